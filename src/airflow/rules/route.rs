//! Where redirected connections lead: networks of the outside world that upstreams stand for.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::RulesError;
use super::document::{Item, Section};
use crate::mesh::caller::Route;

/// The keys at the top of the file that are read here.
pub(super) const KEYS: &[&str] = &["redirect", "route", "lease_port"];
const ROUTE_KEYS: &[&str] = &["to", "port", "upstream"];
/// Most `[[route]]` tables, each of which may have several networks.
const ROUTES_MAX: usize = 1_000;
/// Most listeners.
const LISTENERS_MAX: usize = 4;

/// `redirect = [...]`: where redirected connections come in. Loopback alone: elsewhere anybody could use it.
pub(super) fn listeners(top: &Section<'_>) -> Result<Vec<SocketAddr>, RulesError> {
    let Some(item) = top.get("redirect") else { return Ok(Vec::new()) };
    let mut listeners = Vec::new();
    for item in item.values()? {
        let remedy = "write a loopback address and port, as in \"127.0.0.1:15001\" or \"[::1]:15001\"";
        match item.text()?.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() && address.port() != 0 && listeners.len() < LISTENERS_MAX => {
                listeners.push(address);
            }
            Ok(address) if address.ip().is_loopback() => return Err(item.wrong("is one listener too many, or port 0", remedy)),
            Ok(_) => return Err(item.wrong("is not on loopback", remedy)),
            Err(_) => return Err(item.wrong("is no address and port", remedy)),
        }
    }
    Ok(listeners)
}

/// `lease_port`: where leased addresses are reached. No port, no leases.
pub(super) fn lease_port(top: &Section<'_>) -> Result<Option<u16>, RulesError> {
    let port = top.get("lease_port").map(|item| item.number(1..=usize::from(u16::MAX))).transpose()?;
    Ok(port.and_then(|port| u16::try_from(port).ok()))
}

/// The `[[route]]` tables, in the order of the file.
pub(super) fn routes(top: &Section<'_>) -> Result<Arc<[Route]>, RulesError> {
    let mut routes = Vec::new();
    for section in top.tables("route", ROUTES_MAX)? {
        section.only(ROUTE_KEYS)?;
        let (Some(to), Some(upstream)) = (section.get("to"), section.text("upstream")?) else {
            return Err(section.wrong("lacks `to` or `upstream`", "write to = [\"10.1.0.0/16\"] and upstream = \"warehouse\""));
        };
        let port = section.get("port").map(|item| item.number(1..=usize::from(u16::MAX))).transpose()?;
        let port = port.and_then(|port| u16::try_from(port).ok());
        for item in to.values()? {
            let (network, prefix) = network(&item)?;
            routes.push(Route { network, prefix, port, upstream: upstream.into() });
        }
    }
    Ok(routes.into())
}

fn network(item: &Item<'_, '_>) -> Result<(IpAddr, u8), RulesError> {
    let text = item.text()?;
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let remedy = "write an address or a network, as in \"10.1.2.3\" or \"10.1.0.0/16\"; names are not resolved here";
    let Ok(address) = address.parse::<IpAddr>() else { return Err(item.wrong("is no network", remedy)) };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    match prefix.map_or(Ok(bits), str::parse::<u8>) {
        Ok(prefix) if prefix <= bits => Ok((address, prefix)),
        _ => Err(item.wrong(&format!("has no prefix of 0 to {bits}"), remedy)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::document::Document;
    use super::*;

    fn decode(text: &str) -> Result<(Vec<SocketAddr>, Arc<[Route]>), String> {
        let document = Document::parse(text, "a.toml").map_err(|error| error.to_string())?;
        let top = document.top();
        let both = listeners(&top).and_then(|listeners| Ok((listeners, routes(&top)?)));
        both.map_err(|error| error.to_string())
    }

    #[test]
    fn listeners_and_routes_are_read_in_order() {
        let text = "redirect = [\"127.0.0.1:15001\", \"[::1]:15001\"]
            [[route]]\nto = [\"10.1.0.0/16\", \"10.2.3.4\"]\nport = 5432\nupstream = \"warehouse\"
            [[route]]\nto = \"2001:db8::/32\"\nupstream = \"lake\"";
        let (listeners, routes) = decode(text).expect("valid");
        assert_eq!(listeners.len(), 2);
        let told: Vec<_> = routes.iter().map(|route| (route.prefix, route.port, &*route.upstream)).collect();
        assert_eq!(told, [(16, Some(5_432), "warehouse"), (32, Some(5_432), "warehouse"), (32, None, "lake")]);
    }

    #[test]
    fn a_mistake_names_the_value_and_the_remedy() {
        for (text, part) in [
            ("redirect = \"0.0.0.0:15001\"", "not on loopback"),
            ("redirect = \"127.0.0.1\"", "no address and port"),
            ("redirect = \"127.0.0.1:0\"", "port 0"),
            ("[[route]]\nto = \"10.0.0.0/33\"\nupstream = \"w\"", "no prefix of 0 to 32"),
            ("[[route]]\nto = \"db.example.com\"\nupstream = \"w\"", "names are not resolved here"),
            ("[[route]]\nto = \"10.0.0.0/8\"", "lacks `to` or `upstream`"),
            ("[[route]]\nto = \"10.0.0.0/8\"\nupstrem = \"w\"", "upstream"),
        ] {
            let error = decode(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
