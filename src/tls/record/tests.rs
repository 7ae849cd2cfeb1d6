//! The record layer against rustls itself, and against hostile bytes.

use proptest::prelude::*;

use super::*;
use crate::tls::fixtures::KeyKind;
use crate::tls::harness::{Linked, give, linked, our_pair, seal, suites, take};
use crate::tls::provider::TlsParams;

const TLS12: TlsParams = TlsParams { tls12: true, tls13: false, ..TlsParams::DEFAULT };
const TLS13: TlsParams = TlsParams { tls12: false, tls13: true, ..TlsParams::DEFAULT };

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// TLS 1.3 with AES-128-GCM against stock rustls.
fn linked13(role: Role) -> Linked {
    let (suite, key) = suites().into_iter().find(|(suite, _)| suite.tls13().is_some()).expect("a suite");
    linked(role, suite, key)
}

/// A record of ours with any inner content, as a peer that breaks rules would send it.
fn forge(session: &mut Session, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; HEADER_BYTES_MAX + payload.len() + TRAILER_BYTES_MAX];
    let written = session.seal_small(kind, payload, &mut out).expect("sealed");
    out.truncate(written);
    out
}

fn refused(session: &mut Session, bytes: &mut [u8]) -> u8 {
    session.open(bytes).expect_err("refused").alert
}

#[test]
fn every_suite_and_role_agrees_with_rustls() {
    for (suite, key) in suites() {
        for role in [Role::Client, Role::Server] {
            let mut link = linked(role, suite, key);
            for len in [1, 100, PAYLOAD_BYTES_MAX - 1, PAYLOAD_BYTES_MAX] {
                let data = pattern(len, 7);
                let wire = link.our_records(&data);
                assert_eq!(link.stock_read(&wire), data, "{suite:?} {role:?} to rustls, {len} bytes");
                link.stock_write(&data);
                assert_eq!(link.our_read(1_000), data, "{suite:?} {role:?} from rustls, {len} bytes");
            }
            let mut out = [0; CONTROL_BYTES_MAX];
            let written = link.session.seal_alert(alert::CLOSE_NOTIFY, &mut out).expect("close_notify");
            give(&mut link.stock, &out[..written]).expect("regular");
            assert!(link.stock.process_new_packets().expect("regular").peer_has_closed(), "{suite:?} {role:?}");
            link.stock.send_close_notify();
            let mut last = take(&mut link.stock);
            assert_eq!(link.session.open(&mut last), Ok(Open::CloseNotify { record_len: last.len() }));
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    OurWrite(usize),
    StockWrite(usize),
    OurUpdate,
    StockUpdate,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1_usize..=PAYLOAD_BYTES_MAX).prop_map(Op::OurWrite),
        4 => (1_usize..70_000).prop_map(Op::StockWrite),
        1 => Just(Op::OurUpdate),
        1 => Just(Op::StockUpdate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_conversation_with_rustls_keeps_its_bytes(
        ops in prop::collection::vec(op(), 1..12),
        which in 0_usize..9,
        as_client in any::<bool>(),
        piece in 1_usize..40_000,
    ) {
        let (suite, key) = suites()[which];
        let tls13 = suite.tls13().is_some();
        let mut link = linked(if as_client { Role::Client } else { Role::Server }, suite, key);
        for (n, op) in ops.into_iter().enumerate() {
            let seed = n as u8;
            match op {
                Op::OurWrite(len) => {
                    let wire = link.our_records(&pattern(len, seed));
                    prop_assert_eq!(link.stock_read(&wire), pattern(len, seed));
                }
                Op::StockWrite(len) => {
                    link.stock_write(&pattern(len, seed));
                    prop_assert_eq!(link.our_read(piece), pattern(len, seed));
                }
                Op::OurUpdate if tls13 => {
                    let mut out = [0; CONTROL_BYTES_MAX];
                    let written = link.session.seal_control(&mut out).expect("a key update");
                    give(&mut link.stock, &out[..written]).expect("rustls takes the update");
                }
                Op::StockUpdate if tls13 => {
                    link.stock.refresh_traffic_keys().expect("1.3");
                    link.stock_write(&[]);
                    prop_assert_eq!(link.our_read(piece), Vec::<u8>::new());
                    prop_assert!(link.session.wants_control(), "rustls asked for an update in return");
                }
                Op::OurUpdate | Op::StockUpdate => {
                    prop_assert!(link.session.seal_control(&mut [0; CONTROL_BYTES_MAX]).is_err());
                }
            }
        }
    }

    #[test]
    fn hostile_bytes_never_panic_and_never_open(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        head in prop::option::of((20_u8..24, 0_u16..200)),
        tls13 in any::<bool>(),
    ) {
        if let (Some((kind, len)), true) = (head, bytes.len() >= 5) {
            let [high, low] = len.to_be_bytes();
            bytes[..5].copy_from_slice(&[kind, 3, 3, high, low]);
        }
        let (mut client, _) = our_pair(if tls13 { &TLS13 } else { &TLS12 });
        let opened = client.open(&mut bytes);
        prop_assert!(matches!(opened, Ok(Open::Incomplete { .. }) | Err(_)), "{:?}", opened);
        if opened.is_err() {
            prop_assert!(client.open(&mut bytes).is_err(), "a failed session opened");
            prop_assert!(client.seal(&mut [0; 64]).is_err(), "a failed session sealed");
            prop_assert!(client.seal_alert(alert::BAD_RECORD_MAC, &mut [0; CONTROL_BYTES_MAX]).is_ok());
            prop_assert!(client.seal_alert(alert::BAD_RECORD_MAC, &mut [0; CONTROL_BYTES_MAX]).is_err());
        }
    }

    #[test]
    fn one_changed_bit_is_noticed(len in 0_usize..300, at in any::<prop::sample::Index>(), bit in 0_u8..8, tls13 in any::<bool>()) {
        let (mut client, mut server) = our_pair(if tls13 { &TLS13 } else { &TLS12 });
        let mut record = seal(&mut client, &pattern(len, 1));
        let at = at.index(record.len());
        record[at] ^= 1 << bit;
        // A changed length may only make it wait for more.
        let opened = server.open(&mut record);
        let waits = matches!(opened, Ok(Open::Incomplete { .. })) && (3..5).contains(&at);
        prop_assert!(opened.is_err() || waits, "{:?}", opened);
    }
}

#[test]
fn a_truncated_record_waits_and_changes_nothing() {
    for params in [&TLS12, &TLS13] {
        let (mut client, mut server) = our_pair(params);
        let record = seal(&mut client, b"payload");
        for have in 0..record.len() {
            let need = if have < RECORD_HEADER_BYTES { RECORD_HEADER_BYTES } else { record.len() };
            assert_eq!(server.open(&mut record[..have].to_vec()), Ok(Open::Incomplete { need }));
        }
        let mut whole = record;
        let Ok(Open::Data { payload, record_len }) = server.open(&mut whole) else { panic!("not data") };
        assert_eq!((&whole[payload], record_len), (&b"payload"[..], whole.len()));
    }
}

#[test]
fn a_replayed_or_reordered_record_is_refused() {
    for params in [&TLS12, &TLS13] {
        let (mut client, mut server) = our_pair(params);
        let first = seal(&mut client, b"one");
        assert!(server.open(&mut first.clone()).is_ok());
        assert_eq!(refused(&mut server, &mut first.clone()), alert::BAD_RECORD_MAC);
    }
}

#[test]
fn lengths_and_kinds_out_of_the_standard_are_refused_by_the_header_alone() {
    for (header, tls13, expected) in [
        ([23, 3, 3, 0x41, 0x01], true, alert::RECORD_OVERFLOW),
        ([23, 3, 3, 0x40, 0x19], false, alert::RECORD_OVERFLOW),
        ([20, 3, 3, 0, 1], true, alert::UNEXPECTED_MESSAGE),
        ([20, 3, 3, 0, 1], false, alert::UNEXPECTED_MESSAGE),
        ([21, 3, 3, 0, 2], true, alert::UNEXPECTED_MESSAGE),
        ([22, 3, 3, 0, 9], true, alert::UNEXPECTED_MESSAGE),
        (*b"GET /", true, alert::UNEXPECTED_MESSAGE),
        ([23, 3, 1, 0, 99], true, alert::PROTOCOL_VERSION),
    ] {
        let (mut client, _) = our_pair(if tls13 { &TLS13 } else { &TLS12 });
        assert_eq!(refused(&mut client, &mut header.clone()), expected, "{header:?}");
    }
}

#[test]
fn padding_is_stripped_and_its_excess_refused() {
    let (mut client, mut server) = our_pair(&TLS13);
    // Inner plaintext: data, type, zeros; `seal` would put its own type behind, so the type goes before zeros by hand.
    let mut padded = b"data".to_vec();
    padded.push(APPLICATION_DATA);
    padded.resize(200, 0);
    let mut record = forge(&mut client, 0, &padded);
    let Ok(Open::Data { payload, .. }) = server.open(&mut record) else { panic!("not data") };
    assert_eq!(&record[payload], b"data");

    let mut nothing = forge(&mut client, 0, &[0; 50]);
    assert_eq!(refused(&mut server, &mut nothing), alert::UNEXPECTED_MESSAGE);
}

#[test]
fn nothing_but_data_alerts_and_known_messages_is_taken() {
    for (kind, payload, expected) in [
        (HANDSHAKE, &[1_u8, 0, 0, 0][..], alert::UNEXPECTED_MESSAGE),
        (HANDSHAKE, &[], alert::UNEXPECTED_MESSAGE),
        (HANDSHAKE, &[24, 0, 0, 1, 7], alert::ILLEGAL_PARAMETER),
        (HANDSHAKE, &[24, 0, 0, 1, 0, 4, 0], alert::UNEXPECTED_MESSAGE),
        (ALERT, &[1], alert::DECODE_ERROR),
        (ALERT, &[1, 0, 0], alert::DECODE_ERROR),
        (CHANGE_CIPHER_SPEC, &[1], alert::UNEXPECTED_MESSAGE),
        (99, &[1], alert::UNEXPECTED_MESSAGE),
    ] {
        let (mut client, mut server) = our_pair(&TLS13);
        let mut record = forge(&mut server, kind, payload);
        assert_eq!(refused(&mut client, &mut record), expected, "kind {kind} {payload:?}");
    }
}

#[test]
fn renegotiation_is_refused_in_both_roles() {
    let (mut client, mut server) = our_pair(&TLS12);
    let mut hello_request = forge(&mut server, HANDSHAKE, &[0, 0, 0, 0]);
    assert_eq!(refused(&mut client, &mut hello_request), alert::NO_RENEGOTIATION);
    let (mut client, mut server) = our_pair(&TLS12);
    let mut client_hello = forge(&mut client, HANDSHAKE, &[1, 0, 0, 0]);
    assert_eq!(refused(&mut server, &mut client_hello), alert::NO_RENEGOTIATION);
}

#[test]
fn a_message_broken_off_for_data_is_refused() {
    let (mut client, mut server) = our_pair(&TLS13);
    let mut half = forge(&mut server, HANDSHAKE, &[4, 0, 0, 50, 1]);
    assert!(matches!(client.open(&mut half), Ok(Open::Control { .. })));
    assert_eq!(refused(&mut client, &mut seal(&mut server, b"data")), alert::UNEXPECTED_MESSAGE);
}

#[test]
fn key_update_floods_end_and_data_resets_the_count() {
    let (mut client, mut server) = our_pair(&TLS13);
    let mut update = |client: &mut Session| {
        let mut out = [0; CONTROL_BYTES_MAX];
        let written = server.seal_control(&mut out).expect("a key update");
        client.open(&mut out[..written])
    };
    for _ in 0..CONTROL_RECORDS_MAX {
        assert!(matches!(update(&mut client), Ok(Open::Control { .. })));
    }
    assert_eq!(update(&mut client).expect_err("a flood").alert, alert::UNEXPECTED_MESSAGE);

    let (mut client, mut server) = our_pair(&TLS13);
    for _ in 0..4 * usize::from(CONTROL_RECORDS_MAX) {
        let mut out = [0; CONTROL_BYTES_MAX];
        let written = server.seal_control(&mut out).expect("a key update");
        assert!(client.open(&mut out[..written]).is_ok());
        assert!(client.open(&mut seal(&mut server, b"x")).is_ok());
    }
}

#[test]
fn rustls_answers_the_update_that_it_was_asked_for() {
    for role in [Role::Client, Role::Server] {
        let mut link = linked13(role);
        link.stock.refresh_traffic_keys().expect("1.3");
        link.stock_write(b"under new keys");
        assert_eq!(link.our_read(usize::MAX / 2), b"under new keys");
        assert!(link.session.wants_control());
        let wire = link.our_records(b"answered");
        assert!(!link.session.wants_control());
        assert_eq!(link.stock_read(&wire), b"answered");

        // A request from us, forged as ours never asks: rustls must answer, and we must follow.
        let mut out = [0; CONTROL_BYTES_MAX];
        let mut message = messages::KEY_UPDATE;
        message[4] = UPDATE_REQUESTED;
        let written = link.session.seal_small(HANDSHAKE, &message, &mut out).expect("sealed");
        let next = link.session.schedule_mut().and_then(Schedule::next_tx).expect("1.3");
        link.session.tx = Direction::new(next, true).expect("known").0;
        give(&mut link.stock, &out[..written]).expect("regular");
        link.stock_write(b"followed");
        assert_eq!(link.our_read(usize::MAX / 2), b"followed");
    }
}

#[test]
fn empty_records_in_a_row_are_bounded() {
    let (mut client, mut server) = our_pair(&TLS13);
    for _ in 0..EMPTY_RECORDS_MAX {
        assert!(matches!(server.open(&mut seal(&mut client, b"")), Ok(Open::Data { .. })));
    }
    assert!(server.open(&mut seal(&mut client, b"x")).is_ok());
    for _ in 0..EMPTY_RECORDS_MAX {
        assert!(server.open(&mut seal(&mut client, b"")).is_ok());
    }
    assert_eq!(refused(&mut server, &mut seal(&mut client, b"")), alert::UNEXPECTED_MESSAGE);
}

#[test]
fn alerts_end_a_session_and_user_canceled_does_not() {
    for params in [&TLS12, &TLS13] {
        let (mut client, mut server) = our_pair(params);
        let mut out = [0; CONTROL_BYTES_MAX];
        let written = server.seal_alert(alert::ACCESS_DENIED, &mut out).expect("an alert");
        assert!(server.seal(&mut [0; 64]).is_err(), "sealed behind a fatal alert");
        assert_eq!(client.open(&mut out[..written]), Ok(Open::Alert { code: alert::ACCESS_DENIED }));
        assert!(client.open(&mut [0; 5]).is_err() && client.seal(&mut [0; 64]).is_err());
    }
    let (mut client, mut server) = our_pair(&TLS13);
    let mut canceled = forge(&mut server, ALERT, &[1, alert::USER_CANCELED]);
    assert!(matches!(client.open(&mut canceled), Ok(Open::Control { .. })));
    assert!(client.open(&mut seal(&mut server, b"still here")).is_ok());
}

#[test]
fn close_notify_closes_one_direction_only() {
    let (mut client, mut server) = our_pair(&TLS13);
    let mut out = [0; CONTROL_BYTES_MAX];
    let written = client.seal_alert(alert::CLOSE_NOTIFY, &mut out).expect("close_notify");
    assert_eq!(server.open(&mut out[..written]), Ok(Open::CloseNotify { record_len: written }));
    assert_eq!(server.open(&mut b"ignored".to_vec()), Ok(Open::CloseNotify { record_len: 7 }));
    assert!(client.seal(&mut [0; 64]).is_err(), "sealed behind close_notify");
    assert!(matches!(client.open(&mut seal(&mut server, b"half-closed")), Ok(Open::Data { .. })));
}

#[test]
fn gcm_keys_are_changed_before_their_limit_and_never_used_beyond_it() {
    let (mut client, mut server) = our_pair(&TLS13);
    assert!(!client.wants_control());
    client.tx.jump(REKEY_RECORDS);
    server.rx.jump(REKEY_RECORDS);
    assert!(client.wants_control(), "no key update at the record count where one is due");
    let mut out = [0; CONTROL_BYTES_MAX];
    let written = client.seal_control(&mut out).expect("a key update");
    assert!(server.open(&mut out[..written]).is_ok());
    assert_eq!((client.wants_control(), client.tx.sequence()), (false, 0));
    assert!(server.open(&mut seal(&mut client, b"fresh")).is_ok());

    let (mut client, mut server) = our_pair(&TLS12);
    let last = (1 << 24) - 17;
    client.tx.jump(last);
    server.rx.jump(last);
    assert!(!client.wants_control(), "TLS 1.2 cannot change keys");
    assert!(server.open(&mut seal(&mut client, b"the last")).is_ok());
    let mut record = vec![0; client.header_len() + 1 + client.trailer_len()];
    assert!(client.seal(&mut record).is_err(), "sealed beyond the limit");
    let written = client.seal_alert(alert::CLOSE_NOTIFY, &mut out).expect("the reserve is for this");
    assert!(matches!(server.open(&mut out[..written]), Ok(Open::CloseNotify { .. })));
}

#[test]
fn frames_of_a_wrong_size_are_our_own_error() {
    let (mut client, _) = our_pair(&TLS13);
    assert_eq!(client.seal(&mut [0; 21]).expect_err("too short").alert, alert::INTERNAL_ERROR);
    let (mut client, _) = our_pair(&TLS13);
    let mut long = vec![0; client.header_len() + PAYLOAD_BYTES_MAX + 1 + client.trailer_len()];
    assert_eq!(client.seal(&mut long).expect_err("too long").alert, alert::INTERNAL_ERROR);
}

#[test]
fn debug_shows_no_key() {
    let (client, _) = our_pair(&TLS13);
    let text = format!("{client:?}");
    assert!(text.contains("[redacted]") && text.len() < 200, "{text}");
}

#[test]
fn rsa_suites_are_part_of_the_matrix() {
    let kinds: Vec<KeyKind> = suites().into_iter().map(|(_, key)| key).collect();
    assert_eq!((kinds.len(), kinds.iter().filter(|kind| **kind == KeyKind::Rsa).count()), (9, 3));
}

#[test]
fn a_flood_of_tickets_is_skipped_after_the_first_few() {
    let (mut client, mut server) = our_pair(&TLS13);
    client.tickets_left = TICKETS_MAX;
    // NewSessionTicket of 14 bytes: lifetime, age_add, no nonce, a ticket of one byte, no extensions.
    let ticket = [4, 0, 0, 14, 0, 0, 28, 32, 1, 2, 3, 4, 0, 0, 1, 9, 0, 0];
    let mut record = forge(&mut server, HANDSHAKE, &ticket.repeat(900));
    let record_len = record.len();
    assert_eq!(client.open(&mut record), Ok(Open::Control { record_len }));
    assert_eq!(client.tickets_left, 0, "the first few were taken");

    client.tickets_left = TICKETS_MAX;
    let mut malformed = forge(&mut server, HANDSHAKE, &[4, 0, 0, 3, 1, 2, 3]);
    assert_eq!(refused(&mut client, &mut malformed), alert::DECODE_ERROR);
}
