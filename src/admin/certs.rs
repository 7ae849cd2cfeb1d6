//! `/certs`: certificates in use, with the roots they are used with.
//!
//! Invariant: one entry a leaf, whoever shows it and on however many routes. Envoy has one a TLS context, so that the same leaf
//! appears again for each upstream; a reader that looks for the earliest expiry finds the same here. What does not parse is left
//! out: it was validated before it was published, so that is never.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::proto_json;
use super::routes::{self, Admin};
use crate::mesh::{Identity, Snapshot};
use crate::tls::{OutsideSettings, Shown};

/// Where certificates come from that Consul sends.
const INLINE: &str = "<inline>";
const DAY_SECONDS: u64 = 24 * 3_600;

pub(super) async fn certs(State(shared): Admin) -> Response {
    proto_json::answer(&all(&shared.viewer.current(), SystemTime::now()))
}

fn all(snapshot: &Snapshot, now: SystemTime) -> Value {
    let mut granted: Vec<_> = snapshot.identities.iter().collect();
    granted.sort_unstable_by_key(|(name, _)| *name);
    let services = snapshot.all_services().filter_map(|service| service.identity.as_deref());
    let mut told = HashSet::new();
    let identities = services.chain(granted.into_iter().map(|(_, identity)| &**identity));
    let identities: Vec<_> = identities.filter(|identity| told.insert((&identity.svid.id, &identity.svid.serial))).collect();
    let outside =
        snapshot.routers.iter().flat_map(|router| router.routes()).filter_map(|route| route.upstream()?.outside.as_ref());
    let outside = outside.map(|outside| of_app(outside.settings(), now));
    // An ingress gateway may show clients the leaf that it shows peers.
    let mut leaves: HashSet<&[u8]> =
        identities.iter().filter_map(|identity| identity.svid.chain.first()).map(AsRef::as_ref).collect();
    let fronts = snapshot.all_upstreams().filter_map(|upstream| Some(&upstream.front.as_ref()?.settings().certificate));
    let fronts = fronts.filter(|certificate| certificate.chain.first().is_some_and(|leaf| leaves.insert(leaf)));
    let fronts = fronts.filter_map(|certificate| shown(certificate, now));
    let fronts = fronts.map(|chain| json!({"ca_cert": [], "cert_chain": [chain]}));
    let identities = identities.iter().map(|identity| entry(identity, now));
    json!({"certificates": identities.chain(outside).chain(fronts).collect::<Vec<_>>()})
}

fn shown(shown: &Shown, now: SystemTime) -> Option<Value> {
    details(shown.chain.first()?, &shown.from, now)
}

/// What an app outside of the mesh is known by, and what it is shown.
fn of_app(settings: &OutsideSettings, now: SystemTime) -> Value {
    let roots: Vec<Value> = settings.roots.iter().filter_map(|root| details(root, &settings.roots_from, now)).collect();
    let shown = settings.certificate.as_ref().and_then(|certificate| shown(certificate, now));
    json!({"ca_cert": roots, "cert_chain": shown.into_iter().collect::<Vec<_>>()})
}

/// `envoy.admin.v3.Certificate`: the leaf without its intermediates, as in Envoy. Roots of peers come after ours.
fn entry(identity: &Identity, now: SystemTime) -> Value {
    let of_peers = identity.bundle.peers.iter().flat_map(|peer| &peer.roots);
    let roots: Vec<Value> = identity.bundle.roots.iter().chain(of_peers).filter_map(|root| details(root, INLINE, now)).collect();
    let leaf: Vec<Value> = identity.svid.chain.first().and_then(|leaf| details(leaf, INLINE, now)).into_iter().collect();
    json!({"ca_cert": roots, "cert_chain": leaf})
}

/// `envoy.admin.v3.CertificateDetails`.
fn details(der: &[u8], path: &str, now: SystemTime) -> Option<Value> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let names: Vec<Value> = names.iter().flat_map(|names| &names.value.general_names).filter_map(name).collect();
    let time = |seconds: i64| UNIX_EPOCH + std::time::Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
    let validity = certificate.validity();
    let (from, to) = (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()));
    let days = to.duration_since(now).unwrap_or_default().as_secs() / DAY_SECONDS;
    Some(json!({
        "path": path,
        "serial_number": routes::hex(&certificate.serial.to_bytes_be()),
        "subject_alt_names": names,
        "days_until_expiration": days.to_string(),
        "valid_from": seconds(from),
        "expiration_time": seconds(to),
    }))
}

fn name(name: &GeneralName<'_>) -> Option<Value> {
    match name {
        GeneralName::URI(uri) => Some(json!({"uri": uri})),
        GeneralName::DNSName(dns) => Some(json!({"dns": dns})),
        GeneralName::IPAddress([a, b, c, d]) => Some(json!({"ip_address": format!("{a}.{b}.{c}.{d}")})),
        GeneralName::IPAddress(bytes) => {
            let bytes: [u8; 16] = (*bytes).try_into().ok()?;
            Some(json!({"ip_address": std::net::Ipv6Addr::from(bytes).to_string()}))
        }
        _ => None,
    }
}

/// A certificate's times have no fraction, and Envoy prints none.
fn seconds(at: SystemTime) -> String {
    proto_json::time(at).replace(".000Z", "Z")
}
