//! Formats against what Envoy 1.40 wrote, and the logs that are replaced while connections end.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value as Json, json};

use super::*;
use crate::mesh::Address;
use crate::mesh::caller::Caller;
use crate::telemetry::cells::Direction;
use crate::telemetry::close::CloseReason;
use crate::telemetry::hub::callers::tests::{outbound as called, task};
use crate::telemetry::log::line;
use crate::telemetry::log::tests::inbound;
use crate::telemetry::record::AccessFacts;
use crate::tls::fixtures::Ca;

fn text(format: &str, record: &ConnectionRecord) -> String {
    write(&Template::text(format).expect("a format"), record)
}

fn write(template: &Template, record: &ConnectionRecord) -> String {
    let host = Host::read();
    let mut line = Vec::new();
    template.write(&Facts::new(record, &host, 7, SystemTime::UNIX_EPOCH), &mut line);
    String::from_utf8(line).expect("text")
}

/// `web` here, which called `db` on 127.0.0.1:21000.
fn outbound() -> ConnectionRecord {
    ConnectionRecord {
        direction: Direction::Outbound,
        service: "web".into(),
        upstream: Some("db".into()),
        endpoint: Some(Address::Tcp(([127, 0, 0, 1], 21_000).into())),
        decision: None,
        tls_version: Some(0x0303),
        tls_suite: Some(0xc02c),
        access: Some(Box::new(AccessFacts {
            downstream_local: Some(([127, 0, 0, 1], 9_000).into()),
            upstream_local: Some(([127, 0, 0, 1], 40_000).into()),
            cluster: Some("db.default.dc1.internal.t.consul".into()),
            ..AccessFacts::default()
        })),
        ..inbound(true)
    }
}

/// `outbound`, with nothing dialed.
fn undialed(reason: CloseReason) -> ConnectionRecord {
    ConnectionRecord { endpoint: None, connect: None, handshake: None, attempts: 0, reason, ..outbound() }
}

/// `outbound`, with a dial that came to nothing.
fn undone(reason: CloseReason, detail: Option<&str>) -> ConnectionRecord {
    let detail = detail.map(Into::into);
    ConnectionRecord { handshake: None, tls_version: None, tls_suite: None, reason, detail, ..outbound() }
}

#[test]
fn each_side_is_the_one_that_envoy_means() {
    let format = "%BYTES_RECEIVED%/%BYTES_SENT% %UPSTREAM_CLUSTER% %UPSTREAM_HOST% %UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_LOCAL_PORT% \
         %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%UPSTREAM_TLS_VERSION% %UPSTREAM_TLS_CIPHER% \
         %UPSTREAM_PEER_URI_SAN%|%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER% %DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_LOCAL_URI_SAN%";
    assert_eq!(
        text(format, &outbound()),
        "34/1200 db.default.dc1.internal.t.consul 127.0.0.1:21000 127.0.0.1:40000 40000 127.0.0.1:9000 127.0.0.1|TLSv1.2 \
         ECDHE-ECDSA-AES256-GCM-SHA384 spiffe://t.consul/ns/default/dc/dc1/svc/db|- - - -"
    );
    assert_eq!(
        text(format, &inbound(true)),
        "1200/34 local_app 127.0.0.1:5432 - - - 127.0.0.1|- - -|TLSv1.3 TLS_AES_128_GCM_SHA256 \
         spiffe://t.consul/ns/default/dc/dc1/svc/web spiffe://t.consul/ns/default/dc/dc1/svc/db"
    );
}

#[test]
fn tls_outside_of_the_mesh_is_told_on_its_side() {
    let format =
        "%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER% %DOWNSTREAM_PEER_URI_SAN%|%UPSTREAM_TLS_VERSION% %UPSTREAM_TLS_CIPHER%";
    let facts = || Some(Box::new(AccessFacts { outside_tls: Some((0x0303, 0xc02b)), ..AccessFacts::default() }));
    let suite = "ECDHE-ECDSA-AES128-GCM-SHA256";
    let of_ingress = text(format, &ConnectionRecord { access: facts(), ..outbound() });
    assert_eq!(of_ingress, format!("TLSv1.2 {suite} -|TLSv1.2 ECDHE-ECDSA-AES256-GCM-SHA384"));
    let of_terminating = text(format, &ConnectionRecord { access: facts(), ..inbound(true) });
    let caller = "TLSv1.3 TLS_AES_128_GCM_SHA256 spiffe://t.consul/ns/default/dc/dc1/svc/web";
    assert_eq!(of_terminating, format!("{caller}|TLSv1.2 {suite}"));
    // Nobody of the mesh was met: the client's TLS is told all the same.
    let undialed = text(format, &ConnectionRecord { access: facts(), ..undialed(CloseReason::NoEndpoint) });
    assert_eq!(undialed, format!("TLSv1.2 {suite} -|- -"));
}

#[test]
fn the_default_line_is_envoys() {
    let template = template(&AccessLogFormat::Default).expect("a format");
    assert_eq!(
        write(&template, &outbound()),
        "[2026-01-02T03:04:05.006Z] \"- - -\" 0 - 34 1200 2500 - \"-\" \"-\" \"-\" \"-\" \"127.0.0.1:21000\""
    );
}

#[test]
fn json_is_sorted_and_typed_like_envoys() {
    let format = json!({
        "z": "%DURATION%", "B": "plain", "p": "%PROTOCOL%", "f": "%RESPONSE_FLAGS%", "t": "%ENVIRONMENT(RINGFENCE_NOPE)%",
        "a": {"q": "x%BYTES_SENT%\"y\n%PROTOCOL%", "b": 5, "c": true, "d": null, "A": [1, "%BYTES_SENT%", "%PROTOCOL%"], "j": {}},
    });
    let Json::Object(format) = format else { panic!("an object") };
    assert_eq!(
        write(&Template::json(&format).expect("a format"), &outbound()),
        "{\"B\":\"plain\",\"a\":{\"A\":[1,1200,null],\"b\":5,\"c\":true,\"d\":null,\"j\":{},\"q\":\"x1200\\\"y\\n-\"},\
         \"f\":\"-\",\"p\":null,\"t\":\"-\",\"z\":2500}"
    );
    let line: Map<String, Json> = serde_json::from_str(&write(
        &template(&AccessLogFormat::consul()).expect("a format"),
        &undone(CloseReason::ConnectTimeout, None),
    ))
    .expect("JSON");
    assert_eq!(line["response_flags"], "UF,URX");
    assert_eq!(line["upstream_transport_failure_reason"], Json::Null);
    assert_eq!(line["bytes_sent"], 1_200);
}

#[test]
fn what_envoy_refuses_is_refused_with_its_name() {
    for (format, named) in [
        ("%NOPE%", "NOPE"),
        ("%START_TIME", "byte 0"),
        ("100%", "byte 3"),
        ("%", "byte 0"),
        ("%start_time%", "byte 0"),
        ("%UPSTREAM_CLUSTER%%", "byte 18"),
        ("%UPSTREAM_CLUSTER:x%", "byte 0"),
        ("%UPSTREAM_CLUSTER(a)%", "UPSTREAM_CLUSTER does not take any parameters"),
        ("%RESPONSE_FLAGS:3%", "RESPONSE_FLAGS"),
        ("%REQUESTED_SERVER_NAME(X)%", "REQUESTED_SERVER_NAME"),
        ("%START_TIME(%Y):4%", "START_TIME does not allow length"),
        ("%REQ%", "REQ requires parameters"),
        ("%REQ()%", "REQ requires parameters"),
        ("%ENVIRONMENT%", "ENVIRONMENT requires parameters"),
        ("%UPSTREAM_PEER_SERIAL%", "UPSTREAM_PEER_SERIAL"),
        ("%RINGFENCE(secret)%", "secret"),
    ] {
        let error = check(&AccessLogFormat::Text(format.to_owned())).expect_err(format).to_string();
        assert!(error.contains(named), "{format}: {error}");
    }
    for format in [
        "",
        "%%",
        "%START_TIME()%",
        "%START_TIME(%E4n)%",
        "%TRAILER(X):4%",
        "%RESPONSE_CODE_DETAILS(x)%",
        "%REQUESTED_SERVER_NAME(SNI_ONLY)%",
    ] {
        assert!(check(&AccessLogFormat::Text(format.to_owned())).is_ok(), "{format}");
    }
    assert!(check(&AccessLogFormat::Text("x".repeat(1 << 16))).is_err());
}

/// The table of [`flags`]; `tests/access_log_flags_match_envoy.rs` provokes its rows on Envoy and on us.
#[test]
fn every_end_has_its_flags() {
    let of = |record: &ConnectionRecord| {
        text(
            "%RESPONSE_FLAGS%|%CONNECTION_TERMINATION_DETAILS%|%UPSTREAM_TRANSPORT_FAILURE_REASON%|%DOWNSTREAM_LOCAL_CLOSE_REASON%",
            record,
        )
    };
    let refused = undone(CloseReason::ConnectFailed, Some("Connection refused (os error 111)"));
    assert_eq!(of(&refused), "UF,URX|-|delayed_connect_error:_Connection_refused|tcp_initializion_failure:0");
    assert_eq!(
        text("%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_CONNECTION_ID%", &refused),
        "127.0.0.1:21000 - - 0"
    );
    assert_eq!(of(&undone(CloseReason::ConnectTimeout, None)), "UF,URX|-|-|tcp_initializion_failure:0");
    assert_eq!(
        of(&undone(CloseReason::HandshakeFailed, Some("not TLS"))),
        "UF,URX|-|TLS_error:|not_TLS:TLS_error_end|tcp_initializion_failure:0"
    );
    assert_eq!(
        of(&undone(CloseReason::IdentityMismatch, Some("it is web"))),
        "UF,URX|-|TLS_error:|CERTIFICATE_VERIFY_FAILED:verify_cert_failed:_it_is_web:TLS_error_end|tcp_initializion_failure:0"
    );
    assert_eq!(of(&undialed(CloseReason::NoEndpoint)), "UH|-|-|tcp_initializion_failure:1");
    assert_eq!(of(&undialed(CloseReason::Limit)), "UO|-|-|tcp_initializion_failure:2");
    assert_eq!(of(&undialed(CloseReason::NoRoute)), "NR|-|-|-");
    assert_eq!(of(&inbound(false)), "-|rbac_access_denied_matched_policy[none]|-|rbac_deny_close");
    assert_eq!(of(&ConnectionRecord { reason: CloseReason::Limit, ..inbound(true) }), "-|-|-|over_connection_limit");
    let types = |record: &ConnectionRecord| {
        text("%RESPONSE_FLAGS_LONG% %DOWNSTREAM_DETECTED_CLOSE_TYPE% %UPSTREAM_DETECTED_CLOSE_TYPE%", record)
    };
    let by =
        |reason, record| ConnectionRecord { reason, detail: Some("Connection reset by peer (os error 104)".into()), ..record };
    assert_eq!(types(&by(CloseReason::PeerReset, outbound())), "UpstreamRemoteReset LocalReset RemoteReset");
    assert_eq!(types(&by(CloseReason::LocalReset, outbound())), "- RemoteReset Normal");
    assert_eq!(types(&by(CloseReason::LocalReset, inbound(true))), "UpstreamRemoteReset LocalReset RemoteReset");
    assert_eq!(types(&by(CloseReason::PeerReset, inbound(true))), "- RemoteReset Normal");
    assert_eq!(types(&outbound()), "- Normal Normal");
    let garbage = ConnectionRecord {
        detail: Some("no TLS".into()),
        reason: CloseReason::HandshakeFailed,
        handshake: None,
        ..inbound(true)
    };
    assert_eq!(text("%RESPONSE_FLAGS% %DOWNSTREAM_TRANSPORT_FAILURE_REASON%", &garbage), "- TLS_error:|no_TLS:TLS_error_end");
}

#[test]
fn a_length_cuts_between_characters() {
    let record = ConnectionRecord { detail: Some("é é".into()), ..inbound(true) };
    assert_eq!(text("%RINGFENCE(detail):3%|%RINGFENCE(detail):4%", &record), "é |é ");
    assert_eq!(text("%RINGFENCE(detail):0%|%RINGFENCE(detail):100%", &record), "|é é");
}

#[test]
fn a_denial_says_who_was_denied() {
    let denied = inbound(false);
    assert_eq!(
        text("%RINGFENCE(source)% %RINGFENCE(decision)% %RINGFENCE(by)% %RINGFENCE(denial)% %RINGFENCE(dag)%", &denied),
        "spiffe://t.consul/ns/default/dc/dc1/svc/web denied intention web -> db deny (precedence 9) 0000010000000001 -"
    );
    let caller: Caller = task("payroll", "load", "r1", 1);
    let record = called(caller, "db", None);
    assert_eq!(text("%RINGFENCE(dag)%.%RINGFENCE(task)% %RINGFENCE(attempts)%", &record), "payroll.load 1");
    let format = json!({"attempts": "%RINGFENCE(attempts)%", "dag": "%RINGFENCE(dag)%", "resumed": "%RINGFENCE(tls_resumed)%"});
    let Json::Object(format) = format else { panic!("an object") };
    let line = write(&Template::json(&format).expect("a format"), &record);
    assert_eq!(line, "{\"attempts\":1,\"dag\":\"payroll\",\"resumed\":false}");
}

#[test]
fn every_field_of_the_connection_log_can_be_named() {
    let known: HashSet<&str> = line::FIELDS.into_iter().collect();
    assert_eq!(known.len(), line::FIELDS.len());
    let redirected = ConnectionRecord { original: Some(([10, 0, 0, 1], 1).into()), ..inbound(false) };
    for record in [redirected, called(task("d", "t", "r", 1), "db", Some(1))] {
        let line = serde_json::to_value(line::Line::from(&record)).expect("JSON");
        let keys = |value: &Json| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
        let of_caller = line.get("caller").map(keys).unwrap_or_default();
        for key in keys(&line).iter().chain(&of_caller).filter(|key| *key != "caller") {
            assert!(known.contains(key.as_str()), "{key} is not in FIELDS");
        }
    }
}

#[test]
fn a_certificate_tells_what_envoy_tells() {
    let ca = Ca::new("t.consul");
    let svid = ca.svid("web");
    let facts = AccessFacts { peer_certificate: Some(svid.chain[0].as_ref().into()), ..AccessFacts::default() };
    let record = ConnectionRecord { access: Some(Box::new(facts)), ..inbound(true) };
    let (_, parsed) = x509_parser::parse_x509_certificate(&svid.chain[0]).expect("a certificate");
    let serial: String = parsed.raw_serial().iter().skip_while(|byte| **byte == 0).map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text("%DOWNSTREAM_PEER_SERIAL%", &record), serial);
    assert_eq!(text("%DOWNSTREAM_PEER_FINGERPRINT_256%", &record).len(), 64);
    assert!(text("%DOWNSTREAM_PEER_CERT_V_END%", &record).ends_with(".000Z"));
    assert_eq!(text("%UPSTREAM_PEER_SUBJECT% %UPSTREAM_PEER_CERT_V_END%", &record), "- -");
    let outside = AccessFacts {
        outside_certificate: Some(svid.chain[0].as_ref().into()),
        outside_tls: Some((0x0304, 0x1301)),
        ..AccessFacts::default()
    };
    let of_app = ConnectionRecord { access: Some(Box::new(outside)), ..inbound(true) };
    let end = text("%DOWNSTREAM_PEER_CERT_V_END%", &record);
    let format = "%UPSTREAM_PEER_CERT_V_END% %UPSTREAM_PEER_URI_SAN% %DOWNSTREAM_PEER_CERT_V_END% %DOWNSTREAM_PEER_URI_SAN%";
    let caller = "spiffe://t.consul/ns/default/dc/dc1/svc/web";
    assert_eq!(text(format, &of_app), format!("{end} {} - {caller}", svid.id));
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI("urn:a\nforged".try_into().expect("in ASCII"))];
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "b\nforged");
    let forging = params.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("signed");
    let forging = AccessFacts { outside_certificate: Some(forging.der().as_ref().into()), ..AccessFacts::default() };
    let told = text(
        "%UPSTREAM_PEER_URI_SAN% %UPSTREAM_PEER_SUBJECT%",
        &ConnectionRecord { access: Some(Box::new(forging)), ..inbound(true) },
    );
    assert!(told.starts_with("urn:a\\nforged ") && told.contains("O=b\\nforged") && !told.contains('\n'), "{told}");
    let broken = AccessFacts { peer_certificate: Some(Box::from(*b"junk")), ..AccessFacts::default() };
    assert_eq!(text("%DOWNSTREAM_PEER_ISSUER%", &ConnectionRecord { access: Some(Box::new(broken)), ..inbound(true) }), "-");
}

fn setting(path: &Path, format: &str, unmatched_only: bool) -> AccessLog {
    AccessLog {
        target: LogTarget::File(path.to_owned()),
        format: AccessLogFormat::Text(format.to_owned()),
        unmatched_only,
        only: None,
    }
}

fn read(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[test]
fn a_replaced_log_loses_no_line() {
    let folder = tempfile::tempdir().expect("folder");
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let mut logs = AccessLogs::open(&[], &Reopener::default()).expect("opens");
    assert!(!logs.are_on());
    logs.record(&inbound(true));
    for round in 0..200 {
        let path = if round % 2 == 0 { &one } else { &two };
        logs.learn(&[setting(path, "%CONNECTION_ID%", false), setting(path, "%CONNECTION_ID%", true)]);
        assert!(logs.are_on());
        logs.record(&inbound(true));
        logs.record(&undialed(CloseReason::NoRoute));
        logs.flush();
    }
    logs.learn(&[]);
    assert!(!logs.are_on());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while logs.counts().written < 400 && std::time::Instant::now() < deadline {
        logs.flush();
        std::thread::yield_now();
    }
    assert_eq!(logs.counts(), Counts { written: 400, dropped: 0, errors: 0 });
    let numbers: HashSet<u64> = read(&one).iter().chain(&read(&two)).map(|line| line.parse().expect("a number")).collect();
    assert_eq!(numbers, (2..=401).collect());
}

#[test]
fn a_log_of_some_listeners_takes_their_connections_alone() {
    let folder = tempfile::tempdir().expect("folder");
    let [db, inbound] = ["db", "inbound"].map(|name| folder.path().join(name));
    let only = |path: &Path, service: Option<&str>, upstream: Option<&str>| AccessLog {
        only: Some([Logged { service: service.map(Into::into), upstream: upstream.map(Into::into) }].into()),
        ..setting(path, "%RINGFENCE(service)%", false)
    };
    let record = outbound();
    assert_eq!(record.upstream.as_deref(), Some("db"));
    let settings = [only(&db, None, Some("db")), only(&inbound, Some(&record.service), None)];
    let mut logs = AccessLogs::open(&settings, &Reopener::default()).expect("opens");
    logs.record(&record);
    logs.record(&ConnectionRecord { upstream: Some("other".into()), ..outbound() });
    logs.record(&ConnectionRecord { upstream: None, ..outbound() });
    logs.record(&ConnectionRecord { upstream: None, service: "other".into(), ..outbound() });
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while logs.counts().written < 2 && std::time::Instant::now() < deadline {
        logs.flush();
        std::thread::yield_now();
    }
    assert_eq!((read(&db).len(), read(&inbound).len()), (1, 1));
}

#[test]
fn more_logs_than_are_kept_are_left_out() {
    let folder = tempfile::tempdir().expect("folder");
    let settings: Vec<_> = (0..100).map(|number| setting(&folder.path().join(number.to_string()), "x", false)).collect();
    let mut logs = AccessLogs::open(&[], &Reopener::default()).expect("opens");
    logs.learn(&settings);
    assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 64);
}

#[test]
fn unmatched_connections_have_their_own_log() {
    let folder = tempfile::tempdir().expect("folder");
    let [all, unmatched] = ["all", "unmatched"].map(|name| folder.path().join(name));
    let format = "%RESPONSE_FLAGS% %ACCESS_LOG_TYPE% %RESPONSE_CODE_DETAILS%";
    let settings = [setting(&all, format, false), setting(&unmatched, format, true)];
    let mut logs = AccessLogs::open(&settings, &Reopener::default()).expect("opens");
    logs.record(&inbound(true));
    logs.record(&undialed(CloseReason::NoRoute));
    // What flags say holds, whatever the control plane says.
    logs.learn(&[]);
    logs.record(&undialed(CloseReason::NoEndpoint));
    drop(logs);
    assert_eq!(read(&all), ["- TcpConnectionEnd -", "UH TcpConnectionEnd -"]);
    assert_eq!(read(&unmatched), ["NR NotSet filter_chain_not_found"]);
}

#[test]
fn a_log_is_opened_again_where_its_file_was() {
    let folder = tempfile::tempdir().expect("folder");
    let [path, moved] = ["log", "log.1"].map(|name| folder.path().join(name));
    let reopener = Reopener::default();
    let mut logs = AccessLogs::open(&[setting(&path, "%CONNECTION_ID%", false)], &reopener).expect("opens");
    logs.record(&inbound(true));
    logs.flush();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while logs.counts().written < 1 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    std::fs::rename(&path, &moved).expect("moved");
    reopener.reopen();
    logs.record(&inbound(true));
    drop(logs);
    assert_eq!((read(&moved), read(&path)), (vec!["1".to_owned()], vec!["2".to_owned()]));
    let missing = setting(Path::new("/nowhere/at/all"), "", false);
    assert!(AccessLogs::open(&[missing], &reopener).is_err_and(|error| error.to_string().contains("/nowhere/at/all")));
}

proptest::proptest! {
    #[test]
    fn no_format_panics(format in "[%A-Z_():0-9 é]{0,40}|(%(RINGFENCE|REQ|START_TIME|DURATION)(\\([a-z%]{0,4}\\))?(:[0-9]{0,30})?%){0,3}") {
        if let Ok(template) = Template::text(&format) {
            write(&template, &inbound(false));
        }
    }
}
