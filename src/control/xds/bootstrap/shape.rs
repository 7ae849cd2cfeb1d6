//! The parts of a bootstrap in the shape that is understood.
//!
//! Invariant: a field that is not listed is an error, except in clusters, whose settings for HTTP mean nothing to a client that
//! brings its own. Fields that begin with an underscore are accepted and change nothing at L4.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value as Json;
use zeroize::Zeroizing;

use super::BootstrapError;
use crate::config::envoy::GrpcAddress;

/// Most bytes of a PEM file that a bootstrap names.
const PEM_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Node {
    pub(super) id: String,
    pub(super) cluster: String,
    pub(super) metadata: serde_json::Map<String, Json>,
    #[serde(rename = "locality")]
    _locality: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Admin {
    pub(super) address: Option<Address>,
    access_log_path: String,
    access_log: Vec<Json>,
    #[serde(rename = "profile_path")]
    _profile_path: IgnoredAny,
    #[serde(rename = "ignore_global_conn_limit")]
    _ignore_global_conn_limit: IgnoredAny,
}

impl Admin {
    /// In either of Envoy's two forms.
    pub(super) fn access_log(&self) -> Option<PathBuf> {
        let newer = self.access_log.iter().find_map(|log| log["typed_config"]["path"].as_str());
        newer.or(Some(self.access_log_path.as_str())).filter(|path| !path.is_empty()).map(PathBuf::from)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Address {
    pub(super) socket_address: Option<SocketAddress>,
    pub(super) pipe: Option<Pipe>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SocketAddress {
    address: String,
    port_value: u16,
    #[serde(rename = "protocol")]
    _protocol: IgnoredAny,
    #[serde(rename = "ipv4_compat")]
    _ipv4_compat: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Pipe {
    pub(super) path: PathBuf,
    #[serde(rename = "mode")]
    _mode: IgnoredAny,
}

impl Address {
    /// An IP address and port.
    pub(super) fn socket(&self, place: &str) -> Result<SocketAddr, BootstrapError> {
        let Some(socket) = &self.socket_address else {
            return Err(BootstrapError::at(place, "a socket_address is wanted"));
        };
        let ip: IpAddr =
            socket.address.parse().map_err(|_| BootstrapError::at(place, format!("'{}' is no IP address", socket.address)))?;
        Ok(SocketAddr::new(ip, socket.port_value))
    }

    pub(super) fn grpc(&self, place: &str) -> Result<GrpcAddress, BootstrapError> {
        match (&self.socket_address, &self.pipe) {
            (Some(socket), None) => Ok(GrpcAddress::Tcp(socket.address.clone(), socket.port_value)),
            (None, Some(pipe)) => Ok(GrpcAddress::Unix(pipe.path.clone())),
            _ => Err(BootstrapError::at(place, "an endpoint has neither socket_address nor pipe")),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cluster {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) connect_timeout: Option<String>,
    pub(super) transport_socket: Option<TransportSocket>,
    load_assignment: LoadAssignment,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LoadAssignment {
    endpoints: Vec<Locality>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Locality {
    lb_endpoints: Vec<LbEndpoint>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LbEndpoint {
    endpoint: Endpoint,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Endpoint {
    address: Address,
}

impl Cluster {
    pub(super) fn addresses(&self) -> impl Iterator<Item = &Address> {
        let endpoints = self.load_assignment.endpoints.iter().flat_map(|locality| &locality.lb_endpoints);
        endpoints.map(|endpoint| &endpoint.endpoint.address)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TransportSocket {
    #[serde(rename = "name")]
    _name: IgnoredAny,
    pub(super) typed_config: Json,
}

impl TransportSocket {
    /// Whether its configuration is this message.
    pub(super) fn is(&self, message: &str) -> bool {
        is_type(&self.typed_config, message)
    }
}

/// Whether an expanded `Any` holds a message of this (last) name.
pub(super) fn is_type(any: &Json, message: &str) -> bool {
    any["@type"].as_str().is_some_and(|url| url.rsplit(['/', '.']).next() == Some(message))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct UpstreamTls {
    #[serde(rename = "@type")]
    _type: IgnoredAny,
    pub(super) common_tls_context: CommonTls,
    pub(super) sni: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct DownstreamTls {
    #[serde(rename = "@type")]
    _type: IgnoredAny,
    pub(super) common_tls_context: CommonTls,
    /// With a CA, clients are verified either way.
    #[serde(rename = "require_client_certificate")]
    _require_client_certificate: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CommonTls {
    pub(super) tls_certificates: Vec<TlsCertificate>,
    pub(super) tls_certificate_sds_secret_configs: Vec<SecretName>,
    pub(super) validation_context: Option<ValidationContext>,
    pub(super) validation_context_sds_secret_config: Option<SecretName>,
    /// HTTP/2 is spoken whatever is written here.
    #[serde(rename = "alpn_protocols")]
    _alpn_protocols: IgnoredAny,
    /// rustls' own: TLS 1.2 and 1.3.
    #[serde(rename = "tls_params")]
    _tls_params: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SecretName {
    pub(super) name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Secret {
    pub(super) name: String,
    pub(super) tls_certificate: Option<TlsCertificate>,
    pub(super) validation_context: Option<ValidationContext>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TlsCertificate {
    pub(super) certificate_chain: DataSource,
    pub(super) private_key: DataSource,
    #[serde(rename = "watched_directory")]
    _watched_directory: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ValidationContext {
    pub(super) trusted_ca: Option<DataSource>,
    pub(super) watched_directory: Option<Directory>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
}

/// No `Debug` of what it holds: it may be a key.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct DataSource {
    pub(super) filename: Option<PathBuf>,
    inline_string: Option<Text>,
}

impl std::fmt::Debug for DataSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DataSource").field("filename", &self.filename).finish_non_exhaustive()
    }
}

impl DataSource {
    /// What it holds or leads to.
    pub(super) fn text(&self, place: &str) -> Result<Zeroizing<String>, BootstrapError> {
        use std::io::Read;
        if let Some(text) = &self.inline_string {
            return Ok(text.0.clone());
        }
        let Some(path) = &self.filename else {
            return Err(BootstrapError::at(place, "inline_string or filename is wanted"));
        };
        let mut text = Zeroizing::new(String::new());
        std::fs::File::open(path)
            .and_then(|file| file.take(PEM_BYTES_MAX).read_to_string(&mut text))
            .map_err(|error| BootstrapError::at(place, format!("{}: {error}", path.display())))?;
        Ok(text)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ads {
    pub(super) api_type: String,
    pub(super) grpc_services: Vec<GrpcService>,
    /// [`super::old`] has seen to it.
    #[serde(rename = "transport_api_version")]
    _transport_api_version: IgnoredAny,
    /// It is sent once either way.
    #[serde(rename = "set_node_on_first_message_only")]
    _set_node_on_first_message_only: IgnoredAny,
    #[serde(rename = "rate_limit_settings")]
    _rate_limit_settings: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct GrpcService {
    pub(super) envoy_grpc: EnvoyGrpc,
    pub(super) initial_metadata: Vec<Metadata>,
    #[serde(rename = "timeout")]
    _timeout: IgnoredAny,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct EnvoyGrpc {
    pub(super) cluster_name: String,
}

/// A text that may be a secret.
#[derive(Default, Deserialize)]
#[serde(from = "String")]
pub(super) struct Text(pub(super) Zeroizing<String>);

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Metadata {
    pub(super) key: String,
    pub(super) value: Text,
}

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metadata").field("key", &self.key).finish_non_exhaustive()
    }
}
