//! What `/config_dump` is told: resources as they came, since when, what was refused of them, and no key of any form.

use std::time::Duration;

use super::*;
use crate::control::dump::{Accepted, Resource as Told, Resources};
use crate::control::xds::shown::Everything;
use crate::telemetry::stats::Changes;

const ADMIN: &str = "envoy.admin.v3.ConfigDump";

impl Bench {
    pub(super) fn told(&mut self, bootstrap: Json) -> Resources {
        let bootstrap_at = std::time::SystemTime::UNIX_EPOCH;
        Everything::new((Arc::new(bootstrap), bootstrap_at), &mut self.held).resources()
    }
}

fn named<'a>(all: &'a [Told], name: &str) -> &'a Told {
    all.iter().find(|one| one.name == name).unwrap_or_else(|| panic!("no {name} in {all:?}"))
}

/// Every kind of secret that a resource may hold: none of these words may come out, as they are or in base64.
const SECRETS: [&str; 6] = ["TOP-KEY", "TOP-TOKEN", "TOP-GENERIC", "TOP-PASSWORD", "VE9QL", "PRIVATE KEY"];

#[test]
fn resources_are_told_as_they_came_without_their_keys() {
    for capture in ["sidecar", "sidecar-inbound", "mesh-gateway", "egress", "transparent"] {
        let mut bench = Bench::new("airflow-worker");
        bench.send_all(&Bench::fixture(capture));
        let told = bench.told(json!({}));
        let count = told.clusters.len() + told.endpoints.len() + told.listeners.len();
        assert!(count > 0 && told.static_clusters.is_empty(), "{capture}");
        let mut all = Vec::new();
        for (message, field, resources) in [
            ("ClustersConfigDump.DynamicCluster", "cluster", &told.clusters),
            ("EndpointsConfigDump.DynamicEndpointConfig", "endpoint_config", &told.endpoints),
            ("ListenersConfigDump.DynamicListenerState", "listener", &told.listeners),
        ] {
            for resource in resources {
                let json = json!({"@type": format!("type.googleapis.com/envoy.admin.v3.{message}"), field: resource.json});
                assert!(resource.json["@type"].as_str().is_some_and(|kind| !kind.contains("StringValue")), "{resource:?}");
                assert!(resource.error_state.is_none() && !resource.version_info.is_empty(), "{resource:?}");
                all.push(json);
            }
        }
        let dump = json!({ "configs": all });
        bench.protos.encode(ADMIN, &dump).unwrap_or_else(|error| panic!("{capture}: {error}"));
        let text = dump.to_string();
        assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{capture}");
        if capture == "sidecar" {
            assert!(text.contains("BEGIN CERTIFICATE") && text.contains("\"private_key\":{\"inline_string\":\"[redacted]\"}"));
            assert!(text.contains("envoy.extensions.filters.network.rbac.v3.RBAC"), "an Any is expanded");
        }
    }
}

#[test]
fn no_secret_comes_out_wherever_it_stands() {
    let mut bench = Bench::new("db");
    let context = json!({"tls_certificates": [
        {"certificate_chain!": "PUBLIC", "private_key!": "-----BEGIN PRIVATE KEY-----TOP-KEY", "password!": "TOP-PASSWORD"},
        {"private_key": {"inline_bytes": "VE9QLUtFWQ=="}},
    ], "tls_certificate_sds_secret_configs": [{"name": "x", "sds_config": {"api_config_source": {"api_type": "GRPC", "grpc_services": [
        {"envoy_grpc": {"cluster_name": "sds"}, "initial_metadata": [{"key": "x-consul-token", "value": "TOP-TOKEN"}]},
        {"google_grpc": {"target_uri": "x", "stat_prefix": "x", "call_credentials": [{"access_token": "TOP-TOKEN"}]}},
    ]}}}]});
    let tls = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.";
    let any = |name: &str, context: &Json| json!({"@type": format!("{tls}{name}"), "common_tls_context": context});
    let generic =
        json!({"@type": format!("{tls}Secret"), "name": "s", "generic_secret": {"secret": {"inline_string": "TOP-GENERIC"}}});
    let cluster = json!({
        "name": "db", "connect_timeout": "5s", "type": "STATIC",
        "load_assignment": {"cluster_name": "db"},
        "metadata": {"typed_filter_metadata": {"tls": any("UpstreamTlsContext", &context), "generic": generic}},
        "typed_extension_protocol_options": {"tls": any("DownstreamTlsContext", &context)},
    });
    // Metadata means nothing here, so the cluster is taken with all that.
    assert_eq!(bench.send(Kind::Cluster, &[cluster]), Vec::<String>::new());
    assert!(SECRETS.iter().all(|secret| !format!("{:?}", bench.held.shown()).contains(secret)));
    let told = bench.told(json!({}));
    let text = named(&told.clusters, "db").json.to_string();
    assert!(text.contains("PUBLIC") && text.contains("x-consul-token") && text.contains("[redacted]"), "{text}");
    assert!(SECRETS.iter().all(|secret| !text.contains(secret)), "{text}");
}

#[test]
fn an_unknown_type_is_named_and_the_rest_is_told() {
    let mut bench = Bench::new("db");
    let unknown = Any { type_url: "type.googleapis.com/nope.Nope".into(), value: b"TOP-KEY".to_vec() };
    let metadata = envoy_types::pb::envoy::config::core::v3::Metadata {
        typed_filter_metadata: [("x".to_owned(), unknown)].into(),
        ..Default::default()
    };
    let message = envoy_types::pb::envoy::config::cluster::v3::Cluster {
        name: "db".into(),
        metadata: Some(metadata),
        load_assignment: Some(Default::default()),
        ..Default::default()
    };
    let any = Any { type_url: type_url(Kind::Cluster.message()), value: prost::Message::encode_to_vec(&message) };
    let resource = Resource { name: "db".into(), version: "1".into(), resource: Some(any), ..Resource::default() };
    let response = DeltaDiscoveryResponse { resources: vec![resource], ..DeltaDiscoveryResponse::default() };
    assert_eq!(bench.held.apply(Kind::Cluster, &response), Vec::<String>::new());
    let told = bench.told(json!({}));
    let json = &named(&told.clusters, "db").json;
    assert_eq!(json["metadata"]["typed_filter_metadata"]["x"]["value"], "not shown: type.googleapis.com/nope.Nope");
    assert_eq!(json["name"], "db");
}

#[test]
fn the_newest_update_is_told_when_it_was_refused_and_until_it_is_mended() {
    let mut bench = Bench::new("airflow-worker");
    let good =
        |name: &str| json!({"name": name, "connect_timeout": "5s", "type": "STATIC", "load_assignment": {"cluster_name": name}});
    let bad = |name: &str| json!({"name": name, "filters": [{"name": "nope"}]});
    assert!(bench.send(Kind::Cluster, &[good("a"), good("b")]).is_empty());
    let refused = bench.send(Kind::Cluster, &[bad("a"), bad("never")]);
    assert_eq!(refused.len(), 2);
    let told = bench.told(json!({}));
    let a = named(&told.clusters, "a");
    assert_eq!((a.version_info.as_str(), a.json["connect_timeout"].as_str()), ("1", Some("5s")));
    let why = a.error_state.as_ref().expect("it was refused");
    assert_eq!((why.version_info.as_str(), &why.details), ("2", &refused[0]));
    assert!(why.at >= a.last_updated);
    let never = named(&told.clusters, "never");
    assert_eq!((never.version_info.as_str(), &never.json), ("", &Json::Null));
    assert_eq!(never.error_state.as_ref().expect("it was refused").details, refused[1]);
    assert!(named(&told.clusters, "b").error_state.is_none());

    // A good one mends it; so does it to be removed.
    assert!(bench.send(Kind::Cluster, &[good("a")]).is_empty());
    let removed = DeltaDiscoveryResponse { removed_resources: vec!["never".into(), "b".into()], ..Default::default() };
    bench.held.apply(Kind::Cluster, &removed);
    let told = bench.told(json!({}));
    let names: Vec<&str> = told.clusters.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["a"]);
    assert!(told.clusters[0].error_state.is_none());
    // What was refused, and what came again as it was, changed nothing.
    assert_eq!(bench.held.clusters.changes, Changes { added: 2, modified: 0, removed: 1 });
    let slower = json!({"name": "a", "connect_timeout": "6s", "type": "STATIC", "load_assignment": {"cluster_name": "a"}});
    assert!(bench.send(Kind::Cluster, &[slower]).is_empty());
    assert_eq!(bench.held.clusters.changes, Changes { added: 2, modified: 1, removed: 1 });
}

#[test]
fn what_did_not_change_keeps_its_time_and_is_not_gathered_again() {
    let mut bench = Bench::new("airflow-worker");
    let capture = Bench::fixture("sidecar");
    bench.send_all(&capture);
    let first = bench.held.shown();
    let before = bench.told(json!({}));
    let mut endpoints = capture["endpoints"].as_array().expect("endpoints").clone();
    endpoints[0]["endpoints"] = json!([]);
    assert!(bench.send(Kind::Endpoints, &endpoints).is_empty());
    let after = bench.told(json!({}));
    let second = bench.held.shown();
    let same = |kind: Kind| Arc::ptr_eq(&first[kind as usize], &second[kind as usize]);
    assert!(same(Kind::Cluster) && same(Kind::Listener) && !same(Kind::Endpoints));
    let time = |told: &Resources, name: &str| named(&told.endpoints, name).last_updated;
    let mut names = endpoints.iter().map(|one| one["cluster_name"].as_str().expect("a name"));
    let changed = names.next().expect("the first");
    assert!(time(&before, changed) < time(&after, changed));
    assert!(names.all(|name| time(&before, name) == time(&after, name)));
}

#[test]
fn what_the_bootstrap_has_is_static() {
    let bootstrap = json!({"static_resources": {"clusters": [{"name": "local_agent"}], "listeners": [{"name": "ready"}]}});
    let told = Bench::new("db").told(bootstrap.clone());
    assert_eq!(told.bootstrap, bootstrap);
    let kind = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    assert_eq!(named(&told.static_clusters, "local_agent").json, json!({"@type": kind, "name": "local_agent"}));
    assert_eq!(named(&told.static_listeners, "ready").version_info, "");
}

#[test]
fn a_bootstrap_as_consul_writes_it_is_told_without_its_token() {
    let path = format!("{}/tests/fixtures/consul-1.10/xds/sidecar.bootstrap.json", env!("CARGO_MANIFEST_DIR"));
    let mut json: Json = serde_json::from_str(&std::fs::read_to_string(path).expect("the fixture is there")).expect("JSON");
    let service = &mut json["dynamic_resources"]["ads_config"]["grpc_services"];
    let service = if service.is_array() { &mut service[0] } else { service };
    service["initial_metadata"] = json!([{"key": "x-consul-token", "value": "TOP-TOKEN"}]);
    let mut bench = Bench::new("db");
    let read = crate::control::xds::bootstrap::read(&bench.protos, &[json]).expect("it is a bootstrap");
    assert_eq!(read.xds.initial_metadata[0].1.as_str(), "TOP-TOKEN");
    let told = bench.told(read.xds.bootstrap);
    assert_eq!(named(&told.static_clusters, "local_agent").json["name"], "local_agent");
    let shown = told.bootstrap.to_string();
    assert!(shown.contains("x-consul-token") && shown.contains("[redacted]"), "{shown}");
    assert!(SECRETS.iter().all(|secret| !format!("{told:?}").contains(secret)), "{told:?}");
    let dump = json!({"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": told.bootstrap});
    bench.protos.encode(ADMIN, &json!({"configs": [dump]})).expect("Envoy's message");
}

/// Prints what five hundred clusters cost; the bound only catches another order of magnitude.
#[test]
fn five_hundred_clusters_are_told_in_a_moment() {
    let mut bench = Bench::new("airflow-worker");
    let mut cluster = Bench::fixture("sidecar")["clusters"][1].clone();
    let clusters: Vec<Json> = (0..500)
        .map(|index| {
            cluster["name"] = json!(format!("c{index}"));
            cluster.clone()
        })
        .collect();
    assert!(bench.send(Kind::Cluster, &clusters).is_empty());
    let start = std::time::Instant::now();
    let told = bench.told(json!({}));
    let took = start.elapsed();
    let start = std::time::Instant::now();
    bench.held.shown();
    eprintln!("500 clusters told in {took:?}, gathered in {:?}", start.elapsed());
    assert_eq!(told.clusters.len(), 500);
    assert!(took < Duration::from_secs(30), "{took:?}");
}
