//! Envoy's commands on a port with the snapshot of the neighbouring tests.

use std::sync::atomic::Ordering;

use super::*;
use serde_json::{Value, json};

async fn published() -> Port {
    let mut port = port().await;
    port.publisher.publish(snapshot());
    port
}

/// Reads `value` as Envoy's message of this name. Unknown fields, wrong types and wrong enums are errors.
#[cfg(feature = "xds")]
pub(super) fn read_as(message: &str, value: &Value) {
    use prost_reflect::{DescriptorPool, DynamicMessage};
    let pool = DescriptorPool::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/envoy.binpb"))[..]).expect("descriptors");
    let descriptor = pool.get_message_by_name(message).expect("known");
    if let Err(error) = DynamicMessage::deserialize(descriptor, value) {
        panic!("no {message}: {error}\n{value:#}");
    }
}

#[cfg(feature = "xds")]
#[tokio::test]
async fn every_answer_in_json_is_envoys_message() {
    let mut port = published().await;
    let _public = port.listener_up(21_000);
    for (path, message) in [
        ("/config_dump", "envoy.admin.v3.ConfigDump"),
        ("/config_dump?include_eds", "envoy.admin.v3.ConfigDump"),
        ("/config_dump?resource=dynamic_listeners", "envoy.admin.v3.ConfigDump"),
        ("/config_dump?resource=dynamic_active_clusters&mask=cluster.name", "envoy.admin.v3.ConfigDump"),
        ("/clusters?format=json", "envoy.admin.v3.Clusters"),
        ("/listeners?format=json", "envoy.admin.v3.Listeners"),
        ("/certs", "envoy.admin.v3.Certificates"),
        ("/server_info", "envoy.admin.v3.ServerInfo"),
        ("/memory", "envoy.admin.v3.Memory"),
        ("/init_dump", "envoy.admin.v3.UnreadyTargetsDumps"),
    ] {
        read_as(message, &port.json(path).await);
    }
}

#[tokio::test]
async fn the_dump_has_envoys_order_and_no_key() {
    let port = published().await;
    let dump = port.json("/config_dump?include_eds").await;
    let kinds: Vec<&str> = dump["configs"].as_array().expect("a list").iter().filter_map(|one| one["@type"].as_str()).collect();
    let wanted = ["Bootstrap", "Clusters", "Endpoints", "Listeners", "Secrets"];
    assert_eq!(kinds, wanted.map(|kind| format!("type.googleapis.com/envoy.admin.v3.{kind}ConfigDump")));
    let cluster = &dump["configs"][1]["dynamic_active_clusters"][1]["cluster"];
    assert_eq!(cluster["name"], "cache.default.dc1.internal.t.consul");
    assert_eq!(cluster["circuit_breakers"]["thresholds"][0]["max_connections"], 3);
    let tls = &cluster["transport_socket"]["typed_config"];
    assert_eq!(tls["sni"], "cache.default.dc1.internal.t.consul");
    assert_eq!(tls["common_tls_context"]["tls_certificates"][0]["private_key"]["inline_string"], "[redacted]");
    let endpoint = &dump["configs"][2]["dynamic_endpoint_configs"][1]["endpoint_config"]["endpoints"][0]["lb_endpoints"][0];
    assert_eq!(endpoint["health_status"], "UNHEALTHY");
    let listener = &dump["configs"][3]["dynamic_listeners"][0];
    assert_eq!(listener["name"], "public_listener:127.0.0.1:21000");
    let filters = listener["active_state"]["listener"]["filter_chains"][0]["filters"].as_array().expect("filters");
    let names: Vec<&str> = filters.iter().filter_map(|filter| filter["name"].as_str()).collect();
    assert_eq!(names, ["rbac", "connection_limit", "tcp_proxy"].map(|name| format!("envoy.filters.network.{name}")));
    assert_eq!(filters[1]["typed_config"]["max_connections"], "7", "64-bit numbers are strings");
    let text = dump.to_string();
    for form in ["SECRET", "U0VDUkVU"] {
        assert!(!text.contains(form), "the key is shown as {form}");
    }
    // Without endpoints the listeners are the third, as scripts count on.
    assert!(port.json("/config_dump").await["configs"][2]["dynamic_listeners"].is_array());
}

#[tokio::test]
async fn parts_of_the_dump_can_be_asked_for() {
    let port = published().await;
    let names = port.json("/config_dump?resource=dynamic_active_clusters&mask=cluster.name").await;
    let cluster = |name: &str| {
        json!({
            "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.DynamicCluster",
            "cluster": {"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": name},
        })
    };
    assert_eq!(names["configs"], json!([cluster("local_app"), cluster("cache.default.dc1.internal.t.consul")]));
    let cache = port.json("/config_dump?resource=dynamic_active_clusters&name_regex=cache.*&mask=cluster.name").await;
    assert_eq!(cache["configs"], json!([cluster("cache.default.dc1.internal.t.consul")]));
    let none = port.json("/config_dump?resource=dynamic_active_clusters&name_regex=cache").await;
    assert_eq!(none, json!({}), "the whole name must match");
    let node = port.json("/config_dump?mask=bootstrap.node.id").await;
    let kind = "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump";
    assert_eq!(node, json!({"configs": [{"@type": kind, "bootstrap": {"node": {"id": "db-sidecar-proxy"}}}]}));
    for (query, status, text) in [
        ("resource=nope", 404, "nope not found in config dump"),
        ("resource=static_endpoint_configs", 404, "static_endpoint_configs not found in config dump"),
        ("resource=bootstrap", 400, "bootstrap is not a repeated field. Use ?mask=bootstrap to get only this field"),
        ("mask=nope", 400, "FieldMask nope could not be successfully applied to any configs."),
        ("name_regex=(", 400, "INVALID_ARGUMENT: Error while parsing name_regex from (: "),
        ("name_regex=a)(b", 400, "INVALID_ARGUMENT: Error while parsing name_regex from a)(b: "),
    ] {
        let answer = port.ask("GET", &format!("/config_dump?{query}")).await;
        assert_eq!(answer.status, status, "{query}");
        assert!(answer.body.starts_with(text), "{query}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_resource_keeps_its_time_until_it_changes() {
    let mut port = published().await;
    let path = "/config_dump?resource=dynamic_active_clusters";
    let before = port.json(path).await;
    tokio::time::sleep(TICK_MAX).await;
    let mut next = snapshot();
    let service = Arc::get_mut(&mut next.services[0]).expect("nobody else has it");
    Arc::get_mut(&mut service.upstreams[0]).expect("nobody else has it").max_connections = Some(4);
    port.publisher.publish(next);
    let after = port.json(path).await;
    let (app, cache) = (|dump: &Value| dump["configs"][0].clone(), |dump: &Value| dump["configs"][1].clone());
    assert_eq!(app(&before), app(&after));
    assert_ne!(cache(&before)["version_info"], cache(&after)["version_info"]);
    assert!(cache(&before)["last_updated"].as_str() < cache(&after)["last_updated"].as_str());
}

#[tokio::test]
async fn accepted_resources_are_shown_instead_of_made_ones() {
    use crate::control::dump::{Refused, Resource, Resources};
    let at = SystemTime::UNIX_EPOCH;
    let cluster = json!({"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "a"});
    let error_state = Some(Refused { at, details: "no such field".into(), version_info: "3".into() });
    let held =
        Resource { name: "a".into(), version_info: "2".into(), last_updated: at, json: cluster, warming: None, error_state };
    let never = Resource { name: "b".into(), json: Value::Null, ..held.clone() };
    // A newest version that waits: one behind another, one alone.
    let newest = Some(Box::new(Resource { version_info: "4".into(), error_state: None, ..held.clone() }));
    let waits = Resource { json: Value::Null, warming: newest.clone(), error_state: None, ..held.clone() };
    let behind = Resource { name: "c".into(), warming: newest, ..held.clone() };
    let message = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    let json = json!({"@type": message, "name": "wildcard"});
    let secret = Resource { name: "wildcard".into(), json, error_state: None, ..held.clone() };
    let waiting = Resource { version_info: "uninitialized".into(), ..secret.clone() };
    let resources = Resources {
        bootstrap: json!({"node": {"id": "x"}}),
        bootstrap_at: at,
        static_clusters: Vec::new(),
        static_listeners: Vec::new(),
        static_secrets: Vec::new(),
        clusters: vec![held.clone(), waits],
        endpoints: Vec::new(),
        listeners: vec![never.clone(), behind],
        routes: vec![never],
        secrets: vec![secret, Resource { json: Value::Null, warming: Some(Box::new(waiting)), ..held }],
    };
    let port = published().await;
    port.resources.send_replace(Some(Arc::new(resources)));
    let dump = port.json("/config_dump").await;
    assert_eq!(dump["configs"][0]["bootstrap"]["node"]["id"], "x");
    let shown = &dump["configs"][1]["dynamic_active_clusters"];
    assert_eq!((&shown[0]["version_info"], &shown[0]["cluster"]["name"]), (&json!("2"), &json!("a")));
    assert_eq!(shown[0]["last_updated"], "1970-01-01T00:00:00.000Z");
    assert_eq!(shown[0]["error_state"]["details"], "no such field");
    let refused = &dump["configs"][2]["dynamic_listeners"][0];
    assert_eq!((&refused["name"], refused.get("active_state")), (&json!("b"), None));
    assert_eq!(shown.as_array().map(Vec::len), Some(1), "what waits is none of them");
    let warming = &dump["configs"][1]["dynamic_warming_clusters"];
    assert_eq!((warming.as_array().map(Vec::len), &warming[0]["version_info"]), (Some(1), &json!("4")));
    let behind = &dump["configs"][2]["dynamic_listeners"][1];
    let version = |state: &str| behind[state]["version_info"].clone();
    assert_eq!((version("active_state"), version("warming_state")), (json!("2"), json!("4")));
    let routes = &dump["configs"][3];
    assert_eq!(routes["@type"], "type.googleapis.com/envoy.admin.v3.RoutesConfigDump");
    assert_eq!(routes["dynamic_route_configs"][0]["error_state"]["version_info"], "3");
    let secrets = &dump["configs"][4];
    for (list, version) in [("dynamic_active_secrets", "2"), ("dynamic_warming_secrets", "uninitialized")] {
        let one = &secrets[list][0];
        assert_eq!((&one["name"], &one["version_info"]), (&json!("wildcard"), &json!(version)), "{list}");
        assert_eq!((&one["secret"]["name"], secrets[list].as_array().map(Vec::len)), (&json!("wildcard"), Some(1)), "{list}");
    }
    #[cfg(feature = "xds")]
    read_as("envoy.admin.v3.ConfigDump", &dump);
}

/// Takes as long as it is told to.
#[derive(Debug, Default)]
struct Slow {
    begun: std::sync::atomic::AtomicUsize,
    may_end: AtomicBool,
}

impl crate::control::dump::Accepted for Slow {
    fn resources(&self) -> crate::control::dump::Resources {
        self.begun.fetch_add(1, Ordering::SeqCst);
        while !self.may_end.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        crate::control::dump::Resources {
            bootstrap: json!({}),
            bootstrap_at: SystemTime::UNIX_EPOCH,
            static_clusters: Vec::new(),
            static_listeners: Vec::new(),
            static_secrets: Vec::new(),
            clusters: Vec::new(),
            endpoints: Vec::new(),
            listeners: Vec::new(),
            routes: Vec::new(),
            secrets: Vec::new(),
        }
    }
}

#[tokio::test]
async fn a_dump_delays_no_other_page_and_is_made_once_at_a_time() {
    let port = published().await;
    let slow = Arc::new(Slow::default());
    let begun = || slow.begun.load(Ordering::SeqCst);
    port.resources.send_replace(Some(Arc::clone(&slow) as Arc<dyn crate::control::dump::Accepted>));
    let ask = || port.json("/config_dump");
    // A client that goes away leaves its dump to be made, and the next one waits for that.
    let impatient = tokio::time::timeout(Duration::from_millis(200), ask()).await;
    assert!(impatient.is_err() && begun() == 1);
    let meanwhile = async {
        assert_eq!(port.ask("GET", "/hot_restart_version").await.body, "disabled");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(begun(), 1, "two at once");
        slow.may_end.store(true, Ordering::SeqCst);
    };
    let (dump, ()) = tokio::join!(ask(), meanwhile);
    assert_eq!(dump["configs"][0]["@type"], "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump");
    assert_eq!(begun(), 2);
}

#[tokio::test]
async fn clusters_show_health_and_what_is_known() {
    let mut port = published().await;
    let cells = port.listener_up(21_000);
    cells.connect_attempts.add(5);
    cells.connect_failures.add(2);
    cells.active.add(1);
    port.worker.send(Event::Ejected {
        upstream: "cache".into(),
        endpoint: ([10, 0, 0, 9], 20_000).into(),
        duration: Duration::from_secs(30),
    });
    let clusters = port.json("/clusters?format=json").await;
    let host = |index: usize| clusters["cluster_statuses"][index]["host_statuses"][0].clone();
    let value = |host: &Value, name: &str| {
        let stats = host["stats"].as_array().expect("stats").clone();
        stats.into_iter().find(|stat| stat["name"] == name).expect("there")["value"].clone()
    };
    let app = host(0);
    assert_eq!(app["health_status"], json!({"eds_health_status": "HEALTHY"}));
    assert_eq!((value(&app, "cx_total"), value(&app, "cx_connect_fail")), (json!("5"), json!("2")));
    assert_eq!((value(&app, "cx_active"), value(&app, "rq_total")), (json!("1"), Value::Null));
    assert_eq!(host(1)["health_status"], json!({"eds_health_status": "UNHEALTHY", "failed_outlier_check": true}));
    assert_eq!(host(1)["address"]["socket_address"], json!({"address": "10.0.0.9", "port_value": 20_000}));

    let text = port.ask("GET", "/clusters").await.body;
    for line in [
        "local_app::127.0.0.1:5432::cx_total::5",
        "local_app::127.0.0.1:5432::health_flags::healthy",
        "cache.default.dc1.internal.t.consul::default_priority::max_connections::3",
        "cache.default.dc1.internal.t.consul::10.0.0.9:20000::health_flags::/failed_outlier_check/failed_eds_health",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!port.ask("GET", "/clusters?filter=^local").await.body.contains("cache"));
    let bad = port.ask("GET", "/clusters?filter=(").await;
    assert_eq!((bad.status, bad.body.as_str()), (400, "Invalid re2 regex"));
}

#[tokio::test]
async fn health_fails_on_demand_and_nothing_else_happens() {
    let mut port = published().await;
    port.lifecycle.send_replace(Lifecycle::Live);
    port.status.send_replace(Status { ready: true, ..Status::default() });
    let _cells = [port.listener_up(21_000), port.listener_up(9_191)];
    assert_eq!(port.ask("GET", "/ready").await.body, "LIVE\n");
    assert_eq!(port.ask("GET", "/healthcheck/fail").await.status, 405);
    assert_eq!(port.ask("POST", "/healthcheck/fail").await.body, "OK\n");
    let ready = port.ask("GET", "/ready").await;
    assert_eq!((ready.status, ready.body.as_str()), (503, "DRAINING\n"));
    assert_eq!(port.json("/server_info").await["state"], "DRAINING");
    assert!(port.actions.try_recv().is_err(), "nothing was asked of the process");
    assert_eq!(port.ask("POST", "/healthcheck/ok").await.body, "OK\n");
    assert_eq!(port.ask("GET", "/ready").await.status, 200);
}

#[tokio::test]
async fn drains_say_what_was_asked_for() {
    let mut port = port().await;
    for (query, wanted) in [
        ("", Drain::default()),
        ("?graceful", Drain { graceful: true, ..Drain::default() }),
        ("?graceful&inboundonly", Drain { graceful: true, inbound_only: true, skip_exit: false }),
        ("?skip_exit=", Drain { skip_exit: true, ..Drain::default() }),
    ] {
        assert_eq!(port.ask("POST", &format!("/drain_listeners{query}")).await.body, "OK\n");
        assert_eq!(port.actions.recv().await, Some(Action::Drain(wanted)));
    }
}

#[tokio::test]
async fn what_this_process_lacks_is_answered_as_by_an_envoy_that_lacks_it() {
    let port = port().await;
    for (method, path, status, text) in [
        ("POST", "/cpuprofiler", 400, "?enable=<y|n>\n"),
        ("POST", "/cpuprofiler?enable=y", 500, "failure to start the profiler"),
        ("POST", "/heapprofiler?enable=y", 501, "The current build does not support heap profiler"),
        ("POST", "/runtime_modify", 400, "usage: /runtime_modify?"),
        ("POST", "/runtime_modify?a=b", 503, "No admin layer specified"),
        ("GET", "/runtime", 200, "{\n \"entries\": {},\n \"layers\": []\n}\n"),
        ("GET", "/hot_restart_version", 200, "disabled"),
        ("GET", "/contention", 200, "Mutex contention tracing is not enabled."),
        ("POST", "/logging", 200, "active loggers:\n  a2a: info\n  admin: info\n"),
        ("POST", "/logging?level=nope", 400, "error: unknown logger level\n\nusage: /logging?<name>=<level>"),
        ("POST", "/logging?nobody=info", 400, "error: unknown logger name\n"),
        ("GET", "/logging", 405, "Method GET not allowed, POST required."),
    ] {
        let answer = port.ask(method, path).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        assert!(answer.body.starts_with(text), "{method} {path}: {}", answer.body);
    }
    assert_eq!(port.ask_with("POST", "/logging?level=trace", "origin: http://x\r\n").await.status, 403);
}
