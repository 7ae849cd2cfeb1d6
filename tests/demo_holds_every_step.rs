//! `ringfence demo -once` ends with 0 only after every step of the story held: identities, traffic, the cut, the denial,
//! rotation under load without a failure. A signal before the last step is a failure. Runs the built program.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.args(["demo", "-once", "-json"]).env_clear();
    command
}

/// One after the other: two demos at once would look for the same free ports.
#[test]
fn the_demo_tells_and_holds_every_step() {
    every_step_is_told_and_held();
    a_signal_before_the_last_step_is_no_success();
}

fn every_step_is_told_and_held() {
    let output = demo().output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}\n{log}");
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect();
    let find = |name: &str| events.iter().find(|event| event["event"] == name).unwrap_or_else(|| panic!("no {name}:\n{text}"));
    let identities: Vec<&str> =
        events.iter().filter(|event| event["event"] == "identity").filter_map(|event| event["spiffe_id"].as_str()).collect();
    assert_eq!(identities.len(), 2, "{text}");
    assert!(identities[0].ends_with("/svc/airflow-worker") && identities[1].ends_with("/svc/warehouse"), "{identities:?}");
    assert!(find("allowed")["connection"]["tls_version"].as_str().expect("text").starts_with("TLSv1."));
    assert!(find("cut")["cut_ms"].as_f64().expect("number") < 1_000.0);
    assert_eq!(find("denied")["connection"]["decision"], "denied");
    assert_eq!(find("rotation")["failed"], 0);
    assert_eq!(find("figures")["failed"], 0);
    assert!(find("figures")["requests"].as_u64().expect("number") > 100);
}

fn a_signal_before_the_last_step_is_no_success() {
    let mut child = demo().stdout(Stdio::piped()).spawn().expect("the program runs");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert!(lines.any(|line| line.expect("UTF-8").contains("\"sidecar\"")), "no sidecar started");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    let last = lines.last().expect("more lines").expect("UTF-8");
    assert_eq!(child.wait().expect("a child").code(), Some(1));
    assert!(last.contains("\"failed\"") && last.contains("before the last step"), "{last}");
}
