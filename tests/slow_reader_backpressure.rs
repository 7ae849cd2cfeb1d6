//! A reader that stops reading stops its writer; memory stays flat, and nothing is lost when it goes on.

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::{Custom, Pair, bytes, traffic, wait_for};

const PIECE: usize = 1 << 20;
const TOTAL: usize = 512 * PIECE;
/// Beyond the sockets' own buffers, what the two sidecars may take for one stalled connection.
const GROWTH_MAX_KIB: u64 = 8 * 1_024;

#[test]
fn memory_stays_flat_while_the_reader_sleeps() {
    let written = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&written);
    let app = Custom::start(move |mut stream| {
        let piece = bytes(6, PIECE);
        // A probe of readiness asks with one byte and gets one; the reader asks with another.
        let mut wish = [0];
        if stream.read_exact(&mut wish).is_err() || wish == *b"?" {
            let _ = stream.write_all(b"!");
            return;
        }
        for _ in 0..TOTAL / PIECE {
            if stream.write_all(&piece).is_err() {
                return;
            }
            count.fetch_add(PIECE as u64, Ordering::Relaxed);
        }
    });
    let pair = Pair::local(app.address);
    wait_for("the pair serves", support::PATIENCE, || {
        let mut stream = traffic::connect(pair.upstream).map_err(|error| error.to_string())?;
        stream.write_all(b"?").and_then(|()| stream.read_exact(&mut [0])).map_err(|error| error.to_string())
    });
    let before = (pair.web.process.resident_kib(), pair.db.process.resident_kib());

    let mut stream = traffic::connect(pair.upstream).expect("web's upstream listens");
    stream.write_all(b"g").expect("the wish");
    support::pause(Duration::from_secs(2));
    let early = written.load(Ordering::Relaxed);
    support::pause(Duration::from_secs(3));
    let stalled = written.load(Ordering::Relaxed);
    let after = (pair.web.process.resident_kib(), pair.db.process.resident_kib());
    println!("stalled after {stalled} bytes; resident KiB before {before:?}, after {after:?}");
    assert_eq!(early, stalled, "the writer was still going after two seconds");
    assert!(stalled < TOTAL as u64 / 4, "the writer got {stalled} bytes away with nobody reading");
    assert!(after.0 < before.0 + GROWTH_MAX_KIB && after.1 < before.1 + GROWTH_MAX_KIB, "{before:?} -> {after:?} KiB");

    let piece = bytes(6, PIECE);
    let mut buffer = vec![0; PIECE];
    for index in 0..TOTAL / PIECE {
        stream.read_exact(&mut buffer).unwrap_or_else(|error| panic!("piece {index}: {error}"));
        assert!(buffer == piece, "piece {index} differs");
    }
    assert_eq!(stream.read(&mut buffer).expect("a clean end"), 0);
}
