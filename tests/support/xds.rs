//! An xDS server of the tests' own, on the same protobufs as Consul's: resources are set, versions count up, acks and nacks are
//! kept, streams can be cut. One a proxy.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a harness of tests"
)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{mpsc, watch};
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::support::{PATIENCE, ports, wait_for};

pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub const ENDPOINTS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
pub const ROUTES: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// The order in which Consul sends.
const ORDER: [&str; 4] = [CLUSTER, ENDPOINTS, LISTENER, ROUTES];

/// What the proxy did, in order.
#[derive(Debug, Clone)]
pub enum Seen {
    Stream { token: String },
    Node { id: String, user_agent: String },
    Initial { kind: String, versions: HashMap<String, String> },
    Ack { kind: String },
    Nack { kind: String, message: String },
}

#[derive(Default)]
struct State {
    resources: BTreeMap<(String, String), (u64, Vec<u8>)>,
    version: u64,
    nonce: u64,
    token: Option<String>,
    seen: Vec<Seen>,
}

struct Shared {
    state: Mutex<State>,
    /// Counts changes of the resources.
    changed: watch::Sender<u64>,
    /// Counts cuts.
    epoch: watch::Sender<u64>,
    /// Whether connections are taken.
    open: watch::Sender<bool>,
}

#[derive(Clone)]
pub struct XdsServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

/// What one stream wants of a kind and has.
#[derive(Default)]
struct Subscription {
    names: HashSet<String>,
    wildcard: bool,
    sent: HashMap<String, String>,
    answered: bool,
}

impl XdsServer {
    pub fn start() -> Self {
        let address = ports::free_address();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            epoch: watch::Sender::new(0),
            open: watch::Sender::new(true),
        });
        let server = Self { address, shared };
        let serving = server.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serving.serve());
        });
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no test thread panicked with it")
    }

    /// Whoever brings another token is refused.
    pub fn require_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// Puts a resource in place, or changes it.
    pub fn set(&self, kind: &str, name: &str, message: &impl prost::Message) {
        self.set_all(vec![(kind, name.to_owned(), message.encode_to_vec())]);
    }

    /// Several at once.
    pub fn set_all(&self, resources: Vec<(&str, String, Vec<u8>)>) {
        let mut state = self.state();
        for (kind, name, bytes) in resources {
            state.version += 1;
            let version = state.version;
            state.resources.insert((kind.to_owned(), name), (version, bytes));
        }
        drop(state);
        self.shared.changed.send_modify(|count| *count += 1);
    }

    pub fn remove(&self, kind: &str, name: &str) {
        self.state().resources.remove(&(kind.to_owned(), name.to_owned()));
        self.shared.changed.send_modify(|count| *count += 1);
    }

    /// Ends every stream and takes none until [`Self::come_back`].
    pub fn go_away(&self) {
        self.shared.open.send_replace(false);
        self.shared.epoch.send_modify(|count| *count += 1);
    }

    pub fn come_back(&self) {
        self.shared.open.send_replace(true);
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    /// Waits for the first answer of a kind since `from` of [`Self::seen`]; the reason, if it is a nack.
    pub fn wait_answered(&self, from: usize, kind: &str) -> Option<String> {
        wait_for("an ack or a nack", PATIENCE, || {
            let seen = self.seen();
            let answer = seen.iter().skip(from).find_map(|one| match one {
                Seen::Ack { kind: of, .. } if of == kind => Some(None),
                Seen::Nack { kind: of, message, .. } if of == kind => Some(Some(message.clone())),
                _ => None,
            });
            answer.ok_or_else(|| format!("{seen:?}"))
        })
    }

    async fn serve(self) {
        let mut open = self.shared.open.subscribe();
        loop {
            if open.wait_for(|open| *open).await.is_err() {
                return;
            }
            let listener = tokio::net::TcpListener::bind(self.address).await.expect("the port is ours");
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        let service = TowerToHyperService::new(AggregatedDiscoveryServiceServer::new(self.clone()));
                        let mut epoch = self.shared.epoch.subscribe();
                        tokio::spawn(async move {
                            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                                .serve_connection(TokioIo::new(stream), service);
                            tokio::select! {
                                _ = connection => {}
                                _ = epoch.changed() => {}
                            }
                        });
                    }
                    _ = open.wait_for(|open| !*open) => break,
                }
            }
        }
    }

    async fn talk(
        self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    ) {
        let mut changed = self.shared.changed.subscribe();
        let mut subscriptions: HashMap<String, Subscription> = HashMap::new();
        loop {
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.hear(request, &mut subscriptions),
                    Ok(None) | Err(_) => return,
                },
                _ = changed.changed() => {}
            }
            for kind in ORDER {
                let Some(subscription) = subscriptions.get_mut(kind) else { continue };
                if let Some(response) = self.due(kind, subscription)
                    && responses.send(Ok(response)).await.is_err()
                {
                    return;
                }
            }
        }
    }

    fn hear(&self, request: DeltaDiscoveryRequest, subscriptions: &mut HashMap<String, Subscription>) {
        let kind = request.type_url.clone();
        let mut state = self.state();
        if let Some(node) = request.node {
            state.seen.push(Seen::Node { id: node.id, user_agent: node.user_agent_name });
        }
        let first = !subscriptions.contains_key(&kind);
        let subscription = subscriptions.entry(kind.clone()).or_default();
        if first {
            state.seen.push(Seen::Initial { kind: kind.clone(), versions: request.initial_resource_versions.clone() });
            subscription.sent = request.initial_resource_versions;
            subscription.wildcard = kind != ENDPOINTS && request.resource_names_subscribe.is_empty();
        }
        for name in request.resource_names_subscribe {
            // Asked for again is sent again.
            if !first {
                subscription.sent.remove(&name);
            }
            subscription.names.insert(name);
        }
        for name in request.resource_names_unsubscribe {
            subscription.names.remove(&name);
            subscription.sent.remove(&name);
        }
        if !request.response_nonce.is_empty() {
            state.seen.push(match request.error_detail {
                None => Seen::Ack { kind },
                Some(detail) => Seen::Nack { kind, message: detail.message },
            });
        }
    }

    /// What a stream has still to be sent of a kind.
    fn due(&self, kind: &str, subscription: &mut Subscription) -> Option<DeltaDiscoveryResponse> {
        let mut state = self.state();
        let wants = |name: &String| subscription.wildcard || subscription.names.contains(name);
        let mine: BTreeMap<String, (u64, Vec<u8>)> = state
            .resources
            .iter()
            .filter(|((of, name), _)| of == kind && wants(name))
            .map(|((_, name), value)| (name.clone(), value.clone()))
            .collect();
        let fresh = |name: &String, version: u64| subscription.sent.get(name).is_none_or(|sent| *sent != version.to_string());
        let resources: Vec<Resource> = mine
            .iter()
            .filter(|(name, (version, _))| fresh(name, *version))
            .map(|(name, (version, bytes))| Resource {
                name: name.clone(),
                version: version.to_string(),
                resource: Some(Any { type_url: kind.to_owned(), value: bytes.clone() }),
                ..Resource::default()
            })
            .collect();
        let removed: Vec<String> = subscription.sent.keys().filter(|name| !mine.contains_key(*name)).cloned().collect();
        if resources.is_empty() && removed.is_empty() && subscription.answered {
            return None;
        }
        subscription.answered = true;
        subscription.sent = mine.into_iter().map(|(name, (version, _))| (name, version.to_string())).collect();
        state.nonce += 1;
        Some(DeltaDiscoveryResponse {
            type_url: kind.to_owned(),
            resources,
            removed_resources: removed,
            nonce: state.nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for XdsServer {
    type StreamAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("delta only"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let token = request.metadata().get("x-consul-token").and_then(|token| token.to_str().ok()).unwrap_or_default().to_owned();
        let wanted = {
            let mut state = self.state();
            state.seen.push(Seen::Stream { token: token.clone() });
            state.token.clone()
        };
        if wanted.is_some_and(|wanted| wanted != token) {
            return Err(Status::permission_denied("permission denied"));
        }
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(self.clone().talk(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
