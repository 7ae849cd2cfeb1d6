//! The client's side of the delta protocol: what is asked for, what is acknowledged, what is told after a reconnect.
//!
//! Invariant: the node is sent once a stream, in its first request; each response is answered by its nonce; a new stream begins
//! with the versions of all that is held. Pure.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::config::core::v3::{BuildVersion, Node, node};
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use envoy_types::pb::google::protobuf as well_known;
use envoy_types::pb::google::rpc;
use serde_json::Value as Json;

use super::held::{Held, Kind};
use super::refusal::type_url;
use crate::config::envoy::Xds;

/// Consul looks at the versions of what calls itself `envoy`; this is another program, and says so.
const USER_AGENT: &str = "ringfence";
/// `google.rpc.Code.INVALID_ARGUMENT`, with which Envoy nacks.
const INVALID_ARGUMENT: i32 = 3;
/// Bytes of a nack's reason: the server puts it into its log.
const REASON_BYTES_MAX: usize = 8 * 1024;

/// What is asked for on the stream.
#[derive(Debug)]
pub(super) struct Subscription {
    node: Node,
    /// What is asked for by name on this stream.
    names: BTreeMap<Kind, BTreeSet<String>>,
}

impl Subscription {
    pub(super) fn new(settings: &Xds) -> Self {
        Self { node: node(settings), names: BTreeMap::new() }
    }

    /// The first requests of a stream.
    pub(super) fn open(&mut self, held: &Held) -> Vec<DeltaDiscoveryRequest> {
        self.names = Kind::BY_NAME.into_iter().map(|kind| (kind, held.names(kind))).collect();
        let kinds = Kind::ALL.into_iter().filter(|kind| self.names.get(kind).is_none_or(|names| !names.is_empty()));
        let mut requests: Vec<_> = kinds
            .map(|kind| DeltaDiscoveryRequest {
                type_url: type_url(kind.message()),
                // None at all is the wildcard.
                resource_names_subscribe: self.names.get(&kind).into_iter().flatten().cloned().collect(),
                initial_resource_versions: held.versions(kind),
                ..DeltaDiscoveryRequest::default()
            })
            .collect();
        if let Some(first) = requests.first_mut() {
            first.node = Some(self.node.clone());
        }
        requests
    }

    /// Asks for the endpoints of new clusters and the routes of new listeners, and lets go of those of old ones.
    pub(super) fn follow(&mut self, held: &Held) -> Vec<DeltaDiscoveryRequest> {
        let follow = |kind| {
            let (wanted, names) = (held.names(kind), self.names.entry(kind).or_default());
            let request = (wanted != *names).then(|| DeltaDiscoveryRequest {
                type_url: type_url(kind.message()),
                resource_names_subscribe: wanted.difference(names).cloned().collect(),
                resource_names_unsubscribe: names.difference(&wanted).cloned().collect(),
                ..DeltaDiscoveryRequest::default()
            });
            *names = wanted;
            request
        };
        Kind::BY_NAME.into_iter().filter_map(follow).collect()
    }
}

/// The answer to a response: an ack, or a nack with every reason.
pub(super) fn answer(type_url: &str, nonce: &str, refused: &[String]) -> DeltaDiscoveryRequest {
    let error_detail = (!refused.is_empty()).then(|| {
        let mut message = refused.join("\n");
        if message.len() > REASON_BYTES_MAX {
            let end = (0..=REASON_BYTES_MAX).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
        }
        rpc::Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
    });
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce.to_owned(),
        error_detail,
        ..DeltaDiscoveryRequest::default()
    }
}

/// Who asks.
pub(super) fn node(settings: &Xds) -> Node {
    let version = BuildVersion {
        version: None,
        metadata: Some(well_known::Struct {
            fields: [("label".to_owned(), value(&Json::from(env!("CARGO_PKG_VERSION"))))].into_iter().collect(),
        }),
    };
    Node {
        id: settings.node_id.clone(),
        cluster: settings.node_cluster.clone(),
        metadata: (!settings.node_metadata.is_empty()).then(|| fields(&settings.node_metadata)),
        user_agent_name: USER_AGENT.to_owned(),
        user_agent_version_type: Some(node::UserAgentVersionType::UserAgentBuildVersion(version)),
        ..Node::default()
    }
}

fn fields(map: &serde_json::Map<String, Json>) -> well_known::Struct {
    well_known::Struct { fields: map.iter().map(|(key, found)| (key.clone(), value(found))).collect() }
}

fn value(json: &Json) -> well_known::Value {
    use well_known::value::Kind as ValueKind;
    let kind = match json {
        Json::Null => ValueKind::NullValue(0),
        Json::Bool(truth) => ValueKind::BoolValue(*truth),
        Json::Number(number) => ValueKind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => ValueKind::StringValue(text.clone()),
        Json::Array(list) => ValueKind::ListValue(well_known::ListValue { values: list.iter().map(value).collect() }),
        Json::Object(map) => ValueKind::StructValue(fields(map)),
    };
    well_known::Value { kind: Some(kind) }
}
