//! `ringfence connect -upgrade` replaces the running process and says so only when the new one serves; where that cannot be, it
//! says why, and the old one goes on.

mod support;

use std::process::{Command, Output};

use serde_json::Value;
use support::{Agent, Echo, Pair, Sidecar, ports, systemd, wait_until};

fn upgrade(admin: std::net::SocketAddr, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.args(["connect", "-upgrade", "-admin-bind", &admin.to_string()]).args(more);
    command.env_clear().output().expect("the program runs")
}

#[test]
fn the_new_process_serves_when_it_says_so() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web.in_unit(), |db| db, |definition| definition).wait_open();
    let old = systemd::main_process(&pair.web.process);
    let output = upgrade(pair.web.admin, &["-json"]);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}{err}{}", pair.web.process.tail());
    let said: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&said["upgraded"], &said["old"]["pid"]), (&true.into(), &old.into()), "{said}");
    assert_eq!(said["new"]["version"], env!("CARGO_PKG_VERSION"));
    let new = said["new"]["pid"].as_u64().expect("a pid");
    assert_ne!(new, u64::from(old));
    pair.echo(b"right away").expect("served");
    // The service manager goes on with it: it is the main process, and its sockets are the ones that are kept.
    wait_until("it is the main process", support::PATIENCE, || {
        systemd::said(&pair.web.process, "main").iter().any(|main| main["pid"] == new)
    });
    systemd::kill(&pair.web.process);
    pair.echo(b"after a kill").expect("the next process has the sockets");

    let output = upgrade(pair.db.admin, &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.starts_with("upgraded: process "), "{text}{:?}", output.stderr);
    let pid: u32 = text.split(' ').nth(2).and_then(|pid| pid.parse().ok()).expect("its pid");
    pair.echo(b"and the other").expect("served");
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs").success());
}

#[test]
fn what_cannot_be_is_said() {
    let nobody = ports::free_address();
    let output = upgrade(nobody, &[]);
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains(&nobody.to_string()));

    // Without a definition it never becomes ready.
    let mesh = Agent::start();
    let mut unready = Sidecar::of("nowhere").spawn(&mesh);
    wait_until("its admin port answers", support::PATIENCE, || unready.client().try_get("/upgrade").is_ok());
    let output = upgrade(unready.admin, &["-json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(said["upgraded"], false);
    assert!(said["error"].as_str().is_some_and(|why| why.contains("not ready")), "{said}");
    unready.process.assert_running();
}
