//! The client's end of one connection.
//!
//! Invariant: each exchange checks the answer's header against what was asked and every byte of its payload. After a failure the
//! connection is not used again. Fails with a [`Failure`] for the caller to count.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio_uring::net::TcpStream;

use crate::pattern::Pattern;
use crate::wire::{Failure, Header, Traffic, Wire};

/// Payload bytes of a request and of its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) request_bytes: u32,
    pub(crate) response_bytes: u32,
}

/// A connection that can ask.
#[derive(Debug)]
pub(crate) struct Client {
    wire: Wire,
    seq: u32,
}

impl Client {
    /// Connects. `seq` is where this connection's messages begin: with another start for each, crossed streams show.
    pub(crate) async fn connect(to: SocketAddr, seq: u32, wait_max: Duration, traffic: &Rc<Traffic>) -> Result<Self, Failure> {
        let connecting = tokio::time::timeout(wait_max, TcpStream::connect(to)).await;
        let stream = connecting.map_err(|_| Failure::Timeout)?.map_err(Failure::Connect)?;
        let wire = Wire::new(stream, Some(wait_max), Rc::clone(traffic)).map_err(Failure::Connect)?;
        Ok(Self { wire, seq })
    }

    /// One message and its answer. Returns when the first byte of the answer came.
    pub(crate) async fn exchange(&mut self, sizes: Sizes) -> Result<Instant, Failure> {
        let answer = self.ask(sizes).await?;
        self.wire.check(answer, sizes.response_bytes as usize).await?;
        self.wire.first_byte_at().ok_or(Failure::Eof)
    }

    /// Sends a request and reads the answer's header; the payload is the caller's to take with [`Self::check_some`].
    pub(crate) async fn ask(&mut self, sizes: Sizes) -> Result<Pattern, Failure> {
        let seq = self.seq;
        self.seq = seq.wrapping_add(1);
        let request = Header { own_bytes: sizes.request_bytes, other_bytes: sizes.response_bytes, seq };
        self.wire.send(request, Pattern::request(seq)).await?;
        let response = self.wire.header().await?.ok_or(Failure::Eof)?;
        if response != (Header { own_bytes: sizes.response_bytes, other_bytes: sizes.request_bytes, seq }) {
            return Err(Failure::Mismatch("an answer's header does not belong to the request"));
        }
        Ok(Pattern::response(seq))
    }

    /// Reads and checks between one and `len_max` bytes of an answer.
    pub(crate) async fn check_some(&mut self, answer: Pattern, offset: usize, len_max: usize) -> Result<usize, Failure> {
        self.wire.check_some(answer, offset, len_max).await
    }

    /// Whether any byte of an answer to the last request came.
    pub(crate) fn was_answered(&self) -> bool {
        self.wire.first_byte_at().is_some()
    }
}
