//! Stalled and busy connections share one worker with a neighbour whose answers stay quick.

mod support;

use std::io::Write;
use std::time::{Duration, Instant};

use support::traffic::Live;
use support::{Echo, Pair, bytes, traffic};

const STALLED: usize = 64;
/// Two debug processes on two busy cores; a starved neighbour waits for seconds.
const P99_MAX: Duration = Duration::from_millis(500);

#[test]
fn pings_stay_quick_beside_stalled_readers() {
    let app = Echo::start();
    let mut pair = Pair::local(app.address).wait_open();
    let upstream = pair.upstream;
    let writers = (0..STALLED).map(|seed| std::thread::spawn(move || stall(upstream, seed as u64))).collect::<Vec<_>>();
    let stalled = writers.into_iter().map(|writer| writer.join().expect("writing thread")).collect::<Vec<_>>();
    let mut live = Live::open(pair.upstream);
    let mut latencies = (0..1_000)
        .map(|_| {
            let start = Instant::now();
            live.ping().expect("the neighbour's ping");
            start.elapsed()
        })
        .collect::<Vec<_>>();
    latencies.sort();
    println!("{STALLED} stalled connections; the neighbour's p50 {:?}, p99 {:?}", latencies[500], latencies[990]);
    assert!(latencies[990] < P99_MAX, "p99 {:?}", latencies[990]);
    assert_eq!(stalled.len(), STALLED);
    drop(stalled);
    pair.assert_healthy();
}

/// A connection that writes until its way is full and never reads an echo.
fn stall(upstream: std::net::SocketAddr, seed: u64) -> std::net::TcpStream {
    let mut stream = traffic::connect(upstream).expect("web's upstream listens");
    stream.set_write_timeout(Some(Duration::from_secs(2))).expect("write timeout");
    let piece = bytes(seed, 1 << 20);
    while stream.write_all(&piece).is_ok() {}
    stream
}
