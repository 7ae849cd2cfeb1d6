//! A listener that carries bytes to one cluster and does nothing else: what an escape hatch may hold.
//!
//! Invariant: it has one filter chain without a condition, and no filter in it decides who may come in.

use envoy_types::pb::envoy::config::listener::v3 as pb;

use super::{Destination, Tuning, access_logs, bind, chain};
use crate::config::envoy::AccessLog;
use crate::control::xds::refusal::Refusal;
use crate::mesh::Bind;

/// A listener that carries bytes to one cluster.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::control) struct Plain {
    pub(in crate::control) bind: Bind,
    pub(in crate::control) cluster: String,
    pub(in crate::control) max_connections: Option<u32>,
    pub(in crate::control) tuning: Tuning,
    pub(in crate::control) access_logs: Vec<AccessLog>,
}

impl Plain {
    /// Reads one of those fields that `hatch` lets through: it carries bytes to one cluster and does nothing else.
    pub(in super::super) fn read(message: &pb::Listener) -> Result<Self, Refusal> {
        let [chain] = message.filter_chains.as_slice() else {
            return Err(Refusal::new("filter_chains", format!("{} of them", message.filter_chains.len()), "expected one"));
        };
        if !chain::matches_all(chain) {
            return Err(Refusal::new(
                "filter_chains[0].filter_chain_match",
                "present",
                "expected one that takes all connections",
            ));
        }
        let filters = chain::filters(chain, false).map_err(|why| why.under("filter_chains[0]"))?;
        let other = [("rbac", filters.rbac), ("sni_cluster", filters.by_server_name), ("http_connection_manager", filters.http)];
        match other.iter().find(|(_, present)| *present) {
            Some((name, _)) => {
                Err(Refusal::new("filter_chains[0].filters", name, "expected connection_limit and tcp_proxy only"))
            }
            None => Ok(Self {
                bind: bind(message)?,
                cluster: filters.to.as_ref().map_or("", Destination::name).to_owned(),
                max_connections: (filters.max_connections > 0).then_some(filters.max_connections),
                tuning: filters.tuning,
                access_logs: access_logs(&message.access_log)?.into_iter().chain(filters.access_logs).collect(),
            }),
        }
    }
}
