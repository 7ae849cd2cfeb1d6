//! Exact lines, and the warning that a denial leaves.

use std::io::{Read, Seek};
use std::time::SystemTime;

use super::*;
use crate::mesh::Address;
use crate::policy::{DefaultPolicy, Ground};
use crate::telemetry::cells::Direction;
use crate::telemetry::denial::DenialId;
use crate::telemetry::record::Decision;

pub(crate) fn spiffe(service: &str) -> SpiffeId {
    SpiffeId::service("t.consul", "", "", "dc1", service).expect("valid")
}

/// An inbound connection from `web` to `db` that `allowed` decides on.
pub(crate) fn inbound(allowed: bool) -> ConnectionRecord {
    let (verb, reason) = if allowed { ("allow", CloseReason::Complete) } else { ("deny", CloseReason::Denied) };
    ConnectionRecord {
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_006),
        direction: Direction::Inbound,
        service: "db".into(),
        upstream: None,
        downstream: Some(([127, 0, 0, 1], 30_001).into()),
        original: None,
        server_name: None,
        endpoint: allowed.then(|| Address::Tcp(([127, 0, 0, 1], 5_432).into())),
        source: Some(spiffe("web")),
        destination: Some(spiffe("db")),
        decision: Some(Decision { allowed, by: Ground::Intention(format!("web -> db {verb} (precedence 9)").into()) }),
        caller: None,
        denial: (!allowed).then(|| DenialId::new(1, 0, 1)),
        tls_version: Some(0x0304),
        tls_suite: Some(0x1301),
        tls_resumed: false,
        bytes_from_mesh: 1_200,
        bytes_to_mesh: 34,
        connect: allowed.then(|| Duration::from_micros(250)),
        handshake: Some(Duration::from_nanos(1_234_567)),
        total: Duration::from_millis(2_500),
        attempts: 1,
        reason,
        detail: None,
        access: None,
    }
}

fn written(records: &[ConnectionRecord]) -> String {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("connections.log");
    let mut log = ConnectionLog::open(&Destination::File(path.clone()), &Reopener::default()).expect("opens");
    for record in records {
        log.record(record, Instant::now());
    }
    log.flush(Instant::now());
    drop(log);
    std::fs::read_to_string(path).expect("written")
}

/// Everything that `work` says by tracing.
pub(crate) fn said(work: impl FnOnce()) -> String {
    let file = Arc::new(tempfile::tempfile().expect("file"));
    let subscriber = tracing_subscriber::fmt().with_writer(Arc::clone(&file)).with_ansi(false).finish();
    tracing::subscriber::with_default(subscriber, work);
    let mut text = String::new();
    (&*file).rewind().expect("rewinds");
    (&*file).read_to_string(&mut text).expect("text");
    text
}

#[test]
fn an_allowed_connection_is_this_line() {
    assert_eq!(
        written(&[inbound(true)]),
        concat!(
            r#"{"time":"2026-01-02T03:04:05.006Z","direction":"inbound","service":"db","upstream":null,"#,
            r#""source":"spiffe://t.consul/ns/default/dc/dc1/svc/web","destination":"spiffe://t.consul/ns/default/dc/dc1/svc/db","#,
            r#""decision":"allowed","by":"intention web -> db allow (precedence 9)","bytes_from_mesh":1200,"bytes_to_mesh":34,"#,
            r#""connect_ms":0.25,"handshake_ms":1.235,"total_ms":2500.0,"tls_version":"TLSv1.3","#,
            r#""tls_suite":"TLS_AES_128_GCM_SHA256","tls_resumed":false,"downstream":"127.0.0.1:30001","#,
            r#""endpoint":"127.0.0.1:5432","attempts":1,"reason":"complete","detail":null}"#,
            "\n"
        )
    );
}

#[test]
fn a_denied_connection_names_the_remedy() {
    assert_eq!(
        written(&[inbound(false)]),
        concat!(
            r#"{"time":"2026-01-02T03:04:05.006Z","direction":"inbound","service":"db","upstream":null,"#,
            r#""source":"spiffe://t.consul/ns/default/dc/dc1/svc/web","destination":"spiffe://t.consul/ns/default/dc/dc1/svc/db","#,
            r#""decision":"denied","by":"intention web -> db deny (precedence 9)","#,
            r#""remedy":"consul intention create -replace -allow web db","bytes_from_mesh":1200,"bytes_to_mesh":34,"#,
            r#""connect_ms":null,"handshake_ms":1.235,"total_ms":2500.0,"tls_version":"TLSv1.3","#,
            r#""tls_suite":"TLS_AES_128_GCM_SHA256","tls_resumed":false,"downstream":"127.0.0.1:30001","#,
            r#""endpoint":null,"attempts":1,"reason":"denied","detail":null,"denial":"0000010000000001","why":"identity \"web\" may not call \"db\": intention web -> db deny (precedence 9)"}"#,
            "\n"
        )
    );
}

#[test]
fn an_outbound_failure_is_this_line_and_stays_one_line() {
    let record = ConnectionRecord {
        direction: Direction::Outbound,
        service: "web".into(),
        upstream: Some("db".into()),
        source: Some(spiffe("web")),
        destination: None,
        decision: None,
        endpoint: Some(Address::Tcp(([10, 0, 0, 9], 20_000).into())),
        tls_version: None,
        tls_suite: None,
        handshake: None,
        connect: None,
        attempts: 3,
        reason: CloseReason::HandshakeFailed,
        detail: Some("peer said \"no\"\nand more".into()),
        ..inbound(true)
    };
    assert_eq!(
        written(&[record]),
        concat!(
            r#"{"time":"2026-01-02T03:04:05.006Z","direction":"outbound","service":"web","upstream":"db","#,
            r#""source":"spiffe://t.consul/ns/default/dc/dc1/svc/web","destination":null,"decision":null,"by":null,"#,
            r#""bytes_from_mesh":1200,"bytes_to_mesh":34,"connect_ms":null,"handshake_ms":null,"total_ms":2500.0,"#,
            r#""tls_version":null,"tls_suite":null,"tls_resumed":false,"downstream":"127.0.0.1:30001","#,
            r#""endpoint":"10.0.0.9:20000","attempts":3,"reason":"handshake_failed","detail":"peer said \"no\"\nand more"}"#,
            "\n"
        )
    );
}

#[test]
fn probes_are_not_logged() {
    let probe = ConnectionRecord { reason: CloseReason::Probe, decision: None, ..inbound(true) };
    assert_eq!(written(&[probe, inbound(true)]).lines().count(), 1);
}

#[test]
fn a_denial_is_said_once_an_interval_with_the_count_of_the_rest() {
    let text = said(|| {
        let mut log = ConnectionLog::open(&Destination::None, &Reopener::default()).expect("opens");
        let start = Instant::now();
        for _ in 0..3 {
            log.record(&inbound(false), start);
        }
        log.record(&inbound(true), start);
        log.flush(start);
        log.record(&inbound(false), start + DENIAL_INTERVAL);
        log.record(&inbound(false), start + DENIAL_INTERVAL);
        log.flush(start + DENIAL_INTERVAL * 2);
    });
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines.iter().all(|line| line.contains("WARN") && line.contains("/svc/web") && line.contains("db")), "{text}");
    assert!(lines[0].contains("intention web -> db deny (precedence 9)"), "{text}");
    assert!(lines[0].contains("consul intention create -replace -allow web db"), "{text}");
    assert!(lines[0].contains("suppressed=0") && lines[1].contains("suppressed=2"), "{text}");
    assert!(lines[2].contains("denied again") && lines[2].contains("suppressed=1"), "{text}");
}

#[test]
fn a_default_denial_names_the_default() {
    let decision = Some(Decision { allowed: false, by: Ground::Default(DefaultPolicy::Deny) });
    let line = written(&[ConnectionRecord { decision, ..inbound(false) }]);
    assert!(line.contains(r#""by":"default policy deny","remedy":"consul intention create -replace -allow web db""#), "{line}");
}
