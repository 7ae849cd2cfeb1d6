//! Upstream listeners and local apps on unix sockets: mode, bytes, and the path free again after the end.

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use serde_json::json;
use support::{Agent, Definition, Mesh, PATIENCE, Sidecar, bytes, wait_for};

#[test]
fn a_socket_in_and_a_socket_out() {
    let folder = support::scratch();
    let (entry, app) = (folder.path().join("db.sock"), folder.path().join("app.sock"));
    let listener = UnixListener::bind(&app).expect("the app's socket");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut request = Vec::new();
                if stream.read_to_end(&mut request).is_ok() {
                    let _ = stream.write_all(&request);
                }
            });
        }
    });
    let agent = Agent::start();
    agent.register(&Definition::new("db").proxy("LocalServiceSocketPath", app.to_str().expect("a path")));
    let upstream =
        json!({"DestinationName": "db", "LocalBindSocketPath": entry.to_str().expect("a path"), "LocalBindSocketMode": "0640"});
    agent.register(&Definition::new("web").raw_upstream(upstream));
    agent.allow("web", "db");
    let db = Sidecar::start(&agent, "db");
    // A socket file that a killed process left behind is in the way of nobody.
    drop(UnixListener::bind(&entry).expect("a stale socket"));
    let mut web = Sidecar::of("web").workers(2).arguments(&["-drain-time", "1s"]).start(&agent);

    let payload = bytes(9, 1_000_000);
    let echo = || -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&entry)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&payload)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut back = Vec::new();
        stream.read_to_end(&mut back).map(|_| back)
    };
    wait_for("an echo through unix sockets", PATIENCE, || match echo() {
        Ok(back) if back == payload => Ok(()),
        other => Err(format!("{:?}\n{}\n{}", other.map(|back| back.len()), web.process.tail(), db.process.tail())),
    });
    for _ in 0..20 {
        assert!(echo().expect("an echo through unix sockets") == payload);
    }
    let mode = std::fs::metadata(&entry).expect("the socket").permissions().mode() & 0o777;
    assert_eq!(mode, 0o640, "mode {mode:o}");

    web.process.signal("TERM");
    assert!(web.process.wait_exit(Duration::from_secs(10)).success(), "{}", web.process.tail());
    assert!(UnixStream::connect(&entry).is_err(), "somebody still listens");
}
