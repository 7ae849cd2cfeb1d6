//! The text that a scraper reads.

use std::time::Duration;

use super::*;
use crate::telemetry::cells::ListenerCells;
use crate::telemetry::channel::{self, Sender};
use crate::telemetry::hub::Hub;
use crate::telemetry::hub::callers::tests::{component, outbound, stranger, task};
use crate::telemetry::log::tests::inbound;
use crate::telemetry::log::{ConnectionLog, Destination, Reopener};
use crate::telemetry::record::Event;

fn hub() -> (Sender, Hub) {
    let (sender, receiver) = channel::pair();
    let log = ConnectionLog::open(&Destination::None, &Reopener::default()).expect("opens");
    (sender, Hub::new(vec![receiver], log))
}

/// What a scraper gets of `hub`.
pub(in crate::telemetry) fn page(hub: &mut Hub, which: Which) -> String {
    hub.render() + &hub.sums(which).text()
}

fn bind(port: u16) -> crate::mesh::Bind {
    crate::mesh::Bind::Tcp(([127, 0, 0, 1], port).into())
}

fn leaf() -> (Arc<str>, Arc<str>) {
    ("db".into(), "db-proxy".into())
}

#[test]
fn every_metric_is_published_with_help_and_type() {
    let (mut sender, mut hub) = hub();
    let up = |port, direction, upstream: Option<&str>| Event::ListenerUp {
        bind: bind(port),
        cells: Arc::new(ListenerCells::new(direction, "db".into(), upstream.map(Into::into))),
    };
    sender.send(up(20_000, Direction::Inbound, None));
    sender.send(up(20_001, Direction::Outbound, Some("cache")));
    sender.send(Event::Connection(Box::new(inbound(true))));
    sender.send(Event::Connection(Box::new(outbound(task("payroll", "load", "r1", 1), "cache", None))));
    hub.drain();
    hub.exporter().publish_snapshot(&Snapshot::default(), 0);
    // Identities are made elsewhere; the name alone matters here.
    hub.exporter().publish_leaf(&leaf(), 1.0);
    let text = page(&mut hub, Which::All);
    for metric in METRICS {
        let kind = format!("{:?}", metric.kind).to_lowercase();
        let name = metric.name;
        assert!(text.contains(&format!("# HELP {name} {}\n", metric.help)), "no HELP for {name}");
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "no TYPE {kind} for {name}");
        let sample = if metric.kind == Kind::Histogram { format!("\n{name}_count{{") } else { format!("\n{name}") };
        assert!(text.contains(&sample), "no sample of {name}");
    }
    let described = text.lines().filter(|line| line.starts_with("# HELP ")).count();
    let typed = text.lines().filter(|line| line.starts_with("# TYPE ")).count();
    assert_eq!((described, typed), (METRICS.len(), METRICS.len()), "a name is published that METRICS does not describe");
}

#[test]
fn names_follow_the_rules() {
    let mut names = HashSet::new();
    for Metric { name, kind, unit, help } in METRICS {
        assert!(names.insert(name), "{name} is there twice");
        assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
        assert!(help.ends_with('.') && !help.contains('\n'), "{name}: {help}");
        if *unit == metrics::Unit::Bytes {
            assert!(name.contains("bytes"), "{name} counts bytes");
        }
        if *unit == metrics::Unit::Seconds {
            assert!(name.ends_with("_seconds"), "{name} measures seconds");
        }
    }
}

#[test]
fn labels_and_values_are_exact() {
    let (mut sender, mut hub) = hub();
    let cells = Arc::new(ListenerCells::new(Direction::Outbound, "web".into(), Some("db?dc=\"dc2\"".into())));
    cells.bytes_from_mesh.add(12);
    cells.bytes_to_mesh.add(34);
    cells.active.add(2);
    cells.closed[CloseReason::ConnectTimeout as usize].add(5);
    sender.send(Event::ListenerUp { bind: bind(20_002), cells: Arc::clone(&cells) });
    hub.drain();
    let text = page(&mut hub, Which::All);
    let labels = r#"direction="outbound",service="web",upstream="db?dc=\"dc2\"""#;
    for line in [
        format!(r#"ringfence_bytes_total{{{labels},flow="from_mesh"}} 12"#),
        format!(r#"ringfence_bytes_total{{{labels},flow="to_mesh"}} 34"#),
        format!("ringfence_connections_active{{{labels}}} 2"),
        format!(r#"ringfence_connections_closed_total{{{labels},reason="connect_timeout"}} 5"#),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains(r#"reason="shutdown""#), "reasons that never happened are left out");
}

#[test]
fn what_was_never_used_is_left_out_where_that_is_asked_for() {
    let (mut sender, mut hub) = hub();
    for (port, direction, upstream) in [
        (20_003, Direction::Outbound, Some("db")),
        (20_004, Direction::Outbound, Some("idle")),
        (20_005, Direction::Inbound, None),
    ] {
        let cells = Arc::new(ListenerCells::new(direction, "web".into(), upstream.map(Into::into)));
        cells.connections.add(u64::from(upstream == Some("db")));
        sender.send(Event::ListenerUp { bind: bind(port), cells });
    }
    hub.drain();
    // All of them were there once: that is not remembered.
    assert!(page(&mut hub, Which::All).contains(r#"upstream="idle""#));
    let text = page(&mut hub, Which::Used);
    let of_web: Vec<&str> = text.lines().filter(|line| line.contains(r#"service="web""#)).collect();
    // A way in always, and all of an upstream that is used: what counts up from 0 is visible to rate().
    for line in [
        r#"ringfence_connections_total{direction="outbound",service="web",upstream="db"} 1"#,
        r#"ringfence_connect_failures_total{direction="outbound",service="web",upstream="db"} 0"#,
        r#"ringfence_connections_total{direction="inbound",service="web"} 0"#,
        r#"ringfence_connections_closed_total{direction="inbound",service="web",reason="denied"} 0"#,
    ] {
        assert!(of_web.contains(&line), "{line} is not among {of_web:#?}");
    }
    assert!(!text.contains(r#"upstream="idle""#), "{text}");
}

#[test]
fn durations_land_in_their_buckets_and_probes_do_not() {
    let (mut sender, mut hub) = hub();
    let probe = ConnectionRecord { reason: CloseReason::Probe, decision: None, ..inbound(true) };
    let slow = ConnectionRecord { handshake: Some(Duration::from_secs(2)), ..inbound(true) };
    for record in [probe, inbound(true), slow] {
        sender.send(Event::Connection(Box::new(record)));
    }
    hub.drain();
    let text = page(&mut hub, Which::All);
    let labels = r#"direction="inbound",service="db""#;
    for line in [
        format!(r#"ringfence_handshake_duration_seconds_bucket{{{labels},le="0.0025"}} 1"#),
        format!(r#"ringfence_handshake_duration_seconds_bucket{{{labels},le="1"}} 1"#),
        format!(r#"ringfence_handshake_duration_seconds_bucket{{{labels},le="5"}} 2"#),
        format!("ringfence_handshake_duration_seconds_count{{{labels}}} 2"),
        format!("ringfence_connection_duration_seconds_count{{{labels}}} 2"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[test]
fn callers_are_labels_by_dag_and_component_and_never_by_run_or_try() {
    let (mut sender, mut hub) = hub();
    let hostile = task("a\"b\nc", "load", "secret-run", 77);
    for caller in [task("payroll", "load", "r1", 1), task("payroll", "load", "r2", 2), hostile] {
        sender.send(Event::Connection(Box::new(outbound(caller, "db", None))));
    }
    sender.send(Event::Connection(Box::new(outbound(component("airflow-scheduler"), "db", None))));
    sender.send(Event::Connection(Box::new(outbound(stranger(), "db", Some(1)))));
    hub.drain();
    let text = page(&mut hub, Which::All);
    for line in [
        r#"ringfence_caller_connections_total{dag="payroll",upstream="db"} 2"#,
        r#"ringfence_caller_denied_total{dag="payroll",upstream="db"} 0"#,
        r#"ringfence_caller_bytes_total{dag="payroll",upstream="db",flow="from_mesh"} 2400"#,
        r#"ringfence_caller_bytes_total{dag="payroll",upstream="db",flow="to_mesh"} 68"#,
        r#"ringfence_caller_connections_total{dag="a\"b\nc",upstream="db"} 1"#,
        r#"ringfence_caller_connections_total{component="airflow-scheduler",upstream="db"} 1"#,
        r#"ringfence_caller_denied_total{component="unidentified",upstream="db"} 1"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("secret-run") && !text.contains("try="), "{text}");
}

#[test]
fn a_leaf_that_is_gone_reads_nan_and_never_expired() {
    let (_sender, mut hub) = hub();
    hub.exporter().publish_leaf(&leaf(), 1.0);
    hub.exporter().leaves.insert(leaf());
    hub.exporter().publish_snapshot(&Snapshot::default(), 0);
    let text = page(&mut hub, Which::All);
    assert!(text.contains("ringfence_leaf_not_after_timestamp_seconds{service=\"db\",proxy=\"db-proxy\"} NaN"), "{text}");
}

#[test]
fn other_rooms_metrics_come_along() {
    let (_sender, mut hub) = hub();
    let recorder = Arc::clone(&hub.exporter().recorder);
    metrics::with_local_recorder(&recorder, || {
        metrics::describe_counter!("ringfence_control_polls_total", "Polls.");
        metrics::counter!("ringfence_control_polls_total").increment(3);
    });
    let text = page(&mut hub, Which::All);
    assert!(text.contains("# HELP ringfence_control_polls_total Polls.\n"), "{text}");
    assert!(text.lines().any(|line| line == "ringfence_control_polls_total 3"), "{text}");
}
