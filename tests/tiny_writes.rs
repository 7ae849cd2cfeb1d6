//! Thousands of writes of one byte arrive in order, and interleaved sizes around the record limit too.

mod support;

use std::io::{Read, Write};

use support::{Echo, Pair, bytes, traffic};

#[test]
fn byte_by_byte_there_and_back() {
    let app = Echo::start();
    let pair = Pair::local(app.address).wait_open();
    let mut stream = traffic::connect(pair.upstream).expect("web's upstream listens");
    let payload = bytes(5, 5_000);
    let mut back = Vec::with_capacity(payload.len());
    // Lock-step for the first part, pipelined for the rest.
    for byte in &payload[..500] {
        stream.write_all(&[*byte]).expect("a write of one byte");
        let mut one = [0];
        stream.read_exact(&mut one).expect("its echo");
        back.push(one[0]);
    }
    for byte in &payload[500..] {
        stream.write_all(&[*byte]).expect("a write of one byte");
    }
    let mut rest = vec![0; payload.len() - 500];
    stream.read_exact(&mut rest).expect("the other echoes");
    back.extend(rest);
    assert_eq!(back, payload);
}

#[test]
fn sizes_around_a_records_limit() {
    let app = Echo::start();
    let pair = Pair::local(app.address).wait_open();
    for length in [0, 1, 2, 16_383, 16_384, 16_385, 32_767, 32_768, 32_769, 65_535, 65_536, 65_537, 1 << 20] {
        pair.echo(&bytes(length as u64, length)).unwrap_or_else(|error| panic!("{length} bytes: {error}"));
    }
}
