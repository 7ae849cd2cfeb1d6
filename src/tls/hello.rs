//! The server name in a ClientHello, read before anybody decides who answers it.
//!
//! Invariant: nothing is consumed, nothing is answered, and no byte is believed: a name read here chooses a route, it proves
//! nothing. Hostile bytes end in [`Hello::NotTls`] or [`Hello::TooLong`], never in a panic, and cost one pass a record.
//!
//! Only the outer form is looked at (RFC 8446 4.1.2, RFC 6066 3): who ends TLS judges the rest. rustls's own acceptor is not used:
//! it keeps a copy of what it reads and judges hellos that are only to be passed on.

use std::borrow::Cow;

/// Most bytes that a ClientHello may have with its record headers (Envoy's tls_inspector has the same bound).
pub const HELLO_BYTES_MAX: usize = 16_384;
/// Most records that one ClientHello may be spread over. Real ones come in one, or two after a middlebox.
const RECORDS_MAX: usize = 16;
const RECORD_HEADER_BYTES: usize = 5;
const MESSAGE_HEADER_BYTES: usize = 4;
const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME_EXTENSION: u16 = 0;
const HOST_NAME: u8 = 0;
/// The longest name that DNS knows.
const NAME_BYTES_MAX: usize = 255;

/// What the first bytes of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    /// So far the beginning of a ClientHello; look again once there are `need` bytes in all.
    Incomplete {
        /// Counted from the connection's first byte.
        need: usize,
    },
    /// A whole ClientHello.
    Whole {
        /// The name that it asks for, in lower case.
        server_name: Option<Box<str>>,
    },
    /// No ClientHello.
    NotTls,
    /// A ClientHello that needs more than [`HELLO_BYTES_MAX`].
    TooLong,
}

/// Reads what is there of a connection's first bytes.
pub fn read(bytes: &[u8]) -> Hello {
    match message(bytes) {
        Ok(message) => match server_name(&message) {
            Some(server_name) => Hello::Whole { server_name },
            None => Hello::NotTls,
        },
        Err(other) => other,
    }
}

/// The body of the ClientHello, put together if it is spread over records.
fn message(bytes: &[u8]) -> Result<Cow<'_, [u8]>, Hello> {
    let mut message: Cow<'_, [u8]> = Cow::Borrowed(&[]);
    let mut at = 0;
    for _ in 0..RECORDS_MAX {
        let record = record(bytes, at)?;
        if message.is_empty() {
            message = Cow::Borrowed(record);
        } else {
            message.to_mut().extend_from_slice(record);
        }
        at += RECORD_HEADER_BYTES + record.len();
        if let Some(&[kind, high, middle, low]) = message.get(..MESSAGE_HEADER_BYTES) {
            if kind != CLIENT_HELLO {
                return Err(Hello::NotTls);
            }
            let len = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
            if len > HELLO_BYTES_MAX - RECORD_HEADER_BYTES - MESSAGE_HEADER_BYTES {
                return Err(Hello::TooLong);
            }
            if message.len() >= MESSAGE_HEADER_BYTES + len {
                return Ok(match message {
                    Cow::Borrowed(message) => Cow::Borrowed(&message[MESSAGE_HEADER_BYTES..MESSAGE_HEADER_BYTES + len]),
                    Cow::Owned(message) => Cow::Owned(message[MESSAGE_HEADER_BYTES..MESSAGE_HEADER_BYTES + len].to_vec()),
                });
            }
        }
    }
    Err(Hello::TooLong)
}

/// The payload of the record at `at`, once it is whole. What cannot become a handshake record is told at its first wrong byte.
fn record(bytes: &[u8], at: usize) -> Result<&[u8], Hello> {
    let there = bytes.get(at..).unwrap_or_default();
    let header: [Option<u8>; RECORD_HEADER_BYTES] = std::array::from_fn(|place| there.get(place).copied());
    if header[0].is_some_and(|kind| kind != HANDSHAKE_RECORD)
        || header[1].is_some_and(|major| major != 3)
        || header[2].is_some_and(|minor| minor > 4)
    {
        return Err(Hello::NotTls);
    }
    let [_, _, _, Some(high), Some(low)] = header else { return Err(incomplete(at + RECORD_HEADER_BYTES)) };
    let len = usize::from(u16::from_be_bytes([high, low]));
    if len == 0 {
        return Err(Hello::NotTls);
    }
    let payload = &there[RECORD_HEADER_BYTES..];
    if at == 0 && payload.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Err(Hello::NotTls);
    }
    payload.get(..len).ok_or_else(|| incomplete(at + RECORD_HEADER_BYTES + len))
}

fn incomplete(need: usize) -> Hello {
    if need > HELLO_BYTES_MAX { Hello::TooLong } else { Hello::Incomplete { need } }
}

/// The name that the body of a ClientHello asks for, or `None` if it is none.
fn server_name(body: &[u8]) -> Option<Option<Box<str>>> {
    const VERSION_AND_RANDOM_BYTES: usize = 2 + 32;
    let mut body = Cursor(body.get(VERSION_AND_RANDOM_BYTES..)?);
    let _session = body.short()?;
    let suites = body.long()?;
    let compressions = body.short()?;
    if suites.is_empty() || suites.len() % 2 != 0 || compressions.is_empty() {
        return None;
    }
    if body.0.is_empty() {
        return Some(None);
    }
    let mut extensions = Cursor(body.long()?);
    let mut name = None;
    while !extensions.0.is_empty() {
        let (kind, content) = (extensions.number()?, extensions.long()?);
        if kind == SERVER_NAME_EXTENSION {
            if name.is_some() {
                return None;
            }
            name = Some(host_name(content)?);
        }
    }
    body.0.is_empty().then_some(name)
}

/// The one host name of a server_name extension.
fn host_name(content: &[u8]) -> Option<Box<str>> {
    let mut content = Cursor(content);
    let mut list = Cursor(content.long()?);
    let (kind, name) = (list.byte()?, list.long()?);
    // Other kinds of names do not exist, and no client sends two.
    let fits = kind == HOST_NAME && list.0.is_empty() && content.0.is_empty();
    let fits = fits && (1..=NAME_BYTES_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
    let text = std::str::from_utf8(name).ok().filter(|_| fits)?;
    Some(text.to_ascii_lowercase().into())
}

/// Bytes yet to be read.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn number(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// A vector whose length stands in one byte.
    fn short(&mut self) -> Option<&'a [u8]> {
        let len = self.byte()?;
        self.take(usize::from(len))
    }

    /// A vector whose length stands in two bytes.
    fn long(&mut self) -> Option<&'a [u8]> {
        let len = self.number()?;
        self.take(usize::from(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustls::client::UnbufferedClientConnection;
    use rustls::unbuffered::ConnectionState;

    use crate::tls::fixtures::Ca;
    use crate::tls::provider::WorkerTls;
    use crate::tls::{Progress, TlsParams};

    /// A ClientHello as our own client role writes it.
    fn real(sni: &str) -> Vec<u8> {
        let ca = Ca::new("mesh.consul");
        let svid = ca.svid("web");
        let tls = WorkerTls::new(&svid, &ca.bundle(), &TlsParams::default()).expect("a good identity");
        let mut handshake = tls.dialer(&sni.into(), &[svid.id.clone()].into()).connect().expect("a handshake");
        let mut out = vec![0; HELLO_BYTES_MAX];
        let step = handshake.step(&mut [], &mut out);
        assert!(matches!(step.progress, Progress::NeedBytes), "{step:?}");
        out.truncate(step.written);
        out
    }

    /// The same message in records of `len` bytes.
    fn spread(hello: &[u8], len: usize) -> Vec<u8> {
        let payload = &hello[RECORD_HEADER_BYTES..];
        let record = |part: &[u8]| [&[22, 3, 1], &(part.len() as u16).to_be_bytes()[..], part].concat();
        payload.chunks(len).flat_map(record).collect()
    }

    fn whole(name: &str) -> Hello {
        Hello::Whole { server_name: Some(name.into()) }
    }

    #[test]
    fn a_real_hello_tells_its_name_whatever_its_pieces() {
        let name = "warehouse.default.dc1.internal.mesh.consul";
        let hello = real(name);
        assert_eq!(read(&hello), whole(name));
        for records in [2, 3, RECORDS_MAX] {
            let spread = spread(&hello, hello.len().div_ceil(records));
            assert_eq!(read(&spread), whole(name), "in {records} records");
        }
        let mut followed = hello.clone();
        followed.extend(b"whatever comes behind it");
        assert_eq!(read(&followed), whole(name));
        assert_eq!(read(&spread(&hello, 4)), Hello::TooLong, "too many records");
    }

    #[test]
    fn every_beginning_asks_for_what_is_missing() {
        let hello = spread(&real("web.x"), 100);
        let mut need = 0;
        for len in 0..hello.len() {
            let Hello::Incomplete { need: now } = read(&hello[..len]) else { panic!("{len} bytes: {:?}", read(&hello[..len])) };
            assert!(now > len && now <= hello.len() && now >= need, "{len} bytes: {now} after {need}");
            need = now;
        }
        assert_eq!(read(&hello), whole("web.x"));
    }

    #[test]
    fn names_are_compared_in_lower_case() {
        let mut hello = real("web.x");
        let at = hello.windows(5).position(|part| part == b"web.x").expect("the name");
        hello[at..at + 5].copy_from_slice(b"WeB.x");
        assert_eq!(read(&hello), whole("web.x"));
        hello[at] = 0;
        assert_eq!(read(&hello), Hello::NotTls, "a name with a NUL byte");
    }

    #[test]
    fn other_protocols_are_told_at_once() {
        for bytes in
            [&b"GET / HTTP/1.1\r\n"[..], b"*1\r\n", &[22, 2], &[22, 3, 5], &[22, 3, 1, 0, 0], &[22, 3, 1, 0, 9, 2], &[0x80]]
        {
            assert_eq!(read(bytes), Hello::NotTls, "{bytes:?}");
        }
        assert_eq!(read(&[]), Hello::Incomplete { need: RECORD_HEADER_BYTES });
        assert_eq!(read(&[22, 3, 1, 0x40, 0]), Hello::TooLong, "a record longer than what is kept");
        assert_eq!(read(&[22, 3, 1, 0, 4, 1, 0, 0x40, 0]), Hello::TooLong, "a message longer than what is kept");
    }

    #[test]
    fn a_hello_without_a_name_is_one() {
        // rustls leaves the extension out for an address.
        let config = rustls::ClientConfig::builder_with_provider(crate::tls::backend::provider::default_provider().into())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = std::net::IpAddr::from([127, 0, 0, 1]).into();
        let mut client = UnbufferedClientConnection::new(config.into(), name).expect("a client");
        let mut out = vec![0; HELLO_BYTES_MAX];
        let mut len = 0;
        loop {
            match client.process_tls_records(&mut []).state.expect("no input, no error") {
                ConnectionState::EncodeTlsData(mut data) => len += data.encode(&mut out[len..]).expect("room"),
                ConnectionState::TransmitTlsData(data) => data.done(),
                _ => break,
            }
        }
        assert_eq!(read(&out[..len]), Hello::Whole { server_name: None });
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_ask_for_what_is_there(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Hello::Incomplete { need } = read(&bytes) {
                prop_assert!(need > bytes.len() && need <= HELLO_BYTES_MAX);
            }
        }

        #[test]
        fn a_damaged_hello_never_panics(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
            cut: proptest::sample::Index,
        ) {
            static HELLO: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| real("web.default.dc1.internal.x"));
            let mut bytes = HELLO.clone();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            match read(&bytes) {
                Hello::Incomplete { need } => prop_assert!(need > bytes.len() && need <= HELLO_BYTES_MAX),
                Hello::Whole { server_name: Some(name) } => {
                    prop_assert!(!name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(|byte| byte.is_ascii_graphic()));
                }
                Hello::Whole { server_name: None } | Hello::NotTls | Hello::TooLong => {}
            }
        }
    }
}
