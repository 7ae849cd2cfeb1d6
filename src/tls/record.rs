//! The record layer after the handshake: records are sealed and opened where they lie.

use std::ops::Range;

/// Most payload bytes in one record.
pub const PAYLOAD_BYTES_MAX: usize = 16_384;
/// Room before the payload that any version and suite needs (TLS 1.2 GCM: 5 header + 8 explicit nonce).
pub const HEADER_BYTES_MAX: usize = 13;
/// Room after the payload that any version and suite needs (TLS 1.3: 1 content type + 16 tag).
pub const TRAILER_BYTES_MAX: usize = 17;
/// The longest record of a peer that keeps to the standard without padding: header, payload, trailer.
pub const RECORD_BYTES_MAX: usize = 5 + PAYLOAD_BYTES_MAX + 256;
/// Room that [`Session::seal_control`] and [`Session::seal_alert`] need.
pub const CONTROL_BYTES_MAX: usize = 64;

/// Sealing and opening for one connection.
pub struct Session {
    _private: (),
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
    /// A handshake message after the handshake (tickets, key updates), dealt with.
    Control {
        /// The whole record's length.
        record_len: usize,
    },
    /// The peer will send no more.
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

impl Session {
    /// Bytes before the payload in the records it seals (5 or 13).
    pub fn header_len(&self) -> usize {
        todo!()
    }

    /// Bytes after the payload in the records it seals (16 or 17).
    pub fn trailer_len(&self) -> usize {
        todo!()
    }

    /// Seals application data in place: `record` is header, payload (already there), trailer, of exactly those lengths.
    pub fn seal(&mut self, _record: &mut [u8]) -> Result<(), RecordError> {
        todo!()
    }

    /// Opens the first record of `bytes` in place.
    pub fn open(&mut self, _bytes: &mut [u8]) -> Result<Open, RecordError> {
        todo!()
    }

    /// Whether a control record (KeyUpdate) should go out before the next application data.
    pub fn wants_control(&self) -> bool {
        todo!()
    }

    /// Writes that control record to the front of `out` (at least [`CONTROL_BYTES_MAX`]) and returns its length.
    pub fn seal_control(&mut self, _out: &mut [u8]) -> Result<usize, RecordError> {
        todo!()
    }

    /// Writes an alert record (close_notify is code 0, sent as a warning; all others fatal) and returns its length.
    pub fn seal_alert(&mut self, _code: u8, _out: &mut [u8]) -> Result<usize, RecordError> {
        todo!()
    }
}
