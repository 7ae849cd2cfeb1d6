//! Drives rustls through a handshake in either role, record by record, in buffers that the caller owns.
//!
//! Invariant: rustls is never shown a byte behind the record that completes the handshake, so application data, tickets and
//! alerts that follow in the same buffer stay in `incoming` for the record layer. A record is taken out of `incoming` as it
//! arrives and kept here until rustls is done with it, so `consumed` bytes are never needed again and a buffer of any size
//! makes progress. What a peer can make us keep is bounded by `KEPT_BYTES_MAX`.
//!
//! Must not know sockets, timers (the caller bounds the time) or policy. Hostile bytes end in a [`Failure`].

mod failure;

use std::fmt;
use std::sync::Arc;

use rustls::HandshakeKind;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};

use failure::Other;
pub use failure::{Failure, FailureKind};

use super::record::{Keys, Session};
use super::verify::{Role, Trust};
use crate::identity::SpiffeId;

/// Bytes of the header of a record.
const HEADER_BYTES: usize = 5;
/// The longest body that a record may have (TLS 1.2: 2^14 and 2,048 of expansion).
const BODY_BYTES_MAX: usize = 16_384 + 2_048;
/// Most bytes kept for rustls: a handshake message of its longest (2^16) spread over records, and one record more.
const KEPT_BYTES_MAX: usize = 65_536 + 2 * (HEADER_BYTES + BODY_BYTES_MAX);
/// Most bytes that wait for room in `out`: a flight of ours with a long chain stays far below.
const PENDING_BYTES_MAX: usize = 256 * 1_024;
/// Most records in a handshake. A regular one has about ten in a direction; only a peer that stalls us sends more.
const RECORDS_MAX: u32 = 256;

/// A handshake under way.
pub struct Handshake {
    rustls: Rustls,
    peer: Peer,
    /// Whether tickets that come later are worth keeping.
    keeps_tickets: bool,
    /// The record that is arriving, behind records that rustls still needs.
    kept: Vec<u8>,
    /// Length of the front of `kept` that rustls has seen.
    seen: usize,
    /// Bytes of ours that found no room in `out`.
    pending: Vec<u8>,
    pending_at: usize,
    records: u32,
    state: State,
}

/// Who is on the other side, and how that is known.
enum Peer {
    /// A service that calls us.
    Caller(Arc<Trust>),
    /// One of these answers us.
    Answerer(Arc<Trust>, Arc<[SpiffeId]>),
    /// A server outside of the mesh: its verifier has said all about it, since its sessions are never resumed.
    App,
    /// A client outside of the mesh, who shows no certificate.
    Client,
}

impl Peer {
    fn other(&self) -> Other {
        match self {
            Self::Caller(_) | Self::Answerer(..) => Other::Peer,
            Self::App => Other::App,
            Self::Client => Other::Client,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Done,
    Failed,
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

/// A finished handshake.
#[derive(Debug)]
pub struct Established {
    /// The peer's verified identity; none of a server or client outside of the mesh.
    pub peer: Option<SpiffeId>,
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
    pub fn step(&mut self, incoming: &mut [u8], out: &mut [u8]) -> Step {
        let mut step = Step { consumed: 0, written: 0, progress: Progress::NeedBytes };
        step.progress = match self.advance(incoming, out, &mut step) {
            Ok(progress) => progress,
            Err(failure) => {
                self.state = State::Failed;
                self.queue_alert();
                Progress::Failed(failure)
            }
        };
        // The last bytes of a failure go out as far as there is room; nothing is owed to that peer.
        self.flush(out, &mut step);
        step
    }

    fn advance(&mut self, incoming: &[u8], out: &mut [u8], step: &mut Step) -> Result<Progress, Failure> {
        if self.state == State::Failed {
            return Err(Failure::protocol("this handshake has failed before"));
        }
        loop {
            if !self.flush(out, step) {
                return Ok(Progress::NeedRoom);
            }
            if self.state == State::Done {
                return Ok(Progress::Done);
            }
            match self.turn()? {
                Turn::Again => {}
                Turn::Complete => self.state = State::Done,
                Turn::Blocked => {
                    if !self.take_record(&incoming[step.consumed..], &mut step.consumed)? {
                        return Ok(Progress::NeedBytes);
                    }
                }
            }
        }
    }

    /// One call into rustls with what it may see. Each call answers with something done, or wants more; nothing spins.
    fn turn(&mut self) -> Result<Turn, Failure> {
        let window = &mut self.kept[..self.seen];
        let (discard, turn) = match &mut self.rustls {
            Rustls::Server(connection) => {
                let UnbufferedStatus { discard, state } = connection.process_tls_records(window);
                (discard, settle(state, &mut self.pending))
            }
            Rustls::Client(connection) => {
                let UnbufferedStatus { discard, state } = connection.process_tls_records(window);
                (discard, settle(state, &mut self.pending))
            }
        };
        let discard = discard.min(self.seen);
        self.kept.drain(..discard);
        self.seen -= discard;
        let turn = turn.map_err(|error| Failure::from_rustls(&error, self.peer.other()))?;
        if self.pending.len() - self.pending_at > PENDING_BYTES_MAX {
            return Err(Failure::protocol("our own flight outgrew its bound"));
        }
        match turn {
            // A server may write before the client's Finished; for us only the end of the handshake counts.
            Turn::Complete if self.rustls.is_handshaking() => Ok(Turn::Blocked),
            Turn::Complete if self.seen > 0 => Err(Failure::protocol("the peer put more behind its Finished in the same record")),
            turn => Ok(turn),
        }
    }

    /// Moves bytes of the next record from `incoming` to `kept`. True when a whole new record may be shown to rustls.
    fn take_record(&mut self, incoming: &[u8], consumed: &mut usize) -> Result<bool, Failure> {
        let arrived = self.kept.len() - self.seen;
        let header_missing = HEADER_BYTES.saturating_sub(arrived).min(incoming.len());
        let (header_rest, incoming) = incoming.split_at(header_missing);
        self.kept.extend_from_slice(header_rest);
        *consumed += header_missing;

        let Some(&[kind, major, minor, high, low]) = self.kept.get(self.seen..self.seen + HEADER_BYTES) else {
            return Ok(false);
        };
        let body = usize::from(u16::from_be_bytes([high, low]));
        if !matches!(kind, 20..=23) || major != 3 || minor > 4 || body > BODY_BYTES_MAX {
            return Err(self.refuse_header([kind, major, minor, high, low]));
        }
        let missing = self.seen + HEADER_BYTES + body - self.kept.len();
        let taken = missing.min(incoming.len());
        self.kept.extend_from_slice(&incoming[..taken]);
        *consumed += taken;
        if taken < missing {
            return Ok(false);
        }
        self.records += 1;
        if self.records > RECORDS_MAX || self.kept.len() > KEPT_BYTES_MAX {
            return Err(Failure::protocol("the peer's handshake has too many records or too long messages"));
        }
        self.seen = self.kept.len();
        Ok(true)
    }

    /// Lets rustls see the bad header too, so that a peer which does speak TLS gets the alert in the right protection.
    fn refuse_header(&mut self, header: [u8; HEADER_BYTES]) -> Failure {
        self.seen = self.kept.len();
        let first = self.records == 0;
        let _ = self.turn();
        Failure::not_tls(header, first, self.peer.other())
    }

    /// Collects the alert that rustls queued when it failed.
    fn queue_alert(&mut self) {
        const ALERTS_MAX: usize = 16;
        for _ in 0..ALERTS_MAX {
            // Asked first: without anything to send rustls would look into its input, and what it kept of that is gone.
            if !self.rustls.has_output() {
                return;
            }
            self.kept.clear();
            self.seen = 0;
            let encoded = match &mut self.rustls {
                Rustls::Server(connection) => settle(connection.process_tls_records(&mut []).state, &mut self.pending),
                Rustls::Client(connection) => settle(connection.process_tls_records(&mut []).state, &mut self.pending),
            };
            if encoded.is_err() {
                return;
            }
        }
    }

    /// Moves pending bytes to `out`; true when none are left.
    fn flush(&mut self, out: &mut [u8], step: &mut Step) -> bool {
        let pending = &self.pending[self.pending_at..];
        let room = &mut out[step.written..];
        let taken = pending.len().min(room.len());
        room[..taken].copy_from_slice(&pending[..taken]);
        step.written += taken;
        self.pending_at += taken;
        if self.pending_at < self.pending.len() {
            return false;
        }
        self.pending.clear();
        self.pending_at = 0;
        true
    }

    /// Whether what [`Progress::Done`] leaves to send are tickets alone: a TLS 1.3 server's Finished went before.
    pub fn ends_with_tickets(&self) -> bool {
        match &self.rustls {
            Rustls::Server(connection) => connection.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3),
            Rustls::Client(_) => false,
        }
    }

    /// Ends the handshake after [`Progress::Done`].
    pub fn establish(self) -> Result<Established, Failure> {
        if self.state != State::Done || !self.pending.is_empty() {
            return Err(Failure::protocol("the handshake is not complete"));
        }
        // Asked again although rustls asked in the handshake: the cache answers, and a resumed handshake is checked too.
        let peer = self.peer()?;
        let resumed = self.rustls.kind() == Some(HandshakeKind::Resumed);
        let (version, suite, keys) = match self.rustls {
            Rustls::Server(connection) => {
                let (secrets, kernel) = connection
                    .dangerous_into_kernel_connection()
                    .map_err(|error| Failure::from_rustls(&error, self.peer.other()))?;
                (kernel.protocol_version(), kernel.negotiated_cipher_suite().suite(), Keys::server(secrets, kernel))
            }
            Rustls::Client(connection) => {
                let (secrets, kernel) = connection
                    .dangerous_into_kernel_connection()
                    .map_err(|error| Failure::from_rustls(&error, self.peer.other()))?;
                (kernel.protocol_version(), kernel.negotiated_cipher_suite().suite(), Keys::client(secrets, kernel))
            }
        };
        let session = Session::new(version, keys, self.keeps_tickets).map_err(|error| Failure::protocol(error.what))?;
        Ok(Established { peer, version: version.into(), suite: suite.into(), resumed, session })
    }

    /// The leaf that the peer presented, DER. Only a finished handshake has verified it.
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        self.peer_chain()?.first().map(AsRef::as_ref)
    }

    fn peer_chain(&self) -> Option<&[CertificateDer<'static>]> {
        match &self.rustls {
            Rustls::Server(connection) => connection.peer_certificates(),
            Rustls::Client(connection) => connection.peer_certificates(),
        }
    }

    fn peer(&self) -> Result<Option<SpiffeId>, Failure> {
        let shown = || {
            let chain = self.peer_chain().and_then(<[_]>::split_first);
            chain.ok_or_else(|| Failure::from_rustls(&rustls::Error::NoCertificatesPresented, self.peer.other()))
        };
        let now = UnixTime::now();
        let verified = match &self.peer {
            Peer::Caller(trust) => {
                let (leaf, intermediates) = shown()?;
                trust.peer(leaf, intermediates, Role::Server, now)
            }
            Peer::Answerer(trust, expected) => {
                let (leaf, intermediates) = shown()?;
                trust.expected_peer(leaf, intermediates, expected, now)
            }
            Peer::App => return shown().map(|_| None),
            Peer::Client => return Ok(None),
        };
        verified.map(Some).map_err(|error| Failure::from_verify(&error))
    }

    pub(super) fn server(connection: UnbufferedServerConnection, trust: Arc<Trust>) -> Self {
        Self::new(Rustls::Server(Box::new(connection)), Peer::Caller(trust), false)
    }

    pub(super) fn client(
        connection: UnbufferedClientConnection,
        trust: Arc<Trust>,
        expected: Arc<[SpiffeId]>,
        keeps_tickets: bool,
    ) -> Self {
        Self::new(Rustls::Client(Box::new(connection)), Peer::Answerer(trust, expected), keeps_tickets)
    }

    pub(super) fn with_app(connection: UnbufferedClientConnection) -> Self {
        Self::new(Rustls::Client(Box::new(connection)), Peer::App, false)
    }

    pub(super) fn with_client(connection: UnbufferedServerConnection) -> Self {
        Self::new(Rustls::Server(Box::new(connection)), Peer::Client, false)
    }

    fn new(rustls: Rustls, peer: Peer, keeps_tickets: bool) -> Self {
        Self {
            rustls,
            peer,
            keeps_tickets,
            kept: Vec::new(),
            seen: 0,
            pending: Vec::new(),
            pending_at: 0,
            records: 0,
            state: State::Running,
        }
    }
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.rustls {
            Rustls::Server(_) => Role::Server,
            Rustls::Client(_) => Role::Client,
        };
        f.debug_struct("Handshake").field("role", &role).field("state", &self.state).finish_non_exhaustive()
    }
}

/// rustls in either role; boxed, as a worker moves handshakes around.
enum Rustls {
    Server(Box<UnbufferedServerConnection>),
    Client(Box<UnbufferedClientConnection>),
}

impl Rustls {
    fn is_handshaking(&self) -> bool {
        match self {
            Self::Server(connection) => connection.is_handshaking(),
            Self::Client(connection) => connection.is_handshaking(),
        }
    }

    fn has_output(&self) -> bool {
        match self {
            Self::Server(connection) => connection.wants_write(),
            Self::Client(connection) => connection.wants_write(),
        }
    }

    fn kind(&self) -> Option<HandshakeKind> {
        match self {
            Self::Server(connection) => connection.handshake_kind(),
            Self::Client(connection) => connection.handshake_kind(),
        }
    }
}

/// What a call into rustls came to.
enum Turn {
    /// Something was done: call again.
    Again,
    /// It wants a record.
    Blocked,
    /// It can write, and so it is complete unless it is a server that still waits.
    Complete,
}

/// Deals with the state that rustls returned; its output goes to `pending`, since a piece that does not fit is lost with it.
fn settle<D>(state: Result<ConnectionState<'_, '_, D>, rustls::Error>, pending: &mut Vec<u8>) -> Result<Turn, rustls::Error> {
    match state? {
        ConnectionState::EncodeTlsData(mut data) => {
            let start = pending.len();
            if let Err(EncodeError::InsufficientSize(need)) = data.encode(&mut []) {
                pending.resize(start + need.required_size, 0);
                data.encode(&mut pending[start..]).map_err(|error| rustls::Error::General(error.to_string()))?;
            }
            Ok(Turn::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Turn::Again)
        }
        ConnectionState::BlockedHandshake => Ok(Turn::Blocked),
        ConnectionState::WriteTraffic(_) => Ok(Turn::Complete),
        ConnectionState::PeerClosed | ConnectionState::Closed => {
            Err(rustls::Error::AlertReceived(rustls::AlertDescription::CloseNotify))
        }
        // Impossible: early data is off, and no record after the last of the handshake is shown to rustls.
        _ => Err(rustls::Error::General("application data within the handshake".to_owned())),
    }
}

#[cfg(test)]
mod tests;
