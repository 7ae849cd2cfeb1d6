//! `ringfence connect` as a child, with its admin port and its connection log.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::http::Client;
use super::{Mesh, PATIENCE, Process, ports, wait_for};

pub struct Sidecar {
    pub process: Process,
    pub admin: SocketAddr,
    connection_log: PathBuf,
    /// The folder of its unit, if it is one's main process: `process` is the service manager then.
    pub unit: PathBuf,
    _folder: tempfile::TempDir,
}

/// How to start one.
pub struct Builder {
    services: Vec<String>,
    token: Token,
    arguments: Vec<String>,
    workers: usize,
    descriptors_max: Option<u32>,
    in_unit: bool,
}

enum Token {
    /// Ask the mesh for one.
    OfMesh,
    Given(Option<String>),
}

/// Samples of `/metrics`.
pub struct Metrics(String);

impl Sidecar {
    pub fn of(service: &str) -> Builder {
        let services = vec![service.to_owned()];
        Builder { services, token: Token::OfMesh, arguments: Vec::new(), workers: 1, descriptors_max: None, in_unit: false }
    }

    pub fn start(mesh: &dyn Mesh, service: &str) -> Self {
        Self::of(service).start(mesh)
    }

    pub fn client(&self) -> Client {
        Client::new(self.admin, None)
    }

    pub fn wait_ready(&mut self) {
        let client = self.client();
        wait_for("the sidecar is ready", PATIENCE, || {
            self.process.assert_running();
            let answer = client.try_get("/ready").map_err(|error| format!("{error}\n{}", self.process.tail()))?;
            if answer.status == 200 { Ok(()) } else { Err(format!("{}\n{}", answer.body, self.process.tail())) }
        });
    }

    /// Waits until some endpoint of an upstream is healthy: the agent's check has seen the far sidecar listen.
    pub fn wait_endpoint(&self) {
        wait_for("a healthy endpoint in the snapshot", PATIENCE, || {
            let (snapshot, mut found) = (self.snapshot(), Vec::new());
            super::find_all(&snapshot, "healthy", &mut found);
            let healthy = found.iter().any(|value| **value == Value::Bool(true));
            if healthy { Ok(()) } else { Err(format!("{snapshot}\n{}", self.process.tail())) }
        });
    }

    pub fn snapshot(&self) -> Value {
        self.client().get("/snapshot").ok("snapshot").json()
    }

    pub fn metrics(&self) -> Metrics {
        Metrics(self.client().get("/metrics").ok("metrics").body)
    }

    /// Connections closed for `reason`, over all listeners.
    pub fn closed(&self, reason: &str) -> u64 {
        self.metrics().sum("ringfence_connections_closed_total", &[("reason", reason)])
    }

    /// Connections closed for whatever reason.
    pub fn closed_all(&self) -> u64 {
        self.metrics().sum("ringfence_connections_closed_total", &[])
    }

    /// Connections open now.
    pub fn active(&self) -> u64 {
        self.metrics().sum("ringfence_connections_active", &[])
    }

    pub fn connection_log_text(&self) -> String {
        std::fs::read_to_string(&self.connection_log).unwrap_or_default()
    }

    /// The connection log's whole lines.
    pub fn connections(&self) -> Vec<Value> {
        let text = self.connection_log_text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("connection log line ({error}): {line}"));
        whole.lines().map(parse).collect()
    }

    /// Waits for a line of the connection log.
    pub fn wait_connection(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        wait_for(&format!("connection log: {what}"), Duration::from_secs(10), || {
            let lines = self.connections();
            lines.iter().rev().find(|line| matches(line)).cloned().ok_or_else(|| {
                let last = lines.iter().rev().take(5).map(Value::to_string).collect::<Vec<_>>().join("\n  ");
                format!("{} lines, the last ones:\n  {last}\n{}", lines.len(), self.process.tail())
            })
        })
    }

    /// Waits for a line that closes with `reason`.
    pub fn wait_closed(&self, reason: &str) -> Value {
        self.wait_connection(&format!("reason {reason}"), |line| line["reason"] == reason)
    }

    /// Fails unless it still runs and no thread of it panicked.
    pub fn assert_healthy(&mut self) {
        self.process.assert_running();
        let output = self.process.output();
        assert!(!output.contains("panicked"), "a thread panicked\n{}", self.process.tail());
    }
}

impl Builder {
    /// One more service in the same process.
    pub fn and(mut self, service: &str) -> Self {
        self.services.push(service.to_owned());
        self
    }

    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Uses this token, or none, instead of one that the mesh makes.
    pub fn token(mut self, token: Option<&str>) -> Self {
        self.token = Token::Given(token.map(str::to_owned));
        self
    }

    /// As the main process of a unit: see [`super::systemd`].
    pub fn in_unit(mut self) -> Self {
        self.in_unit = true;
        self
    }

    /// Hard limit of open files.
    pub fn descriptors_max(mut self, descriptors_max: u32) -> Self {
        self.descriptors_max = Some(descriptors_max);
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(self, mesh: &dyn Mesh) -> Sidecar {
        let mut sidecar = self.spawn(mesh);
        sidecar.wait_ready();
        sidecar
    }

    /// Starts it without waiting.
    pub fn spawn(self, mesh: &dyn Mesh) -> Sidecar {
        let folder = super::scratch();
        let connection_log = folder.path().join("connections.jsonl");
        let admin = ports::free_address();
        let binary = Path::new(env!("CARGO_BIN_EXE_ringfence"));
        let mut command = match self.descriptors_max {
            None => Command::new(binary),
            Some(most) => {
                let mut command = Command::new("sh");
                command.args(["-c", &format!("ulimit -n {most}; exec \"$@\""), "sh"]).arg(binary);
                command
            }
        };
        command.arg("connect");
        for service in &self.services {
            command.args(["-sidecar-for", service]);
        }
        command.args(["-http-addr", &mesh.address().to_string(), "-admin-bind", &admin.to_string()]);
        command.args(["-workers", &self.workers.to_string(), "-connection-log"]).arg(&connection_log);
        let token = match self.token {
            Token::OfMesh => mesh.token(&self.services[0]),
            Token::Given(token) => token,
        };
        if let Some(token) = token {
            command.args(["-token", &token]);
        }
        command.args(&self.arguments);
        // A failed test shows the last lines: let them say something.
        if !self.arguments.iter().any(|argument| argument == "-log-level") {
            command.args(["-log-level", "debug"]);
        }
        if self.in_unit {
            command = super::systemd::unit_of(&command, folder.path());
        }
        let process = Process::start(&format!("ringfence connect {}", self.services[0]), &command);
        Sidecar { process, admin, connection_log, unit: folder.path().to_owned(), _folder: folder }
    }
}

impl Metrics {
    /// A page that was fetched.
    pub fn of(page: String) -> Self {
        Self(page)
    }

    /// Adds up every sample of `name` that carries all `labels`.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let wanted = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect::<Vec<_>>();
        let samples = self.0.lines().filter(|line| {
            let Some(rest) = line.strip_prefix(name) else { return false };
            (rest.starts_with('{') || rest.starts_with(' ')) && wanted.iter().all(|label| rest.contains(label.as_str()))
        });
        let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        samples.map(|line| value(line).unwrap_or_else(|| panic!("no sample: {line}"))).sum::<f64>() as u64
    }

    /// Whether there is any sample of `name`.
    pub fn has(&self, name: &str) -> bool {
        self.0.lines().any(|line| line.starts_with(name))
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}
