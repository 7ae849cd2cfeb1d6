//! The values of flags that name services, ports and hosts.
//!
//! Invariant: whatever passed here is safe to stand in HCL, TOML, a unit file and a shell line. Pure; each error names the
//! value and what to write.

use super::role::Role;
use crate::cli::UsageError;

/// From here on the kernel gives ports to clients, so that a listener may find its own one taken.
pub(super) const EPHEMERAL_FIRST: u16 = 32_768;
/// Below it a listener needs CAP_NET_BIND_SERVICE, which the unit does not have.
pub(super) const UNPRIVILEGED_FIRST: u16 = 1_024;
/// Longest name of a service: it is a DNS label in certificates.
const NAME_BYTES_MAX: usize = 63;

/// `-upstream NAME:PORT[:deny_reply]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extra {
    pub(super) service: String,
    pub(super) port: u16,
    pub(super) deny_reply: &'static str,
}

/// `-log-host HOST[:worker|:triggerer]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LogHost {
    pub(super) host: String,
    pub(super) role: Role,
}

impl Extra {
    /// The value of `-upstream`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        const REPLIES: [&str; 5] = ["postgres", "mysql", "http", "redis", "close"];
        let wrong =
            |what: String| format!("`{text}`: {what}; write NAME:PORT or NAME:PORT:REPLY, as in warehouse:25435:postgres");
        let mut parts = text.split(':');
        let (Some(service), Some(port)) = (parts.next(), parts.next()) else {
            return Err(wrong("the local port is missing".to_owned()));
        };
        check_name(service).map_err(|why| wrong(format!("the service's name {why}")))?;
        let port = port.parse::<u16>().map_err(|_| wrong(format!("`{port}` is no port")))?;
        if !(UNPRIVILEGED_FIRST..EPHEMERAL_FIRST).contains(&port) {
            let why = "the kernel gives higher ones to clients, and lower ones need a capability";
            return Err(wrong(format!("port {port} is not between {UNPRIVILEGED_FIRST} and {}: {why}", EPHEMERAL_FIRST - 1)));
        }
        let reply = parts.next().unwrap_or("close");
        let deny_reply = REPLIES.into_iter().find(|known| *known == reply);
        match (deny_reply, parts.next()) {
            (Some(deny_reply), None) => Ok(Self { service: service.to_owned(), port, deny_reply }),
            (None, _) => Err(wrong(format!("`{reply}` is none of {}", REPLIES.join(", ")))),
            (_, Some(rest)) => Err(wrong(format!("`:{rest}` is too much"))),
        }
    }
}

impl LogHost {
    /// The value of `-log-host`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (host, role) = text.split_once(':').unwrap_or((text, "worker"));
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
        if host.is_empty() || !host.bytes().all(fine) {
            return Err(format!("`{text}`: `{host}` is no host name; write it as Airflow shows it beside a task try"));
        }
        match Role::parse(role) {
            Ok(role) if role.serves_logs() => Ok(Self { host: host.to_owned(), role }),
            _ => Err(format!("`{text}`: only a worker or a triggerer serves logs; write HOST, HOST:worker or HOST:triggerer")),
        }
    }

    pub(super) fn refused_beside_its_reader(&self) -> UsageError {
        UsageError(format!(
            "-log-host {}: the {} of this host binds its log port on every address, so ringfence cannot listen on it here; the \
             api-server reads its logs without the mesh: leave the flag out",
            self.host,
            self.role.word()
        ))
    }

    pub(super) fn refused_without_use(&self) -> UsageError {
        UsageError(format!(
            "-log-host {}: this host has neither the role {} nor api-server, which reads its logs; leave the flag out",
            self.host,
            self.role.word()
        ))
    }
}

/// A name of a Consul service, as it can stand in every file that is written.
pub(super) fn check_name(text: &str) -> Result<(), String> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(fine) || text.starts_with('-') || text.ends_with('-') {
        return Err(format!("is not 1 to {NAME_BYTES_MAX} letters, digits, hyphens inside, or underscores"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_wrong_ones_say_what_to_write() {
        let extra = Extra::parse("warehouse:25435").expect("valid");
        assert_eq!((extra.service.as_str(), extra.port, extra.deny_reply), ("warehouse", 25_435, "close"));
        for text in
            ["warehouse", "a b:1", ":25000", "w:80", "w:40000", "w:x", "w:25000:oracle", "w:25000:http:x", "w\"}:25000", ""]
        {
            assert!(Extra::parse(text).expect_err(text).contains("as in warehouse:25435:postgres"), "{text}");
        }
        for text in ["", ":worker", "a b", "h:scheduler", "h:", "h\n1"] {
            assert!(LogHost::parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_value_panics(text in "\\PC{0,40}|[a-z0-9:.-]{0,40}") {
            let _ = Extra::parse(&text);
            let _ = LogHost::parse(&text);
            let _ = check_name(&text);
        }
    }
}
