//! TLS as a transformation of buffers: no sockets, no clock of its own, no thread.
//!
//! rustls does every handshake and keeps the key schedule; after it a [`Session`] seals and opens records where they lie.
//!
//! Invariant: a [`Session`] exists only for a peer whose chain, validity and SPIFFE URI were checked ([`verify`]), or behind a
//! gateway for a server that the roots given for it vouch for, or before one for a client who is shown a certificate and shows
//! none; hostile bytes end in a [`Failure`], never in a panic, and a failed session stays failed.

pub mod alert;
mod backend;
#[cfg(any(test, feature = "testing"))]
pub mod fixtures;
mod front;
pub mod handshake;
#[cfg(test)]
mod harness;
pub mod hello;
mod outside;
pub mod provider;
pub mod record;
mod resume;
mod suites;
pub mod verify;

pub use front::{FrontSettings, FrontTls};
pub use handshake::{Established, Failure, FailureKind, Handshake, Progress, Step};
pub use outside::{OutsideSettings, OutsideTls, Shown};
pub use provider::{Dialer, TlsError, TlsParams, WorkerTls};
pub use record::{Open, RecordError, Session};
pub use suites::Suites;
