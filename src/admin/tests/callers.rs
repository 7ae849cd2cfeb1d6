//! Callers, denials and reach as a client meets them, and the page's headers.

use std::collections::HashMap;

use super::*;
use crate::telemetry::hub::callers::tests::{component, outbound, stranger, task};
use crate::telemetry::record::ConnectionRecord;

fn send(port: &mut Port, record: ConnectionRecord) -> Option<String> {
    let id = record.denial.map(|id| id.to_string());
    port.worker.send(Event::Connection(Box::new(record)));
    id
}

/// A snapshot whose upstream `cache` lets `airflow-payroll` in and nobody else, and for which one identity is warm.
fn guarded() -> Snapshot {
    let plain = snapshot();
    let service = &plain.services[0];
    let allow = Intention { source: "airflow-payroll".into(), ..service.intentions.ordered()[1].clone() };
    let access = Some(Arc::new(Intentions::new(vec![allow], DefaultPolicy::Deny)));
    let upstream = &service.upstreams[0];
    let target = Target { access, ..(*upstream.targets[0]).clone() };
    let guarded = Upstream { targets: vec![Arc::new(target)], ..(**upstream).clone() };
    let open = Upstream { name: "mail".into(), bind: tcp(9_192), ..(**upstream).clone() };
    let identity = service.identity.clone().expect("there");
    let service = Service {
        name: service.name.clone(),
        proxy_id: service.proxy_id.clone(),
        identity: Some(identity.clone()),
        intentions: service.intentions.clone(),
        public: None,
        upstreams: vec![Arc::new(guarded), Arc::new(open)],
    };
    let identities = HashMap::from([(Arc::from("db"), identity)]);
    Snapshot { services: vec![Arc::new(service)], identities: Arc::new(identities), ..Snapshot::default() }
}

#[tokio::test]
async fn denials_are_listed_and_found_by_their_id() {
    let mut port = port().await;
    let first = send(&mut port, outbound(task("payroll", "load", "r1", 1), "db", Some(1))).expect("denied");
    let second = send(&mut port, outbound(stranger(), "db", Some(2))).expect("denied");
    send(&mut port, outbound(task("payroll", "load", "r1", 1), "db", None));
    let all = port.json("/denials").await;
    assert_eq!((&all["kept"], &all["kept_max"]), (&2.into(), &1_000.into()));
    assert_eq!((&all["denials"][0]["denial"], &all["denials"][1]["denial"]), (&second.as_str().into(), &first.as_str().into()));
    assert_eq!(port.json("/denials?limit=1").await["denials"].as_array().map(Vec::len), Some(1));
    let of_dag = port.json("/denials?dag=payroll&limit=5").await;
    assert_eq!(of_dag["denials"].as_array().map(Vec::len), Some(1), "{of_dag}");
    assert_eq!(port.json("/denials?dag=sales").await["denials"], serde_json::json!([]));
    let one = port.json(&format!("/denials/{first}")).await;
    assert_eq!((&one["caller"]["dag"], &one["reason"]), (&"payroll".into(), &"caller_denied".into()));
}

#[tokio::test]
async fn an_id_that_is_not_kept_and_a_wrong_limit_are_told_what_holds() {
    let port = port().await;
    for path in ["/denials/0123456789abcdef", "/denials/..%2Fsnapshot"] {
        let answer = port.ask("GET", path).await;
        assert_eq!(answer.status, 404);
        assert!(answer.body.contains("the last 1000 are") && answer.body.contains("-connection-log"), "{}", answer.body);
    }
    for limit in ["0", "1001", "-1", "many"] {
        let answer = port.ask("GET", &format!("/denials?limit={limit}")).await;
        assert_eq!((answer.status, answer.body.contains("1 to 1000")), (400, true), "{}", answer.body);
    }
}

#[tokio::test]
async fn callers_shows_both_tables_and_the_live_listeners() {
    let mut port = port().await;
    let cells = port.listener_up(21_000);
    cells.active.add(3);
    cells.closed[crate::telemetry::close::CloseReason::Denied as usize].add(2);
    let denied = send(&mut port, outbound(task("payroll", "load", "r1", 2), "db", Some(9)));
    send(&mut port, outbound(task("sales", "load", "r1", 1), "db", None));
    send(&mut port, outbound(component("airflow-scheduler"), "db", None));
    let view = port.json("/callers").await;
    assert_eq!(
        view["services"][0],
        serde_json::json!({"direction": "inbound", "service": "db", "upstream": null, "active": 3, "connections": 0, "denied": 2,
            "bytes_from_mesh": 0, "bytes_to_mesh": 0})
    );
    let who: Vec<_> = view["totals"].as_array().expect("a list").iter().map(|row| (&row["who"], &row["dag"])).collect();
    assert_eq!(who.len(), 3, "{view}");
    assert_eq!(view["tries"].as_array().map(Vec::len), Some(2));
    assert!(view["counted"].as_str().expect("told").contains("when it closes"));
    let of_dag = port.json("/callers?dag=payroll").await;
    assert_eq!((of_dag["totals"].as_array().map(Vec::len), of_dag["tries"].as_array().map(Vec::len)), (Some(1), Some(1)));
    let row = &of_dag["tries"][0];
    assert_eq!((&row["try"], &row["identity"], &row["map_index"]), (&2.into(), &"airflow-payroll".into(), &(-1).into()));
    assert_eq!((&row["denied"], row["last_denial"].as_str()), (&1.into(), denied.as_deref()));
    assert_eq!((&row["first_seen"], &row["last_seen"]), (&"2026-01-02T03:04:05.006Z".into(), &"2026-01-02T03:04:07.506Z".into()));
}

#[tokio::test]
async fn reach_decides_as_a_worker_would() {
    let mut port = port().await;
    assert_eq!(port.ask("GET", "/reach?identity=a&to=cache").await.status, 404, "nothing is known yet");
    port.publisher.publish(guarded());
    port.worker.send(Event::Ejected {
        upstream: "cache".into(),
        endpoint: ([10, 0, 0, 9], 20_000).into(),
        duration: Duration::from_secs(30),
    });
    let allowed = port.json("/reach?identity=airflow-payroll&to=cache").await;
    assert_eq!((&allowed["decision"], &allowed["leaf"]), (&"allowed".into(), &serde_json::Value::Null));
    assert_eq!(allowed["spiffe_id"], "spiffe://t.consul/ns/default/dc/dc1/svc/airflow-payroll");
    let endpoint =
        serde_json::json!({"target": "cache.default.dc1", "address": "10.0.0.9:20000", "healthy": false, "ejected": true});
    assert_eq!(allowed["endpoints"], serde_json::json!([endpoint]));

    assert_eq!(allowed["failures"], serde_json::json!([]));

    let failed = ConnectionRecord {
        reason: crate::telemetry::close::CloseReason::ConnectFailed,
        detail: Some("Connection refused".into()),
        ..outbound(task("payroll", "load", "r1", 1), "cache", None)
    };
    send(&mut port, failed);
    let denied = port.json("/reach?identity=db&to=cache").await;
    assert_eq!(
        denied["failures"],
        serde_json::json!([{"time": "2026-01-02T03:04:07.506Z", "reason": "connect_failed", "endpoint": "127.0.0.1:5432",
            "detail": "Connection refused"}])
    );
    assert_eq!((&denied["decision"], &denied["by"]), (&"denied".into(), &"default policy deny".into()));
    assert_eq!(denied["remedy"], "consul intention create -replace -allow db cache");
    assert_eq!((&denied["leaf"]["serial"], &denied["leaf"]["not_after"]), (&"0a1b".into(), &"2026-01-02T03:04:05.000Z".into()));

    let unknown = port.json("/reach?identity=db&to=mail").await;
    assert_eq!(unknown["decision"], "unknown");
    let answer = port.ask("GET", "/reach?identity=db&to=nowhere").await;
    assert_eq!((answer.status, answer.body.contains("there are: cache, mail")), (404, true), "{}", answer.body);
    for query in ["", "?identity=&to=cache", "?identity=db"] {
        assert_eq!(port.ask("GET", &format!("/reach{query}")).await.status, 400, "{query}");
    }
}

#[tokio::test]
async fn snapshot_shows_the_identities_of_callers_and_whom_an_upstream_lets_in() {
    let mut port = port().await;
    port.publisher.publish(guarded());
    let text = port.ask("GET", "/snapshot").await.body;
    assert!(!text.contains("SECRET"), "a key is shown");
    let view = port.json("/snapshot").await;
    assert_eq!(
        view["identities"],
        serde_json::json!([{"name": "db", "spiffe_id": "spiffe://t.consul/ns/default/dc/dc1/svc/db", "serial": "0a1b",
            "not_before": "1970-01-01T00:00:00.000Z", "not_after": "2026-01-02T03:04:05.000Z"}])
    );
    let upstreams = &view["services"][0]["upstreams"];
    assert_eq!(upstreams[0]["targets"][0]["access"]["default"], "deny");
    assert_eq!(upstreams[1]["targets"][0]["access"], serde_json::Value::Null);
}

#[tokio::test]
async fn the_page_may_load_its_own_parts_and_nothing_else() {
    let port = port().await;
    for (path, kind) in [("/airflow", "text/html"), ("/airflow/page.js", "text/javascript"), ("/airflow/page.css", "text/css")] {
        let answer = port.ask("GET", path).await;
        assert_eq!(answer.status, 200, "{path}");
        for header in [
            &*format!("content-type: {kind}; charset=utf-8"),
            "content-security-policy: default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
            "referrer-policy: no-referrer",
            "x-content-type-options: nosniff",
        ] {
            assert!(answer.head.contains(header), "{path}: no {header} in {}", answer.head);
        }
    }
}
