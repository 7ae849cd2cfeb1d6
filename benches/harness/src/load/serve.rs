//! The server: answers every well-formed request with the payload that it asks for, after checking the request's own.
//!
//! Invariant: a damaged request is never answered as if it were good; the client is told, so that the count stands in its report,
//! and standard error names it. Must not know shapes. A connection that breaks is the client's to count; a failed accept is said
//! and tried again.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio_uring::net::{TcpListener, TcpStream};

use crate::pattern::Pattern;
use crate::wire::{Failure, Header, Traffic, Wire};

/// How long to wait after a failed accept, which is most often a lack of descriptors.
const ACCEPT_PAUSE_MS: u64 = 10;
/// How long the rest of a damaged request may take to arrive.
const REFUSE_TIMEOUT_MS: u64 = 2_000;

/// Serves every address until the process is ended.
pub(crate) async fn serve(addresses: &[SocketAddr]) -> anyhow::Result<()> {
    let listeners = addresses.iter().map(|address| ringfence_bench::listen(*address)).collect::<anyhow::Result<Vec<_>>>()?;
    let traffic = Rc::new(Traffic::default());
    let loops: Vec<_> = listeners
        .into_iter()
        .map(|listener| tokio_uring::spawn(accept(TcpListener::from_std(listener), Rc::clone(&traffic))))
        .collect();
    println!("ready");
    for accepting in loops {
        accepting.await?;
    }
    Ok(())
}

async fn accept(listener: TcpListener, traffic: Rc<Traffic>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio_uring::spawn(connection(stream, Rc::clone(&traffic)))),
            Err(error) => {
                eprintln!("accept: {error}. If descriptors ran out, raise `ulimit -n`.");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, traffic: Rc<Traffic>) {
    // A socket that takes no options was reset before it was accepted.
    let Ok(mut wire) = Wire::new(stream, None, traffic) else { return };
    let mut seq_expected = None;
    loop {
        let failure = match wire.header().await {
            Ok(None) => return,
            Ok(Some(request)) => match answer(&mut wire, request, seq_expected).await {
                Ok(()) => {
                    seq_expected = Some(request.seq.wrapping_add(1));
                    continue;
                }
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        if let Failure::Mismatch(what) = failure {
            eprintln!("request damaged: {what}");
            let refused = Header { own_bytes: 0, other_bytes: 0, seq: 0 };
            // The client may be gone, and then it has counted a broken connection itself.
            let _ = tokio::time::timeout(Duration::from_millis(REFUSE_TIMEOUT_MS), wire.refuse(refused)).await;
        }
        return;
    }
}

async fn answer(wire: &mut Wire, request: Header, seq_expected: Option<u32>) -> Result<(), Failure> {
    if seq_expected.is_some_and(|expected| expected != request.seq) {
        return Err(Failure::Mismatch("a sequence number does not follow the one before"));
    }
    wire.check(Pattern::request(request.seq), request.own_bytes as usize).await?;
    let response = Header { own_bytes: request.other_bytes, other_bytes: request.own_bytes, seq: request.seq };
    wire.send(response, Pattern::response(request.seq)).await
}
