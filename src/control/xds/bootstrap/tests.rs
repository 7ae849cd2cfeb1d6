//! What Consul printed, and what is refused with its place.

use serde_json::json;

use super::*;
use crate::config::envoy::{PageAnswer, PathMatch, StatAddress, StatDialect, StatTagValue};

fn fixture(path: &str) -> Json {
    let path = format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).expect("the fixture is there")).expect("it is JSON")
}

fn of(json: Json) -> Result<Bootstrap, BootstrapError> {
    read(&Protos::load(), &[json])
}

fn cluster(name: &str, port: u16) -> Json {
    json!({ "name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": { "cluster_name": name, "endpoints": [
        { "lb_endpoints": [{ "endpoint": { "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } } } }] }] } })
}

fn ads(cluster: &str) -> Json {
    json!({ "api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": [{ "envoy_grpc": { "cluster_name": cluster } }] })
}

#[test]
fn a_sidecars_bootstrap_of_consul_1_10() {
    let read = of(fixture("consul-1.10/xds/sidecar.bootstrap.json")).expect("it is understood");
    assert!(!read.old_protocol);
    assert_eq!((read.xds.node_id.as_str(), read.xds.node_cluster.as_str()), ("airflow-worker-sidecar-proxy", "airflow-worker"));
    assert_eq!(read.xds.node_metadata["namespace"], "default");
    let server = read.xds.server.expect("it has a server");
    assert_eq!(server.addresses, [GrpcAddress::Tcp("127.0.0.1".into(), 9702)]);
    assert_eq!((server.connect_timeout, server.tls), (Duration::from_secs(1), None));
    assert!(read.xds.initial_metadata.is_empty(), "an empty token is none");
    assert!(read.xds.static_clusters.is_empty() && read.xds.static_listeners.is_empty());
    assert_eq!(read.admin, Some("127.0.0.1:19700".parse().expect("address")));
    assert_eq!(read.admin_access_log, None);
    assert_eq!(read.stats.tags.len(), 25);
    assert_eq!(read.stats.tags[24].value, StatTagValue::Fixed("dc1".into()));
    let [page] = read.pages.as_slice() else { panic!("{:?}", read.pages) };
    assert_eq!(page.bind, "127.0.0.1:9102".parse().expect("address"));
    assert_eq!(page.routes[0].path, PathMatch::Exact("/metrics".into()));
    assert_eq!(page.routes[0].answer, PageAnswer::Admin { rewrite: Some("/stats/prometheus".into()) });
    assert_eq!(page.routes[1].answer, PageAnswer::Status(404));
}

#[test]
fn every_proxy_kinds_bootstrap_is_understood() {
    for kind in ["sidecar", "sidecar-inbound", "ingress", "egress", "mesh-gateway", "transparent", "stats"] {
        let read =
            of(fixture(&format!("consul-1.10/xds/{kind}.bootstrap.json"))).unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert!(read.xds.server.is_some(), "{kind}");
    }
}

#[test]
fn the_bootstrap_of_consul_1_8_is_renewed_and_marked_as_old() {
    let read = of(fixture("consul-1.8/bootstrap.json")).expect("it is understood");
    assert!(read.old_protocol);
    assert_eq!(read.xds.node_id, "web-sidecar-proxy");
    assert_eq!(read.xds.initial_metadata, [("x-consul-token".to_owned(), Zeroizing::new("abc".to_owned()))]);
    assert_eq!(read.stats.flush_interval, Duration::from_secs(10));
    let [statsd, dog] = read.stats.sinks.as_slice() else { panic!("{:?}", read.stats.sinks) };
    assert_eq!(
        (statsd.dialect, &statsd.address),
        (StatDialect::Statsd, &StatAddress::Udp("127.0.0.1:9125".parse().expect("address")))
    );
    assert_eq!((dog.dialect, &dog.address), (StatDialect::DogStatsd, &StatAddress::Unix("/run/dd.sock".into())));
    let binds: Vec<_> = read.pages.iter().map(|page| page.bind.to_string()).collect();
    assert_eq!(binds, ["0.0.0.0:9102", "127.0.0.1:9103"]);
    assert_eq!(read.pages[1].routes[0].path, PathMatch::Prefix("/stats".into()));
    assert_eq!(read.ignored, ["layered_runtime"]);
    assert!(!read.xds.bootstrap.to_string().contains("abc"), "{}", read.xds.bootstrap);
    assert!(!format!("{read:?}").contains("abc"));
}

#[test]
fn the_servers_tls_comes_inline_and_its_socket_may_be_unix() {
    let mut server = cluster("local_agent", 8503);
    server["transport_socket"] = json!({ "name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": { "validation_context": { "trusted_ca": { "inline_string": "PEM" } } } } });
    let json = json!({ "static_resources": { "clusters": [server] }, "dynamic_resources": { "ads_config": ads("local_agent") } });
    let tls = of(json).expect("it is understood").xds.server.and_then(|server| server.tls);
    assert_eq!(tls, Some(GrpcTls { ca_pem: "PEM".into(), server_name: None, client: None }));

    let mut server = cluster("local_agent", 1);
    server["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"] =
        json!({ "pipe": { "path": "/run/grpc.sock" } });
    let json = json!({ "static_resources": { "clusters": [server] }, "dynamic_resources": { "ads_config": ads("local_agent") } });
    let server = of(json).expect("it is understood").xds.server.expect("it has a server");
    assert_eq!(server.addresses, [GrpcAddress::Unix("/run/grpc.sock".into())]);
}

#[test]
fn static_resources_for_traffic_are_kept_encoded() {
    let listener = json!({ "name": "in", "address": { "socket_address": { "address": "127.0.0.1", "port_value": 1 } }, "filter_chains": [
        { "filters": [{ "name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "x", "cluster": "app" } }] }] });
    let read = of(
        json!({ "static_resources": { "clusters": [cluster("self_admin", 19000), cluster("app", 80)], "listeners": [listener] } }),
    );
    let xds = read.expect("it is understood").xds;
    assert_eq!(xds.server, None);
    let [app] = xds.static_clusters.as_slice() else { panic!("{} clusters", xds.static_clusters.len()) };
    let shown = Protos::load().render_bytes(CLUSTER, app).expect("a cluster");
    assert_eq!(shown["name"], "app");
    let shown = Protos::load().render_bytes(LISTENER, &xds.static_listeners[0]).expect("a listener");
    assert_eq!(shown["filter_chains"][0]["filters"][0]["typed_config"]["cluster"], "app");
}

#[test]
fn secrets_may_come_from_a_static_cluster() {
    // As Consul's documentation of TLS.SDS gives it in envoy_extra_static_clusters_json, but for the files.
    let mut sds = cluster("sds-cluster", 1234);
    sds["type"] = "LOGICAL_DNS".into();
    sds["http2_protocol_options"] = json!({});
    let inline = |text: &str| json!({ "inline_string": text });
    let ca = crate::tls::fixtures::Ca::new("sds.example");
    let svid = ca.svid("gateway");
    let (chain, key) = (crate::tls::fixtures::chain_pem(&svid.chain), crate::tls::fixtures::key_pem(&svid.key));
    let roots = crate::tls::fixtures::chain_pem(std::slice::from_ref(ca.certificate()));
    sds["transport_socket"] = json!({ "name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": { "tls_certificates": [{ "certificate_chain": inline(&chain), "private_key": inline(&key) }],
            "validation_context": { "trusted_ca": inline(&roots) } } } });
    let json = json!({ "node": { "id": "ingress" }, "static_resources": { "clusters": [cluster("local_agent", 8502), sds] },
        "dynamic_resources": { "ads_config": ads("local_agent") } });
    let xds = of(json).expect("it is understood").xds;
    assert_eq!(xds.grpc_servers.keys().collect::<Vec<_>>(), ["sds-cluster"], "the agent is none for secrets");
    let server = &xds.grpc_servers["sds-cluster"];
    assert_eq!(server.addresses, [GrpcAddress::Tcp("127.0.0.1".into(), 1234)]);
    assert!(server.tls.as_ref().is_some_and(|tls| tls.client.is_some()));
    let held = crate::control::xds::held::Held::from_bootstrap(&xds.static_clusters, &[], false);
    assert!(held.is_ok_and(|held| held.clusters.get("sds-cluster").is_some()), "it is a cluster like others");
}

#[test]
fn a_page_has_tls_by_static_secrets_and_a_backend_on_loopback() {
    let mut json = fixture("consul-1.10/xds/sidecar.bootstrap.json");
    json["static_resources"]["secrets"] = json!([
        { "name": "cert", "tlsCertificate": { "certificateChain": { "filename": "/a.pem" }, "privateKey": { "filename": "/a.key" } } },
        { "name": "ca", "validationContext": { "trustedCa": { "filename": "/ca.pem" } } },
    ]);
    json["static_resources"]["listeners"][0]["filter_chains"][0]["transportSocket"] = json!({ "name": "tls", "typedConfig": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "commonTlsContext": { "tlsCertificateSdsSecretConfigs": [{ "name": "cert" }], "validationContextSdsSecretConfig": { "name": "ca" } } } });
    json["static_resources"]["clusters"][1]["name"] = json!("prometheus_backend");
    json["static_resources"]["clusters"][1]["loadAssignment"]["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"]["socket_address"]
        ["port_value"] = json!(20100);
    json["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typedConfig"]["route_config"]["virtual_hosts"]
        [0]["routes"][0]["route"]["cluster"] = json!("prometheus_backend");
    let read = of(json).expect("it is understood");
    let tls = read.pages[0].tls.as_ref().expect("it has TLS");
    assert_eq!((tls.cert_file.as_path(), tls.key_file.as_path()), ("/a.pem".as_ref(), "/a.key".as_ref()));
    assert_eq!(tls.ca.as_deref(), Some("/ca.pem".as_ref()));
    let backend = PageAnswer::Backend {
        address: "127.0.0.1:20100".parse().expect("address"),
        rewrite: Some("/stats/prometheus".into()),
        http2: false,
    };
    assert_eq!(read.pages[0].routes[0].answer, backend);
    assert!(read.xds.static_clusters.is_empty(), "a page's cluster is not for traffic");
}

#[test]
fn parts_are_merged_as_messages_are() {
    let parts = [
        json!({ "node": { "id": "a", "cluster": "c" }, "static_resources": { "clusters": [cluster("x", 1)] } }),
        json!({ "node": { "id": "b" }, "staticResources": { "clusters": [cluster("y", 2)] } }),
    ];
    let read = read(&Protos::load(), &parts).expect("it is understood");
    assert_eq!((read.xds.node_id.as_str(), read.xds.node_cluster.as_str()), ("b", "c"));
    assert_eq!(read.xds.static_clusters.len(), 2);
}

#[test]
fn what_is_not_understood_is_refused_with_its_place() {
    let sidecar = |change: &dyn Fn(&mut Json)| {
        let mut json = fixture("consul-1.10/xds/sidecar.bootstrap.json");
        change(&mut json);
        json
    };
    let http = "/static_resources/listeners/0/filter_chains/0/filters/0/typedConfig";
    for (json, wanted) in [
        (json!({ "overload_manager": { "refresh_interval": "1s" } }), "overload_manager: not understood"),
        (json!({ "hds_config": {} }), "hds_config: not understood"),
        (json!({ "admin": { "address": { "pipe": { "path": "/x" } } } }), "admin.address: a socket_address is wanted"),
        (
            json!({ "admin": { "address": { "socket_address": { "address": "localhost", "port_value": 1 } } } }),
            "'localhost' is no IP address",
        ),
        (json!({ "dynamic_resources": { "ads_config": ads("nowhere") } }), "there is no static cluster 'nowhere'"),
        (
            json!({ "dynamic_resources": { "lds_config": { "path_config_source": { "path": "/x" } } } }),
            "dynamic_resources.lds_config: only `ads`",
        ),
        (
            json!({ "dynamic_resources": { "ads_config": { "api_type": "GRPC", "transport_api_version": "V3" } } }),
            "dynamic_resources.ads_config.api_type: GRPC is not spoken",
        ),
        (
            json!({ "stats_sinks": [{ "name": "x", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.metrics.v3.HystrixSink" } }] }),
            "stats_sinks[0].typed_config: the sink",
        ),
        (json!({ "stats_config": { "stats_tags": [{ "tag_name": "x", "regex": "(" }] } }), "stats_config.stats_tags[0].regex"),
        (
            sidecar(&|json| {
                json.pointer_mut(http).expect("HTTP")["route_config"]["virtual_hosts"][0]["routes"][0]["redirect"] = json!({})
            }),
            "route_config.virtual_hosts[0].routes[0]",
        ),
        (
            sidecar(&|json| json.pointer_mut(http).expect("HTTP")["http_filters"][0]["name"] = json!("envoy.filters.http.lua")),
            "'envoy.filters.http.lua' is of L7",
        ),
        (
            sidecar(&|json| json.pointer_mut(http).expect("HTTP")["http2_protocol_options"] = json!({})),
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http2_protocol_options: not understood",
        ),
    ] {
        let error = of(json).expect_err(wanted).to_string();
        assert!(error.contains(wanted), "{error}\nlacks {wanted}");
    }
}
