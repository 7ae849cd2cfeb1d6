//! A flood of handshakes without a certificate does not keep a mesh peer out, nor does it take memory for good.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Echo, Pair, tls, wait_until};

const FLOOD: Duration = Duration::from_secs(5);
const FLOODERS: usize = 16;
const GROWTH_MAX_KIB: u64 = 48 * 1_024;

#[test]
fn a_mesh_peer_gets_through_a_flood() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    let before = pair.db.process.resident_kib();
    let failed_before = pair.db.closed("handshake_failed");
    let (stop, attempts) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        for _ in 0..FLOODERS {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // TLS 1.3 lets the client believe in success until it reads; either way it ends here.
                    drop(tls::client(pair.public, None));
                    attempts.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let start = Instant::now();
        while start.elapsed() < FLOOD {
            let begun = Instant::now();
            let echo = pair.echo(b"through the flood");
            slowest = slowest.max(begun.elapsed());
            if let Err(error) = echo {
                stop.store(true, Ordering::Relaxed);
                panic!("a mesh peer was kept out: {error}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let attempts = attempts.load(Ordering::Relaxed);
    println!("{attempts} handshakes without a certificate; the slowest honest connection took {slowest:?}");
    assert!(attempts > 100, "no flood: {attempts} attempts");
    assert!(slowest < Duration::from_secs(5), "an honest connection took {slowest:?}");
    // A client may leave before its refusal; then it counts as a reset or a truncated stream.
    wait_until("the flood is counted", support::PATIENCE, || {
        pair.db.closed("handshake_failed") > failed_before && pair.db.active() == 0
    });
    let after = pair.db.process.resident_kib();
    assert!(after < before + GROWTH_MAX_KIB, "resident {before} -> {after} KiB");
    pair.assert_healthy();
}
