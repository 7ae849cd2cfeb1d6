//! What Consul 1.10 sent real Envoy for six kinds of proxy, with certificates of a CA of the tests' own: what is made of it,
//! what stays the same, what is refused and how.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use envoy_types::pb::google::protobuf::Any;
use serde_json::{Value as Json, json};

use super::build::{self, Built, Hosts, Surroundings};
use super::held::{Held, Kind};
use super::identity::Identities;
use super::proto_json::Protos;
use super::refusal::type_url;
use super::subscription::{Subscription, answer};
use crate::config::envoy::Xds;
use crate::identity::Svid;
use crate::mesh::router::{Router, Seen, Way};
use crate::mesh::{Address, Balance, Service, Snapshot};
use crate::policy::DefaultPolicy;
use crate::tls::fixtures::{Ca, chain_pem, key_pem, now};

const TRUST_DOMAIN: &str = "97d2480b-024d-49f9-e76e-de4d1e3eb356.consul";

struct Bench {
    protos: Protos,
    ca: Ca,
    svid: Svid,
    held: Held,
    identities: Identities,
    hosts: Hosts,
    published: Snapshot,
    notes: Vec<String>,
    pages: Vec<crate::config::envoy::PageListener>,
    version: u32,
}

impl Bench {
    fn new(service: &str) -> Self {
        let ca = Ca::new(TRUST_DOMAIN);
        let svid = ca.svid(service);
        Self {
            protos: Protos::load(),
            ca,
            svid,
            held: Held::default(),
            identities: Identities::new(1),
            hosts: Hosts::new(),
            published: Snapshot::default(),
            notes: Vec::new(),
            pages: Vec::new(),
            version: 0,
        }
    }

    fn fixture(name: &str) -> Json {
        let path = format!("{}/tests/fixtures/consul-1.10/xds/{name}.resources.json", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_str(&std::fs::read_to_string(path).expect("the fixture is there")).expect("JSON")
    }

    /// Puts certificates where the capture has none.
    fn certify(&self, json: &mut Json) {
        match json {
            Json::Object(map) => {
                let mut told = Vec::new();
                for (key, value) in map.iter_mut() {
                    // What has its PEM already is marked.
                    if let Some(key) = key.strip_suffix('!') {
                        told.push((key.to_owned(), json!({"inline_string": value.take()})));
                        continue;
                    }
                    let pem = match key.as_str() {
                        "certificate_chain" => chain_pem(&self.svid.chain),
                        "private_key" => key_pem(&self.svid.key),
                        "trusted_ca" => chain_pem(std::slice::from_ref(self.ca.certificate())),
                        _ => {
                            self.certify(value);
                            continue;
                        }
                    };
                    *value = json!({"inline_string": pem});
                }
                map.retain(|key, _| !key.ends_with('!'));
                map.extend(told);
            }
            Json::Array(list) => list.iter_mut().for_each(|value| self.certify(value)),
            _ => {}
        }
    }

    fn send(&mut self, kind: Kind, resources: &[Json]) -> Vec<String> {
        self.version += 1;
        let resource = |json: &Json| {
            let mut json = json.clone();
            self.certify(&mut json);
            json.as_object_mut().expect("an object").shift_remove("@type");
            let name = json.get("name").or_else(|| json.get("cluster_name")).and_then(Json::as_str).expect("a name").to_owned();
            let value = self.protos.encode(kind.message(), &json).expect("a message");
            let any = Any { type_url: type_url(kind.message()), value };
            Resource { name, version: self.version.to_string(), resource: Some(any), ..Resource::default() }
        };
        let resources = resources.iter().map(resource).collect();
        let response = DeltaDiscoveryResponse { resources, ..DeltaDiscoveryResponse::default() };
        self.held.apply(kind, &response)
    }

    /// Everything of a capture; returns what was refused.
    fn send_all(&mut self, capture: &Json) -> Vec<String> {
        let list = |key: &str| capture[key].as_array().cloned().unwrap_or_default();
        let mut refused = self.send(Kind::Cluster, &list("clusters"));
        refused.extend(self.send(Kind::Endpoints, &list("endpoints")));
        refused.extend(self.send(Kind::Listener, &list("listeners")));
        refused
    }

    fn build(&mut self) -> Arc<Service> {
        self.identities.offer(build::materials(&self.held), now());
        let around = Surroundings { proxy_id: "proxy", cluster: "cluster", hosts: &self.hosts, identities: &self.identities };
        let Built { service, routers, pages, notes } = build::mesh(&self.held, &around, &self.published);
        self.pages = pages;
        self.notes = notes;
        self.published = Snapshot { services: vec![Arc::clone(&service)], routers, ..Snapshot::default() };
        service
    }

    /// The one router after a build.
    fn router(&mut self) -> Arc<Router> {
        self.build();
        let [router] = self.published.routers.as_slice() else { panic!("{:?} {:?}", self.published.routers, self.notes) };
        Arc::clone(router)
    }
}

#[test]
fn a_sidecars_resources_become_its_service() {
    let mut bench = Bench::new("airflow-worker");
    assert_eq!(bench.send_all(&Bench::fixture("sidecar")), Vec::<String>::new());
    let service = bench.build();
    assert_eq!(bench.notes, Vec::<String>::new());
    assert_eq!(&*service.name, "airflow-worker");
    let public = service.public.as_ref().expect("a public listener");
    assert_eq!(public.bind.to_string(), "0.0.0.0:21500");
    assert_eq!(public.app, [Address::Tcp(([127, 0, 0, 1], 8_793).into())]);
    assert_eq!(public.local_connect_timeout, Duration::from_secs(1));
    assert_eq!(service.intentions.default_policy(), DefaultPolicy::Allow, "rules that deny nobody");

    let named = |name: &str| service.upstreams.iter().find(|upstream| *upstream.name == *name).expect("an upstream");
    let warehouse = named("warehouse");
    assert_eq!(warehouse.bind.to_string(), "127.0.0.1:15432");
    assert_eq!((warehouse.connect_timeout, warehouse.max_connections), (Duration::from_millis(2_500), Some(64)));
    assert_eq!(warehouse.balance, Balance::LeastRequest { choices: 3 });
    assert_eq!((warehouse.outlier.max_failures, warehouse.outlier.interval), (3, Duration::from_secs(5)));
    assert_eq!(warehouse.targets.len(), 2, "a target a priority");
    let ports: Vec<u16> = warehouse.targets.iter().map(|target| target.endpoints[0].address.port()).collect();
    assert_eq!(ports, [21_501, 21_502]);
    let first = &warehouse.targets[0];
    assert!(first.sni.starts_with("v1.warehouse.default.dc1.internal.") && !first.endpoints[0].healthy);
    assert_eq!(first.expected[0], bench.ca.id("warehouse"));

    let query = named("prepared_query:warehouse-query");
    assert!(query.targets[0].expected.is_empty() && query.targets[0].endpoints.is_empty(), "nobody may answer yet");
}

#[test]
fn what_did_not_change_is_the_same_and_a_new_leaf_changes_the_identity_alone() {
    let mut bench = Bench::new("airflow-worker");
    let capture = Bench::fixture("sidecar");
    bench.send_all(&capture);
    let before = bench.build();
    bench.send_all(&capture);
    assert!(Arc::ptr_eq(&before, &bench.build()));

    // The listener comes first with the new leaf; then the clusters.
    let later = crate::tls::fixtures::Leaf { not_before: now(), serial: vec![0x0c], ..bench.ca.leaf("airflow-worker") };
    bench.svid = bench.ca.issue(&later);
    bench.send(Kind::Listener, capture["listeners"].as_array().expect("a list"));
    let after = bench.build();
    assert_eq!(after.identity.as_ref().expect("an identity").svid.serial, "0c");
    assert!(Arc::ptr_eq(&before.intentions, &after.intentions));
    assert!(Arc::ptr_eq(before.public.as_ref().expect("there"), after.public.as_ref().expect("there")));
    assert!(before.upstreams.iter().zip(&after.upstreams).all(|(a, b)| Arc::ptr_eq(a, b)));
    bench.send(Kind::Cluster, capture["clusters"].as_array().expect("a list"));
    assert!(Arc::ptr_eq(&after, &bench.build()), "the same leaf from the other side");
    assert_eq!(bench.identities.rotations, 2);
}

#[test]
fn a_leaf_that_cannot_be_used_leaves_the_old_one_in_use() {
    let mut bench = Bench::new("airflow-worker");
    let capture = Bench::fixture("sidecar");
    bench.send_all(&capture);
    bench.build();
    let expired = crate::tls::fixtures::Leaf {
        not_after: now() - Duration::from_secs(1),
        serial: vec![0x0c],
        ..bench.ca.leaf("airflow-worker")
    };
    bench.svid = bench.ca.issue(&expired);
    assert_eq!(bench.send_all(&capture), Vec::<String>::new(), "Envoy takes it too");
    assert_eq!(bench.build().identity.as_ref().expect("the old one").svid.serial, "0b");
    assert!(bench.identities.refused().next().expect("a reason").contains("0c"));

    // A key of another certificate is refused at once, and says nothing of the key.
    bench.svid = bench.ca.svid("airflow-worker");
    bench.svid.key = bench.ca.svid("airflow-worker").key.clone_key();
    let refused = bench.send_all(&capture);
    let told = &refused[0];
    assert!(told.contains("private_key: of another certificate") && !told.contains("BEGIN"), "{told}");
}

#[test]
fn intentions_are_decided_by_the_filters_of_the_public_listener() {
    let mut bench = Bench::new("warehouse");
    assert_eq!(bench.send_all(&Bench::fixture("sidecar-inbound")), Vec::<String>::new());
    let service = bench.build();
    let decide = |name: &str| service.intentions.decide(&bench.ca.id(name)).is_ok();
    assert!(decide("airflow-worker") && !decide("airflow-reports") && !decide("web"));
    let denied = service.intentions.decide(&bench.ca.id("web")).expect_err("denied");
    assert_eq!(denied.by.to_string(), "RBAC policy consul-intentions-layer4 (deny)");
}

#[test]
fn an_ingress_gateway_for_tcp_has_upstreams_alone() {
    let mut bench = Bench::new("ingress");
    assert_eq!(bench.send_all(&Bench::fixture("ingress")), Vec::<String>::new());
    let service = bench.build();
    assert!(service.public.is_none());
    assert_eq!(service.upstreams[0].bind.to_string(), "127.0.0.1:15600");
    assert_eq!(service.upstreams[0].targets[0].expected[0], bench.ca.id("warehouse"));
}

#[test]
fn a_bad_resource_is_refused_alone_and_the_one_before_it_stays() {
    let mut bench = Bench::new("airflow-worker");
    let mut capture = Bench::fixture("sidecar");
    bench.send_all(&capture);
    let before = bench.build();
    let listeners = capture["listeners"].as_array_mut().expect("a list");
    let public = listeners.iter_mut().find(|one| one["name"] == "public_listener:0.0.0.0:21500").expect("there");
    public["filter_chains"][0]["filters"][0] = json!({
        "name": "envoy.filters.network.wasm",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.wasm.v3.Wasm",
        },
    });
    let name = "broker:127.0.0.1:16379";
    let broker = listeners.iter_mut().find(|one| one["name"] == name).expect("there");
    broker["address"]["socket_address"]["port_value"] = 16_380.into();
    let listeners = listeners.clone();
    let refused = bench.send(Kind::Listener, &listeners);
    let [told] = refused.as_slice() else { panic!("{refused:?}") };
    assert!(
        told.starts_with(
            "envoy.config.listener.v3.Listener public_listener:0.0.0.0:21500: filter_chains[0].filters[0].name: \
             envoy.filters.network.wasm ("
        ),
        "{told}"
    );
    let after = bench.build();
    assert!(Arc::ptr_eq(before.public.as_ref().expect("there"), after.public.as_ref().expect("stays")));
    assert!(after.upstreams.iter().any(|upstream| upstream.bind.to_string() == "127.0.0.1:16380"), "the good one is taken");
    // Whom the refused one denies is not known.
    assert!(before.intentions.decide(&bench.ca.id("broker")).is_ok(), "the one before let peers in");
    assert!(after.intentions.decide(&bench.ca.id("broker")).is_err(), "policy is not kept over a refusal");
    assert_eq!(bench.held.versions(Kind::Listener)["public_listener:0.0.0.0:21500"], "3");
    assert_eq!(bench.held.versions(Kind::Listener)[name], "4");
}

#[test]
fn an_aggregate_is_its_members_in_order_and_endpoints_on_their_way_keep_the_old() {
    let mut bench = Bench::new("web");
    let cluster = |name: &str, extra: Json| {
        let mut json = json!({"name": name, "type": "EDS", "transport_socket": {"name": "tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": name,
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": {}, "private_key": {}}],
                "validation_context": {"trusted_ca": {}, "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"exact": format!("spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{name}")}}]},
            },
        }}});
        for (key, value) in extra.as_object().into_iter().flatten() {
            json[key] = value.clone();
        }
        json
    };
    let aggregate = json!({"name": "db", "lb_policy": "CLUSTER_PROVIDED", "cluster_type": {"name": "envoy.clusters.aggregate",
        "typed_config": {"@type": "type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig",
            "clusters": ["one", "two"]}}});
    let two = json!({"type": "STRICT_DNS", "load_assignment": {"cluster_name": "two", "endpoints": [{"lb_endpoints": [
        {"endpoint": {"address": {"socket_address": {"address": "gateway.example", "port_value": 8443}}}}]}]}});
    let refused = bench.send(Kind::Cluster, &[aggregate, cluster("one", json!({})), cluster("two", two)]);
    assert_eq!(refused, Vec::<String>::new());
    let listener = json!({"name": "db:127.0.0.1:5000", "address": {"socket_address": {"address": "127.0.0.1", "port_value": 5000}},
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "upstream.db", "cluster": "db"}}]}]});
    assert_eq!(bench.send(Kind::Listener, &[listener]), Vec::<String>::new());
    assert_eq!(build::waits_for(&bench.held).as_deref(), Some("waiting for the endpoints of cluster one"));
    assert_eq!(build::names(&bench.held).keys().collect::<Vec<_>>(), ["gateway.example"]);
    bench.hosts.insert("gateway.example".into(), vec!["192.0.2.7".parse().expect("an address")]);
    let early = bench.build();
    let ids: Vec<&str> = early.upstreams[0].targets.iter().map(|target| &*target.id).collect();
    assert_eq!(ids, ["two"], "of the first nothing is known yet");

    let assignment = |port: u16| {
        json!({"cluster_name": "one", "endpoints": [{"lb_endpoints": [{"health_status": "HEALTHY", "endpoint": {
            "address": {"socket_address": {"address": "192.0.2.1", "port_value": port}}}}]}]})
    };
    bench.send(Kind::Endpoints, &[assignment(1)]);
    let service = bench.build();
    let addresses: Vec<_> = service.upstreams[0].targets.iter().map(|target| target.endpoints[0].address.to_string()).collect();
    assert_eq!(addresses, ["192.0.2.1:1", "192.0.2.7:8443"]);
    assert_eq!(build::waits_for(&bench.held), None);
    bench.send(Kind::Endpoints, &[assignment(2)]);
    let next = bench.build();
    assert_eq!(next.upstreams[0].targets[0].endpoints[0].address.port(), 2);
    assert!(Arc::ptr_eq(&service.upstreams[0].targets[1], &next.upstreams[0].targets[1]));
}

#[test]
fn identities_in_other_words_than_exact_uris_are_refused() {
    let mut capture = Bench::fixture("ingress");
    let context = &mut capture["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"];
    context["validation_context"]["match_subject_alt_names"] = json!([{"prefix": "spiffe://"}]);
    let refused = Bench::new("ingress").send(Kind::Cluster, capture["clusters"].as_array().expect("a list"));
    assert!(refused[0].contains("match_subject_alt_names[0]: Prefix(\"spiffe://\"); expected exact"), "{refused:?}");
}

#[test]
fn cipher_suites_are_narrowed_and_none_that_is_spoken_is_refused() {
    let with = |params: Json| {
        let mut capture = Bench::fixture("ingress");
        capture["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"]["tls_params"] = params;
        Bench::new("ingress").send(Kind::Cluster, capture["clusters"].as_array().expect("a list"))
    };
    assert_eq!(with(json!({"cipher_suites": ["ECDHE-ECDSA-AES256-GCM-SHA384", "AES256-SHA"]})), [""; 0]);
    assert_eq!(with(json!({"cipher_suites": ["AES256-SHA"]})), [""; 0], "TLS 1.3 is left");
    let refused = with(json!({"cipher_suites": ["AES256-SHA"], "tls_maximum_protocol_version": "TLSv1_2"}));
    assert!(refused[0].contains("tls_params.cipher_suites: AES256-SHA; ") && refused[0].contains("ECDHE-RSA"), "{refused:?}");
}

#[test]
fn what_would_reach_other_members_or_as_payload_is_refused() {
    let with = |change: fn(&mut Json)| {
        let mut listener = Bench::fixture("sidecar")["listeners"][0].clone();
        change(&mut listener["filter_chains"][0]);
        Bench::new("web").send(Kind::Listener, &[listener])
    };
    let refused = with(|chain| chain["use_proxy_proto"] = json!(true));
    assert!(refused[0].contains(".use_proxy_proto: true; "), "{refused:?}");
    let refused = with(|chain| {
        let filters = chain["filters"].as_array_mut().expect("a list");
        filters.last_mut().expect("a filter")["typed_config"]["metadata_match"] = json!({"filter_metadata": {}});
    });
    assert!(refused[0].contains(".typed_config.metadata_match: present; "), "{refused:?}");
}

#[test]
fn what_tcp_proxy_says_of_connections_holds() {
    let mut capture = Bench::fixture("sidecar");
    for listener in capture["listeners"].as_array_mut().expect("a list") {
        let filters = listener["filter_chains"][0]["filters"].as_array_mut().expect("a list");
        let tcp_proxy = &mut filters.last_mut().expect("a filter")["typed_config"];
        tcp_proxy["idle_timeout"] = json!("90s");
        tcp_proxy["max_connect_attempts"] = json!(7);
    }
    let mut bench = Bench::new("web");
    assert_eq!(bench.send_all(&capture), [""; 0]);
    let service = bench.build();
    let idle_timeout = Some(Duration::from_secs(90));
    assert_eq!(service.public.as_ref().map(|public| public.idle_timeout), Some(idle_timeout));
    assert!(!service.upstreams.is_empty());
    for upstream in &service.upstreams {
        assert_eq!((upstream.idle_timeout, upstream.connect_attempts), (idle_timeout, Some(7)));
    }
}

#[test]
fn a_log_is_known_for_the_listeners_that_have_it() {
    let mut capture = Bench::fixture("sidecar");
    let log = json!([{"name": "mine", "typed_config":
        {"@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog"}}]);
    let listeners = capture["listeners"].as_array_mut().expect("a list");
    let upstream = listeners.iter_mut().find(|listener| listener["traffic_direction"] == "OUTBOUND").expect("an upstream");
    upstream["access_log"] = log.clone();
    let mut bench = Bench::new("web");
    bench.send_all(&capture);
    let only = |bench: &Bench| {
        let held: Vec<_> = bench.held.listeners.values().map(AsRef::as_ref).collect();
        super::feeder::access_logs(&held).into_iter().map(|log| log.only).collect::<Vec<_>>()
    };
    let of_one = only(&bench);
    let [Some(names)] = of_one.as_slice() else { panic!("{of_one:?}") };
    let service = bench.build();
    assert!(
        names.len() == 1
            && service.upstreams.iter().any(|upstream| names.iter().any(|of| of.upstream.as_deref() == Some(&upstream.name))),
        "{names:?}"
    );
    for listener in capture["listeners"].as_array_mut().expect("a list") {
        listener["access_log"] = log.clone();
    }
    bench.send_all(&capture);
    assert_eq!(only(&bench), [None], "what all have needs no list");
}

fn settings() -> Xds {
    Xds {
        node_id: "id".into(),
        node_cluster: "web".into(),
        node_metadata: json!({"namespace": "default"}).as_object().expect("an object").clone(),
        server: None,
        initial_metadata: Vec::new(),
        static_listeners: Vec::new(),
        static_clusters: Vec::new(),
        grpc_servers: Default::default(),
        http_as_tcp: false,
        bootstrap: Json::Null,
    }
}

#[test]
fn a_stream_begins_with_the_node_and_what_is_held() {
    let mut bench = Bench::new("airflow-worker");
    let mut subscription = Subscription::new(&settings());
    let first = subscription.open(&bench.held);
    let kinds: Vec<_> = first.iter().map(|request| Kind::of_url(&request.type_url).expect("known")).collect();
    assert_eq!(kinds, [Kind::Cluster, Kind::Listener]);
    let node = first[0].node.as_ref().expect("the node");
    assert_eq!((node.id.as_str(), node.user_agent_name.as_str()), ("id", "ringfence"));
    assert!(node.metadata.as_ref().expect("metadata").fields.contains_key("namespace") && first[1].node.is_none());

    bench.send_all(&Bench::fixture("sidecar"));
    let asked = subscription.follow(&bench.held);
    assert_eq!(asked.len(), 1, "endpoints are asked for: {asked:?}");
    assert_eq!(asked[0].resource_names_subscribe.len(), 4, "{asked:?}");
    assert!(subscription.follow(&bench.held).is_empty());

    let again = subscription.open(&bench.held);
    assert_eq!(again.len(), 3);
    let held: Vec<usize> = again.iter().map(|request| request.initial_resource_versions.len()).collect();
    assert_eq!(held, [5, 4, 5]);
    assert_eq!(again[1].resource_names_subscribe.len(), 4);

    let nack = answer("t", "7", &["bad".to_owned()]);
    assert_eq!((nack.response_nonce.as_str(), nack.error_detail.expect("why").message.as_str()), ("7", "bad"));
    assert!(answer("t", "7", &[]).error_detail.is_none());
}

mod ingress;
mod routes;
mod shown;
