//! Listeners for pages of the admin port that a registration asks for: `envoy_prometheus_bind_addr`, `envoy_stats_bind_addr`.
//!
//! What cannot be read is named and left out: a scrape that fails changes nothing for the mesh.

use std::net::SocketAddr;

use super::Opaque;
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PathMatch, Scrape};

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

/// One path is answered and every other is not there, as Consul's bootstrap has it.
fn listener(name: &str, bind: SocketAddr, path: PathMatch, answer: PageAnswer) -> PageListener {
    let nothing = PageRoute { path: PathMatch::Prefix("/".to_owned()), answer: PageAnswer::Status(NOT_FOUND) };
    PageListener { name: name.to_owned(), bind, routes: vec![PageRoute { path, answer }, nothing], tls: None }
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

        let map = json!({"envoy_stats_bind_addr": "9103"});
        let pages = of(&Opaque::new(map.as_object().expect("an object")), &scrape, &mut warnings);
        assert!(pages.is_empty());
        assert!(warnings[0].contains("envoy_stats_bind_addr") && warnings[0].contains("0.0.0.0:9102"), "{warnings:?}");
    }
}
