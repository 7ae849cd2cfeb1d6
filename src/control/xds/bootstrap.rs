//! Envoy's bootstrap as typed settings.
//!
//! Invariant: a field is used, or told in [`Bootstrap::ignored`] because at L4 nothing depends on it, or refused with its path;
//! none is dropped in silence. The bootstrap is read as canonical proto JSON, so both spellings of a name and every form of
//! a value have become one before anything here looks at them. What Consul prints from 1.8 to 1.22 is understood; 1.8's, of
//! Envoy's old API, is renewed first ([`old`]). Knows no command line. Fails with the path of the field and what to do.

pub(super) mod old;
mod pages;
mod shape;
mod stats;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use zeroize::Zeroizing;

use super::proto_json::{ProtoJsonError, Protos};
use crate::config;
use crate::config::envoy::{GrpcAddress, GrpcServer, GrpcTls, PageListener, Stats, Xds};

const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const LISTENER: &str = "envoy.config.listener.v3.Listener";

/// Fields of the bootstrap without a meaning for a proxy that is not Envoy and works at L4.
const WITHOUT_MEANING: [&str; 25] = [
    "application_log_config",
    "cluster_manager",
    "default_regex_engine",
    "default_socket_interface",
    "deferred_stat_options",
    "dns_resolution_config",
    "enable_dispatcher_stats",
    "enable_worker_cpu_affinity",
    "fatal_actions",
    "flags_path",
    "grpc_async_client_manager_config",
    "header_prefix",
    "inline_headers",
    "layered_runtime",
    "memory_allocator_manager",
    "node_context_params",
    "perf_tracing_file_path",
    "stats_eviction",
    "stats_flush_on_admin",
    "stats_server_version_override",
    "tracing",
    "typed_dns_resolver_config",
    "use_tcp_for_dns_lookups",
    "watchdog",
    "watchdogs",
];
const UNDERSTOOD: [&str; 7] =
    ["admin", "dynamic_resources", "node", "static_resources", "stats_config", "stats_flush_interval", "stats_sinks"];

/// A bootstrap understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Bootstrap {
    /// Who this proxy is, and where its resources come from.
    pub xds: Xds,
    /// It was written by a Consul that speaks only Envoy's old protocol (before 1.10).
    pub old_protocol: bool,
    /// Where the admin port is to listen.
    pub admin: Option<SocketAddr>,
    /// The admin port's access log; none for `/dev/null`.
    pub admin_access_log: Option<PathBuf>,
    /// Tags and sinks.
    pub stats: Stats,
    /// Listeners for some of the admin pages.
    pub pages: Vec<PageListener>,
    /// What is accepted and has no effect, one path each.
    pub ignored: Vec<String>,
}

/// Why a bootstrap cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// It is no bootstrap.
    #[error(transparent)]
    Json(#[from] ProtoJsonError),
    /// It asks for what this proxy does not do.
    #[error("{place}: {why}")]
    Unsupported {
        /// Path of the field.
        place: String,
        /// What about it, and what to do.
        why: String,
    },
}

impl BootstrapError {
    fn at(place: &str, why: impl Into<String>) -> Self {
        Self::Unsupported { place: place.to_owned(), why: why.into() }
    }
}

/// Reads a bootstrap from `parts`, each merged over those before it, as Envoy merges `--config-yaml` over `--config-path`.
pub fn read(protos: &Protos, parts: &[Json]) -> Result<Bootstrap, BootstrapError> {
    let old_protocol = parts.iter().any(old::is_old);
    let mut bytes = Vec::new();
    for part in parts {
        let renewed = old_protocol.then(|| old::renewed(part));
        // One message after another is the merge of both: protobuf's own rule.
        bytes.extend(protos.encode(BOOTSTRAP, renewed.as_ref().unwrap_or(part))?);
    }
    let json = protos.canonical(BOOTSTRAP, &bytes)?;
    let shown = protos.render_bytes(BOOTSTRAP, &bytes)?;
    Reader { protos, json: &json, ignored: Vec::new() }.read(old_protocol, shown)
}

/// A server, where there is one, and what a stream to it is opened with.
type Server = (Option<GrpcServer>, Vec<(String, Zeroizing<String>)>);

struct Reader<'a> {
    protos: &'a Protos,
    /// Canonical, with its secrets.
    json: &'a Json,
    ignored: Vec<String>,
}

impl Reader<'_> {
    fn read(mut self, old_protocol: bool, bootstrap: Json) -> Result<Bootstrap, BootstrapError> {
        for field in self.json.as_object().into_iter().flat_map(serde_json::Map::keys) {
            if WITHOUT_MEANING.contains(&field.as_str()) {
                self.ignored.push(field.clone());
            } else if !UNDERSTOOD.contains(&field.as_str()) {
                return Err(BootstrapError::at(field, "not understood: take it out, or keep Envoy for this proxy"));
            }
        }
        let node: shape::Node = part(&self.json["node"], "node")?;
        let clusters: Vec<shape::Cluster> = part(&self.json["static_resources"]["clusters"], "static_resources.clusters")?;
        let admin: shape::Admin = part(&self.json["admin"], "admin")?;
        let admin_address = admin.address.as_ref().map(|address| address.socket("admin.address")).transpose()?;
        let stats = stats::read(self.json, &clusters, &mut self.ignored)?;
        let (pages, listeners) = self.listeners(&clusters, admin_address)?;
        let (server, initial_metadata) = self.server(&clusters)?;
        let mut own: Vec<String> = pages::clusters_of(self.json);
        own.extend(stats::clusters_of(self.json));
        own.extend(self.json["dynamic_resources"].pointer(SERVER_NAME).and_then(Json::as_str).map(str::to_owned));
        let traffic = clusters.iter().enumerate().filter(|(_, cluster)| !own.contains(&cluster.name));
        let indexes: Vec<usize> = traffic.map(|(index, _)| index).collect();
        let grpc_servers = indexes.iter().filter_map(|index| {
            let (cluster, place) = (&clusters[*index], format!("static_resources.clusters[{index}]"));
            // What is none is an app: nobody has asked for its secrets.
            Some((cluster.name.clone(), grpc_server(cluster, &place).ok()?))
        });
        let grpc_servers = grpc_servers.collect();
        let static_clusters = self.encoded("clusters", CLUSTER, &indexes)?;
        let static_listeners = self.encoded("listeners", LISTENER, &listeners)?;
        Ok(Bootstrap {
            xds: Xds {
                node_id: node.id,
                node_cluster: node.cluster,
                node_metadata: node.metadata,
                server,
                initial_metadata,
                static_listeners,
                static_clusters,
                grpc_servers,
                http_as_tcp: false,
                bootstrap,
            },
            old_protocol,
            admin: admin_address,
            admin_access_log: admin.access_log().filter(|path| path.as_os_str() != "/dev/null"),
            stats,
            pages,
            ignored: self.ignored,
        })
    }

    /// The listeners for admin pages, and the indexes of those for traffic.
    fn listeners(
        &self,
        clusters: &[shape::Cluster],
        admin: Option<SocketAddr>,
    ) -> Result<(Vec<PageListener>, Vec<usize>), BootstrapError> {
        let secrets: Vec<shape::Secret> = part(&self.json["static_resources"]["secrets"], "static_resources.secrets")?;
        let (mut pages, mut traffic) = (Vec::new(), Vec::new());
        for (index, listener) in list(&self.json["static_resources"]["listeners"]).iter().enumerate() {
            if pages::is_page(listener) {
                let place = format!("static_resources.listeners[{index}]");
                pages.push(pages::Context { clusters, admin, secrets: &secrets }.read(listener, &place)?);
            } else {
                traffic.push(index);
            }
        }
        Ok((pages, traffic))
    }

    fn encoded(&self, field: &str, message: &str, indexes: &[usize]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let all = &self.json["static_resources"][field];
        indexes.iter().map(|index| Ok(self.protos.encode(message, &all[*index])?)).collect()
    }

    /// The xDS server and what a stream to it is opened with.
    fn server(&self, clusters: &[shape::Cluster]) -> Result<Server, BootstrapError> {
        let dynamic = &self.json["dynamic_resources"];
        for field in dynamic.as_object().into_iter().flat_map(serde_json::Map::keys) {
            let place = format!("dynamic_resources.{field}");
            match field.as_str() {
                "ads_config" => {}
                "lds_config" | "cds_config" if dynamic[field].get("ads").is_some() => {}
                "lds_config" | "cds_config" => {
                    return Err(BootstrapError::at(&place, "only `ads` is understood, as Consul writes it"));
                }
                _ => return Err(BootstrapError::at(&place, "not understood: Consul never sets it")),
            }
        }
        let Some(config) = dynamic.get("ads_config") else { return Ok((None, Vec::new())) };
        let place = "dynamic_resources.ads_config";
        let config: shape::Ads = part(config, place)?;
        if config.api_type != "DELTA_GRPC" {
            let why = format!("{} is not spoken, only DELTA_GRPC (Consul 1.10 and later)", config.api_type);
            return Err(BootstrapError::at(&format!("{place}.api_type"), why));
        }
        let [service] = config.grpc_services.as_slice() else {
            return Err(BootstrapError::at(&format!("{place}.grpc_services"), "exactly one is wanted"));
        };
        let name = &service.envoy_grpc.cluster_name;
        let (index, cluster) = cluster_named(clusters, name, &format!("{place}.grpc_services[0].envoy_grpc.cluster_name"))?;
        let place = format!("static_resources.clusters[{index}]");
        let metadata = service.initial_metadata.iter();
        // Consul writes an empty token where there is none.
        let metadata = metadata.filter(|one| !one.value.0.is_empty()).map(|one| (one.key.clone(), one.value.0.clone()));
        Ok((Some(grpc_server(cluster, &place)?), metadata.collect()))
    }
}

/// Where `ads_config` names its cluster, inside `dynamic_resources`.
const SERVER_NAME: &str = "/ads_config/grpc_services/0/envoy_grpc/cluster_name";

fn grpc_server(cluster: &shape::Cluster, place: &str) -> Result<GrpcServer, BootstrapError> {
    if !matches!(cluster.kind.as_str(), "" | "STATIC" | "STRICT_DNS" | "LOGICAL_DNS") {
        let why = format!("{} cannot be looked up before the stream is there: STATIC, STRICT_DNS or LOGICAL_DNS", cluster.kind);
        return Err(BootstrapError::at(&format!("{place}.type"), why));
    }
    let addresses = cluster.addresses().map(|address| address.grpc(place)).collect::<Result<Vec<GrpcAddress>, _>>()?;
    if addresses.is_empty() {
        return Err(BootstrapError::at(&format!("{place}.load_assignment"), "no endpoint: where is the xDS server?"));
    }
    let tls = cluster.transport_socket.as_ref().map(|socket| server_tls(socket, place)).transpose()?;
    let connect_timeout = cluster.connect_timeout.as_deref().map(|text| duration(text, place)).transpose()?;
    Ok(GrpcServer { addresses, tls, connect_timeout: connect_timeout.unwrap_or(config::CONNECT_TIMEOUT) })
}

fn server_tls(socket: &shape::TransportSocket, place: &str) -> Result<GrpcTls, BootstrapError> {
    let place = format!("{place}.transport_socket.typed_config");
    if !socket.is("UpstreamTlsContext") {
        return Err(BootstrapError::at(&place, "only UpstreamTlsContext is understood here"));
    }
    let tls: shape::UpstreamTls = part(&socket.typed_config, &place)?;
    let common = format!("{place}.common_tls_context");
    let Some(trusted) = tls.common_tls_context.validation_context.as_ref().and_then(|context| context.trusted_ca.as_ref()) else {
        let why = "no trusted_ca: the xDS server would not be verified; give Consul -grpc-ca-file";
        return Err(BootstrapError::at(&format!("{common}.validation_context"), why));
    };
    let ca_pem = trusted.text(&format!("{common}.validation_context.trusted_ca"))?;
    let client = match tls.common_tls_context.tls_certificates.as_slice() {
        [] => None,
        [pair, ..] => {
            let place = format!("{common}.tls_certificates[0]");
            Some((pair.certificate_chain.text(&place)?.to_string(), pair.private_key.text(&place)?))
        }
    };
    Ok(GrpcTls { ca_pem: ca_pem.to_string(), server_name: Some(tls.sni).filter(|sni| !sni.is_empty()), client })
}

fn cluster_named<'a>(
    clusters: &'a [shape::Cluster],
    name: &str,
    place: &str,
) -> Result<(usize, &'a shape::Cluster), BootstrapError> {
    let found = clusters.iter().enumerate().find(|(_, cluster)| cluster.name == name);
    found.ok_or_else(|| BootstrapError::at(place, format!("there is no static cluster '{name}'")))
}

/// A part of the bootstrap in the shape that is understood; one that is absent has its defaults.
fn part<T: DeserializeOwned + Default>(json: &Json, place: &str) -> Result<T, BootstrapError> {
    if json.is_null() {
        return Ok(T::default());
    }
    serde_path_to_error::deserialize(json).map_err(|error| {
        let path = error.path().to_string();
        let place = match path.as_str() {
            "." => place.to_owned(),
            path if path.starts_with('[') => format!("{place}{path}"),
            path => format!("{place}.{path}"),
        };
        // serde names what it does not know in backticks, and then all that it does.
        let text = error.into_inner().to_string();
        let why = text.split(", expected").next().unwrap_or_default();
        BootstrapError::at(&place, format!("not understood ({why}): take it out, or keep Envoy for this proxy"))
    })
}

fn list(json: &Json) -> &[Json] {
    json.as_array().map_or(&[], Vec::as_slice)
}

/// A duration of canonical proto JSON: seconds, with a fraction where there is one.
fn duration(text: &str, place: &str) -> Result<Duration, BootstrapError> {
    let seconds = text.strip_suffix('s').and_then(|seconds| seconds.parse::<f64>().ok());
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| BootstrapError::at(place, format!("'{text}' is no duration of zero or more")))
}

#[cfg(test)]
mod tests;
