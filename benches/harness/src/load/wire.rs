//! The protocol on one connection, for both ends: a 16-byte header, then payload that is checked byte for byte.
//!
//! Invariant: memory is bounded by two small boxes a connection and one chunk while a large payload passes, whatever the message's
//! size. A connection that reported a failure is finished: a wait that ended early shuts the socket down, which is the only way
//! to end a read that the kernel holds. Must not know shapes or schedules. Fails with a [`Failure`], one kind a counter.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::TcpStream;

use crate::pattern::{Pattern, RUN_BYTES_MAX};

/// Length of a header.
pub(crate) const HEADER_BYTES: usize = 16;
/// The longest payload.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 64 * 1024 * 1024;
/// "RFB1": a message.
const MAGIC: [u8; 4] = *b"RFB1";
/// "RFBE": the server found the request damaged.
const MAGIC_REFUSED: [u8; 4] = *b"RFBE";
/// Read buffer of a connection between messages.
const INBOX_BYTES: usize = 4 * 1024;
/// Payload that is copied behind its header, so that a small message is one write.
const HEAD_PAYLOAD_BYTES_MAX: usize = 16 * 1024;
/// What one read of a large payload may take.
const CHUNK_BYTES: usize = RUN_BYTES_MAX;
/// Chunks kept for the next large payload.
const SPARE_CHUNKS_MAX: usize = 64;

thread_local! {
    static SPARE_CHUNKS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Why a connection or a message failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection came about.
    Connect(io::Error),
    /// The connection broke.
    Reset(io::Error),
    /// The stream ended where more had to come.
    Eof,
    /// A header or payload differs from what the other side must have sent.
    Mismatch(&'static str),
    /// Nothing moved for the time allowed.
    Timeout,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "connect: {error}"),
            Self::Reset(error) => write!(f, "reset: {error}"),
            Self::Eof => f.write_str("eof: the stream ended before the answer was complete"),
            Self::Mismatch(what) => write!(f, "mismatch: {what}"),
            Self::Timeout => f.write_str("timeout: nothing moved for --timeout-s"),
        }
    }
}

/// What precedes every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Payload bytes of this message.
    pub(crate) own_bytes: u32,
    /// In a request: payload bytes wanted in the answer. In an answer: those of the request.
    pub(crate) other_bytes: u32,
    /// Counts the messages of a connection up from where its client chose to begin.
    pub(crate) seq: u32,
}

impl Header {
    fn encode(self, magic: [u8; 4]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&magic);
        bytes[4..8].copy_from_slice(&self.own_bytes.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.other_bytes.to_be_bytes());
        bytes[12..].copy_from_slice(&self.seq.to_be_bytes());
        bytes
    }

    fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, Failure> {
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        match word(0) {
            MAGIC => {}
            MAGIC_REFUSED => return Err(Failure::Mismatch("the server found the request damaged")),
            _ => return Err(Failure::Mismatch("a header does not begin with RFB1")),
        }
        let header = Self {
            own_bytes: u32::from_be_bytes(word(4)),
            other_bytes: u32::from_be_bytes(word(8)),
            seq: u32::from_be_bytes(word(12)),
        };
        if header.own_bytes > PAYLOAD_BYTES_MAX || header.other_bytes > PAYLOAD_BYTES_MAX {
            return Err(Failure::Mismatch("a header names a payload above 64 MiB"));
        }
        Ok(header)
    }
}

/// Bytes of one program, headers included.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent_bytes: Cell<u64>,
    pub(crate) received_bytes: Cell<u64>,
}

fn add(counter: &Cell<u64>, bytes: usize) {
    counter.set(counter.get() + bytes as u64);
}

/// One connection.
pub(crate) struct Wire {
    stream: TcpStream,
    inbox: Vec<u8>,
    inbox_start: usize,
    inbox_end: usize,
    outbox: Vec<u8>,
    wait_max: Option<Duration>,
    first_byte_at: Option<Instant>,
    traffic: Rc<Traffic>,
}

impl Wire {
    /// Without `wait_max` this end waits for ever, as a server does.
    pub(crate) fn new(stream: TcpStream, wait_max: Option<Duration>, traffic: Rc<Traffic>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let inbox = vec![0; INBOX_BYTES];
        Ok(Self { stream, inbox, inbox_start: 0, inbox_end: 0, outbox: Vec::new(), wait_max, first_byte_at: None, traffic })
    }

    /// When the first byte since the last [`Self::send`] came.
    pub(crate) fn first_byte_at(&self) -> Option<Instant> {
        self.first_byte_at
    }

    /// Sends a whole message.
    pub(crate) async fn send(&mut self, header: Header, pattern: Pattern) -> Result<(), Failure> {
        self.first_byte_at = None;
        let len = header.own_bytes as usize;
        let mut offset = len.min(HEAD_PAYLOAD_BYTES_MAX);
        self.outbox.extend_from_slice(&header.encode(MAGIC));
        self.outbox.extend_from_slice(pattern.run(0, offset));
        self.send_outbox().await?;
        while offset < len {
            let run = pattern.run(offset, len - offset);
            self.within(self.stream.write_all(run)).await?.0.map_err(Failure::Reset)?;
            add(&self.traffic.sent_bytes, run.len());
            offset += run.len();
        }
        Ok(())
    }

    /// Tells the client that its request was damaged, then takes in what is still under way: closing a socket with unread
    /// bytes would reset the connection and lose the answer.
    pub(crate) async fn refuse(&mut self, header: Header) -> Result<(), Failure> {
        self.outbox.extend_from_slice(&header.encode(MAGIC_REFUSED));
        self.send_outbox().await?;
        self.stream.shutdown(Shutdown::Write).map_err(Failure::Reset)?;
        let mut drained_bytes = 0;
        while drained_bytes <= PAYLOAD_BYTES_MAX as usize {
            (self.inbox_start, self.inbox_end) = (0, 0);
            match self.fill().await? {
                0 => break,
                count => drained_bytes += count,
            }
        }
        Ok(())
    }

    async fn send_outbox(&mut self) -> Result<(), Failure> {
        let outbox = std::mem::take(&mut self.outbox);
        let len = outbox.len();
        let (result, mut outbox) = self.within(self.stream.write_all(outbox)).await?;
        result.map_err(Failure::Reset)?;
        add(&self.traffic.sent_bytes, len);
        outbox.clear();
        self.outbox = outbox;
        Ok(())
    }

    /// The next header; none when the peer ended the stream between messages.
    pub(crate) async fn header(&mut self) -> Result<Option<Header>, Failure> {
        while self.inbox_end - self.inbox_start < HEADER_BYTES {
            self.inbox.copy_within(self.inbox_start..self.inbox_end, 0);
            (self.inbox_start, self.inbox_end) = (0, self.inbox_end - self.inbox_start);
            if self.fill().await? == 0 {
                return if self.inbox_end == 0 { Ok(None) } else { Err(Failure::Eof) };
            }
        }
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(&self.inbox[self.inbox_start..self.inbox_start + HEADER_BYTES]);
        self.inbox_start += HEADER_BYTES;
        Header::parse(bytes).map(Some)
    }

    /// Reads `len` payload bytes and checks each.
    pub(crate) async fn check(&mut self, pattern: Pattern, len: usize) -> Result<(), Failure> {
        let mut offset = 0;
        while offset < len {
            offset += self.check_some(pattern, offset, len - offset).await?;
        }
        Ok(())
    }

    /// Reads between one and `len_max` payload bytes, which begin at `offset`, checks each and says how many there were.
    pub(crate) async fn check_some(&mut self, pattern: Pattern, offset: usize, len_max: usize) -> Result<usize, Failure> {
        if self.inbox_start == self.inbox_end && len_max > INBOX_BYTES {
            return self.check_chunk(pattern, offset, len_max.min(CHUNK_BYTES)).await;
        }
        if self.inbox_start == self.inbox_end {
            (self.inbox_start, self.inbox_end) = (0, 0);
            if self.fill().await? == 0 {
                return Err(Failure::Eof);
            }
        }
        let len = len_max.min(self.inbox_end - self.inbox_start);
        let same = pattern.matches(offset, &self.inbox[self.inbox_start..self.inbox_start + len]);
        self.inbox_start += len;
        same.then_some(len).ok_or(PAYLOAD_DIFFERS)
    }

    async fn check_chunk(&mut self, pattern: Pattern, offset: usize, len_max: usize) -> Result<usize, Failure> {
        let chunk = SPARE_CHUNKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; CHUNK_BYTES]);
        let (result, slice) = self.within(self.stream.read(chunk.slice(..len_max))).await?;
        let len = self.arrived(result)?;
        let chunk = slice.into_inner();
        let same = pattern.matches(offset, &chunk[..len]);
        SPARE_CHUNKS.with_borrow_mut(|spare| {
            if spare.len() < SPARE_CHUNKS_MAX {
                spare.push(chunk);
            }
        });
        match len {
            0 => Err(Failure::Eof),
            len => same.then_some(len).ok_or(PAYLOAD_DIFFERS),
        }
    }

    /// Reads once into the free end of the inbox.
    async fn fill(&mut self) -> Result<usize, Failure> {
        let inbox = std::mem::take(&mut self.inbox);
        let (result, slice) = self.within(self.stream.read(inbox.slice(self.inbox_end..))).await?;
        self.inbox = slice.into_inner();
        let len = self.arrived(result)?;
        self.inbox_end += len;
        Ok(len)
    }

    fn arrived(&mut self, result: io::Result<usize>) -> Result<usize, Failure> {
        let len = result.map_err(Failure::Reset)?;
        if len > 0 && self.first_byte_at.is_none() {
            self.first_byte_at = Some(Instant::now());
        }
        add(&self.traffic.received_bytes, len);
        Ok(len)
    }

    async fn within<F: Future>(&self, operation: F) -> Result<F::Output, Failure> {
        let Some(wait_max) = self.wait_max else { return Ok(operation.await) };
        tokio::time::timeout(wait_max, operation).await.map_err(|_| {
            // The kernel still holds the operation and its buffer; this ends it. The socket may be gone already.
            let _ = self.stream.shutdown(Shutdown::Both);
            Failure::Timeout
        })
    }
}

const PAYLOAD_DIFFERS: Failure = Failure::Mismatch("payload bytes differ from the pattern");

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("wait_max", &self.wait_max).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        for (own_bytes, other_bytes, seq) in [(0, 0, 0), (PAYLOAD_BYTES_MAX, 0, u32::MAX), (1, PAYLOAD_BYTES_MAX, 7)] {
            let header = Header { own_bytes, other_bytes, seq };
            assert_eq!(Header::parse(header.encode(MAGIC)).unwrap(), header);
        }
    }

    #[test]
    fn hostile_headers_are_mismatches() {
        let good = Header { own_bytes: 1, other_bytes: 2, seq: 3 }.encode(MAGIC);
        for at in 0..4 {
            let mut bad = good;
            bad[at] ^= 0x20;
            assert!(matches!(Header::parse(bad), Err(Failure::Mismatch(_))), "magic damaged at {at}");
        }
        let long = PAYLOAD_BYTES_MAX + 1;
        for header in [Header { own_bytes: long, other_bytes: 0, seq: 0 }, Header { own_bytes: 0, other_bytes: u32::MAX, seq: 0 }]
        {
            assert!(matches!(Header::parse(header.encode(MAGIC)), Err(Failure::Mismatch(_))), "{header:?}");
        }
        assert!(matches!(Header::parse([0; HEADER_BYTES]), Err(Failure::Mismatch(_))));
        assert!(matches!(Header::parse([0xff; HEADER_BYTES]), Err(Failure::Mismatch(_))));
        assert!(matches!(Header::parse(*b"HTTP/1.1 400 Bad"), Err(Failure::Mismatch(_))));
        assert!(matches!(
            Header::parse(Header { own_bytes: 0, other_bytes: 0, seq: 0 }.encode(MAGIC_REFUSED)),
            Err(Failure::Mismatch(_))
        ));
    }
}
