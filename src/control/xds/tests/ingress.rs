//! Ingress gateways: listeners whose clients speak TLS and show nothing, and routes that come by RDS.

use std::time::SystemTime;

use super::routes::{all_to, listener, manager, proxy};
use super::*;
use crate::control::dump::Resource as Told;
use crate::control::xds::secrets::{SECRET, Secret};
use crate::control::xds::shown::Came;
use crate::control::xds::tls_context::SecretName;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

/// What Consul's ingress gateways end TLS with; `require` is whether clients must show a certificate.
fn socket(require: bool) -> Json {
    json!({"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {"tls_params": {}, "tls_certificates": [{"certificate_chain": {}, "private_key": {}}],
            "validation_context": {"trusted_ca": {}}},
        "require_client_certificate": require}})
}

/// A bench with the clusters of an ingress gateway, and the name of one.
fn gateway() -> (Bench, String) {
    let mut bench = Bench::new("ingress-gateway");
    let capture = Bench::fixture("ingress");
    bench.send_all(&capture);
    (bench, capture["clusters"][0]["name"].as_str().expect("a name").to_owned())
}

const NAME: &str = "db:127.0.0.1:15001";

fn upstream_of(service: &Service) -> Arc<crate::mesh::Upstream> {
    let found = service.upstreams.iter().find(|upstream| upstream.bind.to_string() == "127.0.0.1:15001");
    Arc::clone(found.expect("served"))
}

#[test]
fn clients_of_an_ingress_gateway_are_met_with_tls() {
    let (mut bench, cluster) = gateway();
    let out = |socket: Json, timeout: &str| {
        let mut proxy = proxy(&cluster);
        proxy["typed_config"]["idle_timeout"] = timeout.into();
        listener(NAME, "OUTBOUND", &[], json!([{"filters": [proxy], "transport_socket": socket}]))
    };
    assert_eq!(bench.send(Kind::Listener, &[out(socket(false), "5s")]), Vec::<String>::new());
    let first = upstream_of(&bench.build());
    let front = first.front.as_ref().expect("TLS");
    assert_eq!(front.settings().certificate.chain[0], bench.svid.chain[0]);
    assert!(!first.targets.is_empty() && first.outside.is_none());
    assert_eq!(bench.send(Kind::Listener, &[out(socket(false), "7s")]), Vec::<String>::new());
    let second = upstream_of(&bench.build());
    assert!(!Arc::ptr_eq(&first, &second), "a change");
    assert!(Arc::ptr_eq(front, second.front.as_ref().expect("TLS")), "of something else");
    // The gateway's leaf is another.
    bench.svid = bench.ca.svid("ingress-gateway");
    assert_eq!(bench.send(Kind::Listener, &[out(socket(false), "7s")]), Vec::<String>::new());
    assert!(!Arc::ptr_eq(front, upstream_of(&bench.build()).front.as_ref().expect("TLS")));

    let mut told = |socket: Json| bench.send(Kind::Listener, &[out(socket, "7s")]).join("; ");
    let requiring = told(socket(true));
    assert!(requiring.contains("every certificate of the mesh would be let in"), "{requiring}");
    let mut bare = socket(false);
    bare["typed_config"]["common_tls_context"]["tls_certificates"] = json!([]);
    let bare = told(bare);
    assert!(bare.contains("tls_certificates: absent; expected one with its key"), "{bare}");
    let mut by_name = socket(false);
    by_name["typed_config"]["common_tls_context"]["tls_certificate_sds_secret_configs"] = json!([{"name": "wildcard"}]);
    let by_name = told(by_name);
    assert!(by_name.contains("tls_certificate_sds_secret_configs: 1 of them besides 1 inline"), "{by_name}");
    let mut way_in = out(socket(false), "7s");
    way_in["traffic_direction"] = "INBOUND".into();
    let way_in = bench.send(Kind::Listener, &[way_in]).join("; ");
    assert!(way_in.contains("a way in that is not mutual TLS is not served"), "{way_in}");
    assert!(upstream_of(&bench.build()).front.is_some(), "what was good stays");
}

#[test]
fn each_server_name_has_its_own_certificate() {
    let (mut bench, cluster) = gateway();
    let other = bench.ca.svid("other");
    let mut second = socket(false);
    second["typed_config"]["common_tls_context"]["tls_certificates"][0] =
        json!({"certificate_chain!": chain_pem(&other.chain), "private_key!": key_pem(&other.key)});
    let chain = |name: &str, socket: Json| json!({"filter_chain_match": {"server_names": [name]}, "filters": [proxy(&cluster)], "transport_socket": socket});
    let chains = json!([chain("a.example.com", socket(false)), chain("b.example.com", second)]);
    assert_eq!(bench.send(Kind::Listener, &[listener(NAME, "OUTBOUND", &["tls_inspector"], chains)]), Vec::<String>::new());
    let router = bench.router();
    let shown = |name: &str| {
        let at = router.route(&Seen { server_name: Some(name), tls: true, ..Seen::default() }).expect("taken");
        let route = router.routes().nth(at).expect("there");
        let Way::Originate { upstream, .. } = &route.way else { panic!("{route:?} does not lead into the mesh") };
        upstream.front.as_ref().expect("TLS").settings().certificate.chain[0].clone()
    };
    assert_eq!((shown("a.example.com"), shown("b.example.com")), (bench.svid.chain[0].clone(), other.chain[0].clone()));

    // TLS of clients ends for the mesh alone.
    let plain = json!({"name": "plain", "type": "STATIC", "load_assignment": {"cluster_name": "plain", "endpoints": []}});
    assert_eq!(bench.send(Kind::Cluster, &[plain]), Vec::<String>::new());
    let chain = json!({"filter_chain_match": {"server_names": ["c.example.com"]}, "filters": [proxy("plain")],
        "transport_socket": socket(false)});
    assert_eq!(bench.send(Kind::Listener, &[listener(NAME, "UNSPECIFIED", &["tls_inspector"], json!([chain]))]), [""; 0]);
    bench.build();
    assert!(bench.notes[0].contains("no UpstreamTlsContext of the mesh, and nothing leaves without"), "{:?}", bench.notes);
}

/// A listener for HTTP whose routes are at `name`.
fn by_rds(name: &str) -> Json {
    let mut manager = manager(json!([]), json!([{"name": "envoy.filters.http.router"}]));
    let config = manager["typed_config"].as_object_mut().expect("an object");
    config.shift_remove("route_config");
    config
        .insert("rds".to_owned(), json!({"route_config_name": name, "config_source": {"ads": {}, "resource_api_version": "V3"}}));
    listener(NAME, "OUTBOUND", &[], json!([{"filters": [manager]}]))
}

fn asked(requests: &[DeltaDiscoveryRequest]) -> Vec<(&[String], &[String])> {
    requests
        .iter()
        .filter(|request| request.type_url.ends_with("RouteConfiguration"))
        .map(|request| (request.resource_names_subscribe.as_slice(), request.resource_names_unsubscribe.as_slice()))
        .collect()
}

#[test]
fn routes_that_come_by_name_lead_to_one_cluster() {
    let (mut bench, cluster) = gateway();
    let mut subscription = Subscription::new(&settings());
    subscription.open(&bench.held);
    assert_eq!(bench.send(Kind::Listener, &[by_rds("8080")]), Vec::<String>::new());
    let requests = subscription.follow(&bench.held);
    assert_eq!(asked(&requests), [(&["8080".to_owned()][..], &[][..])]);
    assert_eq!(bench.send(Kind::Listener, &[by_rds("8080")]), Vec::<String>::new(), "once more changes nothing");
    assert_eq!(build::waits_for(&bench.held).as_deref(), Some("waiting for the routes 8080"));
    bench.build();
    assert_eq!(bench.notes, ["listener db:127.0.0.1:15001: the routes 8080 are not there"]);
    assert!(!bench.published.services[0].upstreams.iter().any(|upstream| upstream.bind.to_string() == "127.0.0.1:15001"));

    let routes = |domain: &str, routes: Json| json!({"name": "8080", "virtual_hosts": [{"name": "db", "domains": [domain], "routes": routes}], "validate_clusters": true});
    assert_eq!(bench.send(Kind::Routes, &[routes("*", all_to(&cluster))]), Vec::<String>::new());
    assert_eq!(build::waits_for(&bench.held), None);
    assert_eq!(upstream_of(&bench.build()).targets[0].cluster(), cluster);
    // On the next stream it is told that they are here.
    let again = subscription.open(&bench.held);
    let last = again.last().expect("requests");
    assert_eq!((last.resource_names_subscribe.as_slice(), last.initial_resource_versions.len()), (&["8080".to_owned()][..], 1));

    let mut told = |domain: &str, list: Json| bench.send(Kind::Routes, &[routes(domain, list)]).join("; ");
    let by_host = told("web.ingress.*", all_to(&cluster));
    assert!(by_host.contains("RouteConfiguration 8080: virtual_hosts[0].domains: web.ingress.*;"), "{by_host}");
    let by_header = json!([{"header": {"header_name": "x-user"}}]);
    let hashed = told("*", json!([{"match": {"prefix": "/"}, "route": {"cluster": cluster, "hash_policy": by_header}}]));
    assert!(hashed.contains("route.cluster_specifier: of another kind"), "{hashed}");
    let by_source = json!([{"connection_properties": {"source_ip": true}}]);
    assert_eq!(told("*", json!([{"match": {"prefix": "/"}, "route": {"cluster": cluster, "hash_policy": by_source}}])), "");
    let by_path = told("*", json!([{"match": {"path": "/a"}, "route": {"cluster": cluster}}]));
    assert!(by_path.contains("virtual_hosts[0].routes: 1 of them, by path or with a rewrite"), "{by_path}");
    assert_eq!(upstream_of(&bench.build()).targets[0].cluster(), cluster, "what was good stays");

    // Others: what serves meanwhile goes on as it would, and both are asked for.
    assert_eq!(bench.send(Kind::Listener, &[by_rds("9090")]), Vec::<String>::new());
    assert_eq!(asked(&subscription.follow(&bench.held)), [(&["9090".to_owned()][..], &[][..])]);
    assert_eq!(build::waits_for(&bench.held), None, "it serves");
    let moved = json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"health_status": "HEALTHY", "endpoint": {
        "address": {"socket_address": {"address": "192.0.2.9", "port_value": 9}}}}]}]});
    bench.send(Kind::Endpoints, &[moved]);
    bench.svid = bench.ca.svid("ingress-gateway");
    let capture = Bench::fixture("ingress");
    bench.send(Kind::Cluster, capture["clusters"].as_array().expect("a list"));
    let service = bench.build();
    assert_eq!(service.identity.as_ref().expect("one").svid.chain[0], bench.svid.chain[0], "its leaf is the newest");
    assert_eq!(upstream_of(&service).targets[0].endpoints[0].address.to_string(), "192.0.2.9:9");
    assert!(bench.notes[0].contains("its newest waits for the routes 9090, the one before it serves"), "{:?}", bench.notes);
    let mut others = routes("*", all_to(&cluster));
    others["name"] = "9090".into();
    assert_eq!(bench.send(Kind::Routes, &[others]), Vec::<String>::new());
    bench.build();
    assert_eq!(bench.notes, Vec::<String>::new());
    bench.held.forget_unnamed();
    assert_eq!(bench.held.versions(Kind::Routes).keys().collect::<Vec<_>>(), ["9090"]);
    assert_eq!(asked(&subscription.follow(&bench.held)), [(&[][..], &["8080".to_owned()][..])]);
    // And then nobody asks for any.
    let plain = listener(NAME, "OUTBOUND", &[], json!([{"filters": [proxy(&cluster)]}]));
    assert_eq!(bench.send(Kind::Listener, &[plain]), Vec::<String>::new());
    bench.held.forget_unnamed();
    assert!(bench.held.versions(Kind::Routes).is_empty());
    assert_eq!(asked(&subscription.follow(&bench.held)), [(&[][..], &["9090".to_owned()][..])]);
    let mut elsewhere = by_rds("9090");
    elsewhere["filter_chains"][0]["filters"][0]["typed_config"]["rds"]["config_source"] = json!({"self": {}});
    let elsewhere = bench.send(Kind::Listener, &[elsewhere]).join("; ");
    assert!(elsewhere.contains("rds.config_source: another than ads"), "{elsewhere}");
}

#[test]
fn http_of_other_hosts_is_bytes_only_where_apps_trust_no_header_of_envoys() {
    let (mut bench, _) = gateway();
    let mut open = by_rds("8080");
    open["name"] = "http:0.0.0.0:8080".into();
    open["address"]["socket_address"] = json!({"address": "0.0.0.0", "port_value": 8080});
    let mut fronted = open.clone();
    fronted["filter_chains"][0]["transport_socket"] = socket(false);
    for listener in [&open, &fronted] {
        let why = bench.send(Kind::Listener, std::slice::from_ref(listener)).join("; ");
        assert!(why.contains("http_connection_manager for clients of other hosts; x-forwarded-client-cert"), "{why}");
    }
    bench.held.http_as_tcp = true;
    assert_eq!(bench.send(Kind::Listener, &[fronted.clone()]), Vec::<String>::new());
    // Two of them have counters of their own.
    assert_eq!(label_of(&bench, "http:0.0.0.0:8080"), "ingress_upstream_8080");
    // What it would do to requests is looked at all the same.
    let manager = &mut fronted["filter_chains"][0]["filters"][0]["typed_config"];
    manager["http_filters"] = json!([{"name": "envoy.filters.http.grpc_http1_bridge"}, {"name": "envoy.filters.http.router"}]);
    let why = bench.send(Kind::Listener, &[fronted]).join("; ");
    assert!(why.contains("http_filters[0].name: envoy.filters.http.grpc_http1_bridge"), "{why}");
}

fn label_of(bench: &Bench, name: &str) -> String {
    match &bench.held.listeners.get(name).expect("held").role {
        crate::control::xds::listener::Role::Upstream { label, .. } => label.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_dump_tells_what_waits_from_what_serves() {
    let (mut bench, cluster) = gateway();
    let routes =
        |name: &str| json!({"name": name, "virtual_hosts": [{"name": "db", "domains": ["*"], "routes": all_to(&cluster)}]});
    let versions = |told: &Told| {
        let warming = told.warming.as_ref().map(|newest| newest.version_info.clone());
        (told.version_info.clone(), !told.json.is_null(), warming)
    };
    let listener =
        |bench: &mut Bench| versions(bench.told(json!({})).listeners.iter().find(|one| one.name == NAME).expect("told"));
    let send = |bench: &mut Bench, kind, resource: Json| {
        assert_eq!(bench.send(kind, &[resource]), Vec::<String>::new());
        bench.version.to_string()
    };
    let first = send(&mut bench, Kind::Listener, by_rds("8080"));
    assert_eq!(listener(&mut bench), (String::new(), false, Some(first.clone())));
    send(&mut bench, Kind::Routes, routes("8080"));
    assert_eq!(listener(&mut bench), (first.clone(), true, None));
    // Two that wait one after the other: the first still serves.
    send(&mut bench, Kind::Listener, by_rds("9090"));
    let newest = send(&mut bench, Kind::Listener, by_rds("7070"));
    assert_eq!(listener(&mut bench), (first, true, Some(newest.clone())));
    send(&mut bench, Kind::Routes, routes("7070"));
    assert_eq!(listener(&mut bench), (newest, true, None));

    // A cluster waits for its first endpoints.
    let by_eds = json!({"name": "late", "type": "EDS", "connect_timeout": "5s",
        "eds_cluster_config": {"service_name": "late", "eds_config": {"ads": {}, "resource_api_version": "V3"}}});
    let sent = send(&mut bench, Kind::Cluster, by_eds);
    let late = |bench: &mut Bench| versions(bench.told(json!({})).clusters.iter().find(|one| one.name == "late").expect("told"));
    assert_eq!(late(&mut bench), (String::new(), false, Some(sent.clone())));
    send(&mut bench, Kind::Endpoints, json!({"cluster_name": "late"}));
    assert_eq!(late(&mut bench), (sent, true, None));
}

#[test]
fn routes_that_are_refused_are_not_waited_for() {
    let (mut bench, cluster) = gateway();
    assert_eq!(bench.send(Kind::Listener, &[by_rds("8080")]), Vec::<String>::new());
    assert!(build::waits_for(&bench.held).is_some());
    let by_host =
        json!({"name": "8080", "virtual_hosts": [{"name": "db", "domains": ["db.ingress.*"], "routes": all_to(&cluster)}]});
    assert_eq!(bench.send(Kind::Routes, &[by_host]).len(), 1);
    assert_eq!(build::waits_for(&bench.held), None);
}

#[test]
fn a_secret_that_nobody_asked_for_is_dropped() {
    let (mut bench, cluster) = gateway();
    let api =
        json!({"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}]});
    let mut named = socket(false);
    let common = &mut named["typed_config"]["common_tls_context"];
    common["tls_certificates"] = json!([]);
    common["tls_certificate_sds_secret_configs"] = json!([{"name": "wildcard", "sds_config": {"api_config_source": api}}]);
    let out =
        |socket: &Json| listener(NAME, "OUTBOUND", &[], json!([{"filters": [proxy(&cluster)], "transport_socket": socket}]));
    assert_eq!(bench.send(Kind::Listener, &[out(&named)]), Vec::<String>::new());
    assert_eq!(build::waits_for(&bench.held).as_deref(), Some("waiting for the secret wildcard of cluster sds"));
    let came = {
        let key = key_pem(&bench.svid.key);
        let message = json!({"name": "wildcard", "tls_certificate": {"private_key": {"inline_string": key}}});
        bench.protos.encode(SECRET, &message).expect("a secret")
    };
    let certificate = || Secret {
        shown: crate::tls::Shown {
            chain: bench.svid.chain.clone(),
            key_pem: key_pem(&bench.svid.key).into(),
            from: "<inline>".into(),
        },
        came: Came::new("7", came.clone(), SystemTime::now(), None),
    };
    let (wanted, other) = (certificate(), certificate());
    let waits = bench.told(json!({})).secrets;
    let newest = waits[0].warming.as_ref().expect("it waits");
    assert_eq!((waits.len(), newest.version_info.as_str(), &newest.json["name"]), (1, "uninitialized", &json!("wildcard")));
    let of = |name: &str| SecretName { cluster: "sds".into(), name: name.into() };
    bench.held.take_secret(of("other"), other);
    assert!(bench.held.secrets.is_empty());
    bench.held.take_secret(of("wildcard"), wanted);
    assert!(upstream_of(&bench.build()).front.is_some());
    let shown = &bench.told(json!({})).secrets[0];
    let key = &shown.json["tls_certificate"]["private_key"]["inline_string"];
    assert_eq!((shown.version_info.as_str(), key), ("7", &json!("[redacted]")));
    assert!(shown.warming.is_none());

    let mut told = |change: &str, to: Json| {
        let mut changed = named.clone();
        *changed
            .pointer_mut(&format!("/typed_config/common_tls_context/tls_certificate_sds_secret_configs/0/{change}"))
            .expect("there") = to;
        bench.send(Kind::Listener, &[out(&changed)]).join("; ")
    };
    let delta = told("sds_config/api_config_source/api_type", "DELTA_GRPC".into());
    assert!(delta.contains("tls_certificate_sds_secret_configs[0].sds_config: another api_type; expected"), "{delta}");
    let elsewhere = told("sds_config", json!({"ads": {}}));
    assert!(elsewhere.contains("sds_config: another source"), "{elsewhere}");
    let nameless = told("name", "".into());
    assert!(nameless.contains("name: absent; expected the name of a secret"), "{nameless}");
}
