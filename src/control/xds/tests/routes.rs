//! Listeners whose connections are told apart: what Consul 1.10 sent for gateways and a transparent proxy, and what later ones
//! send, written after Consul's `agent/xds/listeners.go`.

use super::*;
use crate::config::envoy::{PageAnswer, PathMatch};

const HTTP: &str = "type.googleapis.com/envoy.extensions.filters";

impl Bench {
    /// The name of the route that a connection takes.
    fn taken(&self, seen: &Seen<'_>) -> Option<String> {
        let router = &self.published.routers[0];
        router.route(seen).map(|place| router.routes().nth(place).expect("a place of a route").name.to_string())
    }

    /// The way of a route.
    fn way(&self, name: &str) -> Way {
        let routes = self.published.routers.iter().flat_map(|router| router.routes());
        routes.into_iter().find(|route| *route.name == *name).unwrap_or_else(|| panic!("no route {name}")).way.clone()
    }
}

fn tls(server_name: &str) -> Seen<'_> {
    Seen { server_name: Some(server_name), tls: true, ..Seen::default() }
}

fn to(address: &str, tls: bool) -> Seen<'_> {
    Seen { destination: Some(address.parse().expect("an address")), tls, ..Seen::default() }
}

pub(super) fn proxy(cluster: &str) -> Json {
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": format!("{HTTP}.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "x", "cluster": cluster}})
}

/// A filter chain that ends mutual TLS.
fn ending(cluster: &str) -> Json {
    json!({
        "filters": [{"name": "envoy.filters.network.rbac", "typed_config": {
            "@type": format!("{HTTP}.network.rbac.v3.RBAC"), "rules": {"action": "DENY"}, "stat_prefix": "connect_authz"}},
            proxy(cluster)],
        "transport_socket": {"name": "tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": {"tls_certificates": [{"certificate_chain": {}, "private_key": {}}],
                "validation_context": {"trusted_ca": {}}}}}})
}

pub(super) fn listener(name: &str, direction: &str, filters: &[&str], chains: Json) -> Json {
    let filters: Vec<Json> = filters.iter().map(|name| json!({"name": format!("envoy.filters.listener.{name}")})).collect();
    json!({"name": name, "address": {"socket_address": {"address": "127.0.0.1", "port_value": 15001}},
        "traffic_direction": direction, "listener_filters": filters, "filter_chains": chains})
}

#[test]
fn a_mesh_gateway_passes_tls_on_to_the_cluster_that_is_asked_for() {
    let mut bench = Bench::new("gateway");
    let capture = Bench::fixture("mesh-gateway");
    assert_eq!(bench.send_all(&capture), Vec::<String>::new());
    let router = bench.router();
    assert_eq!(bench.notes, Vec::<String>::new());
    assert_eq!(router.settings().bind.to_string(), "127.0.0.1:21512");
    assert!(router.inspects() && !router.enforces());
    let names: Vec<&str> =
        capture["clusters"].as_array().expect("a list").iter().map(|one| one["name"].as_str().expect("")).collect();
    assert_eq!(names.len(), 6);
    for name in &names {
        assert_eq!(bench.taken(&tls(name)).as_deref(), Some(*name));
        let Way::Forward(upstream) = bench.way(name) else { panic!("{name} is not passed on") };
        assert!(!upstream.targets[0].endpoints.is_empty(), "{name}");
    }
    assert_eq!(bench.taken(&tls("elsewhere.default.dc1.internal.t.consul")), None);
    assert_eq!(bench.taken(&Seen::default()), None, "without TLS there is no name");
    assert!(Arc::ptr_eq(&router, &bench.router()), "nothing changed");

    // Names of another datacenter go to its gateways; what no chain names stays with the clusters of that name.
    let cluster = json!({"name": "dc2.internal.t.consul", "type": "EDS"});
    let mut listener = capture["listeners"][0].clone();
    let chains = listener["filter_chains"].as_array_mut().expect("a list");
    chains.insert(
        0,
        json!({"filter_chain_match": {"server_names": ["*.dc2.internal.t.consul"]},
        "filters": [proxy("dc2.internal.t.consul")]}),
    );
    assert_eq!(bench.send(Kind::Cluster, &[cluster]), Vec::<String>::new());
    assert_eq!(bench.send(Kind::Listener, &[listener]), Vec::<String>::new());
    bench.build();
    assert_eq!(bench.taken(&tls("web.default.dc2.internal.t.consul")).as_deref(), Some("dc2.internal.t.consul"));
    assert_eq!(bench.taken(&tls(names[0])).as_deref(), Some(names[0]));
}

#[test]
fn a_terminating_gateway_shows_each_service_its_own_certificate_and_passes_nothing_on() {
    let mut bench = Bench::new("legacy");
    let capture = Bench::fixture("egress");
    assert_eq!(bench.send_all(&capture), Vec::<String>::new());
    let router = bench.router();
    let name = capture["clusters"][0]["name"].as_str().expect("a name");
    assert!(router.enforces() && !router.lacks_identity(), "{:?}", bench.notes);
    assert_eq!(bench.taken(&tls(name)).as_deref(), Some(name));
    let Way::Terminate { service, app } = bench.way(name) else { panic!("TLS does not end") };
    assert_eq!((&*service.name, service.identity.as_ref().expect("one").svid.id.clone()), ("legacy", bench.ca.id("legacy")));
    assert!(!app.expect("endpoints to choose from").targets[0].endpoints.is_empty());
    assert_eq!(router.routes().count(), 1, "the last chain leads to no cluster, and would pass intentions by");
    assert_eq!(bench.taken(&tls("other.default.dc1.internal.t.consul")), None);

    // A second service under another certificate.
    let mut listener = capture["listeners"][0].clone();
    let chains = listener["filter_chains"].as_array_mut().expect("a list");
    let mut second = chains[0].clone();
    second["filter_chain_match"]["server_names"] = json!(["billing.internal"]);
    second["filters"][1]["typed_config"]["cluster"] = "billing".into();
    let billing = bench.ca.svid("billing");
    let certificate = &mut second["transport_socket"]["typed_config"]["common_tls_context"]["tls_certificates"][0];
    *certificate = json!({"certificate_chain!": chain_pem(&billing.chain), "private_key!": key_pem(&billing.key)});
    chains.insert(1, second);
    assert_eq!(bench.send(Kind::Listener, &[listener]), Vec::<String>::new());
    bench.build();
    let Way::Terminate { service: first, .. } = bench.way(name) else { panic!("TLS does not end") };
    assert!(Arc::ptr_eq(&service, &first), "the other one does not touch it");
    let Way::Terminate { service, app } = bench.way("billing") else { panic!("TLS does not end") };
    assert_eq!(service.identity.as_ref().expect("one").svid.id, bench.ca.id("billing"));
    assert!(app.expect("nowhere yet").targets[0].endpoints.is_empty() && bench.notes[0].contains("cluster billing is not there"));
}

#[test]
fn an_app_that_speaks_tls_is_spoken_to_behind_a_terminating_gateway_and_nowhere_else() {
    let mut bench = Bench::new("legacy");
    let capture = Bench::fixture("egress");
    assert_eq!(bench.send_all(&capture), Vec::<String>::new());
    let name = capture["clusters"][0]["name"].as_str().expect("a name");
    let context = json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": "db.example.com",
        "common_tls_context": {"validation_context": {"trusted_ca": {}}}}});
    let mut cluster = capture["clusters"][0].clone();
    cluster["transport_socket"] = context.clone();
    assert_eq!(bench.send(Kind::Cluster, &[cluster.clone()]), Vec::<String>::new());
    let app = |bench: &mut Bench| {
        bench.build();
        let Way::Terminate { app: Some(app), .. } = bench.way(name) else { panic!("{:?}", bench.notes) };
        app
    };
    let first = app(&mut bench);
    assert_eq!(&*first.outside.as_ref().expect("TLS").settings().sni, "db.example.com");
    assert!(!first.targets[0].endpoints.is_empty(), "what was known of its members stays");
    cluster["connect_timeout"] = "7s".into();
    assert_eq!(bench.send(Kind::Cluster, &[cluster]), Vec::<String>::new());
    let second = app(&mut bench);
    assert!(!Arc::ptr_eq(&first, &second), "a change");
    assert!(Arc::ptr_eq(first.outside.as_ref().expect("TLS"), second.outside.as_ref().expect("TLS")), "of something else");

    // A sidecar calls the mesh with it as little as without any, and shows its own app none of it.
    let sidecar = |fixture: &str| {
        let mut capture = Bench::fixture(fixture);
        for cluster in capture["clusters"].as_array_mut().expect("a list") {
            cluster["transport_socket"] = context.clone();
        }
        let mut bench = Bench::new("web");
        let refused = bench.send_all(&capture);
        (bench.build(), refused, bench.notes)
    };
    let (_, refused, _) = sidecar("sidecar");
    assert!(refused.iter().any(|why| why.contains("no UpstreamTlsContext of the mesh")), "{refused:?}");
    let (service, _, notes) = sidecar("sidecar-inbound");
    assert!(service.public.is_none() && notes.iter().any(|note| note.contains("is reached in plain")), "{notes:?}");
}

#[test]
fn a_transparent_proxy_tells_virtual_addresses_apart_and_lets_the_rest_pass() {
    let mut bench = Bench::new("batch");
    let mut capture = Bench::fixture("transparent");
    assert_eq!(bench.send_all(&capture), Vec::<String>::new(), "a filter by name alone is taken");
    bench.build();
    assert!(matches!(bench.way("original-destination"), Way::Original(_)));
    assert_eq!(bench.taken(&to("192.0.2.1:80", false)).as_deref(), Some("original-destination"));

    let clusters: Vec<String> =
        capture["clusters"].as_array().expect("a list").iter().map(|one| one["name"].to_string()).collect();
    let broker = clusters.iter().map(|name| name.trim_matches('"')).find(|name| name.starts_with("broker.")).expect("there");
    let outbound = capture["listeners"].as_array_mut().expect("a list");
    let outbound = outbound.iter_mut().find(|one| one["traffic_direction"] == "OUTBOUND").expect("there");
    let rest = outbound["filter_chains"][0].clone();
    outbound["default_filter_chain"] = rest;
    let range = |address: &str| json!([{"address_prefix": address, "prefix_len": 32}]);
    outbound["filter_chains"] = json!([
        {"filter_chain_match": {"prefix_ranges": range("240.0.0.1")}, "filters": [proxy(broker)]},
        {"filter_chain_match": {"prefix_ranges": range("240.0.0.2")}, "filters": [proxy("local_app")]},
        {"filter_chain_match": {"prefix_ranges": range("240.0.0.3"), "destination_port": 443}, "filters": [proxy(broker)]},
    ]);
    let outbound = outbound.clone();
    assert_eq!(bench.send(Kind::Listener, &[outbound]), Vec::<String>::new());
    bench.build();
    let first = bench.taken(&to("240.0.0.1:6379", false)).expect("a route");
    let Way::Originate { service, upstream } = bench.way(&first) else { panic!("no TLS behind {first}") };
    assert_eq!(service.identity.as_ref().expect("one").svid.id, bench.ca.id("batch"));
    assert_eq!(upstream.targets[0].expected[0], bench.ca.id("broker"));
    assert_eq!(bench.taken(&to("192.0.2.1:80", false)).as_deref(), Some("original-destination"));
    assert_ne!(bench.taken(&to("240.0.0.3:443", false)), Some(first), "two chains to one cluster are two routes");
    // Nothing leaves for the mesh in plain: it ends there, and does not fall to the passthrough.
    let Way::Forward(nowhere) = bench.way("local_app") else { panic!("served") };
    assert!(
        nowhere.targets[0].endpoints.is_empty() && bench.notes.iter().any(|note| note.contains("nothing leaves without")),
        "{:?}",
        bench.notes
    );
    assert_eq!(bench.taken(&to("240.0.0.2:80", false)).as_deref(), Some("local_app"));
}

#[test]
fn permissive_mode_is_a_chain_by_port_beside_the_one_that_decides() {
    let mut bench = Bench::new("batch");
    let app = json!({"name": "local_app", "type": "STATIC", "load_assignment": {"cluster_name": "local_app", "endpoints": [
        {"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 8080}}}}]}]}});
    assert_eq!(bench.send(Kind::Cluster, &[app]), Vec::<String>::new());
    let raw = json!({"filter_chain_match": {"destination_port": 8080}, "filters": [proxy("local_app")]});
    let public = |chains: Json| listener("public_listener", "INBOUND", &["original_dst"], chains);
    assert_eq!(bench.send(Kind::Listener, &[public(json!([ending("local_app"), raw]))]), Vec::<String>::new());
    let router = bench.router();
    assert!(router.settings().permissive && !router.enforces(), "{:?}", bench.notes);
    assert!(matches!(bench.way("local_app for port 8080"), Way::Forward(_)));
    assert_eq!(bench.taken(&to("127.0.0.1:20000", true)).as_deref(), Some("local_app for all"));
    let Way::Terminate { service, app: None } = bench.way("local_app for all") else { panic!("TLS does not end") };
    assert_eq!(service.public.as_ref().expect("there").app, [Address::Tcp(([127, 0, 0, 1], 8_080).into())]);

    // A listener that is not understood lets nobody in by its old rules.
    assert!(service.intentions.decide(&bench.ca.id("web")).is_ok());
    let refused = bench.send(Kind::Listener, &[listener("public_listener", "INBOUND", &["http_inspector"], json!([]))]);
    assert!(refused[0].contains("listener_filters[0].name: envoy.filters.listener.http_inspector"), "{refused:?}");
    let router = bench.router();
    let Way::Terminate { service, .. } = bench.way("local_app for all") else { panic!("TLS does not end") };
    assert!(service.intentions.decide(&bench.ca.id("web")).is_err());
    assert!(router.enforces() && router.routes().count() == 1, "nobody passes the intentions by either");
    assert_eq!(bench.taken(&to("127.0.0.1:8080", false)).as_deref(), Some("local_app for all"), "where TLS is wanted");
}

#[test]
fn a_permissive_sidecar_calls_under_its_own_certificate() {
    let mut bench = Bench::new("ingress");
    let capture = Bench::fixture("ingress");
    bench.send_all(&capture);
    let raw = json!({"filter_chain_match": {"destination_port": 8080}, "filters": [proxy("local_app")]});
    let public = listener("public_listener", "INBOUND", &["original_dst"], json!([ending("local_app"), raw]));
    assert_eq!(bench.send(Kind::Listener, &[public]), Vec::<String>::new());
    let service = bench.build();
    assert_eq!(service.identity.as_ref().expect("its own").svid.id, bench.ca.id("ingress"));
    assert!(!service.upstreams.is_empty());
}

fn pem(ca: &Ca) -> String {
    chain_pem(std::slice::from_ref(ca.certificate()))
}

/// The cluster `db.peer` of another trust domain.
fn cluster_of(peer: &Ca) -> Json {
    json!({"name": "db.peer", "type": "EDS", "transport_socket": {"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": "db.peer",
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": {}, "private_key": {}}],
            "validation_context": {"trusted_ca!": pem(peer), "match_typed_subject_alt_names": [
                {"san_type": "URI", "matcher": {"exact": peer.id("db").as_str()}}]}}}}})
}

#[test]
fn a_gateway_to_peers_alone_trusts_nobody_of_its_own_domain() {
    let mut bench = Bench::new("ingress");
    let peer = Ca::new("aaaa.consul");
    assert_eq!(bench.send(Kind::Cluster, &[cluster_of(&peer)]), Vec::<String>::new());
    let nobody_yet = json!({"cluster_name": "db.peer", "endpoints": []});
    assert_eq!(bench.send(Kind::Endpoints, &[nobody_yet]), Vec::<String>::new());
    let upstream = listener("db.peer:127.0.0.1:15001", "OUTBOUND", &[], json!([{"filters": [proxy("db.peer")]}]));
    assert_eq!(bench.send(Kind::Listener, &[upstream]), Vec::<String>::new());
    let service = bench.build();
    let identity = service.identity.as_ref().unwrap_or_else(|| panic!("{:?}", bench.identities.refused().collect::<Vec<_>>()));
    assert_eq!(identity.svid.id, bench.ca.id("ingress"));
    assert!(identity.bundle.roots.is_empty());
    assert_eq!(identity.bundle.peers, [peer.as_peer(false)]);
    assert_eq!(service.upstreams[0].targets[0].expected[..], [peer.id("db")]);
}

#[test]
fn a_peer_is_trusted_for_its_own_domain_and_where_a_listener_says_so() {
    let mut bench = Bench::new("web");
    let (answering, calling) = (Ca::new("aaaa.consul"), Ca::new("bbbb.consul"));
    let mut public = ending("local_app");
    public["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"] = json!({
        "custom_validator_config": {"name": "envoy.tls.cert_validator.spiffe", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig",
            "trust_domains": [
                {"name": TRUST_DOMAIN, "trust_bundle!": pem(&bench.ca)},
                {"name": "bbbb.consul", "trust_bundle!": pem(&calling)}]}}});
    assert_eq!(bench.send(Kind::Cluster, &[cluster_of(&answering)]), Vec::<String>::new());
    assert_eq!(bench.send(Kind::Listener, &[listener("public_listener", "INBOUND", &[], json!([public]))]), Vec::<String>::new());
    let service = bench.build();
    let bundle = &service.identity.as_ref().unwrap_or_else(|| panic!("{:?}", bench.notes)).bundle;
    assert_eq!((&*bundle.trust_domain, bundle.roots.as_slice()), (TRUST_DOMAIN, std::slice::from_ref(bench.ca.certificate())));
    assert_eq!(bundle.peers, [answering.as_peer(false), calling.as_peer(true)]);
}

#[test]
fn a_peer_with_more_roots_than_are_kept_is_left_out_alone() {
    let mut bench = Bench::new("web");
    let peer = |name: &str| {
        let roots: String = (0..40).map(|_| chain_pem(std::slice::from_ref(Ca::new("aaaa.consul").certificate()))).collect();
        json!({"name": name, "type": "EDS", "transport_socket": {"name": "tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", "sni": name,
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": {}, "private_key": {}}],
                "validation_context": {"trusted_ca!": roots, "match_typed_subject_alt_names": [
                    {"san_type": "URI", "matcher": {"exact": format!("spiffe://aaaa.consul/ns/default/dc/dc1/svc/{name}")}}]}}}}})
    };
    assert_eq!(bench.send(Kind::Cluster, &[peer("one"), peer("two")]), Vec::<String>::new());
    let public = listener("public_listener", "INBOUND", &[], json!([ending("local_app")]));
    assert_eq!(bench.send(Kind::Listener, &[public]), Vec::<String>::new());
    let service = bench.build();
    let identity = service.identity.as_ref().expect("our own certificate is in use all the same");
    assert!(identity.bundle.peers.is_empty());
    let why = bench.identities.refused().next().expect("a reason");
    assert!(why.starts_with("peer aaaa.consul: "), "{why}");
}

#[test]
fn matches_that_are_not_looked_at_are_refused_by_their_names() {
    let mut bench = Bench::new("web");
    let mut told = |filters: &[&str], matches: Json| {
        let chains = json!([{"filter_chain_match": matches, "filters": [proxy("x")]}]);
        bench.send(Kind::Listener, &[listener("one", "OUTBOUND", filters, chains)]).join("; ")
    };
    let alpn = told(&["tls_inspector"], json!({"application_protocols": ["h2"]}));
    assert!(alpn.contains("filter_chains[0].filter_chain_match.application_protocols: present"), "{alpn}");
    let source = told(&["original_dst"], json!({"source_prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 8}]}));
    assert!(source.contains("filter_chain_match.source_prefix_ranges: present"), "{source}");
    let long = told(&["original_dst"], json!({"prefix_ranges": [{"address_prefix": "10.0.0.0", "prefix_len": 33}]}));
    assert!(long.contains("prefix_ranges[0].prefix_len: 33; 10.0.0.0/33 is no network"), "{long}");
    let blind = told(&[], json!({"server_names": ["db.consul"]}));
    assert!(blind.contains("listener_filters: absent; what a connection says first is looked at by"), "{blind}");
    let mut raw = |direction: &str, filters: &[&str], chains: Json| {
        bench.send(Kind::Listener, &[listener("one", direction, filters, chains)]).join("; ")
    };
    let port = |cluster: &str| json!({"filter_chain_match": {"destination_port": 80}, "filters": [proxy(cluster)]});
    let plain = raw("INBOUND", &["original_dst"], json!([port("x")]));
    assert!(plain.contains("transport_socket: absent; a way in that is not mutual TLS"), "{plain}");
    let twice = raw("OUTBOUND", &["original_dst"], json!([port("x"), port("y")]));
    assert!(twice.contains("filter_chains[1].filter_chain_match: doubled; another chain takes the same"), "{twice}");
    let sni = json!({"filters": [{"name": "envoy.filters.network.sni_cluster"}, proxy("")]});
    let mut by_name = listener("one", "UNSPECIFIED", &["tls_inspector"], json!([sni]));
    by_name["default_filter_chain"] = json!({"filters": [proxy("x")]});
    let by_name = bench.send(Kind::Listener, &[by_name]).join("; ");
    assert!(by_name.contains("sni_cluster; names that are no cluster's are reset"), "{by_name}");
    let mut told = |filters: &[&str], matches: Json| {
        let chains = json!([{"filter_chain_match": matches, "filters": [proxy("x")]}]);
        bench.send(Kind::Listener, &[listener("one", "OUTBOUND", filters, chains)]).join("; ")
    };
    let empty = told(&["tls_inspector"], json!({"server_names": ["*"]}));
    assert!(empty.contains("server_names[0]: server name \"*\" cannot be matched"), "{empty}");
}

/// A connection manager with these routes and HTTP filters.
pub(super) fn manager(routes: Json, filters: Json) -> Json {
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": {
        "@type": format!("{HTTP}.network.http_connection_manager.v3.HttpConnectionManager"), "stat_prefix": "x",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]}, "http_filters": filters}})
}

pub(super) fn all_to(cluster: &str) -> Json {
    json!([{"match": {"prefix": "/"}, "route": {"cluster": cluster}}])
}

#[test]
fn a_connection_manager_that_tells_nothing_apart_is_bytes() {
    let mut bench = Bench::new("web");
    bench.send_all(&Bench::fixture("ingress"));
    let capture = Bench::fixture("ingress");
    let cluster = capture["clusters"][0]["name"].as_str().expect("a name");
    let router = json!({"name": "envoy.filters.http.router"});
    let out = |filters: Json, routes: Json| {
        listener("http:127.0.0.1:15001", "OUTBOUND", &[], json!([{"filters": [manager(routes, filters)]}]))
    };
    assert_eq!(bench.send(Kind::Listener, &[out(json!([router]), all_to(cluster))]), Vec::<String>::new());
    let service = bench.build();
    let upstream = service.upstreams.iter().find(|upstream| upstream.bind.to_string() == "127.0.0.1:15001").expect("served");
    assert!(&*upstream.name == "http" && !upstream.targets.is_empty());

    let mut told = |listener: Json| bench.send(Kind::Listener, &[listener]).join("; ");
    let lua = told(out(json!([{"name": "envoy.filters.http.lua"}, router]), all_to(cluster)));
    assert!(lua.contains("typed_config.http_filters[0].name: envoy.filters.http.lua"), "{lua}");
    let by_header =
        json!([{"match": {"prefix": "/", "headers": [{"name": "x", "present_match": true}]}, "route": {"cluster": cluster}}]);
    let by_header = told(out(json!([router]), by_header));
    assert!(by_header.contains("route_config.virtual_hosts[0].routes[0].match: more than a path"), "{by_header}");
    let changed = json!([{"match": {"prefix": "/"}, "route": {"cluster": cluster}, "request_headers_to_remove": ["x"]}]);
    let changed = told(out(json!([router]), changed));
    assert!(changed.contains("routes[0].route: more than match and action"), "{changed}");
    let by_path = told(out(json!([router]), json!([{"match": {"path": "/a"}, "route": {"cluster": cluster}}])));
    assert!(by_path.contains("route_config: routes by prefix, or outbound"), "{by_path}");
    let mut chain = ending("x");
    chain["filters"] = json!([manager(all_to(cluster), json!([router]))]);
    let inbound = told(listener("public_listener", "INBOUND", &[], json!([chain])));
    assert!(inbound.contains("http_connection_manager behind TLS; x-forwarded-client-cert"), "{inbound}");
}

#[test]
fn a_way_in_for_http_is_bytes_where_its_app_trusts_no_header_of_envoys() {
    let mut bench = Bench::new("db");
    bench.held.http_as_tcp = true;
    let app = json!({"name": "local_app", "type": "STATIC", "load_assignment": {"cluster_name": "local_app", "endpoints": [
        {"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 8080}}}}]}]}});
    assert_eq!(bench.send(Kind::Cluster, &[app]), Vec::<String>::new());
    let allowed = |permission: Json| {
        let web = json!({"authenticated": {"principal_name": {"safe_regex": {
            "regex": "^spiffe://[^/]+/ns/default/dc/[^/]+/svc/web$"}}}});
        let policy = json!({"permissions": [permission], "principals": [web]});
        json!({"name": "envoy.filters.http.rbac", "typed_config": {"@type": format!("{HTTP}.http.rbac.v3.RBAC"),
            "rules": {"policies": {"consul-intentions-layer4": policy}}}})
    };
    let way_in = |filters: Json, routes: Json| {
        let mut chain = ending("local_app");
        let mut manager = manager(routes, filters);
        manager["typed_config"]["codec_type"] = "HTTP2".into();
        manager["typed_config"]["forward_client_cert_details"] = "APPEND_FORWARD".into();
        chain["filters"] = json!([manager]);
        listener("public_listener", "INBOUND", &[], json!([chain]))
    };
    let router = json!({"name": "envoy.filters.http.router"});
    let bridge = json!({"name": "envoy.filters.http.grpc_http1_bridge"});
    let filters = json!([allowed(json!({"any": true})), bridge, router]);
    assert_eq!(bench.send(Kind::Listener, &[way_in(filters, all_to("local_app"))]), Vec::<String>::new());
    let service = bench.build();
    assert_eq!(service.public.as_ref().expect("served").app, [Address::Tcp("127.0.0.1:8080".parse().expect("an address"))]);
    let decides = |bench: &Bench, service: &Service, name: &str| service.intentions.decide(&bench.ca.id(name)).is_ok();
    assert!(decides(&bench, &service, "web") && !decides(&bench, &service, "batch"));

    let mut refused = |filters: Json, routes: Json, wanted: &str| {
        let why = bench.send(Kind::Listener, &[way_in(filters, routes)]).join("; ");
        assert!(why.contains(wanted), "{why}");
    };
    let by_path = allowed(json!({"url_path": {"path": {"exact": "/a"}}}));
    refused(json!([by_path, router]), all_to("local_app"), "url_path");
    let forwarded = json!({"address_prefix": "203.0.113.0", "prefix_len": 24});
    let mut by_header = allowed(json!({"any": true}));
    let principals = &mut by_header["typed_config"]["rules"]["policies"]["consul-intentions-layer4"]["principals"];
    *principals = json!([{"not_id": {"remote_ip": forwarded}}]);
    refused(json!([by_header, router]), all_to("local_app"), "principals: remote_ip; in HTTP it is what x-forwarded-for says");
    refused(json!([router]), all_to("local_app"), "every certificate of the mesh would be let in");
    let paths = json!([{"match": {"path": "/a"}, "route": {"cluster": "local_app"}}]);
    refused(json!([allowed(json!({"any": true})), router]), paths, "transport_socket: with routes by path");
    let jwt = json!({"name": "envoy.filters.http.jwt_authn"});
    refused(json!([jwt, router]), all_to("local_app"), "http_filters[0].name: envoy.filters.http.jwt_authn");
    let service = bench.build();
    assert!(!decides(&bench, &service, "web"), "whose newest listener is refused lets nobody in");
}

#[test]
fn exposed_paths_are_pages_for_whom_the_chain_says() {
    let mut bench = Bench::new("web");
    let app = json!({"name": "exposed_cluster_8080", "type": "STATIC", "load_assignment": {"cluster_name": "x", "endpoints": [
        {"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 8080}}}}]}]}});
    bench.send(Kind::Cluster, std::slice::from_ref(&app));
    let routes = json!([{"match": {"path": "/health"}, "route": {"cluster": "exposed_cluster_8080"}}]);
    let chain = |prefix: u32| {
        json!([{
        "filter_chain_match": {"source_prefix_ranges": [{"address_prefix": "127.0.0.1", "prefix_len": prefix}]},
        "filters": [manager(routes.clone(), json!([{"name": "envoy.filters.http.router"}]))]}])
    };
    let of = |prefix| listener("exposed_path_health:21500", "INBOUND", &[], chain(prefix));
    assert_eq!(bench.send(Kind::Listener, &[of(8)]), Vec::<String>::new());
    bench.build();
    let page = &bench.pages[0];
    assert_eq!((page.name.as_str(), page.sources.as_slice()), ("exposed_path_health:21500", &[([127, 0, 0, 1].into(), 8)][..]));
    assert_eq!(page.routes[0].path, PathMatch::Exact("/health".to_owned()));
    let address = "127.0.0.1:8080".parse().expect("an address");
    assert_eq!(page.routes[0].answer, PageAnswer::Backend { address, rewrite: None, http2: false });
    // What a gRPC check is exposed for, before and since Consul 1.11.
    let options = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}}}});
    for (key, value) in [("http2_protocol_options", json!({})), ("typed_extension_protocol_options", options)] {
        let mut grpc = app.clone();
        grpc[key] = value;
        assert_eq!(bench.send(Kind::Cluster, &[grpc]), Vec::<String>::new(), "{key}");
        bench.build();
        assert_eq!(bench.pages[0].routes[0].answer, PageAnswer::Backend { address, rewrite: None, http2: true }, "{key}");
    }
    assert!(bench.send(Kind::Listener, &[of(33)])[0].contains("source_prefix_ranges[0].prefix_len: 33"));
}
