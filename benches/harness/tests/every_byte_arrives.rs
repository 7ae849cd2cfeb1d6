//! The promise of the harness: every shape moves every byte intact over every relay, and a byte that is not intact is counted.
//!
//! Real programs over loopback, a second each. What a test starts it ends by its handle.

#![allow(clippy::unwrap_used, reason = "a test may be blunt, and so may what it calls")]

#[path = "every_byte_arrives/identities.rs"]
mod identities;
#[path = "every_byte_arrives/programs.rs"]
mod programs;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use identities::Identities;
use programs::{Program, free_address, run, run_to};
use serde_json::Value;

/// Every shape, small enough for a second of a busy machine.
const SHAPES: [&str; 12] = [
    "request",
    "request --rate 500 --request-bytes 0 --response-bytes 100000",
    "connect --rate 100",
    "meta-churn --rate 50",
    "exec-api --rate 20",
    "sql-small --rate 50",
    "bulk --connections 2",
    "idle-haul --connections 200",
    "storm --connections 50",
    "hold --connections 50",
    "slow-reader --rate 200",
    "fairness --rate 200",
];

fn failures(report: &Value) -> u64 {
    report["failures"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

fn assert_every_shape_arrives(to: SocketAddr) {
    for shape in SHAPES {
        let report = run_to(shape, to);
        assert_eq!(failures(&report), 0, "{shape}: {report}");
        assert!(report["messages"].as_u64().unwrap() > 0, "{shape}: {report}");
        assert!(report["bytes_received"].as_u64().unwrap() > 0, "{shape}: {report}");
        assert!(report["latency_us"]["count"].as_u64().unwrap() > 0, "{shape}: {report}");
        assert_eq!(report["shape"], shape.split(' ').next().unwrap());
    }
}

fn plain_pair(engine: &str, server: SocketAddr) -> [Program; 2] {
    let inner = Program::relay(engine, server, &[]);
    let outer = Program::relay(engine, inner.address, &[]);
    [inner, outer]
}

#[test]
fn directly() {
    let server = Program::serve();
    assert_every_shape_arrives(server.address);
}

#[test]
fn over_a_pair_of_uring_relays() {
    let server = Program::serve();
    let [_inner, outer] = plain_pair("uring", server.address);
    assert_every_shape_arrives(outer.address);
}

#[test]
fn over_a_pair_of_tokio_uring_relays() {
    let server = Program::serve();
    let [_inner, outer] = plain_pair("tokio-uring", server.address);
    assert_every_shape_arrives(outer.address);
}

#[test]
fn over_a_pair_of_tokio_relays() {
    let server = Program::serve();
    let [_inner, outer] = plain_pair("tokio", server.address);
    assert_every_shape_arrives(outer.address);
}

#[test]
fn over_mutual_tls_on_both_engines_that_speak_it() {
    let identities = Identities::new();
    for (dialing, accepting) in
        [("tokio-uring", "tokio-uring"), ("tokio", "tokio-uring"), ("tokio-uring", "tokio"), ("tokio", "tokio")]
    {
        let server = Program::serve();
        let inner = Program::relay(accepting, server.address, &identities.accept("web"));
        let outer = Program::relay(dialing, inner.address, &identities.dial("api"));
        if dialing == accepting {
            assert_every_shape_arrives(outer.address);
        } else {
            let report = run_to("bulk --connections 2", outer.address);
            assert_eq!(failures(&report), 0, "{dialing} to {accepting}: {report}");
        }
    }
}

#[test]
fn a_peer_with_another_identity_gets_nothing_through() {
    let identities = Identities::new();
    let server = Program::serve();
    for engine in ["tokio-uring", "tokio"] {
        let wrong_caller = Program::relay(engine, server.address, &identities.accept("db"));
        let right = Program::relay(engine, server.address, &identities.accept("web"));
        let refused_by_inner = Program::relay(engine, wrong_caller.address, &identities.dial("api"));
        let refused_by_outer = Program::relay(engine, right.address, &identities.dial("db"));
        for relay in [&refused_by_inner, &refused_by_outer] {
            let shape = format!("storm --connections 20 --denied {}", relay.address);
            let report = run_to(&shape, server.address);
            assert_eq!((report["denied_ok"].as_u64(), failures(&report)), (Some(2), 0), "{engine}: {report}");
        }
    }
}

#[test]
fn a_storm_tells_denied_from_answered_and_refused() {
    let server = Program::serve();
    let closed = free_address();
    let report = run_to(&format!("storm --connections 20 --denied {closed}"), server.address);
    assert_eq!((report["denied_ok"].as_u64(), failures(&report)), (Some(2), 0), "{report}");
    let report = run_to(&format!("storm --connections 20 --denied {}", server.address), server.address);
    assert_eq!((report["denied_ok"].as_u64(), report["failures"]["denied_answered"].as_u64()), (Some(0), Some(2)), "{report}");
    let report = run_to("storm --connections 20", closed);
    assert_eq!(report["failures"]["connect"], 20, "{report}");
}

#[test]
fn a_silent_server_is_a_timeout_and_late_messages_are_not_forgotten() {
    let silent = TcpListener::bind(free_address()).unwrap();
    let address = silent.local_addr().unwrap();
    let report = run(&format!("connect --connections 1 --rate 10 --seconds 1 --timeout-s 0.4 --to {address}"));
    // Of ten due messages each is a timeout, whether it was sent or not.
    assert_eq!((report["failures"]["timeout"].as_u64(), report["messages"].as_u64()), (Some(10), Some(0)), "{report}");
}

#[test]
fn a_flipped_byte_is_a_mismatch_in_either_direction() {
    let server = Program::serve();
    for is_request in [true, false] {
        let address = corrupting_relay(server.address, is_request);
        for shape in
            ["request --connections 2", "request --connections 2 --request-bytes 1000000 --response-bytes 1000000", "meta-churn"]
        {
            let report = run_to(shape, address);
            assert!(report["failures"]["mismatch"].as_u64().unwrap() > 0, "{shape}, request {is_request}: {report}");
        }
    }
}

#[test]
fn what_cannot_run_says_why_and_fails() {
    let taken = Program::serve();
    let relay = "--listen 127.0.0.1:26999 --to 127.0.0.1:26998 --tls accept --cert none.pem --key none.key --roots none.pem";
    for (program, words, reason) in [
        (env!("CARGO_BIN_EXE_bench-relay"), format!("--engine uring {relay}"), "floor".to_owned()),
        (env!("CARGO_BIN_EXE_bench-relay"), format!("--engine tokio {relay}"), "none.pem".to_owned()),
        (env!("CARGO_BIN_EXE_bench-load"), format!("serve --bind {}", taken.address), taken.address.to_string()),
    ] {
        let output = Command::new(program).args(words.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(&reason), "{words}: {said}");
    }
}

#[test]
fn json_goes_to_the_file_that_was_named() {
    let server = Program::serve();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    programs::run_silently(&format!("request --connections 1 --seconds 0.1 --to {} --json {}", server.address, file.display()));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(report["shape"], "request");
}

/// Flips a bit of the second message's payload on every connection. The thread ends with the test program.
fn corrupting_relay(to: SocketAddr, is_request: bool) -> SocketAddr {
    let listener = TcpListener::bind(free_address()).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            let far = TcpStream::connect(to).unwrap();
            let (near_out, far_out) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            std::thread::spawn(move || copy_damaged(near, far_out, is_request));
            std::thread::spawn(move || copy_damaged(far, near_out, !is_request));
        }
    });
    address
}

fn copy_damaged(mut from: TcpStream, mut to: TcpStream, is_damaging: bool) {
    const DAMAGED_AT: usize = 150;
    let mut buffer = [0; 16 * 1024];
    let mut offset = 0;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if is_damaging && (offset..offset + len).contains(&DAMAGED_AT) {
            buffer[DAMAGED_AT - offset] ^= 0x10;
        }
        offset += len;
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    // The other direction may have ended both already.
    let _ = to.shutdown(Shutdown::Write);
}
