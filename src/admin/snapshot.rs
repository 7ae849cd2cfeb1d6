//! What is being enforced, as JSON for a person or a script.
//!
//! Invariant: public parts only. The private key is not named here; certificates appear as serials and fingerprints.

mod routers;

use std::sync::Arc;

use serde::{Serialize, Serializer};

use self::routers::RouterView;
use super::Rfc3339;
use crate::identity::PeerBundle;
use crate::mesh::{Endpoint, Identity, PublicListener, Service, Snapshot, Target, Upstream};
use crate::policy::{DefaultPolicy, Intention, Intentions};
use crate::telemetry::hub::{Ejection, Hub, Listener, Worker, WorkerListener};

/// The whole answer of `/snapshot`.
#[derive(Serialize)]
pub(super) struct View {
    generation: u64,
    /// The oldest generation that a worker still uses.
    acknowledged_generation: u64,
    services: Vec<ServiceView>,
    /// Listeners that tell connections apart first. Empty where none does.
    routers: Vec<RouterView>,
    /// What local callers may speak as, with the certificate that is ready for it, by name.
    identities: Vec<GrantedView>,
    listeners: Vec<ListenerView>,
    ejections: Vec<EjectionView>,
    workers: Vec<WorkerView>,
}

#[derive(Serialize)]
struct ServiceView {
    service: String,
    proxy_id: String,
    identity: Option<IdentityView>,
    intentions: IntentionsView,
    public: Option<PublicView>,
    upstreams: Vec<UpstreamView>,
}

#[derive(Serialize)]
struct IdentityView {
    spiffe_id: String,
    serial: String,
    not_before: String,
    not_after: String,
    chain_length: usize,
    trust_domain: String,
    /// SHA-256 of each root's DER, lower-case hex.
    roots: Vec<String>,
    /// Trust domains that this one is peered with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<PeerView>,
}

#[derive(Serialize)]
struct PeerView {
    trust_domain: String,
    roots: Vec<String>,
    /// Whether its services may call, as far as intentions let them; otherwise they only answer.
    calls: bool,
}

#[derive(Serialize)]
struct GrantedView {
    name: String,
    spiffe_id: String,
    serial: String,
    not_before: String,
    not_after: String,
}

#[derive(Serialize)]
struct IntentionsView {
    /// What holds when none matches: `allow`, `deny` or `unknown` (denied).
    default: &'static str,
    /// In evaluation order: the first whose source matches wins.
    ordered: Vec<IntentionView>,
    /// Policies of the RBAC filters that stand in place of intentions where Consul's xDS feeds this process.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    policies: Vec<String>,
}

#[derive(Serialize)]
struct IntentionView {
    rule: String,
    id: String,
    allows: bool,
    precedence: u8,
}

#[derive(Serialize)]
struct PublicView {
    bind: String,
    app: Vec<String>,
    max_inbound_connections: u32,
}

#[derive(Serialize)]
struct UpstreamView {
    name: String,
    bind: String,
    connect_timeout_ms: u128,
    max_connections: Option<u32>,
    targets: Vec<TargetView>,
}

#[derive(Serialize)]
struct TargetView {
    id: String,
    sni: String,
    expected: Vec<String>,
    endpoints: Vec<EndpointView>,
    /// Who may call it, where this process knows.
    access: Option<IntentionsView>,
}

#[derive(Serialize)]
struct EndpointView {
    address: String,
    weight: u32,
    healthy: bool,
}

#[derive(Serialize)]
struct ListenerView {
    bind: String,
    direction: Option<&'static str>,
    service: Option<String>,
    upstream: Option<String>,
    /// Indexed by worker.
    workers: Vec<StateView>,
}

/// `"bound"`, `"absent"`, or `{"failed": "why"}`.
struct StateView(WorkerListener);

#[derive(Serialize)]
struct EjectionView {
    upstream: String,
    endpoint: String,
    workers: usize,
    remaining_ms: u128,
}

#[derive(Serialize)]
struct WorkerView {
    generation: u64,
    drained: bool,
}

impl View {
    pub(super) fn new(snapshot: &Snapshot, acknowledged: u64, hub: &Hub) -> Self {
        Self {
            generation: snapshot.generation,
            acknowledged_generation: acknowledged,
            services: snapshot.services.iter().map(|service| ServiceView::from(&**service)).collect(),
            routers: snapshot.routers.iter().map(|router| RouterView::from(&**router)).collect(),
            identities: granted(snapshot),
            listeners: hub.listeners().iter().map(ListenerView::from).collect(),
            ejections: hub.ejections().into_iter().map(EjectionView::from).collect(),
            workers: hub.workers().iter().map(WorkerView::from).collect(),
        }
    }
}

/// In the order of their names: the snapshot has none.
fn granted(snapshot: &Snapshot) -> Vec<GrantedView> {
    let mut views: Vec<_> = snapshot.identities.iter().map(GrantedView::from).collect();
    views.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    views
}

impl From<(&Arc<str>, &Arc<Identity>)> for GrantedView {
    fn from((name, identity): (&Arc<str>, &Arc<Identity>)) -> Self {
        let svid = &identity.svid;
        Self {
            name: name.to_string(),
            spiffe_id: svid.id.to_string(),
            serial: svid.serial.clone(),
            not_before: Rfc3339(svid.not_before).to_string(),
            not_after: Rfc3339(svid.not_after).to_string(),
        }
    }
}

impl From<&Service> for ServiceView {
    fn from(service: &Service) -> Self {
        Self {
            service: service.name.to_string(),
            proxy_id: service.proxy_id.to_string(),
            identity: service.identity.as_deref().map(IdentityView::from),
            intentions: IntentionsView::from(&*service.intentions),
            public: service.public.as_deref().map(PublicView::from),
            upstreams: service.upstreams.iter().map(|upstream| UpstreamView::from(&**upstream)).collect(),
        }
    }
}

impl From<&Identity> for IdentityView {
    fn from(Identity { svid, bundle, .. }: &Identity) -> Self {
        Self {
            spiffe_id: svid.id.to_string(),
            serial: svid.serial.clone(),
            not_before: Rfc3339(svid.not_before).to_string(),
            not_after: Rfc3339(svid.not_after).to_string(),
            chain_length: svid.chain.len(),
            trust_domain: bundle.trust_domain.to_string(),
            roots: bundle.roots.iter().map(|root| fingerprint(root)).collect(),
            peers: bundle.peers.iter().map(PeerView::from).collect(),
        }
    }
}

impl From<&PeerBundle> for PeerView {
    fn from(peer: &PeerBundle) -> Self {
        Self {
            trust_domain: peer.trust_domain.to_string(),
            roots: peer.roots.iter().map(|root| fingerprint(root)).collect(),
            calls: peer.calls,
        }
    }
}

impl From<&Intentions> for IntentionsView {
    fn from(intentions: &Intentions) -> Self {
        let default = match intentions.default_policy() {
            DefaultPolicy::Allow => "allow",
            DefaultPolicy::Deny => "deny",
            DefaultPolicy::Unknown => "unknown",
        };
        Self {
            default,
            ordered: intentions.ordered().iter().map(IntentionView::from).collect(),
            policies: intentions.filters().iter().flat_map(|rules| rules.texts()).map(ToString::to_string).collect(),
        }
    }
}

impl From<&Intention> for IntentionView {
    fn from(intention: &Intention) -> Self {
        Self {
            rule: intention.to_string(),
            id: intention.id.clone(),
            allows: intention.action == crate::policy::Action::Allow,
            precedence: intention.precedence,
        }
    }
}

impl From<&PublicListener> for PublicView {
    fn from(public: &PublicListener) -> Self {
        Self {
            bind: public.bind.to_string(),
            app: public.app.iter().map(ToString::to_string).collect(),
            max_inbound_connections: public.max_inbound_connections,
        }
    }
}

impl From<&Upstream> for UpstreamView {
    fn from(upstream: &Upstream) -> Self {
        Self {
            name: upstream.name.to_string(),
            bind: upstream.bind.to_string(),
            connect_timeout_ms: upstream.connect_timeout.as_millis(),
            max_connections: upstream.max_connections,
            targets: upstream.targets.iter().map(|target| TargetView::from(&**target)).collect(),
        }
    }
}

impl From<&Target> for TargetView {
    fn from(target: &Target) -> Self {
        Self {
            id: target.id.to_string(),
            sni: target.sni.to_string(),
            expected: target.expected.iter().map(ToString::to_string).collect(),
            endpoints: target.endpoints.iter().map(EndpointView::from).collect(),
            access: target.access.as_deref().map(IntentionsView::from),
        }
    }
}

impl From<&Endpoint> for EndpointView {
    fn from(endpoint: &Endpoint) -> Self {
        Self { address: endpoint.address.to_string(), weight: endpoint.weight, healthy: endpoint.healthy }
    }
}

impl From<&Listener> for ListenerView {
    fn from(listener: &Listener) -> Self {
        let serves = listener.serves.as_ref();
        Self {
            bind: listener.bind.to_string(),
            direction: serves.map(|serves| serves.direction.as_str()),
            service: serves.map(|serves| serves.service.to_string()),
            upstream: serves.and_then(|serves| serves.upstream.as_ref()).map(ToString::to_string),
            workers: listener.workers.iter().cloned().map(StateView).collect(),
        }
    }
}

impl Serialize for StateView {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            WorkerListener::Absent => serializer.serialize_str("absent"),
            WorkerListener::Bound => serializer.serialize_str("bound"),
            WorkerListener::Failed(error) => serializer.collect_map([("failed", error)]),
        }
    }
}

impl From<Ejection> for EjectionView {
    fn from(ejection: Ejection) -> Self {
        Self {
            upstream: ejection.upstream.to_string(),
            endpoint: ejection.endpoint.to_string(),
            workers: ejection.workers,
            remaining_ms: ejection.remaining.as_millis(),
        }
    }
}

impl From<&Worker> for WorkerView {
    fn from(worker: &Worker) -> Self {
        Self { generation: worker.generation, drained: worker.drained }
    }
}

fn fingerprint(der: &[u8]) -> String {
    use std::fmt::Write;
    let digest = ring::digest::digest(&ring::digest::SHA256, der);
    digest.as_ref().iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
