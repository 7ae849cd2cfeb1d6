//! Consul's HTTP agent API as this proxy uses it: one client, one loop for blocking queries, one watch a file.
//!
//! Invariant: whatever the agent answers becomes a typed value or an [`error::AgentError`]; a bad answer never replaces a
//! good one. Knows no snapshot, no listener: watches end in [`watch::Event`]s.

pub(crate) mod budget;
pub(crate) mod client;
pub(crate) mod connector;
pub(crate) mod cursor;
pub(crate) mod error;
pub(crate) mod login;
pub(crate) mod token;
pub(crate) mod watch;
pub(crate) mod wire;
