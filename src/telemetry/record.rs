//! One connection as the log tells it, and the other events that a worker sends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::cells::{Direction, ListenerCells};
use super::close::CloseReason;
use super::denial::DenialId;
use crate::identity::SpiffeId;
use crate::mesh::caller::Caller;
use crate::mesh::{Address, Bind};
use crate::policy::Ground;

/// What a worker sends to the admin thread.
#[derive(Debug)]
pub enum Event {
    /// A connection ended, or an inbound one was denied.
    Connection(Box<ConnectionRecord>),
    /// A listener is bound and counts into these cells.
    ListenerUp {
        /// Where.
        bind: Bind,
        /// Its counters, which outlive it.
        cells: Arc<ListenerCells>,
    },
    /// A bound listener tells connections apart, and these cells count those of one route.
    RouteUp {
        /// Its counters, which outlive it.
        cells: Arc<ListenerCells>,
    },
    /// A listener is closed.
    ListenerDown {
        /// Where it was.
        bind: Bind,
    },
    /// A listener could not be bound; the worker tries again.
    BindFailed {
        /// Where.
        bind: Bind,
        /// The system's reason.
        error: std::io::Error,
    },
    /// Accepting failed (descriptors or memory ran out); the worker backs off and goes on.
    AcceptFailed {
        /// Where.
        bind: Bind,
        /// The system's reason.
        error: std::io::Error,
    },
    /// Passive health checking took an endpoint out.
    Ejected {
        /// The upstream.
        upstream: Arc<str>,
        /// The endpoint.
        endpoint: SocketAddr,
        /// For how long.
        duration: Duration,
    },
    /// A worker has adopted this generation and holds nothing older.
    Adopted {
        /// The worker.
        worker: usize,
        /// The generation.
        generation: u64,
    },
    /// A draining worker has no connection left.
    Drained {
        /// The worker.
        worker: usize,
    },
}

/// Everything that the connection log says about one connection.
#[derive(Debug)]
pub struct ConnectionRecord {
    /// When it was accepted.
    pub start: SystemTime,
    /// Inbound or outbound.
    pub direction: Direction,
    /// Local service.
    pub service: Arc<str>,
    /// Upstream's name on outbound connections.
    pub upstream: Option<Arc<str>>,
    /// Who connected to us.
    pub downstream: Option<SocketAddr>,
    /// Where it wanted to go, when it was redirected here (outbound).
    pub original: Option<SocketAddr>,
    /// The server name that its ClientHello asked for, where that chose its route. Nobody proved it.
    pub server_name: Option<Box<str>>,
    /// Whom we connected to (the app, or the upstream endpoint).
    pub endpoint: Option<Address>,
    /// SPIFFE ID of the calling side, once known.
    pub source: Option<SpiffeId>,
    /// SPIFFE ID of the called side, once known.
    pub destination: Option<SpiffeId>,
    /// What let the peer in or kept it out (inbound), or kept a local caller out (outbound).
    pub decision: Option<Decision>,
    /// Who opened it here, where callers are told apart (outbound).
    pub caller: Option<Arc<Caller>>,
    /// The name of the denial, when it was denied.
    pub denial: Option<DenialId>,
    /// TLS version number (0x0303, 0x0304), once negotiated.
    pub tls_version: Option<u16>,
    /// TLS cipher suite number, once negotiated.
    pub tls_suite: Option<u16>,
    /// Whether the TLS session was resumed.
    pub tls_resumed: bool,
    /// Payload bytes from the mesh leg to the plain leg.
    pub bytes_from_mesh: u64,
    /// Payload bytes from the plain leg to the mesh leg.
    pub bytes_to_mesh: u64,
    /// Opening the far side took this long.
    pub connect: Option<Duration>,
    /// The TLS handshake took this long.
    pub handshake: Option<Duration>,
    /// From accept to close.
    pub total: Duration,
    /// Endpoints tried before one answered (outbound).
    pub attempts: u16,
    /// Why it ended.
    pub reason: CloseReason,
    /// What rustls or the system said, for failures.
    pub detail: Option<Box<str>>,
    /// What only access logs tell, where there are any.
    pub access: Option<Box<AccessFacts>>,
}

/// Facts that cost a system call or a copy, and that only access logs print.
#[derive(Debug, Default)]
pub struct AccessFacts {
    /// Our end of the connection that was accepted.
    pub downstream_local: Option<SocketAddr>,
    /// Our end of the connection that was opened.
    pub upstream_local: Option<SocketAddr>,
    /// The SNI that a listener which routes by it has read; like Envoy's, a listener that only terminates TLS reads none.
    pub server_name: Option<Box<str>>,
    /// The SNI of the target (outbound), by which Consul names its cluster.
    pub cluster: Option<Arc<str>>,
    /// The peer's leaf, DER.
    pub peer_certificate: Option<Box<[u8]>>,
    /// Version and suite of TLS with whoever has no part in the mesh: an ingress gateway's client, a terminating gateway's app.
    pub outside_tls: Option<(u16, u16)>,
    /// The leaf that they showed, DER.
    pub outside_certificate: Option<Box<[u8]>>,
}

impl ConnectionRecord {
    /// A connection just accepted on the listener of these cells, of which nothing else is known.
    pub fn new(cells: &ListenerCells, downstream: Option<SocketAddr>) -> Self {
        Self {
            start: SystemTime::now(),
            direction: cells.direction,
            service: Arc::clone(&cells.service),
            upstream: cells.upstream.clone(),
            downstream,
            original: None,
            server_name: None,
            endpoint: None,
            source: None,
            destination: None,
            decision: None,
            caller: None,
            denial: None,
            tls_version: None,
            tls_suite: None,
            tls_resumed: false,
            bytes_from_mesh: 0,
            bytes_to_mesh: 0,
            connect: None,
            handshake: None,
            total: Duration::ZERO,
            attempts: 0,
            reason: CloseReason::Limit,
            detail: None,
            access: None,
        }
    }
}

/// The authorisation of a connection.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Whether the peer was let in. For the log only: the proof is `policy::Authorized`.
    pub allowed: bool,
    /// The intention or default that decided.
    pub by: Ground,
}
