//! Drives rustls through a handshake in either role, record by record, in buffers that the caller owns.

use super::record::Session;
use crate::identity::SpiffeId;

/// A handshake under way.
pub struct Handshake {
    _private: (),
}

/// What one step did.
#[derive(Debug)]
pub struct Step {
    /// Bytes of `incoming` that are done with; the caller moves the rest to the front before the next step.
    pub consumed: usize,
    /// Bytes written to the front of `out`; they must be sent in this order, whatever `progress` says.
    pub written: usize,
    /// What comes next.
    pub progress: Progress,
}

/// What a handshake needs next.
#[derive(Debug)]
pub enum Progress {
    /// More bytes from the peer.
    NeedBytes,
    /// `out` was too small: send what was written and step again.
    NeedRoom,
    /// Complete once `written` is sent: call [`Handshake::establish`]. What is left of `incoming` are records.
    Done,
    /// Over. `written` may hold a last alert.
    Failed(Failure),
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// The kind, for counters.
    pub kind: FailureKind,
    /// What rustls or verification said, for the log.
    pub detail: Box<str>,
}

/// The kinds of handshake failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The peer sent what is not TLS, or broke the protocol.
    Protocol,
    /// The peer's certificate was missing or not trusted.
    Certificate,
    /// The chain is good, the SPIFFE ID is not the expected one or none that may come in.
    Identity,
    /// The peer ended it with an alert (its code).
    Alert(u8),
}

/// A finished handshake.
pub struct Established {
    /// The peer's verified identity.
    pub peer: SpiffeId,
    /// TLS version number (0x0303, 0x0304).
    pub version: u16,
    /// TLS cipher suite number.
    pub suite: u16,
    /// Whether it was resumed.
    pub resumed: bool,
    /// The record layer.
    pub session: Session,
}

impl Handshake {
    /// Takes the handshake as far as `incoming` and `out` allow. Call first with an empty `incoming`.
    pub fn step(&mut self, _incoming: &mut [u8], _out: &mut [u8]) -> Step {
        todo!()
    }

    /// Ends the handshake after [`Progress::Done`].
    pub fn establish(self) -> Result<Established, Failure> {
        todo!()
    }
}
