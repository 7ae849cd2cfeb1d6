//! Certificates that are asked for by name, of the SDS servers that listeners of ingress gateways name (Consul's `TLS.SDS`).
//!
//! Invariant: one stream a server, on which all its names are asked for; every response is answered; while a server is away, or
//! sends what cannot be used, the certificate that came last stays. Keys leave this room only in a [`Secret`], which prints none.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as Message;
use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;

use super::connector::Connector;
use super::refusal::{type_url, unpack};
use super::shown::Came;
use super::stream::{REQUESTS_MAX, connect};
use super::subscription::{answer, node};
use super::tls_context::{SecretName, secret};
use crate::config::envoy::{GrpcServer, Xds};
use crate::control::backoff::Backoff;
use crate::tls::Shown;

/// The message that is asked for.
pub(super) const SECRET: &str = "envoy.extensions.transport_sockets.tls.v3.Secret";
/// One response: some chains with their keys, of a few KiB each.
const RESPONSE_BYTES_MAX: usize = 4 << 20;
/// Certificates that may wait to be taken.
const CERTIFICATES_MAX: usize = 64;

/// A certificate and the message in which it came.
#[derive(Debug)]
pub(super) struct Secret {
    pub(super) shown: Shown,
    pub(super) came: Came,
}

/// A name and what came under it.
pub(super) type Certificate = (SecretName, Secret);

/// The streams, by the name of the server's cluster.
pub(super) struct Secrets {
    servers: BTreeMap<String, GrpcServer>,
    node: Node,
    streams: BTreeMap<String, Stream>,
    sender: mpsc::Sender<Certificate>,
}

struct Stream {
    names: watch::Sender<BTreeSet<String>>,
    trouble: watch::Receiver<Option<String>>,
    task: Option<AbortHandle>,
}

impl Secrets {
    pub(super) fn new(settings: &Xds) -> (Self, mpsc::Receiver<Certificate>) {
        let (sender, certificates) = mpsc::channel(CERTIFICATES_MAX);
        let secrets = Self { servers: settings.grpc_servers.clone(), node: node(settings), streams: BTreeMap::new(), sender };
        (secrets, certificates)
    }

    /// Asks for exactly these from now on.
    pub(super) fn follow(&mut self, wanted: &BTreeSet<SecretName>) {
        let mut by_cluster: BTreeMap<&String, BTreeSet<String>> = BTreeMap::new();
        for SecretName { cluster, name } in wanted {
            by_cluster.entry(cluster).or_default().insert(name.clone());
        }
        self.streams.retain(|cluster, stream| {
            let keep = by_cluster.contains_key(cluster);
            if !keep && let Some(task) = &stream.task {
                task.abort();
            }
            keep
        });
        for (cluster, names) in by_cluster {
            match self.streams.get(cluster) {
                Some(stream) => {
                    stream.names.send_if_modified(|before| {
                        let changed = *before != names;
                        *before = names;
                        changed
                    });
                }
                None => {
                    let stream = self.open(cluster, names);
                    self.streams.insert(cluster.clone(), stream);
                }
            }
        }
    }

    fn open(&self, cluster: &str, names: BTreeSet<String>) -> Stream {
        let (names, asked) = watch::channel(names);
        let (told, trouble) = watch::channel(None);
        let server = self.servers.get(cluster).ok_or_else(|| {
            format!("no static cluster of the bootstrap is called {cluster}; give it in envoy_extra_static_clusters_json")
        });
        let connector = server.and_then(|server| {
            let connector = Connector::new(server).map_err(|why| why.to_string())?;
            Ok((connector, server.connect_timeout))
        });
        let task = match connector {
            Ok((connector, timeout)) => {
                let (cluster, node) = (cluster.to_owned(), self.node.clone());
                let asking = Asking { cluster, node, connector, timeout, sender: self.sender.clone(), told };
                Some(tokio::spawn(asking.run(asked)).abort_handle())
            }
            Err(why) => {
                tracing::error!(cluster, problem = %why, "secrets cannot be asked for");
                told.send_replace(Some(why));
                None
            }
        };
        Stream { names, trouble, task }
    }

    /// Why servers do not tell what they are asked for.
    pub(super) fn troubles(&self) -> Vec<String> {
        let told = self.streams.iter().filter_map(|(cluster, stream)| Some((cluster, stream.trouble.borrow().clone()?)));
        told.map(|(cluster, why)| format!("secrets of cluster {cluster}: {why}")).collect()
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.streams.values().filter_map(|stream| stream.task.as_ref()).for_each(AbortHandle::abort);
    }
}

/// One server being asked.
struct Asking {
    cluster: String,
    node: Node,
    connector: Connector,
    timeout: Duration,
    sender: mpsc::Sender<Certificate>,
    told: watch::Sender<Option<String>>,
}

impl Asking {
    /// One stream after the other until nobody listens any more.
    async fn run(self, mut names: watch::Receiver<BTreeSet<String>>) {
        let mut backoff = Backoff::agent();
        loop {
            let mut answered = false;
            let why = self.one(&mut names, &mut answered).await;
            if self.sender.is_closed() {
                return;
            }
            if answered {
                backoff.reset();
            }
            tracing::warn!(cluster = self.cluster, problem = %why, "no SDS stream; certificates that came before stay");
            self.told.send_replace(Some(why));
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    /// One stream from its beginning to its end; returns why it ended.
    async fn one(&self, names: &mut watch::Receiver<BTreeSet<String>>, answered: &mut bool) -> String {
        let channel = match connect(&self.connector, self.timeout).await {
            Ok(channel) => channel,
            Err(why) => return format!("the SDS server {why}"),
        };
        let ended = |status: &tonic::Status| format!("the stream ended with {:?} ({})", status.code(), status.message());
        let mut client = SecretDiscoveryServiceClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let mut request = DiscoveryRequest { type_url: type_url(SECRET), ..DiscoveryRequest::default() };
        let first = DiscoveryRequest { node: Some(self.node.clone()), ..asking(&request, names) };
        // There is room for the first.
        let _ = requests.try_send(first);
        let mut responses = match client.stream_secrets(ReceiverStream::new(receiver)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return ended(&status),
        };
        loop {
            tokio::select! {
                changed = names.changed() => if changed.is_err() { return String::new() },
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        *answered = true;
                        match self.learn(&response, &mut request).await {
                            Ok(trouble) => self.told.send_replace(trouble),
                            Err(why) => return why,
                        };
                    }
                    Ok(None) => return "the server ended the stream".to_owned(),
                    Err(status) => return ended(&status),
                }
            }
            if requests.try_send(asking(&request, names)).is_err() {
                return "the server takes no requests".to_owned();
            }
            request.error_detail = None;
        }
    }

    /// Takes what is good of a response and readies the answer; what is not is the trouble.
    async fn learn(&self, response: &DiscoveryResponse, request: &mut DiscoveryRequest) -> Result<Option<String>, String> {
        let mut refused = Vec::new();
        for any in &response.resources {
            let message = unpack::<Message>(any, SECRET, "resource");
            let name = message.as_ref().map(|message| message.name.clone()).unwrap_or_default();
            match message.and_then(|message| secret(&message)) {
                Ok(shown) => {
                    let name = SecretName { cluster: self.cluster.clone(), name };
                    let came = Came::new(&response.version_info, any.value.clone(), SystemTime::now(), None);
                    self.sender.send((name, Secret { shown, came })).await.map_err(|_| String::new())?;
                }
                Err(why) => refused.push(format!("{SECRET} {name}: {why}")),
            }
        }
        request.response_nonce.clone_from(&response.nonce);
        request.error_detail = answer("", "", &refused).error_detail;
        if refused.is_empty() {
            request.version_info.clone_from(&response.version_info);
            return Ok(None);
        }
        let why = refused.join("; ");
        tracing::error!(cluster = self.cluster, secret = %why, "a secret is refused; the one before it, if any, stays");
        Ok(Some(why))
    }
}

/// `request`, for the names that are wanted now.
fn asking(request: &DiscoveryRequest, names: &mut watch::Receiver<BTreeSet<String>>) -> DiscoveryRequest {
    let names = names.borrow_and_update().iter().cloned().collect();
    DiscoveryRequest { resource_names: names, ..request.clone() }
}
