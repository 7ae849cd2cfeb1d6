//! The values of flags and environment variables, read as Consul reads them.
//!
//! Pure but for [`socket_address`], which asks the resolver for host names. Each error names the value and what it should
//! look like.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use crate::config::envoy::AccessLogFormat;
use crate::config::{AgentAddress, LogTarget, UpstreamFlag};
use crate::telemetry::log::check_access_log;

/// The longest duration that a flag may set: beyond it a typing error is likelier than a wish.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3_600);

/// `-http-addr`, CONSUL_HTTP_ADDR: `host:port`, `http(s)://host[:port][/prefix]`, `unix:///path`. `tls` is what
/// CONSUL_HTTP_SSL says; a scheme of `https` switches TLS on, one of `http` never switches it off (as in Consul).
pub(super) fn agent_address(text: &str, tls: bool) -> Result<AgentAddress, String> {
    let wrong = |what: &str| {
        format!("`{text}`: {what}; write host:port, http://host:port, https://host:port[/prefix] or unix:///path/to/socket")
    };
    if let Some(path) = text.strip_prefix("unix://") {
        return if path.starts_with('/') {
            Ok(AgentAddress::Unix(PathBuf::from(path)))
        } else {
            Err(wrong("the socket's path is not absolute"))
        };
    }
    let (tls, url, rest) = match text.split_once("://") {
        Some(("http", rest)) => (tls, true, rest),
        Some(("https", rest)) => (true, true, rest),
        Some((scheme, _)) => return Err(wrong(&format!("unknown scheme {scheme}"))),
        None => (tls, false, text),
    };
    let (authority, prefix) = match rest.split_once('/') {
        Some((authority, prefix)) if url => (authority, prefix.trim_matches('/')),
        Some(_) => return Err(wrong("a path needs a scheme before it")),
        None => (rest, ""),
    };
    if authority.contains('@') {
        return Err(wrong("user and password belong into CONSUL_HTTP_AUTH"));
    }
    if prefix.contains(['?', '#']) {
        return Err(wrong("a query or fragment cannot be part of it"));
    }
    let (host, port) = split_host_port(authority).map_err(wrong)?;
    if host.is_empty() {
        return Err(wrong("the host is missing"));
    }
    // Go's HTTP client, and so Consul, dials the scheme's own port when none is written.
    let port = port.unwrap_or(if tls { 443 } else { 80 });
    let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
    Ok(AgentAddress::Http { host: host.to_owned(), port, tls, prefix })
}

/// `host:port` with a host name or an address; an empty host is `unspecified`.
pub(super) fn socket_address(text: &str, unspecified: IpAddr) -> Result<SocketAddr, String> {
    let wrong = |what: String| format!("`{text}`: {what}; write address:port, as in 127.0.0.1:19000");
    let (host, port) = split_host_port(text).map_err(|what| wrong(what.to_owned()))?;
    let port = port.ok_or_else(|| wrong("the port is missing".to_owned()))?;
    if host.is_empty() {
        return Ok(SocketAddr::new(unspecified, port));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, port));
    }
    let found: Vec<SocketAddr> =
        (host, port).to_socket_addrs().map_err(|error| wrong(format!("host name {host} does not resolve: {error}")))?.collect();
    // `localhost` is mostly both; what Consul and its users mean is the IPv4 one.
    found
        .iter()
        .find(|address| address.is_ipv4())
        .or_else(|| found.first())
        .copied()
        .ok_or_else(|| wrong(format!("host name {host} has no address")))
}

/// `-upstream NAME:[ADDR:]PORT`.
pub(super) fn upstream(text: &str) -> Result<UpstreamFlag, String> {
    let wrong = |what: &str| format!("`{text}`: {what}; write name:port or name:address:port, as in db:9191");
    let (destination, bind) = text.split_once(':').ok_or_else(|| wrong("the local port is missing"))?;
    if destination.is_empty() {
        return Err(wrong("the service's name is missing"));
    }
    let bind = match bind.parse::<u16>() {
        Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
        Err(_) => socket_address(bind, IpAddr::V4(Ipv4Addr::LOCALHOST)).map_err(|_| wrong("the local address is wrong"))?,
    };
    if bind.port() == 0 {
        return Err(wrong("port 0 cannot be dialed"));
    }
    Ok(UpstreamFlag { destination: destination.to_owned(), bind })
}

/// `-service-addr`: where the app listens; `host:port`, a bare port, or `unix:///path`.
pub(super) fn app_address(text: &str) -> Result<String, String> {
    if let Some(path) = text.strip_prefix("unix://") {
        return if path.starts_with('/') {
            Ok(text.to_owned())
        } else {
            Err(format!("`{text}`: the socket's path is not absolute; write unix:///path/to/socket"))
        };
    }
    if text.parse::<u16>().is_ok_and(|port| port != 0) {
        return Ok(format!("127.0.0.1:{text}"));
    }
    match split_host_port(text) {
        Ok((host, Some(port))) if port != 0 => {
            let host = if host.is_empty() { "127.0.0.1" } else { host };
            Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
        }
        _ => Err(format!("`{text}` is no address of an app; write host:port, as in 127.0.0.1:8080")),
    }
}

/// A duration as Go writes it (`30s`, `1m30s`, `250ms`, `1.5h`); a bare number counts seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write it as in 30s, 1m30s or 500ms");
    let seconds = match text.parse::<u32>() {
        Ok(seconds) => f64::from(seconds),
        Err(_) => go_duration_seconds(text).ok_or_else(wrong)?,
    };
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    if duration > DURATION_MAX {
        return Err(format!("`{text}` is longer than a year"));
    }
    Ok(duration)
}

/// `-workers`: at least one.
pub(super) fn workers(text: &str) -> Result<usize, String> {
    const WORKERS_MAX: usize = 1_024;
    match text.parse::<usize>() {
        Ok(count) if (1..=WORKERS_MAX).contains(&count) => Ok(count),
        _ => Err(format!("`{text}` is no number of workers; write 1 to {WORKERS_MAX}")),
    }
}

/// `-login-meta KEY=VALUE`.
pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is no key=value")),
    }
}

/// `-tls-resumption`.
pub(super) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("`{text}` is neither on nor off")),
    }
}

/// `-connection-log`.
pub(super) fn log_target(text: &str) -> Result<LogTarget, String> {
    Ok(match text {
        "" => return Err("the connection log's target is empty; write stdout, stderr, none or a path".to_owned()),
        "stdout" | "-" | "/dev/stdout" => LogTarget::Stdout,
        "stderr" | "/dev/stderr" => LogTarget::Stderr,
        "none" | "/dev/null" => LogTarget::None,
        path => LogTarget::File(PathBuf::from(path)),
    })
}

/// `-access-log-format`.
pub(super) fn access_log_format(text: &str) -> Result<AccessLogFormat, String> {
    let format = match text {
        "" => return Err("the access log's format is empty; write default, json or a text with operators".to_owned()),
        "default" => AccessLogFormat::Default,
        "json" => AccessLogFormat::consul(),
        text => AccessLogFormat::Text(text.to_owned()),
    };
    check_access_log(&format).map_err(|error| error.to_string())?;
    Ok(format)
}

fn split_host_port(text: &str) -> Result<(&str, Option<u16>), &'static str> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
        if host.parse::<std::net::Ipv6Addr>().is_err() {
            return Err("what stands in brackets is no IPv6 address");
        }
        match port.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if port.is_empty() => (host, None),
            None => return Err("after the bracket comes :port"),
        }
    } else {
        match text.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err("an IPv6 address needs brackets, as in [::1]:8500"),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("the host name has a blank or control character");
    }
    match port {
        None => Ok((host, None)),
        Some(port) => port.parse().map(|port| (host, Some(port))).map_err(|_| "the port is no number from 0 to 65535"),
    }
}

fn go_duration_seconds(text: &str) -> Option<f64> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3_600.0)];
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total += number.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(host: &str, port: u16, tls: bool, prefix: &str) -> AgentAddress {
        AgentAddress::Http { host: host.into(), port, tls, prefix: prefix.into() }
    }

    #[test]
    fn agent_addresses_read_as_consul_reads_them() {
        for (text, tls, wanted) in [
            ("127.0.0.1:8500", false, http("127.0.0.1", 8500, false, "")),
            ("consul.example:8501", true, http("consul.example", 8501, true, "")),
            ("http://localhost:8500", false, http("localhost", 8500, false, "")),
            ("http://localhost:8500", true, http("localhost", 8500, true, "")),
            ("https://agent:8501", false, http("agent", 8501, true, "")),
            ("https://agent", false, http("agent", 443, true, "")),
            ("http://agent/", false, http("agent", 80, false, "")),
            ("https://agent:8501/consul/", false, http("agent", 8501, true, "/consul")),
            ("http://agent:8500/a/b", false, http("agent", 8500, false, "/a/b")),
            ("[::1]:8500", false, http("::1", 8500, false, "")),
            ("http://[::1]:8500", false, http("::1", 8500, false, "")),
            ("unix:///var/run/consul.sock", false, AgentAddress::Unix("/var/run/consul.sock".into())),
        ] {
            assert_eq!(agent_address(text, tls), Ok(wanted), "{text}");
        }
    }

    #[test]
    fn wrong_agent_addresses_say_what_is_wrong() {
        for (text, wanted) in [
            ("unix://relative.sock", "not absolute"),
            ("ftp://x:1", "unknown scheme ftp"),
            ("host:port", "port is no number"),
            ("host:70000", "port is no number"),
            ("host:8500/prefix", "a path needs a scheme"),
            ("::1:8500", "needs brackets"),
            ("[::1:8500", "not closed"),
            ("[x]:8500", "no IPv6 address"),
            ("http://user:secret@host:1", "CONSUL_HTTP_AUTH"),
            ("http://", "host is missing"),
            ("", "host is missing"),
            (":8500", "host is missing"),
            ("http://h:1/a?b", "query"),
            ("a b:1", "blank"),
        ] {
            let error = agent_address(text, false).expect_err(text);
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn socket_addresses_take_names_and_numbers() {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        for (text, wanted) in [
            ("127.0.0.1:19000", "127.0.0.1:19000"),
            ("localhost:19000", "127.0.0.1:19000"),
            ("[::1]:19000", "[::1]:19000"),
            (":8443", "0.0.0.0:8443"),
            ("127.0.0.1:0", "127.0.0.1:0"),
        ] {
            assert_eq!(socket_address(text, any).expect(text).to_string(), wanted);
        }
        for text in ["19000", "localhost", "", "127.0.0.1:x", "no-such-host.invalid:1"] {
            assert!(socket_address(text, any).is_err(), "{text}");
        }
    }

    #[test]
    fn upstreams_have_a_name_and_a_port() {
        for (text, name, bind) in [
            ("db:9191", "db", "127.0.0.1:9191"),
            ("db:127.0.0.2:9191", "db", "127.0.0.2:9191"),
            ("db::9191", "db", "127.0.0.1:9191"),
            ("db:[::1]:9191", "db", "[::1]:9191"),
        ] {
            let flag = upstream(text).expect(text);
            assert_eq!((flag.destination.as_str(), flag.bind.to_string().as_str()), (name, bind));
        }
        for text in ["db", ":9191", "db:", "db:0", "db:x", "db:1.2.3.4", ""] {
            assert!(upstream(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_gos() {
        for (text, millis) in [
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("500ms", 500),
            ("1.5h", 5_400_000),
            ("0", 0),
            ("0s", 0),
            ("15", 15_000),
            ("1h2m3s4ms", 3_723_004),
        ] {
            assert_eq!(duration(text).expect(text).as_millis(), millis, "{text}");
        }
        for text in ["", "s", "-5s", "1x", "1s2", "1.2.3s", "9999999h", "1e3s", "+1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn app_addresses_and_the_rest() {
        assert_eq!(app_address("8080").expect("port"), "127.0.0.1:8080");
        assert_eq!(app_address(":8080").expect("port"), "127.0.0.1:8080");
        assert_eq!(app_address("[::1]:8080").expect("v6"), "[::1]:8080");
        assert_eq!(app_address("unix:///run/app.sock").expect("unix"), "unix:///run/app.sock");
        assert!(app_address("0").is_err() && app_address("app").is_err() && app_address("unix://x").is_err());
        assert_eq!(workers("4"), Ok(4));
        assert!(workers("0").is_err() && workers("-1").is_err() && workers("99999").is_err());
        assert_eq!(key_value("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(key_value("=b").is_err() && key_value("a").is_err());
        assert_eq!(access_log_format("default"), Ok(AccessLogFormat::Default));
        assert_eq!(access_log_format("json"), Ok(AccessLogFormat::consul()));
        assert_eq!(access_log_format("%DURATION%"), Ok(AccessLogFormat::Text("%DURATION%".into())));
        assert!(access_log_format("").is_err());
        assert!(access_log_format("%DURATON%").is_err_and(|error| error.contains("DURATON")));
        assert_eq!(log_target("none"), Ok(LogTarget::None));
        assert_eq!(log_target("/var/log/x"), Ok(LogTarget::File("/var/log/x".into())));
        assert!(log_target("").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_value_panics(text in "\\PC{0,40}|[0-9a-z:./\\[\\]=-]{0,40}") {
            let _ = agent_address(&text, false);
            let _ = upstream(&text);
            let _ = duration(&text);
            let _ = app_address(&text);
        }
    }
}
