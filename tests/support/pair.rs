//! The usual cast: `web` with an upstream `db`, one sidecar process each, `web -> db` allowed.

use std::io;
use std::net::SocketAddr;
use std::process::Command;

use serde_json::{Value, json};

use super::sidecar::Builder;
use super::{Agent, Consul, Definition, Mesh, PATIENCE, Process, Sidecar, ports, traffic, wait_for};

/// Which program is a service's sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ringfence,
    /// `consul connect proxy`.
    Builtin,
}

pub struct Pair<M: Mesh> {
    pub web: Sidecar,
    pub db: Sidecar,
    /// Where web's app connects to reach db.
    pub upstream: SocketAddr,
    /// Where db's sidecar takes peers in.
    pub public: SocketAddr,
    pub web_definition: Definition,
    pub db_definition: Definition,
    pub mesh: M,
}

impl Pair<Agent> {
    /// A pair at an embedded agent in front of `app`.
    pub fn local(app: SocketAddr) -> Self {
        Self::with(Agent::start(), app)
    }
}

impl Pair<Consul> {
    /// A pair at a real Consul in front of `app`.
    pub fn consul(app: SocketAddr) -> Self {
        Self::with(Consul::start(), app)
    }
}

impl<M: Mesh> Pair<M> {
    pub fn with(mesh: M, app: SocketAddr) -> Self {
        Self::tuned(mesh, app, |web| web, |db| db, |definition| definition)
    }

    /// A pair whose two processes and whose db registration differ from the usual.
    pub fn tuned(
        mesh: M,
        app: SocketAddr,
        web: impl FnOnce(Builder) -> Builder,
        db: impl FnOnce(Builder) -> Builder,
        define: impl FnOnce(Definition) -> Definition,
    ) -> Self {
        let upstream = ports::free_address();
        let db_definition = define(Definition::new("db").app(app));
        let web_definition = Definition::new("web").upstream("db", upstream);
        mesh.register(&db_definition);
        mesh.register(&web_definition);
        mesh.allow("web", "db");
        let db = db(Sidecar::of("db")).start(&mesh);
        let web = web(Sidecar::of("web")).start(&mesh);
        web.wait_endpoint();
        let public = db_definition.public;
        Self { web, db, upstream, public, web_definition, db_definition, mesh }
    }

    /// Waits until an echo comes through (for an app that echoes).
    pub fn wait_open(self) -> Self {
        wait_for("the first echo through the pair", PATIENCE, || {
            traffic::echo(self.upstream, b"first")
                .map_err(|error| format!("{error}\n{}\n{}", self.web.process.tail(), self.db.process.tail()))
        });
        self
    }

    pub fn echo(&self, bytes: &[u8]) -> io::Result<()> {
        traffic::echo(self.upstream, bytes)
    }

    /// Fails unless both processes run, nothing panicked and an echo comes through.
    pub fn assert_healthy(&mut self) {
        self.web.assert_healthy();
        self.db.assert_healthy();
        if let Err(error) = self.echo(b"still here") {
            panic!("the pair no longer serves: {error}\n{}\n{}", self.web.process.tail(), self.db.process.tail());
        }
    }
}

/// Either program as the sidecar of a service, as long as it lives.
pub enum AnySidecar {
    Ringfence(Sidecar),
    Builtin(Process),
}

impl AnySidecar {
    pub fn start(mesh: &dyn Mesh, service: &str, kind: Kind) -> Self {
        match kind {
            Kind::Ringfence => Self::Ringfence(Sidecar::start(mesh, service)),
            Kind::Builtin => {
                let mut command = Command::new(Consul::binary());
                command.args(["connect", "proxy", "-sidecar-for", service, "-http-addr", &mesh.address().to_string()]);
                if let Some(token) = mesh.token(service) {
                    command.args(["-token", &token]);
                }
                Self::Builtin(Process::start(&format!("consul connect proxy {service}"), &command))
            }
        }
    }

    /// Peers refused for want of an intention.
    pub fn denials(&self) -> usize {
        match self {
            Self::Ringfence(sidecar) => sidecar.closed("denied") as usize,
            Self::Builtin(process) => process.output().matches("authz call denied").count(),
        }
    }

    pub fn tail(&self) -> String {
        match self {
            Self::Ringfence(sidecar) => sidecar.process.tail(),
            Self::Builtin(process) => process.tail(),
        }
    }
}

/// Registers web and db at `mesh`, runs sidecars of these kinds and checks that only what is allowed comes through.
pub fn assert_two_services_talk(mesh: &dyn Mesh, web: Kind, db: Kind) -> (AnySidecar, AnySidecar) {
    let echo = super::Echo::start();
    let upstream = ports::free_address();
    mesh.register(&Definition::new("db").app(echo.address));
    mesh.register(&Definition::new("web").upstream("db", upstream));
    let db = AnySidecar::start(mesh, "db", db);
    let web = AnySidecar::start(mesh, "web", web);
    // Refusals count only when they come from db: before that, web may have had no endpoint or no certificate.
    wait_for("db refuses web, which no intention allows", PATIENCE, || {
        assert!(traffic::round_trip(upstream, b"no intention yet").is_err(), "denied by default, but an echo came through");
        if db.denials() > 0 { Ok(()) } else { Err(format!("{}\n{}", web.tail(), db.tail())) }
    });
    // Consul's own proxy dials the app before it knows the peer.
    if matches!(db, AnySidecar::Ringfence(_)) {
        assert_eq!(echo.accepted(), 0, "the app saw a connection that no intention allows");
    }
    mesh.allow("web", "db");
    wait_for("the first echo", PATIENCE, || {
        traffic::round_trip(upstream, b"first").map_err(|error| format!("{error}\n{}\n{}", web.tail(), db.tail()))
    });
    for seed in 0..20 {
        traffic::round_trip(upstream, &super::bytes(seed, 100_000)).expect("an echo of 100 kB");
    }
    (web, db)
}

/// The default entry that a service resolver test builds on.
pub fn resolver(name: &str, rest: &Value) -> Value {
    let mut entry = json!({"Kind": "service-resolver", "Name": name});
    for (key, value) in rest.as_object().into_iter().flatten() {
        entry[key] = value.clone();
    }
    entry
}
