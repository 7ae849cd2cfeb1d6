//! An SDS server of the tests' own: certificates by name, one stream at a time.
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
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use envoy_types::pb::google::protobuf::Any;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use prost::Message as _;
use tokio::sync::{mpsc, watch};
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::resources::Material;
use crate::support::ports;

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// What a stream asked: names, the version that it has, and why it took none.
#[derive(Debug, Clone)]
pub struct Asked {
    pub node: Option<String>,
    pub names: Vec<String>,
    pub version: String,
    pub error: Option<String>,
}

#[derive(Clone)]
pub struct SdsServer {
    pub address: SocketAddr,
    /// The certificate that is sent under every name, and its version.
    current: Arc<watch::Sender<(u64, Option<tls::TlsCertificate>)>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl SdsServer {
    pub fn start() -> Self {
        let server =
            Self { address: ports::free_address(), current: Arc::new(watch::Sender::new((0, None))), asked: Arc::default() };
        let serving = server.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serving.serve());
        });
        server
    }

    /// From now on this is what has every name.
    pub fn set(&self, material: &Material) {
        let certificate = tls::TlsCertificate {
            certificate_chain: crate::resources::inline(&material.chain_pem),
            private_key: crate::resources::inline(&material.key_pem),
            ..Default::default()
        };
        self.current.send_modify(|(version, current)| {
            *version += 1;
            *current = Some(certificate);
        });
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no test thread panicked with it").clone()
    }

    async fn serve(self) {
        let listener = tokio::net::TcpListener::bind(self.address).await.expect("the port is ours");
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(SecretDiscoveryServiceServer::new(self.clone()));
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
        }
    }

    async fn talk(self, mut requests: Streaming<DiscoveryRequest>, responses: mpsc::Sender<Result<DiscoveryResponse, Status>>) {
        let (mut current, mut names, mut sent) = (self.current.subscribe(), Vec::new(), 0);
        loop {
            tokio::select! {
                request = requests.message() => {
                    let Ok(Some(request)) = request else { return };
                    names.clone_from(&request.resource_names);
                    self.asked.lock().expect("no test thread panicked with it").push(Asked {
                        node: request.node.map(|node| node.id),
                        names: request.resource_names,
                        version: request.version_info,
                        error: request.error_detail.map(|detail| detail.message),
                    });
                }
                _ = current.changed() => {}
            }
            let (version, certificate) = current.borrow_and_update().clone();
            // A certificate that was set before the first request has no name to go under yet.
            let Some(certificate) = certificate.filter(|_| version != sent && !names.is_empty()) else { continue };
            sent = version;
            let secret = |name: &String| tls::Secret {
                name: name.clone(),
                r#type: Some(tls::secret::Type::TlsCertificate(certificate.clone())),
            };
            let any = |name| Any { type_url: SECRET.to_owned(), value: secret(name).encode_to_vec() };
            let response = DiscoveryResponse {
                version_info: version.to_string(),
                resources: names.iter().map(any).collect(),
                type_url: SECRET.to_owned(),
                nonce: version.to_string(),
                ..Default::default()
            };
            if responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl SecretDiscoveryService for SdsServer {
    type DeltaSecretsStream = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;
    type StreamSecretsStream = ReceiverStream<Result<DiscoveryResponse, Status>>;

    async fn delta_secrets(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        Err(Status::unimplemented("the state of the world only"))
    }

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(self.clone().talk(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch_secrets(&self, _: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        Err(Status::unimplemented("streams only"))
    }
}
