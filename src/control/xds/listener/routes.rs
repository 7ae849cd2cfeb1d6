//! The filter chains of a listener that has several, or conditions on one.
//!
//! Invariant: no two chains take the same connections, each has a name of its own that does not depend on its place, and a way
//! in that is not mutual TLS stands only beside one that is.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as pb;

use super::{Chain, INBOUND, Inspection, OUTBOUND, Routes, TLS_INSPECTOR, Way, chain, way};
use crate::config::envoy::AccessLog;
use crate::control::xds::cluster::duration;
use crate::control::xds::refusal::Refusal;
use crate::mesh::Bind;
use crate::mesh::router::Match;

/// Envoy's `listener_filters_timeout`.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Filter chains of one listener: a transparent proxy has one an upstream.
const CHAINS_MAX: usize = 10_000;

pub(super) fn routes(
    message: &pb::Listener,
    bind: &Bind,
    inspection: &Inspection,
    access_logs: &mut Vec<AccessLog>,
    http_as_tcp: bool,
) -> Result<Routes, Refusal> {
    if message.filter_chains.len() > CHAINS_MAX {
        let wanted = format!("at most {CHAINS_MAX} of one listener are served");
        return Err(Refusal::new("filter_chains", message.filter_chains.len(), wanted));
    }
    let mut read = |chain: &pb::FilterChain, place: String| -> Result<Chain, Refusal> {
        let under = |why: Refusal| why.under(&place);
        let filters = chain::filters(chain, http_as_tcp).map_err(under)?;
        for log in &filters.access_logs {
            if !access_logs.contains(log) {
                access_logs.push(log.clone());
            }
        }
        let matches = chain::matches(chain).map_err(under)?;
        if !inspection.tls && (matches.tls.is_some() || !matches.server_names.is_empty() || filters.by_server_name) {
            let wanted = format!("what a connection says first is looked at by {TLS_INSPECTOR}: expected it");
            return Err(Refusal::missing("listener_filters", wanted));
        }
        if !filters.paths.is_empty() {
            let wanted = "requests are told apart by path only in a listener that has no other filter chain";
            return Err(Refusal::new(format!("{place}.filters"), "http_connection_manager with routes by path", wanted));
        }
        let tuning = filters.tuning;
        let way = way(filters, bind).map_err(under)?;
        Ok(Chain { name: way.name().unwrap_or_default().to_owned(), matches, way, tuning })
    };
    let chains = message.filter_chains.iter().enumerate();
    let chains = chains.map(|(index, chain)| read(chain, format!("filter_chains[{index}]")));
    let mut chains: Vec<Chain> = chains.collect::<Result<_, _>>()?;
    let fallback = message.default_filter_chain.as_ref();
    let fallback = fallback.map(|chain| read(chain, "default_filter_chain".to_owned())).transpose()?;
    check_ways(message, &chains, fallback.as_ref())?;
    name_apart(&mut chains, fallback.as_ref());
    let timeout = duration(message.listener_filters_timeout.as_ref(), "listener_filters_timeout")?;
    Ok(Routes {
        transparent: inspection.transparent,
        outbound: message.traffic_direction == OUTBOUND,
        // 0 is Envoy's word for no bound; nobody holds a connection open for ever by saying nothing.
        inspect_timeout: timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(INSPECT_TIMEOUT),
        silent_is_raw: message.continue_on_listener_filters_timeout,
        chains,
        fallback,
    })
}

/// What no chain may be beside another.
fn check_ways(message: &pb::Listener, chains: &[Chain], fallback: Option<&Chain>) -> Result<(), Refusal> {
    let all = || chains.iter().chain(fallback);
    let ends = all().any(|chain| matches!(chain.way, Way::End(_)));
    if message.traffic_direction == INBOUND && !ends && all().any(|chain| matches!(chain.way, Way::Pass(_))) {
        let wanted = "a way in that is not mutual TLS is served only beside one that is: expected a DownstreamTlsContext";
        return Err(Refusal::missing("filter_chains.transport_socket", wanted));
    }
    let mut seen = HashSet::new();
    for (index, chain) in chains.iter().enumerate() {
        let place = format!("filter_chains[{index}]");
        let ends_tls = match &chain.way {
            Way::End(_) => true,
            Way::Pass(passage) => passage.front.is_some(),
            Way::ServerName => false,
        };
        if ends_tls && chain.matches.tls == Some(false) {
            return Err(Refusal::new(
                format!("{place}.filter_chain_match.transport_protocol"),
                "raw_buffer",
                "TLS ends here: expected tls",
            ));
        }
        if matches!(chain.way, Way::ServerName) && (chain.matches != Match::default() || fallback.is_some()) {
            let wanted =
                "names that are no cluster's are reset: expected sni_cluster in a chain without conditions, and none by default";
            return Err(Refusal::new(format!("{place}.filters"), "sni_cluster", wanted));
        }
        if !chain.matches.places().all(|place| seen.insert(place)) {
            let wanted = format!("another chain takes the same connections: {}", chain.matches);
            return Err(Refusal::new(format!("{place}.filter_chain_match"), "doubled", wanted));
        }
    }
    Ok(())
}

/// Several chains to one cluster are named after whom they take as well. Never after their place: a connection belongs to its
/// chain by name, and places change.
fn name_apart(chains: &mut [Chain], fallback: Option<&Chain>) {
    let mut seen: HashMap<String, usize> = HashMap::new();
    for chain in chains.iter().chain(fallback) {
        *seen.entry(chain.name.clone()).or_default() += 1;
    }
    for chain in chains {
        if seen.get(&chain.name).is_some_and(|count| *count > 1) {
            chain.name = format!("{} for {}", chain.name, chain.matches);
        }
    }
}
