//! Consul's HTTP agent API as this proxy uses it.

pub(crate) mod connector;
