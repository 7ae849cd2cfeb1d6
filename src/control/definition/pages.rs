//! Listeners for pages that a registration asks for: `envoy_prometheus_bind_addr`, `envoy_stats_bind_addr`, and the paths and checks
//! of the app that `expose` names.
//!
//! What cannot be read is named and left out: a scrape that fails changes nothing for the mesh.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Opaque;
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PathMatch, Scrape};
use crate::control::consul::watch::Name;
use crate::control::consul::watch::chain::not_default;
use crate::control::consul::watch::checks::{Ask, Exposed};
use crate::control::consul::wire;

/// How checks of the app are passed on, wherever the agent asks for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExposedChecks {
    pub(crate) ask: Ask,
    bind: IpAddr,
    app: SocketAddr,
}

/// Where Envoy's admin port has Prometheus' format, and a backend for scrapes too.
const PROMETHEUS: &str = "/stats/prometheus";
const STATS: &str = "/stats";
const NOT_FOUND: u16 = 404;

pub(super) fn of(config: &Opaque<'_>, scrape: &Scrape, warnings: &mut Vec<String>) -> Vec<PageListener> {
    let mut bind = |key: &str| {
        let text = super::lenient(config.text(key), warnings)?;
        address(&text).map_err(|why| warnings.push(format!("proxy.config.{key} `{}` {why}", text.escape_default()))).ok()
    };
    let rewrite = |path: &str| Some(path.to_owned());
    let prometheus = bind("envoy_prometheus_bind_addr").map(|bind| {
        let answer = match scrape.backend {
            Some(address) => PageAnswer::Backend { address, rewrite: rewrite(PROMETHEUS), http2: false },
            None => PageAnswer::Admin { rewrite: rewrite(PROMETHEUS) },
        };
        PageListener {
            tls: scrape.tls.clone(),
            ..listener("envoy_prometheus_metrics_listener", bind, PathMatch::Exact(scrape.path.clone()), answer)
        }
    });
    let stats = bind("envoy_stats_bind_addr").map(|bind| {
        let answer = PageAnswer::Admin { rewrite: rewrite(STATS) };
        listener("envoy_metrics_listener", bind, PathMatch::Prefix(STATS.to_owned()), answer)
    });
    prometheus.into_iter().chain(stats).collect()
}

/// `expose.paths`: single paths of the app, in plain HTTP at ports of their own, as Consul has Envoy do it.
pub(super) fn exposed(service: &wire::Service, config: &Opaque<'_>, warnings: &mut Vec<String>) -> Vec<PageListener> {
    let mut pages: Vec<PageListener> = Vec::new();
    let bound = super::lenient(config.text("bind_address"), warnings);
    let address = bound.as_ref().unwrap_or(&service.address);
    for path in &service.proxy.expose.paths {
        match one_exposed(service, address, path) {
            Ok(page) if pages.iter().any(|known| known.bind == page.bind) => {
                warnings.push(format!("{}: another exposed path has port {}", page.name, path.listener_port));
            }
            Ok(page) => pages.push(page),
            Err(why) => warnings.push(format!("proxy.expose.paths `{}` {why}", path.path.escape_default())),
        }
    }
    pages
}

/// `expose.checks`: the app is asked at its own port, because the agent does not tell another one over the HTTP API.
pub(super) fn checks(service: &wire::Service, config: &Opaque<'_>, warnings: &mut Vec<String>) -> Option<ExposedChecks> {
    let bound = super::lenient(config.text("bind_address"), warnings);
    exposed_checks(service, bound.as_ref().unwrap_or(&service.address))
        .map_err(|why| warnings.push(format!("expose.checks has no effect: {why}; name the paths in expose.paths")))
        .ok()
}

fn exposed_checks(service: &wire::Service, address: &str) -> Result<ExposedChecks, String> {
    let proxy = &service.proxy;
    let bind = super::bind_ip(address, Ipv4Addr::UNSPECIFIED, "address")?;
    let app = super::bind_ip(&proxy.local_service_address, Ipv4Addr::LOCALHOST, "local_service_address")?;
    if proxy.local_service_port == 0 {
        return Err("the app has no port".to_owned());
    }
    // The agent has no checks rewritten then.
    if proxy.destination_service_id.is_empty() {
        return Err("destination_service_id is not set".to_owned());
    }
    let instance = Name {
        service: proxy.destination_service_id.clone(),
        namespace: not_default(&service.namespace),
        partition: not_default(&service.partition),
    };
    let ask = Ask { instance, address: service.address.clone() };
    Ok(ExposedChecks { ask, bind, app: SocketAddr::new(app, proxy.local_service_port) })
}

impl ExposedChecks {
    /// One listener a check that none of `pages` has the port of: `expose.paths` says more.
    pub(crate) fn add_to<'a>(&self, pages: &mut Vec<PageListener>, checks: impl Iterator<Item = &'a Exposed>) {
        for Exposed { port, path, http2 } in checks {
            if *port != self.app.port() && pages.iter().all(|known| known.bind.port() != *port) {
                let to = Exposure { bind: SocketAddr::new(self.bind, *port), path, app: self.app, http2: *http2 };
                pages.push(PageListener { sources: self.agents(), ..to.listener() });
            }
        }
    }

    /// Where the agent on this host asks from: by loopback, or by the address that it asks at. Consul lets in by its own address,
    /// which the HTTP API tells only with rights that a sidecar has not.
    fn agents(&self) -> Vec<(IpAddr, u8)> {
        let mut sources: Vec<(IpAddr, u8)> = vec![(Ipv4Addr::LOCALHOST.into(), 8), (Ipv6Addr::LOCALHOST.into(), 128)];
        let asked_at = [self.ask.address.parse().ok(), Some(self.bind)].into_iter().flatten();
        for address in asked_at.filter(|address: &IpAddr| !address.is_unspecified()) {
            let whole = (address, if address.is_ipv4() { 32 } else { 128 });
            if !sources.contains(&whole) {
                sources.push(whole);
            }
        }
        sources
    }
}

/// A path of the app at a port of its own.
struct Exposure<'a> {
    bind: SocketAddr,
    path: &'a str,
    app: SocketAddr,
    http2: bool,
}

impl Exposure<'_> {
    fn listener(self) -> PageListener {
        let Self { bind, path, app, http2 } = self;
        let name = format!("exposed_path_{}:{}", path.trim_start_matches('/').replace('/', "_"), bind.port());
        let answer = PageAnswer::Backend { address: app, rewrite: None, http2 };
        listener(&name, bind, PathMatch::Exact(path.to_owned()), answer)
    }
}

fn one_exposed(service: &wire::Service, address: &str, path: &wire::ExposedPath) -> Result<PageListener, String> {
    if !path.path.starts_with('/') {
        return Err("is no path; write it with a slash in front".to_owned());
    }
    if path.listener_port == 0 || path.local_path_port == 0 {
        return Err("needs listener_port and local_path_port".to_owned());
    }
    let http2 = match path.protocol.as_str() {
        "" | "http" => false,
        "http2" => true,
        other => return Err(format!("has protocol {}: http and http2 are served", other.escape_default())),
    };
    let ip = super::bind_ip(address, Ipv4Addr::UNSPECIFIED, "address")?;
    let app = super::bind_ip(&service.proxy.local_service_address, Ipv4Addr::LOCALHOST, "local_service_address")?;
    let bind = SocketAddr::new(ip, path.listener_port);
    let app = SocketAddr::new(app, path.local_path_port);
    Ok(Exposure { bind, path: &path.path, app, http2 }.listener())
}

/// One path is answered and every other is not there, as Consul's bootstrap has it.
fn listener(name: &str, bind: SocketAddr, path: PathMatch, answer: PageAnswer) -> PageListener {
    let nothing = PageRoute { path: PathMatch::Prefix("/".to_owned()), answer: PageAnswer::Status(NOT_FOUND) };
    PageListener {
        name: name.to_owned(),
        bind,
        routes: vec![PageRoute { path, answer }, nothing],
        tls: None,
        sources: Vec::new(),
    }
}

fn address(text: &str) -> Result<SocketAddr, &'static str> {
    let text = text.strip_prefix("localhost:").map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) => Err("is no address to listen on; write it as 0.0.0.0:9102"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_key_makes_one_listener_and_a_wrong_one_is_named() {
        let map = json!({"envoy_prometheus_bind_addr": "0.0.0.0:9102", "envoy_stats_bind_addr": "localhost:9103"});
        let map = map.as_object().expect("an object");
        let scrape = Scrape { path: "/scrape".to_owned(), ..Scrape::default() };
        let mut warnings = Vec::new();
        let pages = of(&Opaque::new(map), &scrape, &mut warnings);
        assert_eq!(pages[0].routes[0].path, PathMatch::Exact("/scrape".to_owned()));
        assert_eq!(pages[0].routes[0].answer, PageAnswer::Admin { rewrite: Some("/stats/prometheus".to_owned()) });
        assert_eq!(pages[1].bind, "127.0.0.1:9103".parse().expect("address"));
        assert_eq!(pages[1].routes[1].answer, PageAnswer::Status(404));
        assert!(warnings.is_empty());

        let read = |paths: serde_json::Value| {
            let mut value = crate::control::fixture("agent-service-sidecar");
            value["Proxy"]["Expose"] = json!({"Paths": paths});
            let mut warnings = Vec::new();
            let service: wire::Service = serde_json::from_value(value).expect("the capture parses");
            (exposed(&service, &Opaque::new(&serde_json::Map::new()), &mut warnings), warnings)
        };
        let health = json!({"Path": "/health/live", "LocalPathPort": 8080, "ListenerPort": 21500, "Protocol": "http"});
        let (found, none) = read(json!([health]));
        assert_eq!((found[0].name.as_str(), found[0].bind.port()), ("exposed_path_health_live:21500", 21_500));
        let address = "127.0.0.1:8080".parse().expect("an address");
        assert_eq!(found[0].routes[0].answer, PageAnswer::Backend { address, rewrite: None, http2: false });
        assert!(none.is_empty() && found[0].routes[0].path == PathMatch::Exact("/health/live".to_owned()));
        let (found, told) =
            read(json!([health, health, {"Path": "/x", "LocalPathPort": 1, "ListenerPort": 2, "Protocol": "http3"}]));
        assert_eq!(found.len(), 1);
        assert!(told[0].contains("another exposed path has port 21500") && told[1].contains("protocol http3"), "{told:?}");
        let call = json!({"Path": "/grpc", "LocalPathPort": 8080, "ListenerPort": 21501, "Protocol": "http2"});
        let (found, _) = read(json!([call]));
        assert_eq!(found[0].routes[0].answer, PageAnswer::Backend { address, rewrite: None, http2: true });

        let map = json!({"envoy_stats_bind_addr": "9103"});
        let pages = of(&Opaque::new(map.as_object().expect("an object")), &scrape, &mut warnings);
        assert!(pages.is_empty());
        assert!(warnings[0].contains("envoy_stats_bind_addr") && warnings[0].contains("0.0.0.0:9102"), "{warnings:?}");
    }

    #[test]
    fn checks_are_passed_on_for_this_hosts_agent_where_the_agent_asks() {
        let mut value = crate::control::fixture("agent-service-sidecar");
        value["Address"] = json!("10.0.0.5");
        let mut service: wire::Service = serde_json::from_value(value).expect("the capture parses");
        let of = |service: &wire::Service| checks(service, &Opaque::new(&service.proxy.config), &mut Vec::new());
        let exposed = |port, path: &str, http2| Exposed { port, path: path.to_owned(), http2 };
        let told = [exposed(21_501, "/health", false), exposed(21_502, "/call", true), exposed(8_793, "/of/the/app", false)];
        let known = of(&service).expect("it has all");
        let named: SocketAddr = "10.0.0.5:21501".parse().expect("an address");
        let mut pages = vec![listener("named", named, PathMatch::Exact("/other".to_owned()), PageAnswer::Status(NOT_FOUND))];
        known.add_to(&mut pages, told.iter());
        assert_eq!(pages.len(), 2, "expose.paths keeps its port, and the app its own");
        assert_eq!((pages[1].name.as_str(), pages[1].bind.to_string().as_str()), ("exposed_path_call:21502", "10.0.0.5:21502"));
        let app = "127.0.0.1:8793".parse().expect("an address");
        assert_eq!(pages[1].routes[0].answer, PageAnswer::Backend { address: app, rewrite: None, http2: true });
        let sources = [("127.0.0.1", 8), ("::1", 128), ("10.0.0.5", 32)].map(|(ip, prefix)| (ip.parse().expect("an IP"), prefix));
        assert_eq!(pages[1].sources, sources);

        service.proxy.config = json!({"bind_address": "0.0.0.0"}).as_object().cloned().expect("an object");
        let everywhere = of(&service).expect("it has all");
        assert_eq!((everywhere.bind.to_string().as_str(), everywhere.agents()), ("0.0.0.0", sources.to_vec()));
        service.proxy.destination_service_id.clear();
        assert_eq!(of(&service), None, "they would be the node's");
    }
}
