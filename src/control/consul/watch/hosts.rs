//! A host name among the addresses, resolved here because workers never do, and again on an interval.

use std::net::IpAddr;
use std::time::Duration;

use super::{Context, Update};
use crate::control::backoff::{Backoff, jittered};

/// How often a name is resolved again. The resolver does not tell a record's TTL.
const INTERVAL: Duration = Duration::from_secs(30);
/// Bound on one resolution.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Addresses of one name that are used.
pub(crate) const ADDRESSES_MAX: usize = 32;

pub(super) async fn watch(cx: &Context, host: &str) {
    let mut backoff = Backoff::new(Duration::from_millis(500), INTERVAL);
    let mut last = Vec::new();
    loop {
        let wait = match resolve(host).await {
            Ok(addresses) => {
                backoff.reset();
                cx.recovered().await;
                if last != addresses {
                    last.clone_from(&addresses);
                    cx.data(Update::Host(addresses)).await;
                }
                jittered(INTERVAL)
            }
            Err(text) => {
                cx.trouble(format!("host name `{host}` cannot be resolved: {text}")).await;
                backoff.wait()
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Distinct addresses in a steady order: IPv4 first, because that is what most apps listen on.
pub(crate) async fn resolve(host: &str) -> Result<Vec<IpAddr>, String> {
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((host, 0)))
        .await
        .map_err(|_| format!("no answer within {TIMEOUT:?}"))?
        .map_err(|error| error.to_string())?;
    let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    addresses.sort_by_key(|address| (address.is_ipv6(), *address));
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    if addresses.is_empty() { Err("it has no address".to_owned()) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn localhost_resolves_and_nonsense_says_why() {
        assert!(resolve("localhost").await.expect("resolves").iter().all(IpAddr::is_loopback));
        assert!(resolve("no such host.invalid").await.is_err());
    }
}
