//! Escape hatches of a registration: what plain TCP in them says of the public listener, its app and the upstreams.
//!
//! Invariant: a hatch never changes whom a listener leads to or lets in. One that would, or that holds more than this proxy
//! does, refuses the proxy with the key's name. Source of who overrides whom: Consul `agent/xds/listeners.go`, `clusters.go`.

#[cfg(feature = "xds")]
mod read;
#[cfg(not(feature = "xds"))]
mod unread;

#[cfg(feature = "xds")]
pub(super) use read::{of_public, of_upstream};
#[cfg(not(feature = "xds"))]
pub(super) use unread::{of_public, of_upstream};

/// Where they stand in `proxy.config`.
pub(super) const OF_PROXIES: [&str; 2] = [PUBLIC_LISTENER, LOCAL_CLUSTER];
/// Where they stand in an upstream's `config`.
pub(super) const OF_UPSTREAMS: [&str; 2] = [LISTENER, CLUSTER];

const PUBLIC_LISTENER: &str = "envoy_public_listener_json";
const LOCAL_CLUSTER: &str = "envoy_local_cluster_json";
const LISTENER: &str = "envoy_listener_json";
const CLUSTER: &str = "envoy_cluster_json";
