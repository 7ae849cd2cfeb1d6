//! Health checks: one check's state, and the probes that feed it.
//!
//! Invariant: a check is `critical` until something says otherwise, and a probe lives exactly as long as its check. A probe
//! never waits longer than its timeout. TTL checks have no probe: they expire (`State::expire`).

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::definition::CheckDefinition;

/// Longest `Output` kept (Consul's default).
const OUTPUT_BYTES_MAX: usize = 4_096;
/// Most bytes read of an HTTP check's answer: the status line is all that counts.
const ANSWER_BYTES_MAX: usize = 1_024;

/// Health of a check or a service; the greater the worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// Well.
    Passing,
    /// Usable, but not well.
    Warning,
    /// Not usable.
    Critical,
}

impl Health {
    /// Consul's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "passing" => Self::Passing,
            "warning" => Self::Warning,
            _ => Self::Critical,
        }
    }
}

/// One check.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) service_id: String,
    pub(super) service_name: String,
    pub(super) notes: String,
    pub(super) output: String,
    /// `tcp`, `http`, `ttl`, `alias`, `maintenance`.
    pub(super) kind: &'static str,
    pub(super) definition: CheckDefinition,
    /// What was observed last.
    pub(super) observed: Health,
    /// Whether it came inside a service's definition.
    pub(super) with_service: bool,
    pub(super) ttl_deadline: Option<Instant>,
    critical_since: Option<Instant>,
    /// The task that feeds it; stops when dropped.
    pub(super) probe: Option<Probe>,
    pub(super) create_index: u64,
    pub(super) modify_index: u64,
}

/// A running probe.
#[derive(Debug)]
pub(super) struct Probe(pub(super) tokio::task::AbortHandle);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Check {
    /// A check that has not run yet.
    pub(super) fn new(id: String, definition: CheckDefinition, with_service: bool) -> Self {
        let kind = match &definition {
            check if !check.tcp.is_empty() => "tcp",
            check if !check.http.is_empty() => "http",
            check if !check.alias_service.is_empty() => "alias",
            _ => "ttl",
        };
        let observed = Health::parse(&definition.status);
        Self {
            name: if definition.name.is_empty() { format!("Service '{id}' check") } else { definition.name.clone() },
            notes: definition.notes.clone(),
            service_id: String::new(),
            service_name: String::new(),
            output: String::new(),
            ttl_deadline: definition.ttl().map(|ttl| Instant::now() + ttl),
            critical_since: (observed == Health::Critical).then(Instant::now),
            probe: None,
            create_index: 0,
            modify_index: 0,
            id,
            kind,
            definition,
            observed,
            with_service,
        }
    }

    /// The check that keeps a service in maintenance.
    pub(super) fn maintenance(id: String, reason: &str) -> Self {
        Self {
            kind: "maintenance",
            ..Self::new(id, CheckDefinition::bare("Service Maintenance Mode", reason, "critical"), false)
        }
    }

    /// A check that exists only to carry a pinned health.
    pub(super) fn pinned(id: String) -> Self {
        Self::new(id, CheckDefinition::bare("Pinned Health", "", "passing"), false)
    }

    /// Records a result; tells whether the health or an alias's text changed.
    pub(super) fn set(&mut self, health: Health, mut output: String) -> bool {
        if output.len() > OUTPUT_BYTES_MAX {
            let end = (0..=OUTPUT_BYTES_MAX).rev().find(|at| output.is_char_boundary(*at)).unwrap_or(0);
            output.truncate(end);
        }
        let changed = self.observed != health;
        self.critical_since = match (health, self.critical_since) {
            (Health::Critical, since) => since.or_else(|| Some(Instant::now())),
            _ => None,
        };
        (self.observed, self.output) = (health, output);
        changed
    }

    /// Takes a heartbeat of a TTL check; tells whether it is one.
    pub(super) fn beat(&mut self) -> bool {
        match self.definition.ttl() {
            Some(ttl) => {
                self.ttl_deadline = Some(Instant::now() + ttl);
                true
            }
            None => false,
        }
    }

    /// Whether a probe has to feed it.
    pub(super) fn wants_probe(&self) -> bool {
        self.probe.is_none() && matches!(self.kind, "tcp" | "http")
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        self.ttl_deadline.is_some_and(|deadline| deadline <= now)
    }

    pub(super) fn reapable(&self, now: Instant) -> bool {
        self.reap_at().is_some_and(|at| at <= now)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.ttl_deadline, self.reap_at()].into_iter().flatten().min()
    }

    fn reap_at(&self) -> Option<Instant> {
        Some(self.critical_since? + self.definition.deregister_after()?)
    }
}

/// Probes once, within the check's timeout.
pub(super) async fn probe(definition: &CheckDefinition) -> (Health, String) {
    let work =
        async { if definition.tcp.is_empty() { probe_http(&definition.http).await } else { probe_tcp(&definition.tcp).await } };
    let timeout = definition.timeout();
    tokio::time::timeout(timeout, work).await.unwrap_or_else(|_| (Health::Critical, format!("no answer within {timeout:?}")))
}

/// How often to probe.
pub(super) fn interval(definition: &CheckDefinition) -> Duration {
    // The definition was validated: a polled check has an interval.
    definition.interval().unwrap_or(Duration::from_secs(10))
}

async fn probe_tcp(target: &str) -> (Health, String) {
    match TcpStream::connect(target).await {
        Ok(_) => (Health::Passing, format!("TCP connect {target}: Success")),
        Err(error) => (Health::Critical, format!("dial tcp {target}: connect: {error}")),
    }
}

/// Plain HTTP/1.1: 2xx passes, 429 warns, everything else is critical.
async fn probe_http(url: &str) -> (Health, String) {
    match http_status(url).await {
        Ok(status @ 200..=299) => (Health::Passing, format!("HTTP GET {url}: {status}")),
        Ok(429) => (Health::Warning, format!("HTTP GET {url}: 429")),
        Ok(status) => (Health::Critical, format!("HTTP GET {url}: {status}")),
        Err(error) => (Health::Critical, format!("Get {url:?}: {error}")),
    }
}

async fn http_status(url: &str) -> std::io::Result<u16> {
    let rest = url.strip_prefix("http://").ok_or_else(|| std::io::Error::other("the URL must start with http://"))?;
    let (host, path) = rest.split_once('/').map_or_else(|| (rest, String::from("/")), |(host, path)| (host, format!("/{path}")));
    let clean = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !clean(host) || !clean(&path) {
        return Err(std::io::Error::other("the URL has an empty host, a blank or a control character"));
    }
    let address =
        if host.rsplit(']').next().is_some_and(|tail| tail.contains(':')) { host.to_owned() } else { format!("{host}:80") };
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Consul Health Check\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
    stream.take(ANSWER_BYTES_MAX as u64).read_to_end(&mut answer).await?;
    let line = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let status = std::str::from_utf8(line).ok().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
    status.ok_or_else(|| std::io::Error::other("malformed HTTP response"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn answering(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 512];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        format!("http://{address}/health")
    }

    #[tokio::test]
    async fn http_status_decides_health() {
        for (answer, health) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", Health::Passing),
            ("HTTP/1.1 429 Too Many\r\n\r\n", Health::Warning),
            ("HTTP/1.1 500 Oops\r\n\r\n", Health::Critical),
            ("nonsense", Health::Critical),
        ] {
            assert_eq!(probe_http(&answering(answer).await).await.0, health, "{answer}");
        }
        assert_eq!(probe_http("http://127.0.0.1:1/a b").await.0, Health::Critical);
    }

    #[tokio::test]
    async fn a_refused_connection_is_critical_and_says_where() {
        let (health, output) = probe_tcp("127.0.0.1:1").await;
        assert_eq!(health, Health::Critical);
        assert!(output.starts_with("dial tcp 127.0.0.1:1: connect:"), "{output}");
    }
}
