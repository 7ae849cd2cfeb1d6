//! Clients that trickle a handshake are cut by the handshake bound while others are served.

mod support;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use support::{Agent, Echo, Pair, traffic, wait_until};

const TRICKLERS: usize = 200;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

#[test]
fn trickled_handshakes_end_in_time() {
    let app = Echo::start();
    let define = |db: support::Definition| db.config("handshake_timeout_ms", HANDSHAKE_TIMEOUT.as_millis() as u64);
    let mut pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db, define).wait_open();
    let start = Instant::now();
    let mut tricklers = (0..TRICKLERS).map(|_| traffic::connect(pair.public).expect("the public listener")).collect::<Vec<_>>();
    // The header of a handshake record of 512 bytes, then a byte now and then.
    for stream in &mut tricklers {
        stream.write_all(&[22, 3, 1, 2, 0]).expect("a record header");
    }
    let accepted = app.accepted();
    let mut turn = 0;
    while start.elapsed() < HANDSHAKE_TIMEOUT * 2 {
        for stream in &mut tricklers {
            // Those that were cut refuse.
            let _ = stream.write_all(&[1]);
        }
        pair.echo(b"meanwhile").unwrap_or_else(|error| panic!("turn {turn}: {error}"));
        turn += 1;
        support::pause(Duration::from_millis(200));
    }
    wait_until("all tricklers are cut and counted", support::PATIENCE, || {
        pair.db.closed("handshake_timeout") >= TRICKLERS as u64
    });
    for stream in &mut tricklers {
        stream.set_read_timeout(Some(Duration::from_secs(2))).expect("read timeout");
        let mut bytes = Vec::new();
        let end = stream.read_to_end(&mut bytes);
        let timed_out = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        assert!(!end.as_ref().is_err_and(timed_out), "a trickler is still connected");
    }
    assert_eq!(app.accepted() - accepted, turn, "the app saw only whole connections");
    pair.assert_healthy();
}
