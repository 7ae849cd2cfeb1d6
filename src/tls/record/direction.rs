//! One direction of a session: a key, its nonces and its count, and how the versions frame a record around the AEAD.
//!
//! Invariant: a sequence number is used for one seal only, and no key seals more than its AEAD allows.

use std::ops::Range;

use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroize;

use super::{APPLICATION_DATA, PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES, RecordError};
use crate::tls::alert;
use crate::tls::backend::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};

/// Most records that AES-GCM may seal under one key (RFC 8446 section 5.5, and RFC 9325 section 4.4 for TLS 1.2).
const GCM_RECORDS_MAX: u64 = 1 << 24;
/// Records of that limit kept back for a KeyUpdate or the last alert.
const RESERVED_RECORDS: u64 = 16;

const TAG_BYTES: usize = 16;
/// The explicit part of the nonce in TLS 1.2 with AES-GCM.
const EXPLICIT_BYTES: usize = 8;

/// A first sequence number with the secrets, as rustls hands them out.
pub(super) type Secrets = (u64, ConnectionTrafficSecrets);

/// How a record is laid out around the AEAD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protection {
    /// TLS 1.3, any suite.
    Tls13,
    /// TLS 1.2 with AES-GCM (RFC 5288).
    Tls12Gcm,
    /// TLS 1.2 with ChaCha20-Poly1305 (RFC 7905).
    Tls12Chacha,
}

pub(super) struct Direction {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    records_max: u64,
}

impl Protection {
    pub(super) const fn header_len(self) -> usize {
        match self {
            Self::Tls13 | Self::Tls12Chacha => RECORD_HEADER_BYTES,
            Self::Tls12Gcm => RECORD_HEADER_BYTES + EXPLICIT_BYTES,
        }
    }

    pub(super) const fn trailer_len(self) -> usize {
        match self {
            Self::Tls13 => 1 + TAG_BYTES,
            Self::Tls12Gcm | Self::Tls12Chacha => TAG_BYTES,
        }
    }

    /// The longest that a record's length field may say.
    pub(super) const fn body_bytes_max(self) -> usize {
        match self {
            // Padding may fill it up (RFC 8446 section 5.2).
            Self::Tls13 => PAYLOAD_BYTES_MAX + 256,
            // More would open to more than a record may hold.
            Self::Tls12Gcm => PAYLOAD_BYTES_MAX + EXPLICIT_BYTES + TAG_BYTES,
            Self::Tls12Chacha => PAYLOAD_BYTES_MAX + TAG_BYTES,
        }
    }
}

impl Direction {
    pub(super) fn new((sequence, secrets): Secrets, tls13: bool) -> Result<(Self, Protection), RecordError> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::internal("rustls agreed on a suite that the record layer does not know")),
        };
        let unbound = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| RecordError::internal("a traffic key has another length than its suite"))?;
        let iv = iv.as_ref().try_into().map_err(|_| RecordError::internal("a traffic IV has another length than its suite"))?;
        let chacha = *algorithm == CHACHA20_POLY1305;
        let protection = match (tls13, chacha) {
            (true, _) => Protection::Tls13,
            (false, false) => Protection::Tls12Gcm,
            (false, true) => Protection::Tls12Chacha,
        };
        let records_max = if chacha { u64::MAX } else { GCM_RECORDS_MAX };
        Ok((Self { key: LessSafeKey::new(unbound), iv, sequence, records_max }, protection))
    }

    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Pretends that so many records were sealed or opened.
    #[cfg(test)]
    pub(super) fn jump(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    /// Whether the suite limits the records under one key at all.
    pub(super) fn is_limited(&self) -> bool {
        self.records_max != u64::MAX
    }

    /// Whether only the reserve is left.
    pub(super) fn is_near_limit(&self) -> bool {
        self.sequence >= self.records_max - RESERVED_RECORDS
    }

    /// Seals `record`, which is header room, payload and trailer room.
    pub(super) fn seal(&mut self, protection: Protection, kind: u8, record: &mut [u8]) -> Result<(), RecordError> {
        let (header_len, trailer_len) = (protection.header_len(), protection.trailer_len());
        let payload_len = record
            .len()
            .checked_sub(header_len + trailer_len)
            .filter(|payload_len| *payload_len <= PAYLOAD_BYTES_MAX)
            .ok_or(RecordError::internal("a record to seal is shorter than its frame or longer than the standard allows"))?;
        if self.sequence >= self.records_max {
            return Err(RecordError::internal("no record may be sealed under this key any more"));
        }
        let nonce = self.nonce();
        let tag_at = record.len() - TAG_BYTES;
        let outer_kind = if protection == Protection::Tls13 { APPLICATION_DATA } else { kind };
        // At most 16,384 + 24, by the check above.
        let [high, low] = u16::try_from(record.len() - RECORD_HEADER_BYTES)
            .map_err(|_| RecordError::internal("a record to seal is too long"))?
            .to_be_bytes();
        let header = [outer_kind, 3, 3, high, low];
        record[..RECORD_HEADER_BYTES].copy_from_slice(&header);
        let tag = match protection {
            Protection::Tls13 => {
                record[header_len + payload_len] = kind;
                let nonce = Nonce::assume_unique_for_key(nonce);
                self.key.seal_in_place_separate_tag(nonce, Aad::from(header), &mut record[header_len..tag_at])
            }
            Protection::Tls12Gcm | Protection::Tls12Chacha => {
                if protection == Protection::Tls12Gcm {
                    record[RECORD_HEADER_BYTES..header_len].copy_from_slice(&nonce[NONCE_LEN - EXPLICIT_BYTES..]);
                }
                let aad = Aad::from(self.aad12(kind, payload_len)?);
                let nonce = Nonce::assume_unique_for_key(nonce);
                self.key.seal_in_place_separate_tag(nonce, aad, &mut record[header_len..tag_at])
            }
        };
        let tag = tag.map_err(|_| RecordError::internal("sealing failed"))?;
        record[tag_at..].copy_from_slice(tag.as_ref());
        self.sequence += 1;
        Ok(())
    }

    /// Opens one whole record: its content type, and where the payload lies in it.
    pub(super) fn open(&mut self, protection: Protection, record: &mut [u8]) -> Result<(u8, Range<usize>), RecordError> {
        const FORGED: RecordError =
            RecordError { alert: alert::BAD_RECORD_MAC, what: "a record of the peer does not authenticate: altered on its way" };
        let start = protection.header_len();
        if record.len() < start + TAG_BYTES {
            return Err(FORGED);
        }
        let payload_len = record.len() - start - TAG_BYTES;
        let (header, body) = record.split_at_mut(start);
        let opened = match protection {
            Protection::Tls13 => {
                let aad = Aad::from(&*header);
                self.key.open_in_place(Nonce::assume_unique_for_key(self.nonce()), aad, body)
            }
            Protection::Tls12Gcm | Protection::Tls12Chacha => {
                let mut nonce = self.nonce();
                if protection == Protection::Tls12Gcm {
                    nonce[..NONCE_LEN - EXPLICIT_BYTES].copy_from_slice(&self.iv[..NONCE_LEN - EXPLICIT_BYTES]);
                    nonce[NONCE_LEN - EXPLICIT_BYTES..].copy_from_slice(&header[RECORD_HEADER_BYTES..]);
                }
                let aad = Aad::from(self.aad12(header[0], payload_len)?);
                self.key.open_in_place(Nonce::assume_unique_for_key(nonce), aad, body)
            }
        };
        let plain = opened.map_err(|_| FORGED)?;
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::internal("the sequence numbers are used up"))?;
        if protection == Protection::Tls13 {
            return strip(plain, start);
        }
        Ok((record[0], start..start + payload_len))
    }

    /// The IV with the sequence number over its end.
    fn nonce(&self) -> [u8; NONCE_LEN] {
        let mut nonce = self.iv;
        for (byte, over) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= over;
        }
        nonce
    }

    /// What TLS 1.2 authenticates besides the payload: sequence number, kind, version, length.
    fn aad12(&self, kind: u8, payload_len: usize) -> Result<[u8; 13], RecordError> {
        let len = u16::try_from(payload_len).map_err(|_| RecordError::internal("a payload is too long"))?;
        let mut aad = [0; 13];
        aad[..8].copy_from_slice(&self.sequence.to_be_bytes());
        aad[8..11].copy_from_slice(&[kind, 3, 3]);
        aad[11..].copy_from_slice(&len.to_be_bytes());
        Ok(aad)
    }
}

impl Drop for Direction {
    /// ring keeps the expanded key to itself and does not wipe it; the IV is ours to wipe.
    fn drop(&mut self) {
        self.iv.zeroize();
    }
}

/// The content type behind the padding, and where the payload lies in the record.
fn strip(plain: &[u8], start: usize) -> Result<(u8, Range<usize>), RecordError> {
    // Payload, type and padding together (RFC 8446 section 5.4).
    if plain.len() > PAYLOAD_BYTES_MAX + 1 {
        return Err(RecordError::new(
            alert::RECORD_OVERFLOW,
            "the peer sent a record with more padding than the standard allows",
        ));
    }
    match plain.iter().rposition(|byte| *byte != 0) {
        Some(at) => Ok((plain[at], start..start + at)),
        None => Err(RecordError::unexpected("the peer sent a record of nothing but padding")),
    }
}
