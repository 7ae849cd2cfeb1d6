//! Envoy's flags and a bootstrap as the settings of a sidecar.
//!
//! Which feeder: the bootstrap's xDS, unless it was written by a Consul whose xDS is the old one (before 1.10): then the HTTP
//! agent API, found as every tool of Consul finds it, for the proxy and with the token that the bootstrap names.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use zeroize::Zeroizing;

use super::super::environment::Environment;
use super::super::flags::Agent;
use super::options::{Feeder, Options};
use super::read;
use crate::config::envoy::{StatTag, StatTagValue, Xds};
use crate::config::{self, TokenSource};
use crate::control::xds::bootstrap::{self, Bootstrap};
use crate::control::xds::proto_json::Protos;

/// Where the admin port listens when the bootstrap has none.
const ANY_LOOPBACK_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// The metadata that Consul's token comes in.
const TOKEN: &str = "x-consul-token";

/// What runs, and what the user should be told.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) sidecar: config::Sidecar,
    pub(super) logging: config::Logging,
    /// One line each.
    pub(super) notes: Vec<String>,
}

/// Reads the bootstrap that `options` name and settles everything.
pub(super) fn of(options: &Options, environment: &Environment) -> Result<Settings, String> {
    let mut parts = Vec::new();
    if let Some(path) = &options.config_path {
        parts.push(read::file(path)?);
    }
    if let Some(text) = &options.config_yaml {
        parts.push(read::yaml(text)?);
    }
    if parts.is_empty() {
        return Err("At least one of --config-path or --config-yaml should be non-empty".to_owned());
    }
    let protos = Protos::load();
    let protos = if options.tolerant { protos.tolerant() } else { protos };
    let bootstrap = bootstrap::read(&protos, &parts).map_err(|error| error.to_string())?;
    settle(options, bootstrap, environment)
}

fn settle(options: &Options, mut bootstrap: Bootstrap, environment: &Environment) -> Result<Settings, String> {
    let mut notes = notes(options, &bootstrap);
    if let Some(id) = &options.service_node {
        bootstrap.xds.node_id.clone_from(id);
    }
    if let Some(cluster) = &options.service_cluster {
        bootstrap.xds.node_cluster.clone_from(cluster);
    }
    let tags = options.stats_tags.iter();
    bootstrap
        .stats
        .tags
        .extend(tags.map(|(name, value)| StatTag { name: name.clone(), value: StatTagValue::Fixed(value.clone()) }));

    let feeder = options.feeder.unwrap_or(if bootstrap.old_protocol { Feeder::Http } else { Feeder::Xds });
    let (consul, xds) = match feeder {
        Feeder::Http => {
            let consul = http(&bootstrap, environment)?;
            let whose =
                if bootstrap.old_protocol { "this bootstrap is of a Consul before 1.10" } else { "RINGFENCE_FEEDER=http" };
            notes.push(format!("{whose}: the mesh is learned from Consul's HTTP API (CONSUL_HTTP_ADDR), not by xDS"));
            (consul, None)
        }
        Feeder::Xds if bootstrap.old_protocol => {
            return Err("the xDS of a Consul before 1.10 is not spoken: leave out RINGFENCE_FEEDER=xds".to_owned());
        }
        Feeder::Xds => (config::Consul::default(), Some(Xds { http_as_tcp: options.http_as_tcp, ..bootstrap.xds })),
    };
    let bind = bootstrap.admin.unwrap_or(ANY_LOOPBACK_PORT);
    let defaults = config::DataPlane::default();
    Ok(Settings {
        sidecar: config::Sidecar {
            consul,
            xds,
            plane: config::DataPlane {
                workers: options.concurrency.unwrap_or(defaults.workers),
                drain_time: options.drain_time.unwrap_or(defaults.drain_time),
                restart_drain_time: options.drain_time.unwrap_or(defaults.restart_drain_time),
                ..defaults
            },
            admin: config::Admin {
                bind,
                access_log: bootstrap.admin_access_log,
                address_path: options.admin_address_path.clone(),
                envoy_version: super::claimed_version(environment).to_owned(),
                component_levels: options.component_levels.clone(),
            },
            connection_log: options.connection_log.clone(),
            stats: bootstrap.stats,
            pages: bootstrap.pages,
            ..config::Sidecar::default()
        },
        logging: config::Logging { level: options.log_level, json: false },
        notes,
    })
}

fn notes(options: &Options, bootstrap: &Bootstrap) -> Vec<String> {
    let mut notes = Vec::new();
    if !options.without_effect.is_empty() {
        let flags: Vec<String> = options.without_effect.iter().map(|name| format!("--{name}")).collect();
        notes.push(format!("these flags of Envoy's have no effect here: {}", flags.join(" ")));
    }
    if !bootstrap.ignored.is_empty() {
        notes.push(format!("these parts of the bootstrap have no effect here: {}", bootstrap.ignored.join(", ")));
    }
    match bootstrap.admin {
        None => notes
            .push("the bootstrap has no admin address: the admin port is on loopback, at a port of the system's choice".into()),
        Some(address) if !address.ip().is_loopback() => {
            notes.push(format!("the admin port on {address} has no access control and can be reached from other hosts"));
        }
        Some(_) => {}
    }
    notes
}

/// The HTTP feeder's settings: Consul's variables, and from the bootstrap the proxy and the token.
fn http(bootstrap: &Bootstrap, environment: &Environment) -> Result<config::Consul, String> {
    let Xds { node_id, node_metadata, initial_metadata, static_listeners, static_clusters, .. } = &bootstrap.xds;
    if node_id.is_empty() {
        return Err("node.id: it is empty, so there is no proxy to ask Consul for".to_owned());
    }
    if !static_listeners.is_empty() || !static_clusters.is_empty() {
        return Err("static_resources: listeners and clusters for traffic need xDS, which a Consul before 1.10 does not have; \
                    take envoy_extra_static_listeners_json and envoy_extra_static_clusters_json out of the proxy's Config"
            .to_owned());
    }
    let mut consul = Agent::default().resolve(environment).map_err(|error| error.to_string())?;
    if let Some((_, token)) = initial_metadata.iter().find(|(key, _)| key == TOKEN) {
        consul.token = token_source(token, environment);
    }
    let enterprise = |name: &str| node_metadata.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
    // `default` is what a Consul without namespaces writes, and refuses to be asked for.
    let enterprise = |name| enterprise(name).filter(|value| value != "default");
    consul.namespace = consul.namespace.or_else(|| enterprise("namespace"));
    consul.partition = consul.partition.or_else(|| enterprise("partition"));
    consul.proxies = vec![config::Proxy::ProxyId(node_id.clone())];
    Ok(consul)
}

/// The bootstrap's token. Where Consul has read it from a file, the file: it is read again when it changes.
fn token_source(token: &Zeroizing<String>, environment: &Environment) -> TokenSource {
    let file = environment.get("CONSUL_HTTP_TOKEN_FILE").map(Path::new);
    let same = |path: &&Path| std::fs::read_to_string(path).map(Zeroizing::new).is_ok_and(|text| text.trim() == token.as_str());
    match file.filter(same) {
        Some(path) => TokenSource::File(path.to_owned()),
        None => TokenSource::Static(token.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::flags;
    use super::*;

    fn of(line: &[&str], variables: &[(&str, &str)]) -> Result<Settings, String> {
        let words: Vec<String> = line.iter().map(|&word| word.to_owned()).collect();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment: Environment = variables.collect();
        let options = Options::of(&flags::parse(&words).expect("flags"), &environment)?;
        super::of(&options, &environment)
    }

    fn fixture(path: &str) -> String {
        format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn a_bootstrap_of_consul_1_8_is_fed_by_http_with_its_proxy_and_token() {
        let path = fixture("consul-1.8/bootstrap.json");
        let line = ["--config-path", &path, "--disable-hot-restart", "--max-obj-name-len", "256", "--concurrency", "3"];
        let settings = of(&line, &[("CONSUL_HTTP_ADDR", "https://agent:8501")]).expect("it is understood");
        let consul = &settings.sidecar.consul;
        assert_eq!(consul.proxies, [config::Proxy::ProxyId("web-sidecar-proxy".into())]);
        assert!(matches!(&consul.token, TokenSource::Static(token) if token.as_str() == "abc"));
        assert!(matches!(&consul.address, config::AgentAddress::Http { host, tls: true, .. } if host == "agent"));
        assert_eq!(consul.namespace, None);
        assert_eq!(settings.sidecar.xds, None);
        assert_eq!(settings.sidecar.plane.workers, 3);
        assert_eq!(settings.sidecar.admin.bind, config::ADMIN_BIND);
        assert_eq!(settings.sidecar.pages.len(), 2);
        let notes = settings.notes.join("\n");
        assert!(notes.contains("--disable-hot-restart --max-obj-name-len") && notes.contains("before 1.10"), "{notes}");
        assert!(of(&line, &[("RINGFENCE_FEEDER", "xds")]).expect_err("it cannot be").contains("before 1.10"));
    }

    #[test]
    fn a_token_that_consul_read_from_a_file_stays_in_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        let path = fixture("consul-1.8/bootstrap.json");
        let variables = [("CONSUL_HTTP_TOKEN_FILE", file.to_str().expect("UTF-8"))];
        std::fs::write(&file, "abc\n").expect("it can be written");
        let settings = of(&["-c", &path], &variables).expect("it is understood");
        assert!(matches!(&settings.sidecar.consul.token, TokenSource::File(path) if *path == file));
        std::fs::write(&file, "another").expect("it can be written");
        let settings = of(&["-c", &path], &variables).expect("it is understood");
        assert!(matches!(settings.sidecar.consul.token, TokenSource::Static(_)));
    }

    #[test]
    fn a_bootstrap_of_consul_1_10_is_fed_by_xds_unless_told_otherwise() {
        let path = fixture("consul-1.10/xds/sidecar.bootstrap.json");
        let line = ["-c", &path, "--service-node", "other", "--stats-tag", "a:b", "--config-yaml", "node: {cluster: merged}"];
        let settings = of(&line, &[]).expect("it is understood");
        let xds = settings.sidecar.xds.expect("it is fed by xDS");
        assert_eq!((xds.node_id.as_str(), xds.node_cluster.as_str()), ("other", "merged"));
        assert_eq!(settings.sidecar.stats.tags.last().map(|tag| tag.name.as_str()), Some("a"));
        let settings = of(&["-c", &path], &[("RINGFENCE_FEEDER", "http")]).expect("it is understood");
        assert_eq!(settings.sidecar.xds, None);
        assert_eq!(settings.sidecar.consul.proxies, [config::Proxy::ProxyId("airflow-worker-sidecar-proxy".into())]);
    }

    #[test]
    fn mistakes_are_told_in_envoys_words() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("b.json");
        std::fs::write(&path, r#"{"static_resources": {"clusters": [{"nmae": 1}]}}"#).expect("it can be written");
        let path = path.to_str().expect("UTF-8");
        let error = of(&["-c", path], &[]).expect_err("a field is unknown");
        assert!(error.contains("no such field: 'nmae'") && error.contains("static_resources.clusters[0]"), "{error}");
        assert!(of(&["-c", path, "--allow-unknown-static-fields"], &[]).is_ok());
        assert!(of(&[], &[]).expect_err("nothing").contains("At least one of --config-path"));
        let error = of(&["--config-yaml", "{}"], &[("RINGFENCE_FEEDER", "http")]).expect_err("no node");
        assert!(error.starts_with("node.id"), "{error}");
    }
}
