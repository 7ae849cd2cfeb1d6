//! What a denied local client is told, in its own protocol, so that the reason stands in its own error message.
//!
//! Invariant: nothing of the client's is believed or kept but the length and kind of its first packets. Pure: bytes in,
//! bytes out. Sources: PostgreSQL "Message Flow", MySQL "ERR_Packet", RFC 9112, RESP.

use crate::mesh::DenyReply;

/// PostgreSQL's `SSLRequest` and `GSSENCRequest`, which are answered with one byte, and `CancelRequest`, with none.
const POSTGRES_SSL: u32 = 80_877_103;
const POSTGRES_GSS: u32 = 80_877_104;
const POSTGRES_CANCEL: u32 = 80_877_102;
/// Length and code at the front of a PostgreSQL client's first packets.
const POSTGRES_HEAD_BYTES: usize = 8;
/// Encryption requests answered: libpq asks for GSS, then TLS.
const POSTGRES_REQUESTS_MAX: u8 = 2;
/// `ER_HOST_NOT_PRIVILEGED`, which MySQL itself answers before any handshake.
const MYSQL_HOST_NOT_PRIVILEGED: u16 = 1_130;
/// Redis commands answered: clients introduce themselves with several before the one that matters.
const REDIS_ANSWERS_MAX: u8 = 32;
/// Longest text told.
const TEXT_BYTES_MAX: usize = 1_024;

/// What to say, and how far it is said.
#[derive(Debug)]
pub(super) struct Reply {
    protocol: DenyReply,
    message: String,
    hint: String,
    head: Vec<u8>,
    answered: u8,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Wait for bytes of the client.
    Read,
    /// Send these, then wait for more.
    Answer(Vec<u8>),
    /// Send these and end.
    Last(Vec<u8>),
    /// End without a word.
    End,
}

impl Reply {
    /// `None` when the client is only to be closed.
    pub(super) fn new(protocol: DenyReply, message: &str, hint: &str) -> Option<Self> {
        (protocol != DenyReply::Close).then(|| Self {
            protocol,
            message: clean(message),
            hint: clean(hint),
            head: Vec::new(),
            answered: 0,
        })
    }

    /// Before the client has sent anything.
    pub(super) fn begin(&self) -> Step {
        match self.protocol {
            // Its server speaks first.
            DenyReply::Mysql => Step::Last(self.mysql()),
            DenyReply::Close => Step::End,
            DenyReply::Postgres | DenyReply::Http | DenyReply::Redis => Step::Read,
        }
    }

    /// After `bytes` of the client.
    pub(super) fn received(&mut self, bytes: &[u8]) -> Step {
        match self.protocol {
            DenyReply::Postgres => self.postgres_received(bytes),
            DenyReply::Http => Step::Last(self.http()),
            DenyReply::Redis => {
                self.answered += 1;
                let answer = format!("-NOPERM {}; {}\r\n", self.message, self.hint).into_bytes();
                if self.answered < REDIS_ANSWERS_MAX { Step::Answer(answer) } else { Step::Last(answer) }
            }
            DenyReply::Mysql | DenyReply::Close => Step::End,
        }
    }

    fn postgres_received(&mut self, bytes: &[u8]) -> Step {
        let missing = POSTGRES_HEAD_BYTES - self.head.len();
        self.head.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        let Some((length, code)) =
            self.head.split_first_chunk::<4>().and_then(|(length, rest)| Some((length, rest.first_chunk::<4>()?)))
        else {
            return Step::Read;
        };
        let (length, code) = (u32::from_be_bytes(*length), u32::from_be_bytes(*code));
        match code {
            POSTGRES_SSL | POSTGRES_GSS if length == 8 && self.answered < POSTGRES_REQUESTS_MAX => {
                self.answered += 1;
                self.head.clear();
                Step::Answer(b"N".to_vec())
            }
            POSTGRES_SSL | POSTGRES_GSS | POSTGRES_CANCEL => Step::End,
            _ => Step::Last(self.postgres()),
        }
    }

    /// `ErrorResponse` with severity, SQLSTATE 28000 (invalid_authorization_specification), message and hint.
    fn postgres(&self) -> Vec<u8> {
        let mut fields = Vec::new();
        for (kind, text) in [(b'S', "FATAL"), (b'V', "FATAL"), (b'C', "28000"), (b'M', &self.message), (b'H', &self.hint)] {
            fields.push(kind);
            fields.extend_from_slice(text.as_bytes());
            fields.push(0);
        }
        fields.push(0);
        let length = u32::try_from(fields.len() + 4).unwrap_or(u32::MAX);
        [&b"E"[..], &length.to_be_bytes(), &fields].concat()
    }

    fn mysql(&self) -> Vec<u8> {
        let text = format!("{}; {}", self.message, self.hint);
        let body = [&[0xff][..], &MYSQL_HOST_NOT_PRIVILEGED.to_le_bytes(), text.as_bytes()].concat();
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
        [&length[..3], &[0], &body].concat()
    }

    fn http(&self) -> Vec<u8> {
        let body = serde_json::json!({ "error": self.message, "remedy": self.hint }).to_string();
        let head = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\n";
        format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }
}

/// One line without control characters, at most [`TEXT_BYTES_MAX`].
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(TEXT_BYTES_MAX));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if clean.len() + c.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        clean.push(c);
    }
    clean
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reply(protocol: DenyReply) -> Reply {
        Reply::new(protocol, "no\nentry", "ask").expect("says something")
    }

    fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
        let length = u32::try_from(8 + rest.len()).expect("short");
        [&length.to_be_bytes()[..], &code.to_be_bytes(), rest].concat()
    }

    #[test]
    fn postgres_is_refused_after_its_startup_packet_in_any_pieces() {
        let mut reply = reply(DenyReply::Postgres);
        assert_eq!(reply.begin(), Step::Read);
        assert_eq!(reply.received(&packet(POSTGRES_GSS, b"")), Step::Answer(b"N".to_vec()));
        let ssl = packet(POSTGRES_SSL, b"");
        assert_eq!(reply.received(&ssl[..3]), Step::Read);
        assert_eq!(reply.received(&ssl[3..]), Step::Answer(b"N".to_vec()));
        let startup = packet(196_608, b"user\0airflow\0\0");
        assert_eq!(reply.received(&startup[..7]), Step::Read);
        let Step::Last(error) = reply.received(&startup[7..]) else { panic!("an error is the last word") };
        assert_eq!(error, b"E\x00\x00\x00\x29SFATAL\0VFATAL\0C28000\0Mno entry\0Hask\0\0");
    }

    #[test]
    fn endless_encryption_requests_are_not_answered() {
        let mut reply = reply(DenyReply::Postgres);
        let ssl = packet(POSTGRES_SSL, b"");
        assert_eq!(reply.received(&ssl), Step::Answer(b"N".to_vec()));
        assert_eq!(reply.received(&ssl), Step::Answer(b"N".to_vec()));
        assert_eq!(reply.received(&ssl), Step::End);
    }

    #[test]
    fn the_others_are_told_in_their_own_form() {
        let Step::Last(mysql) = reply(DenyReply::Mysql).begin() else { panic!("mysql's server speaks first") };
        assert_eq!(mysql, b"\x10\0\0\0\xff\x6a\x04no entry; ask");
        let Step::Last(http) = reply(DenyReply::Http).received(b"GET / HTTP/1.1\r\n") else { panic!("one answer") };
        let http = String::from_utf8(http).expect("text");
        assert!(
            http.starts_with("HTTP/1.1 403 Forbidden\r\n") && http.ends_with("{\"error\":\"no entry\",\"remedy\":\"ask\"}"),
            "{http}"
        );
        assert_eq!(reply(DenyReply::Redis).received(b"PING"), Step::Answer(b"-NOPERM no entry; ask\r\n".to_vec()));
        assert!(Reply::new(DenyReply::Close, "x", "y").is_none());
    }

    proptest! {
        #[test]
        fn no_client_makes_it_panic(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..40)) {
            for protocol in [DenyReply::Postgres, DenyReply::Http, DenyReply::Redis, DenyReply::Mysql] {
                let mut reply = reply(protocol);
                for piece in &pieces {
                    let _ = reply.received(piece);
                }
            }
        }
    }
}
