//! A half-close travels through both TLS hops, in either direction, and the other half goes on.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;

use support::servers::reports;
use support::{Custom, Pair, bytes, traffic, wait_for};

const LENGTH: usize = 3_000_000;

#[test]
fn the_client_closes_first_and_still_reads() {
    let app = Custom::start(|mut stream| {
        let mut request = Vec::new();
        if stream.read_to_end(&mut request).is_ok() && request == bytes(1, LENGTH) {
            let _ = stream.write_all(&bytes(2, LENGTH));
        }
    });
    let pair = Pair::local(app.address);
    wait_for("the answer to a half-closed request", support::PATIENCE, || {
        let mut stream = traffic::connect(pair.upstream).map_err(|error| error.to_string())?;
        stream.write_all(&bytes(1, LENGTH)).map_err(|error| error.to_string())?;
        stream.shutdown(Shutdown::Write).map_err(|error| error.to_string())?;
        let (answer, end) = traffic::read_to_end(&stream);
        if answer == bytes(2, LENGTH) && end == traffic::End::Clean {
            Ok(())
        } else {
            Err(format!("{} bytes, {end:?}", answer.len()))
        }
    });
    assert_eq!(pair.db.wait_closed("complete")["bytes_from_mesh"], LENGTH);
}

#[test]
fn the_server_closes_first_and_still_reads() {
    let (sender, received) = reports();
    let app = Custom::start(move |mut stream| {
        let _ = stream.write_all(&bytes(3, LENGTH));
        let _ = stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let result = stream.read_to_end(&mut rest).map(|_| rest);
        sender.send(result.map_err(|error| error.to_string()));
    });
    let pair = Pair::local(app.address);
    wait_for("what comes after the server's half-close", support::PATIENCE, || {
        let mut stream = traffic::connect(pair.upstream).map_err(|error| error.to_string())?;
        let (greeting, end) = traffic::read_to_end(&stream);
        if greeting != bytes(3, LENGTH) || end != traffic::End::Clean {
            return Err(format!("greeting of {} bytes, {end:?}", greeting.len()));
        }
        // The far half is closed; ours must still carry.
        support::pause(std::time::Duration::from_millis(200));
        stream.write_all(&bytes(4, LENGTH)).map_err(|error| error.to_string())?;
        stream.shutdown(Shutdown::Write).map_err(|error| error.to_string())?;
        let rest = received.next()?;
        if rest == bytes(4, LENGTH) { Ok(()) } else { Err(format!("{} bytes arrived after the half-close", rest.len())) }
    });
}
