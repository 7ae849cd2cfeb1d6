//! The gRPC stream to Consul: opened, kept alive, opened again after a wait that grows.
//!
//! Invariant: one stream at a time; messages and queues are bounded; an error is told with its code, its message and what would
//! mend it, and never with the token. Knows nothing of what the messages say.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::connector::Connector;
use crate::config::envoy::{GrpcServer, Xds};
use crate::control::ControlError;
use crate::control::backoff::Backoff;

/// One response with every resource in it; ten thousand endpoints are about 1 MiB.
const RESPONSE_BYTES_MAX: usize = 64 << 20;
/// Requests that may wait to be sent. A server that takes none loses the stream.
pub(super) const REQUESTS_MAX: usize = 256;
/// Between two pings of an idle stream.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long a ping may stay unanswered.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Headers tell who we are; the URI's host is never looked up.
const AUTHORITY: &str = "http://consul.xds";

/// What happens on the stream.
pub(super) enum Event {
    /// A stream begins: the first requests may be sent.
    Opened(mpsc::Sender<DeltaDiscoveryRequest>),
    Response(Box<DeltaDiscoveryResponse>),
    /// It ended or could not be opened, and why.
    Closed(String),
}

/// What a stream is opened with.
pub(super) struct Opener {
    connector: Connector,
    metadata: MetadataMap,
    cluster: String,
    connect_timeout: Duration,
}

impl Opener {
    pub(super) fn new(settings: &Xds, server: &GrpcServer) -> Result<Self, ControlError> {
        let mut metadata = MetadataMap::new();
        for (key, value) in &settings.initial_metadata {
            // Consul renders an empty token where there is none.
            if value.is_empty() {
                continue;
            }
            let key: MetadataKey<Ascii> =
                key.parse().map_err(|_| ControlError::Config(format!("initial_metadata: `{key}` is no header name")))?;
            let mut value: MetadataValue<Ascii> = value.parse().map_err(|_| {
                ControlError::Config(format!("initial_metadata: the value of `{key}` has letters that a header cannot carry"))
            })?;
            value.set_sensitive(true);
            metadata.append(key, value);
        }
        Ok(Self {
            connector: Connector::new(server)?,
            metadata,
            cluster: settings.node_cluster.clone(),
            connect_timeout: server.connect_timeout,
        })
    }

    /// Opens one stream after the other until nobody listens any more.
    pub(super) async fn run(self: Arc<Self>, events: mpsc::Sender<Event>) {
        let mut backoff = Backoff::agent();
        loop {
            let mut answered = false;
            let why = self.one(&events, &mut answered).await;
            if answered {
                backoff.reset();
            }
            if events.send(Event::Closed(why)).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    /// One stream from its beginning to its end; returns why it ended.
    async fn one(&self, events: &mpsc::Sender<Event>, answered: &mut bool) -> String {
        let channel = match connect(&self.connector, self.connect_timeout).await {
            Ok(channel) => channel,
            Err(why) => return format!("the xDS server {why}"),
        };
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let (sender, receiver) = mpsc::channel(REQUESTS_MAX);
        // The server may send its headers only after our first request.
        if events.send(Event::Opened(sender)).await.is_err() {
            return String::new();
        }
        let mut request = tonic::Request::new(ReceiverStream::new(receiver));
        *request.metadata_mut() = self.metadata.clone();
        let mut responses = match client.delta_aggregated_resources(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return self.explain(&status),
        };
        loop {
            match responses.message().await {
                Ok(Some(response)) => {
                    *answered = true;
                    if events.send(Event::Response(Box::new(response))).await.is_err() {
                        return String::new();
                    }
                }
                Ok(None) => return format!("the xDS server at {} ended the stream", self.connector.describe()),
                Err(status) => return self.explain(&status),
            }
        }
    }

    fn explain(&self, status: &Status) -> String {
        let remedy = match status.code() {
            Code::PermissionDenied => format!(": the token needs service:write on service {}", self.cluster),
            Code::Unauthenticated => {
                format!(": the token in x-consul-token is missing or unknown; it needs service:write on service {}", self.cluster)
            }
            Code::Unimplemented => ": delta xDS needs Consul 1.10 or later; `ringfence connect` works with older ones".to_owned(),
            Code::ResourceExhausted => ": the server asks to be left alone, another may answer".to_owned(),
            _ => String::new(),
        };
        let server = self.connector.describe();
        format!("the xDS server at {server} ended the stream with {:?} ({}){remedy}", status.code(), status.message())
    }
}

/// A connection that is kept alive.
pub(super) async fn connect(connector: &Connector, timeout: Duration) -> Result<Channel, String> {
    let endpoint = Endpoint::from_static(AUTHORITY)
        .connect_timeout(timeout)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect_with_connector(connector.clone()).await;
    channel.map_err(|error| format!("at {} is not reached: {}", connector.describe(), causes(&error)))
}

/// An error with all that lies behind it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}
