//! Every bound of the data plane that is not a setting, in one place.

use std::time::Duration;

/// Completions stepped before timers, snapshot and orders are looked at again; what is left is stepped next turn.
pub(super) const COMPLETIONS_PER_TURN_MAX: usize = 4_096;
/// Live connections decided again per turn after an intention change, so that a sweep never stalls traffic.
pub(super) const SWEEP_PER_TURN_MAX: usize = 4_096;
/// Connections that may wait for a first certificate or endpoint, per worker.
pub(super) const HELD_MAX: usize = 1_024;
/// Endpoints tried for one connection before it is given up.
pub(super) const CONNECT_ATTEMPTS_MAX: u32 = 3;
/// How long a refused peer may take to read its alert before the connection is reset.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// How long a denied local client may take to ask, be told and leave.
pub(super) const REPLY_TIME: Duration = Duration::from_secs(3);
/// Identities under which one worker keeps TLS sessions with one endpoint.
pub(super) const DIALERS_MAX: usize = 64;
/// How long a failed accept waits before the next (descriptors or memory ran out).
pub(super) const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// How long a failed bind waits before the next try.
pub(super) const BIND_RETRY: Duration = Duration::from_secs(1);
/// Connections taken from one listening socket that is left and to be closed: as many as can wait there.
pub(super) const LEFT_WAITING_MAX: usize = 4_096;
/// How often a worker looks whether the first one has bound an address.
pub(super) const BIND_FOLLOW: Duration = Duration::from_millis(5);
/// How long a region may wait for bytes before its connection falls back to the shared buffers.
pub(super) const REGION_IDLE: Duration = Duration::from_secs(1);
/// Receives in a row that did not fill a quarter record, after which a flow gives its region up.
pub(super) const SMALL_RECEIVES_MAX: u8 = 4;
/// How long a worker that ends waits for the kernel to finish cancelled operations.
pub(super) const TEARDOWN: Duration = Duration::from_secs(5);
/// Longest ejection by passive health checking (Envoy `max_ejection_time`).
pub(super) const EJECTION_MAX: Duration = Duration::from_secs(300);
