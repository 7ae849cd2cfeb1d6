//! Resources as Consul makes them for a sidecar.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a harness of tests"
)]

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::accesslog::v3 as accesslog;
use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as http;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf::{Any, BoolValue};
use prost::Message;

const API: &str = "type.googleapis.com/envoy";

/// What a proxy presents and trusts.
#[derive(Clone)]
pub struct Material {
    pub chain_pem: String,
    pub key_pem: String,
    pub roots_pem: String,
}

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("{API}.{name}"), value: message.encode_to_vec() }
}

pub fn inline(text: &str) -> Option<core::DataSource> {
    let specifier = core::data_source::Specifier::InlineString(text.to_owned());
    Some(core::DataSource { specifier: Some(specifier), ..Default::default() })
}

fn common(material: &Material, expected: &[String]) -> Option<tls::CommonTlsContext> {
    let san = |uri: &String| tls::SubjectAltNameMatcher {
        san_type: tls::subject_alt_name_matcher::SanType::Uri as i32,
        matcher: Some(matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(uri.clone())),
            ..Default::default()
        }),
        ..Default::default()
    };
    validated(
        material,
        tls::CertificateValidationContext {
            trusted_ca: inline(&material.roots_pem),
            match_typed_subject_alt_names: expected.iter().map(san).collect(),
            ..Default::default()
        },
    )
}

/// Roots by trust domain, as Consul sends them where there are peers.
fn by_domain(domains: &[(&str, &str)]) -> tls::CertificateValidationContext {
    let domain = |(name, roots): &(&str, &str)| tls::spiffe_cert_validator_config::TrustDomain {
        name: (*name).to_owned(),
        trust_bundle: inline(roots),
        ..Default::default()
    };
    let config = tls::SpiffeCertValidatorConfig { trust_domains: domains.iter().map(domain).collect(), ..Default::default() };
    let config = any("extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig", &config);
    tls::CertificateValidationContext {
        custom_validator_config: Some(core::TypedExtensionConfig {
            name: "envoy.tls.cert_validator.spiffe".into(),
            typed_config: Some(config),
        }),
        ..Default::default()
    }
}

fn validated(material: &Material, validation: tls::CertificateValidationContext) -> Option<tls::CommonTlsContext> {
    let certificate = tls::TlsCertificate {
        certificate_chain: inline(&material.chain_pem),
        private_key: inline(&material.key_pem),
        ..Default::default()
    };
    Some(tls::CommonTlsContext {
        tls_params: Some(tls::TlsParameters::default()),
        tls_certificates: vec![certificate],
        validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(validation)),
        ..Default::default()
    })
}

fn socket(name: &str, context: &impl Message) -> Option<core::TransportSocket> {
    let config = any(&format!("extensions.transport_sockets.tls.v3.{name}"), context);
    let config_type = Some(core::transport_socket::ConfigType::TypedConfig(config));
    Some(core::TransportSocket { name: "tls".into(), config_type })
}

/// The stream that all comes on.
fn ads() -> core::ConfigSource {
    core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource {})),
        resource_api_version: core::ApiVersion::V3 as i32,
        ..Default::default()
    }
}

fn address(at: SocketAddr) -> Option<core::Address> {
    let socket = core::SocketAddress {
        address: at.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(at.port().into())),
        ..Default::default()
    };
    Some(core::Address { address: Some(core::address::Address::SocketAddress(socket)) })
}

pub fn assignment(name: &str, members: &[(SocketAddr, core::HealthStatus)]) -> endpoint::ClusterLoadAssignment {
    let member = |(at, health): &(SocketAddr, core::HealthStatus)| endpoint::LbEndpoint {
        health_status: *health as i32,
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: address(*at),
            ..Default::default()
        })),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: members.iter().map(member).collect(), ..Default::default() };
    endpoint::ClusterLoadAssignment { cluster_name: name.into(), endpoints: vec![locality], ..Default::default() }
}

fn of_type(kind: cluster::cluster::DiscoveryType) -> Option<cluster::cluster::ClusterDiscoveryType> {
    Some(cluster::cluster::ClusterDiscoveryType::Type(kind as i32))
}

/// `local_app`.
pub fn app_cluster(app: SocketAddr) -> cluster::Cluster {
    cluster::Cluster {
        name: "local_app".into(),
        cluster_discovery_type: of_type(cluster::cluster::DiscoveryType::Static),
        load_assignment: Some(assignment("local_app", &[(app, core::HealthStatus::Unknown)])),
        ..Default::default()
    }
}

/// A target, found by EDS.
pub fn target_cluster(name: &str, material: &Material, expected: &str) -> cluster::Cluster {
    let context = tls::UpstreamTlsContext {
        common_tls_context: common(material, &[expected.to_owned()]),
        sni: name.into(),
        ..Default::default()
    };
    cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: of_type(cluster::cluster::DiscoveryType::Eds),
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig { eds_config: Some(ads()), ..Default::default() }),
        transport_socket: socket("UpstreamTlsContext", &context),
        // As Consul has it for what a sidecar calls.
        common_lb_config: Some(cluster::cluster::CommonLbConfig {
            healthy_panic_threshold: Some(Percent::default()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A filter with its configuration, which has the name `config`.
pub fn filter(name: &str, config: &str, message: &impl Message) -> listener::Filter {
    let config = any(&format!("extensions.filters.network.{config}"), message);
    listener::Filter { name: name.into(), config_type: Some(listener::filter::ConfigType::TypedConfig(config)) }
}

fn proxy_to(stat_prefix: &str, cluster: &str) -> listener::Filter {
    let config = tcp_proxy::TcpProxy {
        stat_prefix: stat_prefix.into(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    };
    filter("envoy.filters.network.tcp_proxy", "tcp_proxy.v3.TcpProxy", &config)
}

/// The filter in which only `allowed` may come in, as Consul writes it.
pub fn allow(allowed: &[&str]) -> listener::Filter {
    let principal = |service: &&str| {
        let regex =
            matcher::RegexMatcher { regex: format!("^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{service}$"), ..Default::default() };
        let name = matcher::StringMatcher {
            match_pattern: Some(matcher::string_matcher::MatchPattern::SafeRegex(regex)),
            ..Default::default()
        };
        let who = rbac::principal::Authenticated { principal_name: Some(name) };
        rbac::Principal { identifier: Some(rbac::principal::Identifier::Authenticated(who)) }
    };
    let policy = rbac::Policy {
        permissions: vec![rbac::Permission { rule: Some(rbac::permission::Rule::Any(true)) }],
        principals: allowed.iter().map(principal).collect(),
        ..Default::default()
    };
    let policies = if allowed.is_empty() { vec![] } else { vec![("consul-intentions-layer4".to_owned(), policy)] };
    let rules = rbac::Rbac { policies: policies.into_iter().collect(), ..Default::default() };
    let config = Rbac { rules: Some(rules), stat_prefix: "connect_authz".into(), ..Default::default() };
    filter("envoy.filters.network.rbac", "rbac.v3.RBAC", &config)
}

pub fn public_name(bind: SocketAddr) -> String {
    format!("public_listener:{bind}")
}

pub fn public_listener(bind: SocketAddr, material: &Material, rbac: listener::Filter) -> listener::Listener {
    public_with(bind, ending(common(material, &[]), rbac, "local_app"))
}

/// A public listener that peers of these trust domains may come to, each with its roots.
pub fn peered_listener(
    bind: SocketAddr,
    material: &Material,
    rbac: listener::Filter,
    domains: &[(&str, &str)],
) -> listener::Listener {
    public_with(bind, ending(validated(material, by_domain(domains)), rbac, "local_app"))
}

/// A public listener that also takes clients without a certificate who were going to the app's own port.
pub fn permissive_listener(bind: SocketAddr, material: &Material, rbac: listener::Filter, app_port: u16) -> listener::Listener {
    let port = envoy_types::pb::google::protobuf::UInt32Value { value: app_port.into() };
    let raw = listener::FilterChain {
        filter_chain_match: Some(listener::FilterChainMatch { destination_port: Some(port), ..Default::default() }),
        filters: vec![proxy_to("public_listener", "local_app")],
        ..Default::default()
    };
    let mut listener = public_listener(bind, material, rbac);
    listener.filter_chains.push(raw);
    listener.listener_filters.push(listener_filter("original_dst"));
    listener
}

/// A filter chain that ends mutual TLS.
fn ending(context: Option<tls::CommonTlsContext>, rbac: listener::Filter, cluster: &str) -> listener::FilterChain {
    let context = tls::DownstreamTlsContext {
        common_tls_context: context,
        require_client_certificate: Some(BoolValue { value: true }),
        ..Default::default()
    };
    listener::FilterChain {
        filters: vec![rbac, proxy_to("public_listener", cluster)],
        transport_socket: socket("DownstreamTlsContext", &context),
        ..Default::default()
    }
}

fn public_with(bind: SocketAddr, chain: listener::FilterChain) -> listener::Listener {
    listener::Listener {
        name: public_name(bind),
        address: address(bind),
        filter_chains: vec![chain],
        traffic_direction: core::TrafficDirection::Inbound as i32,
        ..Default::default()
    }
}

pub fn upstream_name(label: &str, bind: SocketAddr) -> String {
    format!("{label}:{bind}")
}

pub fn upstream_listener(label: &str, bind: SocketAddr, cluster: &str) -> listener::Listener {
    let filters = vec![proxy_to(&format!("upstream.{label}.default.dc1"), cluster)];
    listener::Listener {
        name: upstream_name(label, bind),
        address: address(bind),
        filter_chains: vec![listener::FilterChain { filters, ..Default::default() }],
        traffic_direction: core::TrafficDirection::Outbound as i32,
        ..Default::default()
    }
}

/// The listener of an ingress gateway whose clients speak TLS; with `routes` it is for HTTP, and they say where to.
pub fn tls_front_listener(
    label: &str,
    bind: SocketAddr,
    material: &Material,
    cluster: &str,
    routes: Option<&str>,
) -> listener::Listener {
    let context = tls::DownstreamTlsContext {
        common_tls_context: common(material, &[]),
        require_client_certificate: Some(BoolValue { value: false }),
        ..Default::default()
    };
    let mut listener = upstream_listener(label, bind, cluster);
    listener.filter_chains[0].transport_socket = socket("DownstreamTlsContext", &context);
    if let Some(name) = routes {
        let rds = http::Rds { config_source: Some(ads()), route_config_name: name.to_owned() };
        let router = http::HttpFilter { name: "envoy.filters.http.router".into(), ..Default::default() };
        let manager = http::HttpConnectionManager {
            stat_prefix: "ingress_upstream_".into(),
            route_specifier: Some(http::http_connection_manager::RouteSpecifier::Rds(rds)),
            http_filters: vec![router],
            ..Default::default()
        };
        let config = "http_connection_manager.v3.HttpConnectionManager";
        listener.filter_chains[0].filters = vec![filter("envoy.filters.network.http_connection_manager", config, &manager)];
    }
    listener
}

/// The same with its certificate by name, from the SDS server of `cluster`, as Consul 1.11 and later write `TLS.SDS`.
pub fn sds_front_listener(label: &str, bind: SocketAddr, to: &str, cluster: &str, secret: &str) -> listener::Listener {
    let grpc = core::grpc_service::EnvoyGrpc { cluster_name: cluster.to_owned(), ..Default::default() };
    let service =
        core::GrpcService { target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(grpc)), ..Default::default() };
    let api = core::ApiConfigSource {
        api_type: core::api_config_source::ApiType::Grpc as i32,
        transport_api_version: core::ApiVersion::V3 as i32,
        grpc_services: vec![service],
        ..Default::default()
    };
    let source = core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(api)),
        resource_api_version: core::ApiVersion::V3 as i32,
        ..Default::default()
    };
    let config = tls::SdsSecretConfig { name: secret.to_owned(), sds_config: Some(source) };
    let common = tls::CommonTlsContext { tls_certificate_sds_secret_configs: vec![config], ..Default::default() };
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: false }),
        ..Default::default()
    };
    let mut listener = upstream_listener(label, bind, to);
    listener.filter_chains[0].transport_socket = socket("DownstreamTlsContext", &context);
    listener
}

/// Has the connections of a listener of [`upstream_listener`] told in a file.
pub fn with_log(mut listener: listener::Listener, path: &str, format: &str) -> listener::Listener {
    let text = core::SubstitutionFormatString {
        format: Some(core::substitution_format_string::Format::TextFormatSource(inline(format).expect("a text"))),
        ..Default::default()
    };
    let file = file::FileAccessLog {
        path: path.to_owned(),
        access_log_format: Some(file::file_access_log::AccessLogFormat::LogFormat(text)),
    };
    let config = any("extensions.access_loggers.file.v3.FileAccessLog", &file);
    let log = accesslog::AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        config_type: Some(accesslog::access_log::ConfigType::TypedConfig(config)),
        ..Default::default()
    };
    let filter = listener.filter_chains[0].filters.last_mut().expect("tcp_proxy comes last");
    let Some(listener::filter::ConfigType::TypedConfig(proxy)) = &mut filter.config_type else { panic!("a typed filter") };
    let mut message = tcp_proxy::TcpProxy::decode(&*proxy.value).expect("a tcp_proxy");
    message.access_log.push(log);
    proxy.value = message.encode_to_vec();
    listener
}

/// Routes in which all requests for `domain` go to one cluster.
pub fn routes(name: &str, domain: &str, cluster: &str) -> route::RouteConfiguration {
    let to = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    let all = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".to_owned())),
        ..Default::default()
    };
    let one = route::Route { r#match: Some(all), action: Some(route::route::Action::Route(to)), ..Default::default() };
    let host = route::VirtualHost {
        name: cluster.to_owned(),
        domains: vec![domain.to_owned()],
        routes: vec![one],
        ..Default::default()
    };
    route::RouteConfiguration { name: name.to_owned(), virtual_hosts: vec![host], ..Default::default() }
}

/// A listener filter as Consul 1.10 sends it: without a type.
fn listener_filter(name: &str) -> listener::ListenerFilter {
    listener::ListenerFilter { name: format!("envoy.filters.listener.{name}"), ..Default::default() }
}

fn sni_cluster() -> listener::FilterChain {
    let sni = listener::Filter { name: "envoy.filters.network.sni_cluster".into(), ..Default::default() };
    listener::FilterChain { filters: vec![sni, proxy_to("gateway", "")], ..Default::default() }
}

fn gateway_listener(bind: SocketAddr, filters: &[&str], chains: Vec<listener::FilterChain>) -> listener::Listener {
    listener::Listener {
        name: upstream_name("default", bind),
        address: address(bind),
        listener_filters: filters.iter().map(|name| listener_filter(name)).collect(),
        filter_chains: chains,
        ..Default::default()
    }
}

/// What a mesh gateway listens with.
pub fn mesh_gateway(bind: SocketAddr) -> listener::Listener {
    gateway_listener(bind, &["tls_inspector"], vec![sni_cluster()])
}

/// What a terminating gateway listens with: a chain a service, each with the service's own certificate.
pub fn terminating_gateway(bind: SocketAddr, services: Vec<(&str, &Material, listener::Filter)>) -> listener::Listener {
    let chain = |(sni, material, rbac): (&str, &Material, listener::Filter)| listener::FilterChain {
        filter_chain_match: Some(listener::FilterChainMatch { server_names: vec![sni.to_owned()], ..Default::default() }),
        ..ending(common(material, &[]), rbac, sni)
    };
    let chains = services.into_iter().map(chain).chain([sni_cluster()]).collect();
    gateway_listener(bind, &["tls_inspector"], chains)
}

/// What a transparent proxy lets clients out by: clusters at their addresses, the rest where it was going.
pub fn outbound_listener(bind: SocketAddr, clusters: &[(std::net::IpAddr, &str)]) -> listener::Listener {
    let range = |at: &std::net::IpAddr| core::CidrRange {
        address_prefix: at.to_string(),
        prefix_len: Some(envoy_types::pb::google::protobuf::UInt32Value { value: 32 }),
    };
    let chain = |cluster: &str, ranges: Vec<core::CidrRange>| listener::FilterChain {
        filter_chain_match: Some(listener::FilterChainMatch { prefix_ranges: ranges, ..Default::default() }),
        filters: vec![proxy_to("upstream", cluster)],
        ..Default::default()
    };
    listener::Listener {
        traffic_direction: core::TrafficDirection::Outbound as i32,
        default_filter_chain: Some(chain("original-destination", Vec::new())),
        ..gateway_listener(
            bind,
            &["original_dst"],
            clusters.iter().map(|(at, cluster)| chain(cluster, vec![range(at)])).collect(),
        )
    }
}

/// Where nothing is chosen: the connection goes on to where it was going.
pub fn original_cluster() -> cluster::Cluster {
    cluster::Cluster {
        name: "original-destination".into(),
        cluster_discovery_type: of_type(cluster::cluster::DiscoveryType::OriginalDst),
        lb_policy: cluster::cluster::LbPolicy::ClusterProvided as i32,
        ..Default::default()
    }
}

/// The same over mutual TLS, to whoever is `expected` there: what Consul calls dialed directly.
pub fn passthrough_cluster(name: &str, material: &Material, expected: &str) -> cluster::Cluster {
    cluster::Cluster {
        name: format!("passthrough~{name}"),
        transport_socket: target_cluster(name, material, expected).transport_socket,
        ..original_cluster()
    }
}

/// An app outside of the mesh that speaks TLS, with the files that `CAFile`, `CertFile` and `KeyFile` of a terminating gateway
/// name. Its `SNI` is both the name that is asked for and the one that the certificate must carry.
pub fn tls_app_cluster(name: &str, [ca, certificate, key]: [&std::path::Path; 3], sni: &str, san: &str) -> cluster::Cluster {
    let file = |path: &std::path::Path| {
        let specifier = core::data_source::Specifier::Filename(path.display().to_string());
        Some(core::DataSource { specifier: Some(specifier), ..Default::default() })
    };
    let name_of_it = matcher::StringMatcher {
        match_pattern: Some(matcher::string_matcher::MatchPattern::Exact(san.to_owned())),
        ..Default::default()
    };
    #[expect(deprecated, reason = "Consul up to 1.10 sends match_subject_alt_names")]
    let validation = tls::CertificateValidationContext {
        trusted_ca: file(ca),
        match_subject_alt_names: vec![name_of_it],
        ..Default::default()
    };
    let certificate = tls::TlsCertificate { certificate_chain: file(certificate), private_key: file(key), ..Default::default() };
    let common = tls::CommonTlsContext {
        tls_certificates: vec![certificate],
        validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(validation)),
        ..Default::default()
    };
    let context = tls::UpstreamTlsContext { common_tls_context: Some(common), sni: sni.into(), ..Default::default() };
    cluster::Cluster { transport_socket: socket("UpstreamTlsContext", &context), ..plain_cluster(name) }
}

/// A cluster that TLS is passed on to, or an app in plain: found by EDS.
pub fn plain_cluster(name: &str) -> cluster::Cluster {
    cluster::Cluster {
        name: name.into(),
        cluster_discovery_type: of_type(cluster::cluster::DiscoveryType::Eds),
        ..Default::default()
    }
}
