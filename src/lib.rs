//! ringfence: an L4 mutual-TLS sidecar for Consul Connect on io_uring.
//!
//! This page is the map: rooms, arrows, threads, and what holds everywhere. `tests/architecture.rs` enforces the arrows.
//!
//! # Threads
//!
//! | thread | does | never does |
//! | --- | --- | --- |
//! | `worker-N`, one a core, pinned | owns one ring, its `SO_REUSEPORT` listeners, its connections from accept to close | locks, waits for another thread, allocates in steady state, formats a log line |
//! | `rotation`, tokio | talks to Consul, validates, publishes snapshots | touches a connection |
//! | `admin`, tokio | admin port, metrics, connection log | delays a worker or a rotation |
//! | `airflow`, tokio, with `-airflow` only | knows tasks and components by their processes, applies the identity rules | touches a connection, believes what a task says |
//!
//! The planes meet in two places: [`store`] (rotation publishes immutable snapshots, airflow the callers that one look-up
//! finds, workers read them; its desks carry the questions that no look-up answers) and [`telemetry`] (workers write cells and
//! single-producer rings, admin reads them). Limits over all workers are the one shared counter
//! besides: it is touched at accept and close, never for a byte.
//!
//! # Rooms, from the top
//!
//! - [`cli`]: one file a command. [`app`]: boot order, threads, signals; the only room that sees all others.
//! - [`proxy`]: the data plane. [`control`]: the rotation thread. [`admin`]: HTTP endpoints. [`agent`]: the embedded
//!   Consul-compatible agent, for development and tests. [`airflow`]: who is behind a local connection, and as what it speaks.
//! - [`store`]: the lock-free certificate store. [`telemetry`]: counters, metrics, the connection log.
//! - [`mesh`]: the snapshot, all that a worker enforces. [`policy`]: intentions and the proof that one allows.
//!   [`tls`]: handshakes and records as transformations of buffers. [`identity`]: SPIFFE IDs, SVIDs, trust bundles.
//! - [`ring`]: io_uring, and a deterministic kernel to test on. [`buffer`]: the budgeted pool. [`sys`]: what only a system
//!   call can do. Only these three may hold `unsafe`.
//! - [`config`]: typed settings and every default.
//!
//! Imports point downwards only. [`control`] and [`admin`] import neither [`proxy`] nor [`ring`]; [`proxy`] imports neither
//! [`control`] nor [`admin`]. [`ring`] knows leases of [`buffer`], which is what it hands to the kernel.
//!
//! # What holds everywhere
//!
//! - Identity and policy fail closed; a control plane that is away fails static: the last good state stays.
//! - Where local callers are told apart, an outbound connection is dialed only with a [`mesh::caller::Grant`], which only a rule
//!   makes; who is nobody known has none.
//! - A connection to the local app needs a [`policy::Authorized`], which only a decision makes. Where a [`mesh::router`] passes
//!   bytes on as they are, no TLS ends here and nothing is decided: a router with routes of both kinds is refused, unless
//!   permissive mode says so.
//! - A snapshot is validated whole before it is published, and a connection that is still allowed never notices a new one.
//! - Payload is copied by the kernel in and out and touched once by the AEAD, where it lies. A receive stops where every
//!   record that has begun still fits the lease's slack, so that not even a partial record moves
//!   (`tests/zero_copy_is_counted.rs` counts it).
//! - A flow receives again only when all it had was sent: that is the back-pressure.
//! - Hostile input ends in a counted [`telemetry::close::CloseReason`], a broken invariant ends the process.
//!
//! # Decisions that a measurement made
//!
//! - The data plane drives the `io-uring` crate itself; README has the figures against a tokio-uring relay.
//! - Plain descriptors, not direct ones: 100-byte echoes over 16 loopback pairs on one ring cost 0.97 of the CPU an operation
//!   with registered files (median of six pairs of runs, 0.94 to 1.00, in a process of three threads), which the ring
//!   operations that `getpeername`, linger and shutdown would then need give away again.
//! - Handshakes and records by aws-lc-rs, against ring and with the same sidecars: 0.90 of its CPU a GB in bulk, 0.90 a full
//!   handshake, 0.85 a resumed one (`benches/NOTES.md`). ring does both in a build without default features.
//! - Loopback legs use Reno: where the host's default is BBR, its pacing costs 1.4 times the CPU a GB on a path without a queue.
//! - Sessions are resumed within one identity (`tls`): 0.62 of the CPU of a full handshake, and no decision less.
//! - `shutdown` is a system call of its own: the kernel sends the ring's operation for it to a helper thread.

pub mod admin;
pub mod agent;
pub mod airflow;
pub mod app;
pub mod buffer;
pub mod cli;
pub mod config;
pub mod control;
pub mod identity;
pub mod mesh;
pub mod policy;
pub mod proxy;
pub mod ring;
pub mod store;
pub mod sys;
pub mod telemetry;
pub mod tls;
