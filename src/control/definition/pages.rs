//! Listeners for pages that a registration asks for: `envoy_prometheus_bind_addr`, `envoy_stats_bind_addr`, and the paths of the
//! app that `expose` names.
//!
//! What cannot be read is named and left out: a scrape that fails changes nothing for the mesh.

use std::net::{Ipv4Addr, SocketAddr};

use super::Opaque;
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PathMatch, Scrape};
use crate::control::consul::wire;

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
            Some(address) => PageAnswer::Backend { address, rewrite: rewrite(PROMETHEUS) },
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

fn one_exposed(service: &wire::Service, address: &str, path: &wire::ExposedPath) -> Result<PageListener, String> {
    if !path.path.starts_with('/') {
        return Err("is no path; write it with a slash in front".to_owned());
    }
    if path.listener_port == 0 || path.local_path_port == 0 {
        return Err("needs listener_port and local_path_port".to_owned());
    }
    if !matches!(path.protocol.as_str(), "" | "http") {
        return Err(format!("has protocol {}: only http is served without TLS", path.protocol.escape_default()));
    }
    let ip = super::bind_ip(address, Ipv4Addr::UNSPECIFIED, "address")?;
    let app = super::bind_ip(&service.proxy.local_service_address, Ipv4Addr::LOCALHOST, "local_service_address")?;
    let address = SocketAddr::new(app, path.local_path_port);
    let name = format!("exposed_path_{}:{}", path.path.trim_start_matches('/').replace('/', "_"), path.listener_port);
    let answer = PageAnswer::Backend { address, rewrite: None };
    Ok(listener(&name, SocketAddr::new(ip, path.listener_port), PathMatch::Exact(path.path.clone()), answer))
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
        assert_eq!(found[0].routes[0].answer, PageAnswer::Backend { address, rewrite: None });
        assert!(none.is_empty() && found[0].routes[0].path == PathMatch::Exact("/health/live".to_owned()));
        let (found, told) =
            read(json!([health, health, {"Path": "/x", "LocalPathPort": 1, "ListenerPort": 2, "Protocol": "http2"}]));
        assert_eq!(found.len(), 1);
        assert!(told[0].contains("another exposed path has port 21500") && told[1].contains("protocol http2"), "{told:?}");

        let map = json!({"envoy_stats_bind_addr": "9103"});
        let pages = of(&Opaque::new(map.as_object().expect("an object")), &scrape, &mut warnings);
        assert!(pages.is_empty());
        assert!(warnings[0].contains("envoy_stats_bind_addr") && warnings[0].contains("0.0.0.0:9102"), "{warnings:?}");
    }
}
