//! Counters with one writer: a worker adds with a relaxed load and store, the admin thread reads whenever it likes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::close::CloseReason;

/// A counter or gauge with exactly one writing thread.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds `n`. Only the owning worker may call it.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Takes `n` off a gauge. Only the owning worker may call it.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(n), Ordering::Relaxed);
    }

    /// Sets a gauge. Only the owning worker may call it.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A wish of the admin thread, at which workers look without waiting.
#[derive(Debug, Default)]
pub struct Wish(AtomicBool);

impl Wish {
    /// Only the admin thread may call it.
    pub fn set(&self, wanted: bool) {
        self.0.store(wanted, Ordering::Relaxed);
    }

    /// Whether it is wanted now.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Which way connections of a listener go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From the mesh to the local app.
    Inbound,
    /// From a local client to the mesh.
    Outbound,
}

impl Direction {
    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// What one worker counts for one listener. The admin thread adds the workers' cells up by `name`.
#[derive(Debug)]
#[repr(align(128))]
pub struct ListenerCells {
    /// Inbound or outbound.
    pub direction: Direction,
    /// The local service.
    pub service: Arc<str>,
    /// The upstream's name; `None` for the public listener.
    pub upstream: Option<Arc<str>>,
    /// Connections accepted.
    pub connections: Cell,
    /// Connections open now (gauge).
    pub active: Cell,
    /// Connections that intentions allowed (inbound).
    pub allowed: Cell,
    /// Payload bytes from the mesh leg to the plain leg.
    pub bytes_from_mesh: Cell,
    /// Payload bytes from the plain leg to the mesh leg.
    pub bytes_to_mesh: Cell,
    /// TLS handshakes completed.
    pub handshakes: Cell,
    /// Of those, resumed ones.
    pub handshakes_resumed: Cell,
    /// TLS handshakes completed with whoever is outside of the mesh: the app behind a gateway (inbound), or clients of one
    /// (outbound), where they speak TLS themselves.
    pub outside_handshakes: Cell,
    /// And those that failed.
    pub outside_handshakes_failed: Cell,
    /// Connects tried on upstream endpoints or the app.
    pub connect_attempts: Cell,
    /// Of those, failed ones (timeouts included).
    pub connect_failures: Cell,
    /// Of the failed ones, those that took too long.
    pub connect_timeouts: Cell,
    /// Far legs open or being opened now (gauge).
    pub far_active: Cell,
    /// TLS handshakes completed, by cipher suite; see [`Self::count_suite`].
    pub suites: [Cell; SUITES.len()],
    /// Endpoints ejected by passive health checking (total).
    pub ejections: Cell,
    /// Choices among unhealthy endpoints as well, because too few were healthy.
    pub in_panic: Cell,
    /// Connections ended, by reason.
    pub closed: [Cell; CloseReason::ALL.len()],
}

/// The cipher suites that are told apart: registered number, TLS version and OpenSSL's name, as Envoy's stats have them.
pub const SUITES: [(u16, &str, &str); 9] = [
    (0x1301, "TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    (0x1302, "TLSv1.3", "TLS_AES_256_GCM_SHA384"),
    (0x1303, "TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256"),
    (0xc02b, "TLSv1.2", "ECDHE-ECDSA-AES128-GCM-SHA256"),
    (0xc02c, "TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    (0xc02f, "TLSv1.2", "ECDHE-RSA-AES128-GCM-SHA256"),
    (0xc030, "TLSv1.2", "ECDHE-RSA-AES256-GCM-SHA384"),
    (0xcca8, "TLSv1.2", "ECDHE-RSA-CHACHA20-POLY1305"),
    (0xcca9, "TLSv1.2", "ECDHE-ECDSA-CHACHA20-POLY1305"),
];

impl ListenerCells {
    /// All zero.
    pub fn new(direction: Direction, service: Arc<str>, upstream: Option<Arc<str>>) -> Self {
        Self {
            direction,
            service,
            upstream,
            connections: Cell::default(),
            active: Cell::default(),
            allowed: Cell::default(),
            bytes_from_mesh: Cell::default(),
            bytes_to_mesh: Cell::default(),
            handshakes: Cell::default(),
            handshakes_resumed: Cell::default(),
            outside_handshakes: Cell::default(),
            outside_handshakes_failed: Cell::default(),
            connect_attempts: Cell::default(),
            connect_failures: Cell::default(),
            connect_timeouts: Cell::default(),
            far_active: Cell::default(),
            suites: std::array::from_fn(|_| Cell::default()),
            ejections: Cell::default(),
            in_panic: Cell::default(),
            closed: std::array::from_fn(|_| Cell::default()),
        }
    }

    /// Counts a handshake by its cipher suite's number. Only the owning worker may call it.
    pub fn count_suite(&self, suite: u16) {
        if let Some(place) = SUITES.iter().position(|(number, ..)| *number == suite) {
            self.suites[place].add(1);
        }
    }
}

/// What one worker counts for itself.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCells {
    /// `io_uring_enter` calls.
    pub enters: Cell,
    /// Completions reaped.
    pub completions: Cell,
    /// Completions whose token was stale: counted, never acted on.
    pub stale_completions: Cell,
    /// Accepts that failed for want of descriptors or memory.
    pub accept_errors: Cell,
    /// Bytes of records that user space moved: those that came in one receive with the end of a handshake.
    pub payload_bytes_moved: Cell,
    /// Buffer bytes leased now (gauge).
    pub buffer_bytes_leased: Cell,
    /// Times the shared buffer ring was empty.
    pub buffer_ring_empty: Cell,
    /// Connections open now (gauge).
    pub connections: Cell,
    /// Handshakes under way now (gauge).
    pub handshakes_active: Cell,
    /// Events that did not fit the ring to the admin thread.
    pub events_dropped: Cell,
    /// The snapshot generation in use (gauge).
    pub generation: Cell,
    /// Listeners bound now (gauge).
    pub listeners: Cell,
    /// Times that a listening socket came or went.
    pub listener_changes: Cell,
    /// Access logs are open: find out `record::AccessFacts` for them.
    pub access_facts: Wish,
}
