//! The record layer after the handshake: records are sealed and opened where they lie.
//!
//! Invariant: a sequence number is used once for each key and direction; payload is touched once, by the AEAD, and no call
//! allocates but for a change of keys and for the first tickets of a session. A session that refused a record, or received a fatal alert, stays failed: it only
//! seals the one alert that tells the peer. Keys are never printed.
//!
//! rustls keeps the key schedule: it derives the next secrets when a KeyUpdate is sent or received. Records of any kind but
//! application data are counted between two application records, so a peer cannot keep us busy for nothing.
//!
//! Must not know sockets or buffers' owners. Fails with a [`RecordError`] that carries the alert to send.

mod direction;
mod messages;

use std::fmt;
use std::ops::Range;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ExtractedSecrets, ProtocolVersion};

use self::direction::{Direction, Protection};
use self::messages::{Messages, UPDATE_REQUESTED};
use super::alert;
use super::verify::Role;

/// Most payload bytes in one record.
pub const PAYLOAD_BYTES_MAX: usize = 16_384;
/// Room before the payload that any version and suite needs (TLS 1.2 GCM: 5 header + 8 explicit nonce).
pub const HEADER_BYTES_MAX: usize = 13;
/// Room after the payload that any version and suite needs (TLS 1.3: 1 content type + 16 tag).
pub const TRAILER_BYTES_MAX: usize = 17;
/// The longest record of a peer that keeps to the standard, padding included: header, payload, expansion.
pub const RECORD_BYTES_MAX: usize = 5 + PAYLOAD_BYTES_MAX + 256;
/// Room that [`Session::seal_control`] and [`Session::seal_alert`] need.
pub const CONTROL_BYTES_MAX: usize = 64;

/// Most records that carry no application data (key updates, tickets, warnings) between two that do.
const CONTROL_RECORDS_MAX: u8 = 32;
/// Most empty application records in a row.
const EMPTY_RECORDS_MAX: u8 = 32;
/// Most tickets taken from one session; BoringSSL sends two.
const TICKETS_MAX: u8 = 4;
/// The longest ticket taken. One that carries a client's chain has about 2 KiB.
const TICKET_BYTES_MAX: usize = 8_192;
/// Records after which new keys are asked for: a quarter of what AES-GCM allows under one key (RFC 8446 section 5.5).
const REKEY_RECORDS: u64 = 1 << 22;

const RECORD_HEADER_BYTES: usize = 5;
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// Sealing and opening for one connection.
pub struct Session {
    protection: Protection,
    role: Role,
    tx: Direction,
    rx: Direction,
    /// The key schedule; none in TLS 1.2, which never changes keys.
    schedule: Option<Schedule>,
    messages: Messages,
    /// Tickets that this session still takes; none where sessions are not resumed.
    tickets_left: u8,
    update_owed: bool,
    control_left: u8,
    empty_left: u8,
    /// close_notify or a fatal alert was sealed: nothing more goes out.
    tx_closed: bool,
    /// close_notify was received: the rest is ignored.
    rx_closed: bool,
    failed: bool,
}

/// One record opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Open {
    /// The record is not whole: `need` bytes in all are wanted from its start (5 while the header is not whole).
    Incomplete {
        /// Bytes from the record's start.
        need: usize,
    },
    /// Application data, decrypted where it lay. The payload may be empty.
    Data {
        /// The whole record's length.
        record_len: usize,
        /// The payload within the bytes given.
        payload: Range<usize>,
    },
    /// A handshake message after the handshake (tickets, key updates) or a harmless warning, dealt with.
    Control {
        /// The whole record's length.
        record_len: usize,
    },
    /// The peer will send no more. Bytes behind it are ignored, as the standard wants: they come back as this again.
    CloseNotify {
        /// The whole record's length.
        record_len: usize,
    },
    /// The peer ended the connection with this alert.
    Alert {
        /// Its code.
        code: u8,
    },
}

/// The record layer refused: the connection must end. `alert` is what to tell the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct RecordError {
    /// The alert code to send with [`Session::seal_alert`].
    pub alert: u8,
    /// What was wrong.
    pub what: &'static str,
}

/// A handshake's secrets with the key schedule behind them.
pub(super) struct Keys {
    secrets: ExtractedSecrets,
    schedule: Schedule,
}

/// rustls's key schedule, boxed: it is used once in millions of records.
enum Schedule {
    Server(Box<KernelConnection<ServerConnectionData>>),
    Client(Box<KernelConnection<ClientConnectionData>>),
}

impl Session {
    pub(super) fn new(version: ProtocolVersion, keys: Keys, keeps_tickets: bool) -> Result<Self, RecordError> {
        let Keys { secrets, schedule } = keys;
        let tls13 = version == ProtocolVersion::TLSv1_3;
        let (tx, protection) = Direction::new(secrets.tx, tls13)?;
        let (rx, _) = Direction::new(secrets.rx, tls13)?;
        let role = match schedule {
            Schedule::Server(_) => Role::Server,
            Schedule::Client(_) => Role::Client,
        };
        Ok(Self {
            protection,
            role,
            tx,
            rx,
            schedule: tls13.then_some(schedule),
            messages: Messages::default(),
            tickets_left: if keeps_tickets { TICKETS_MAX } else { 0 },
            update_owed: false,
            control_left: CONTROL_RECORDS_MAX,
            empty_left: EMPTY_RECORDS_MAX,
            tx_closed: false,
            rx_closed: false,
            failed: false,
        })
    }

    /// Bytes before the payload in the records it seals (5 or 13).
    pub fn header_len(&self) -> usize {
        self.protection.header_len()
    }

    /// Bytes after the payload in the records it seals (16 or 17).
    pub fn trailer_len(&self) -> usize {
        self.protection.trailer_len()
    }

    /// Seals application data in place: `record` is header, payload (already there), trailer, of exactly those lengths.
    pub fn seal(&mut self, record: &mut [u8]) -> Result<(), RecordError> {
        self.check_writable()?;
        if self.tx.is_near_limit() {
            return Err(RecordError::internal("the record limit of this key is reached: the connection must be made anew"));
        }
        self.seal_kind(APPLICATION_DATA, record)
    }

    /// Opens the first record of `bytes` in place.
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Open, RecordError> {
        if self.failed {
            return Err(RecordError::internal("this session has failed before"));
        }
        if self.rx_closed && !bytes.is_empty() {
            return Ok(Open::CloseNotify { record_len: bytes.len() });
        }
        let opened = self.open_record(bytes);
        self.failed = matches!(opened, Err(_) | Ok(Open::Alert { .. }));
        opened
    }

    fn open_record(&mut self, bytes: &mut [u8]) -> Result<Open, RecordError> {
        let Some(&[kind, major, minor, high, low]) = bytes.get(..RECORD_HEADER_BYTES) else {
            return Ok(Open::Incomplete { need: RECORD_HEADER_BYTES });
        };
        let body = usize::from(u16::from_be_bytes([high, low]));
        self.check_header(kind, [major, minor], body)?;
        let record_len = RECORD_HEADER_BYTES + body;
        let Some(record) = bytes.get_mut(..record_len) else {
            return Ok(Open::Incomplete { need: record_len });
        };
        let (kind, payload) = self.rx.open(self.protection, record)?;
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(RecordError::new(alert::RECORD_OVERFLOW, "the peer sent a record of more than 16,384 bytes of payload"));
        }
        if kind != HANDSHAKE && self.messages.is_partial() {
            return Err(RecordError::unexpected("the peer broke a handshake message off for another record"));
        }
        match kind {
            APPLICATION_DATA => self.data(record_len, payload),
            HANDSHAKE => self.handshake(record_len, &record[payload]),
            ALERT => self.alert(record_len, &record[payload]),
            _ => Err(RecordError::unexpected("the peer sent a record of a kind that has no place after the handshake")),
        }
    }

    fn check_header(&self, kind: u8, version: [u8; 2], body: usize) -> Result<(), RecordError> {
        let tls13 = self.protection == Protection::Tls13;
        match kind {
            APPLICATION_DATA => {}
            HANDSHAKE | ALERT if !tls13 => {}
            CHANGE_CIPHER_SPEC => {
                return Err(RecordError::unexpected("the peer sent change_cipher_spec after the handshake"));
            }
            HANDSHAKE | ALERT => return Err(RecordError::unexpected("the peer sent an unprotected record after the handshake")),
            _ => return Err(RecordError::unexpected("the peer sent what is no TLS record")),
        }
        if version != [3, 3] {
            return Err(RecordError::new(alert::PROTOCOL_VERSION, "the peer's record has another version than the session"));
        }
        if body > self.protection.body_bytes_max() {
            return Err(RecordError::new(alert::RECORD_OVERFLOW, "the peer sent a record longer than the standard allows"));
        }
        Ok(())
    }

    fn data(&mut self, record_len: usize, payload: Range<usize>) -> Result<Open, RecordError> {
        if payload.is_empty() {
            self.empty_left =
                self.empty_left.checked_sub(1).ok_or(RecordError::unexpected("the peer sent too many empty records in a row"))?;
        } else {
            self.empty_left = EMPTY_RECORDS_MAX;
            self.control_left = CONTROL_RECORDS_MAX;
        }
        Ok(Open::Data { record_len, payload })
    }

    fn handshake(&mut self, record_len: usize, payload: &[u8]) -> Result<Open, RecordError> {
        self.count_control()?;
        if self.protection != Protection::Tls13 {
            // HelloRequest (0) and ClientHello (1) ask to renegotiate; nothing else can come either.
            return Err(match payload.first() {
                Some(0 | 1) => RecordError::new(alert::NO_RENEGOTIATION, "the peer asked to renegotiate, which is refused"),
                _ => RecordError::unexpected("the peer sent a handshake message after the handshake"),
            });
        }
        let mut keeper = Keeper { schedule: self.schedule.as_mut(), left: &mut self.tickets_left };
        if let Some(request) = self.messages.feed(payload, self.role, &mut keeper)? {
            let (secrets, _) = Direction::new(self.schedule_mut()?.next_rx()?, true)?;
            self.rx = secrets;
            self.update_owed |= request == UPDATE_REQUESTED;
        }
        Ok(Open::Control { record_len })
    }

    fn alert(&mut self, record_len: usize, payload: &[u8]) -> Result<Open, RecordError> {
        let &[_level, code] = payload else {
            return Err(RecordError::new(alert::DECODE_ERROR, "the peer sent an alert that is not two bytes long"));
        };
        match code {
            alert::CLOSE_NOTIFY => {
                self.rx_closed = true;
                Ok(Open::CloseNotify { record_len })
            }
            // Java sends it before close_notify; it means nothing.
            alert::USER_CANCELED if self.protection == Protection::Tls13 => {
                self.count_control()?;
                Ok(Open::Control { record_len })
            }
            code => Ok(Open::Alert { code }),
        }
    }

    fn count_control(&mut self) -> Result<(), RecordError> {
        self.control_left = self
            .control_left
            .checked_sub(1)
            .ok_or(RecordError::unexpected("the peer sent too many records without application data"))?;
        Ok(())
    }

    /// Whether a control record (KeyUpdate) should go out before the next application data.
    pub fn wants_control(&self) -> bool {
        let due = self.protection == Protection::Tls13 && self.tx.is_limited() && self.tx.sequence() >= REKEY_RECORDS;
        (self.update_owed || due) && !self.tx_closed && !self.failed
    }

    /// Writes that control record to the front of `out` (at least [`CONTROL_BYTES_MAX`]) and returns its length.
    pub fn seal_control(&mut self, out: &mut [u8]) -> Result<usize, RecordError> {
        self.check_writable()?;
        if self.protection != Protection::Tls13 {
            return Err(RecordError::internal("TLS 1.2 has no key update"));
        }
        // Never asks for one in return: the peer counts its own records.
        let written = self.seal_small(HANDSHAKE, &messages::KEY_UPDATE, out)?;
        let (next, _) = Direction::new(self.schedule_mut()?.next_tx()?, true)?;
        self.tx = next;
        self.update_owed = false;
        Ok(written)
    }

    /// Writes an alert record (close_notify is code 0, sent as a warning; all others fatal) and returns its length.
    ///
    /// The last record of the session: afterwards it seals nothing. Works on a failed session, whose peer must be told.
    pub fn seal_alert(&mut self, code: u8, out: &mut [u8]) -> Result<usize, RecordError> {
        if self.tx_closed {
            return Err(RecordError::internal("an alert or close_notify was sent before"));
        }
        let level = if code == alert::CLOSE_NOTIFY { 1 } else { 2 };
        let written = self.seal_small(ALERT, &[level, code], out)?;
        self.tx_closed = true;
        Ok(written)
    }

    fn seal_small(&mut self, kind: u8, payload: &[u8], out: &mut [u8]) -> Result<usize, RecordError> {
        let start = self.header_len();
        let end = start + payload.len() + self.trailer_len();
        let record = out.get_mut(..end).ok_or(RecordError::internal("the buffer for a control record is too small"))?;
        record[start..start + payload.len()].copy_from_slice(payload);
        self.seal_kind(kind, record)?;
        Ok(end)
    }

    fn seal_kind(&mut self, kind: u8, record: &mut [u8]) -> Result<(), RecordError> {
        let sealed = self.tx.seal(self.protection, kind, record);
        self.failed |= sealed.is_err();
        sealed
    }

    fn check_writable(&self) -> Result<(), RecordError> {
        if self.failed {
            Err(RecordError::internal("this session has failed before"))
        } else if self.tx_closed {
            Err(RecordError::internal("this session has sent its close_notify"))
        } else {
            Ok(())
        }
    }

    fn schedule_mut(&mut self) -> Result<&mut Schedule, RecordError> {
        self.schedule.as_mut().ok_or(RecordError::internal("TLS 1.2 has no key schedule to advance"))
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("protection", &self.protection)
            .field("role", &self.role)
            .field("sealed", &self.tx.sequence())
            .field("opened", &self.rx.sequence())
            .field("failed", &self.failed)
            .field("keys", &"[redacted]")
            .finish_non_exhaustive()
    }
}

impl RecordError {
    const fn new(alert: u8, what: &'static str) -> Self {
        Self { alert, what }
    }

    const fn unexpected(what: &'static str) -> Self {
        Self::new(alert::UNEXPECTED_MESSAGE, what)
    }

    const fn internal(what: &'static str) -> Self {
        Self::new(alert::INTERNAL_ERROR, what)
    }
}

impl Keys {
    pub(super) fn server(secrets: ExtractedSecrets, kernel: KernelConnection<ServerConnectionData>) -> Self {
        Self { secrets, schedule: Schedule::Server(Box::new(kernel)) }
    }

    pub(super) fn client(secrets: ExtractedSecrets, kernel: KernelConnection<ClientConnectionData>) -> Self {
        Self { secrets, schedule: Schedule::Client(Box::new(kernel)) }
    }
}

/// Hands tickets to rustls, a few a session: each costs a key derivation and memory, and the peer decides how many come.
struct Keeper<'a> {
    schedule: Option<&'a mut Schedule>,
    left: &'a mut u8,
}

impl messages::KeepTicket for Keeper<'_> {
    fn keep(&mut self, ticket: &[u8]) -> Result<(), RecordError> {
        let Some(Schedule::Client(kernel)) = &mut self.schedule else { return Ok(()) };
        let Some(left) = self.left.checked_sub(1).filter(|_| ticket.len() <= TICKET_BYTES_MAX) else { return Ok(()) };
        *self.left = left;
        kernel
            .handle_new_session_ticket(ticket)
            .map_err(|_| RecordError::new(alert::DECODE_ERROR, "the peer sent a session ticket that cannot be decoded"))
    }
}

impl Schedule {
    fn next_tx(&mut self) -> Result<direction::Secrets, RecordError> {
        match self {
            Self::Server(kernel) => kernel.update_tx_secret(),
            Self::Client(kernel) => kernel.update_tx_secret(),
        }
        .map_err(|_| RecordError::internal("the next sending keys could not be derived"))
    }

    fn next_rx(&mut self) -> Result<direction::Secrets, RecordError> {
        match self {
            Self::Server(kernel) => kernel.update_rx_secret(),
            Self::Client(kernel) => kernel.update_rx_secret(),
        }
        .map_err(|_| RecordError::internal("the next receiving keys could not be derived"))
    }
}

#[cfg(test)]
mod tests;
