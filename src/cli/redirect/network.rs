//! A network with or without a port, as a flag writes it and as nftables reads it.
//!
//! Invariant: bits behind the prefix are zero, so that one network has one text, which is nftables' own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    address: IpAddr,
    prefix: u8,
}

/// What `-allow` lets out: a network, on one port or on all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Allow {
    pub(super) network: Network,
    pub(super) port: Option<u16>,
}

impl Network {
    /// The network of `address` with `prefix` leading bits; `None` for a prefix longer than the address.
    pub(super) fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(ip) => {
                let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
                (prefix <= 32).then(|| Ipv4Addr::from(u32::from(ip) & !host).into())
            }
            IpAddr::V6(ip) => {
                let host = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
                (prefix <= 128).then(|| Ipv6Addr::from(u128::from(ip) & !host).into())
            }
        };
        address.map(|address| Self { address, prefix })
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().ok()?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        Self::new(address, prefix.map_or(Some(whole), |prefix| prefix.parse().ok())?)
    }

    pub(super) fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// Whether it lies on loopback whole.
    pub(super) fn is_loopback(&self) -> bool {
        self.address.is_loopback() && self.prefix >= if self.is_ipv4() { 8 } else { 128 }
    }

    /// The match of its addresses: `ip daddr 10.0.0.0/8`.
    pub(super) fn destination(&self) -> String {
        match (self.address, self.prefix) {
            (IpAddr::V4(_), 0) => "meta nfproto ipv4".to_owned(),
            (IpAddr::V6(_), 0) => "meta nfproto ipv6".to_owned(),
            (IpAddr::V4(_), _) => format!("ip daddr {self}"),
            (IpAddr::V6(_), _) => format!("ip6 daddr {self}"),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.is_ipv4() { 32 } else { 128 };
        if self.prefix == whole { write!(f, "{}", self.address) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

impl Allow {
    /// Reads `10.0.0.0/8`, `10.0.0.2:53`, `2001:db8::/32` or `[2001:db8::/32]:443`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!("`{text}`: {what}; write CIDR or CIDR:PORT, as in 10.0.0.0/8, 10.0.0.2:53 or [2001:db8::/32]:443")
        };
        let (network, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((network, ""))) => (network, None),
            Some(Some((network, port))) => (network, Some(port.strip_prefix(':').ok_or_else(|| wrong("no `:` behind the `]`"))?)),
            Some(None) => return Err(wrong("the `]` is missing")),
            // Two colons and no brackets: IPv6 alone.
            None if text.matches(':').count() > 1 => (text, None),
            None => text.split_once(':').map_or((text, None), |(network, port)| (network, Some(port))),
        };
        let network = Network::parse(network).ok_or_else(|| wrong("no network; names are not resolved here"))?;
        let port = port.map(|port| port.parse().ok().filter(|&port| port != 0).ok_or_else(|| wrong("no port"))).transpose()?;
        Ok(Self { network, port })
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.network.is_ipv4()) {
            (None, _) => write!(f, "{}", self.network),
            (Some(port), true) => write!(f, "{}:{port}", self.network),
            (Some(port), false) => write!(f, "[{}]:{port}", self.network),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exception_reads_as_it_is_shown() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3/8:443", "10.0.0.0/8:443"),
            ("10.0.0.2:53", "10.0.0.2:53"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("[2001:db8::]", "2001:db8::"),
            ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(Allow::parse(text).expect(text).to_string(), shown, "{text}");
        }
        for text in ["", "example.com", "10.0.0.0/33", "10.0.0.1:0", "10.0.0.1:65536", "[::1", "[::1]443", "::/129", "1.2.3.4/-1"]
        {
            assert!(Allow::parse(text).expect_err(text).contains("write CIDR"), "{text}");
        }
    }

    #[test]
    fn a_network_matches_its_addresses_and_knows_loopback() {
        let network = |text: &str| Network::parse(text).expect(text);
        assert_eq!(network("10.1.2.3/16").destination(), "ip daddr 10.1.0.0/16");
        assert_eq!(network("2001:db8::7").destination(), "ip6 daddr 2001:db8::7");
        assert_eq!(network("0.0.0.0/0").destination(), "meta nfproto ipv4");
        assert_eq!(network("::/0").destination(), "meta nfproto ipv6");
        assert!(network("127.0.0.0/8").is_loopback() && network("127.1.2.3").is_loopback() && network("::1").is_loopback());
        assert!(!network("0.0.0.0/0").is_loopback() && !network("126.0.0.0/7").is_loopback() && !network("::/64").is_loopback());
    }
}
