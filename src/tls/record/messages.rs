//! Handshake messages after a TLS 1.3 handshake, read as a stream: they may be several in a record or spread over records.
//!
//! Invariant: nothing is kept but a four-byte header, whatever length a peer announces. A ticket that lies whole in one
//! record is handed on where sessions are resumed; one that is spread over records is skipped, which costs a full handshake.

use super::RecordError;
use crate::tls::alert;
use crate::tls::verify::Role;

/// The KeyUpdate that we send: it asks for none in return.
pub(super) const KEY_UPDATE: [u8; 5] = [KEY_UPDATE_TYPE, 0, 0, 1, UPDATE_NOT_REQUESTED];

/// The body of a KeyUpdate that wants one in return.
pub(super) const UPDATE_REQUESTED: u8 = 1;
const UPDATE_NOT_REQUESTED: u8 = 0;

const NEW_SESSION_TICKET_TYPE: u8 = 4;
const KEY_UPDATE_TYPE: u8 = 24;
const HEADER_BYTES: usize = 4;

/// The longest ticket message: two lengths of 2^16 and their frame stay below.
const TICKET_BYTES_MAX: u32 = 1 << 17;

/// Where tickets go.
pub(super) trait KeepTicket {
    /// Takes the body of a NewSessionTicket, or leaves it.
    fn keep(&mut self, ticket: &[u8]) -> Result<(), RecordError>;
}

/// Where we are in the stream of messages.
#[derive(Debug, Default)]
pub(super) struct Messages {
    header: [u8; HEADER_BYTES],
    header_have: usize,
    body_left: u32,
    /// Some of the body was in an earlier record.
    is_within_body: bool,
}

impl Messages {
    /// Whether a message has begun and not ended.
    pub(super) fn is_partial(&self) -> bool {
        self.header_have > 0
    }

    /// Takes one record's payload. A finished KeyUpdate returns its request.
    pub(super) fn feed<K: KeepTicket>(
        &mut self,
        mut payload: &[u8],
        role: Role,
        keeper: &mut K,
    ) -> Result<Option<u8>, RecordError> {
        if payload.is_empty() {
            return Err(RecordError::unexpected("the peer sent an empty handshake record"));
        }
        while !payload.is_empty() {
            if self.header_have < HEADER_BYTES {
                let taken = (HEADER_BYTES - self.header_have).min(payload.len());
                self.header[self.header_have..self.header_have + taken].copy_from_slice(&payload[..taken]);
                self.header_have += taken;
                payload = &payload[taken..];
                if self.header_have == HEADER_BYTES {
                    self.body_left = self.check_header(role)?;
                }
                continue;
            }
            let is_whole = !self.is_within_body;
            self.is_within_body = true;
            let taken = payload.len().min(usize::try_from(self.body_left).unwrap_or(usize::MAX));
            let (body, rest) = payload.split_at(taken);
            payload = rest;
            // `taken` is at most `body_left`.
            self.body_left -= u32::try_from(taken).unwrap_or(self.body_left);
            if self.body_left > 0 {
                continue;
            }
            self.header_have = 0;
            self.is_within_body = false;
            if self.header[0] == NEW_SESSION_TICKET_TYPE && is_whole {
                keeper.keep(body)?;
            }
            if self.header[0] == KEY_UPDATE_TYPE {
                return key_update(body, payload).map(Some);
            }
        }
        Ok(None)
    }

    /// The length of the body that the header announces, if such a message may come.
    fn check_header(&self, role: Role) -> Result<u32, RecordError> {
        let [kind, high, middle, low] = self.header;
        let length = u32::from_be_bytes([0, high, middle, low]);
        match kind {
            KEY_UPDATE_TYPE if length == 1 => Ok(length),
            KEY_UPDATE_TYPE => Err(RecordError::new(alert::DECODE_ERROR, "the peer sent a KeyUpdate of a wrong length")),
            NEW_SESSION_TICKET_TYPE if role == Role::Client && (1..=TICKET_BYTES_MAX).contains(&length) => Ok(length),
            NEW_SESSION_TICKET_TYPE if role == Role::Client => {
                Err(RecordError::new(alert::DECODE_ERROR, "the peer sent a session ticket of an impossible length"))
            }
            _ => Err(RecordError::unexpected("the peer sent a handshake message that has no place after the handshake")),
        }
    }
}

/// Keys change between records, so a KeyUpdate must be the last of its record.
fn key_update(body: &[u8], rest: &[u8]) -> Result<u8, RecordError> {
    if !rest.is_empty() {
        return Err(RecordError::unexpected("the peer sent more behind a KeyUpdate in the same record"));
    }
    match body {
        [request @ (UPDATE_NOT_REQUESTED | UPDATE_REQUESTED)] => Ok(*request),
        _ => Err(RecordError::new(alert::ILLEGAL_PARAMETER, "the peer sent a KeyUpdate with an unknown request")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Kept(Vec<Vec<u8>>);

    impl KeepTicket for Kept {
        fn keep(&mut self, ticket: &[u8]) -> Result<(), RecordError> {
            self.0.push(ticket.to_vec());
            Ok(())
        }
    }

    #[test]
    fn a_ticket_is_kept_when_it_lies_in_one_record() {
        let (mut messages, mut kept) = (Messages::default(), Kept::default());
        let both = [ticket(3), ticket(5)].concat();
        messages.feed(&both, Role::Client, &mut kept).expect("regular");
        assert_eq!(kept.0.iter().map(Vec::len).collect::<Vec<_>>(), [3, 5]);
        for part in ticket(9).chunks(6) {
            messages.feed(part, Role::Client, &mut kept).expect("regular");
        }
        assert_eq!(kept.0.len(), 2, "one that is spread is skipped");
    }

    fn ticket(len: u16) -> Vec<u8> {
        let [high, low] = len.to_be_bytes();
        let mut message = vec![NEW_SESSION_TICKET_TYPE, 0, high, low];
        message.resize(HEADER_BYTES + usize::from(len), 0xaa);
        message
    }

    #[test]
    fn messages_that_must_not_come_are_refused() {
        let alert_of =
            |role, payload: &[u8]| Messages::default().feed(payload, role, &mut Kept::default()).expect_err("refused").alert;
        assert_eq!(alert_of(Role::Server, &ticket(3)), alert::UNEXPECTED_MESSAGE);
        assert_eq!(alert_of(Role::Client, &[4, 0xff, 0, 0]), alert::DECODE_ERROR);
        assert_eq!(alert_of(Role::Client, &[4, 0, 0, 0]), alert::DECODE_ERROR);
        assert_eq!(alert_of(Role::Client, &[24, 0, 0, 2, 0, 0]), alert::DECODE_ERROR);
        assert_eq!(alert_of(Role::Client, &[24, 0, 0, 1, 2]), alert::ILLEGAL_PARAMETER);
        assert_eq!(alert_of(Role::Client, &[24, 0, 0, 1, 0, 24]), alert::UNEXPECTED_MESSAGE);
        assert_eq!(alert_of(Role::Client, &[1, 0, 0, 0]), alert::UNEXPECTED_MESSAGE);
        assert_eq!(alert_of(Role::Client, &[]), alert::UNEXPECTED_MESSAGE);
    }

    proptest! {
        #[test]
        fn any_split_reads_the_same(lens in prop::collection::vec(1_u16..400, 1..5), cut in 1_usize..50) {
            let mut stream: Vec<u8> = lens.iter().flat_map(|len| ticket(*len)).collect();
            stream.extend_from_slice(&[KEY_UPDATE_TYPE, 0, 0, 1, UPDATE_REQUESTED]);
            let mut messages = Messages::default();
            let mut updates = Vec::new();
            for record in stream.chunks(cut) {
                updates.extend(messages.feed(record, Role::Client, &mut Kept::default()).expect("regular"));
            }
            prop_assert_eq!(updates, vec![UPDATE_REQUESTED]);
            prop_assert!(!messages.is_partial());
        }

        #[test]
        fn hostile_payloads_never_panic(records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8)) {
            let mut messages = Messages::default();
            for record in records {
                if messages.feed(&record, Role::Client, &mut Kept::default()).is_err() {
                    break;
                }
            }
        }
    }
}
