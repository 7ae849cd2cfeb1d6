//! What the story plays on: agent, registrations, database, two sidecars.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::Flags;
use super::database;
use super::journal::Journal;
use super::story::Story;
use crate::agent::{Agent, AgentSettings, DefaultPolicy};
use crate::app::Sidecar;
use crate::cli::http::{self, Answer, Http};
use crate::config::{self, AgentAddress, LogTarget};

/// Calls.
pub(super) const SOURCE: &str = "airflow-worker";
/// Is called.
pub(super) const DESTINATION: &str = "warehouse";
/// How long the two sidecars may take until everything is in place.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Ports looked through for a free one.
const PORTS_TRIED_MAX: u16 = 200;

/// The running demo.
pub(super) struct Scene {
    pub(super) agent: Agent,
    pub(super) http: Http,
    pub(super) source: Sidecar,
    pub(super) destination: Sidecar,
    /// Where the worker's clients reach the warehouse.
    pub(super) upstream: SocketAddr,
    pub(super) source_log: Journal,
    pub(super) destination_log: Journal,
    database: JoinHandle<()>,
}

struct Ports {
    upstream: SocketAddr,
    source_public: SocketAddr,
    destination_public: SocketAddr,
    database: SocketAddr,
}

impl Scene {
    /// Sets the stage, telling what it does.
    pub(super) async fn open(flags: &Flags, folder: PathBuf, story: &mut Story) -> anyhow::Result<Self> {
        story.step("agent", "A Consul-compatible agent starts inside this process");
        let agent = start_agent(flags.agent_bind).await?;
        let http = Http::local(agent.address()).context("the demo's own agent")?;
        let roots = expect(http.get("/v1/agent/connect/ca/roots").await?, "the agent's roots")?.json();
        let trust_domain = roots["TrustDomain"].as_str().context("the agent's roots name no trust domain")?.to_owned();
        story.tell(
            "agent",
            &format!(
                "http://{}  trust domain {trust_domain}\ndefault policy: deny, so who talks to whom is a decision",
                agent.address()
            ),
            json!({ "address": agent.address(), "trust_domain": trust_domain, "default_policy": "deny" }),
        );

        story.step("services", "Two services register, and one intention lets the first reach the second");
        let (database_listener, database_address) = listen(15_432).await.context("a port for the database")?;
        let ports = Ports {
            upstream: free(19_191)?,
            source_public: free(21_000)?,
            destination_public: free(21_100)?,
            database: database_address,
        };
        register(&http, &ports).await?;
        set_intention(&http, "allow").await?;
        story.tell(
            "services",
            &format!(
                "{SOURCE}: upstream {DESTINATION} on {}\n{DESTINATION}: app on {database_address}, public listener on {}\n\
                 intention {SOURCE} -> {DESTINATION}: allow",
                ports.upstream, ports.destination_public
            ),
            json!({ "upstream": ports.upstream, "app": database_address, "public": ports.destination_public }),
        );

        story.step("sidecars", "A sidecar starts for each");
        let database = tokio::spawn(database::serve(database_listener));
        let source_path = folder.join(format!("{SOURCE}.log"));
        let destination_path = folder.join(format!("{DESTINATION}.log"));
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let sidecar = |service: &str, admin, log: &PathBuf| {
            Sidecar::start(settings(flags.workers, agent.address(), service, admin, log.clone()))
                .with_context(|| format!("the sidecar of {service} cannot start"))
        };
        let mut source = sidecar(SOURCE, flags.admin_bind, &source_path)?;
        let mut destination = sidecar(DESTINATION, any_port, &destination_path)?;
        for (service, sidecar) in [(SOURCE, &mut source), (DESTINATION, &mut destination)] {
            sidecar.wait_ready(READY_TIMEOUT).await.with_context(|| format!("the sidecar of {service}"))?;
            let admin = sidecar.admin_address();
            story.tell(
                "sidecar",
                &format!("{service}: ready, admin port http://{admin} (/metrics /ready /snapshot)"),
                json!({ "service": service, "admin": admin }),
            );
        }
        Ok(Self {
            agent,
            http,
            source,
            destination,
            upstream: ports.upstream,
            source_log: Journal::new(source_path),
            destination_log: Journal::new(destination_path),
            database,
        })
    }

    /// Ends everything.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.source.stop().await.with_context(|| format!("stopping the sidecar of {SOURCE}"))?;
        self.destination.stop().await.with_context(|| format!("stopping the sidecar of {DESTINATION}"))?;
        self.database.abort();
        self.agent.stop().await;
        Ok(())
    }
}

/// Writes the intention between the two services.
pub(super) async fn set_intention(http: &Http, action: &str) -> anyhow::Result<()> {
    let path = format!("/v1/connect/intentions/exact?source={}&destination={}", http::encode(SOURCE), http::encode(DESTINATION));
    expect(http.put(&path, &json!({ "SourceType": "consul", "Action": action })).await?, "writing the intention")?;
    Ok(())
}

fn expect(answer: Answer, what: &str) -> anyhow::Result<Answer> {
    if answer.is_ok() {
        return Ok(answer);
    }
    bail!("{what}: {}", answer.text())
}

async fn start_agent(bind: SocketAddr) -> anyhow::Result<Agent> {
    let settings = AgentSettings {
        bind,
        datacenter: config::DATACENTER.to_owned(),
        leaf_ttl: config::EMBEDDED_LEAF_TTL,
        default_policy: DefaultPolicy::Deny,
        ..AgentSettings::default()
    };
    Agent::start(settings).await.context("the embedded agent cannot start")
}

async fn register(http: &Http, ports: &Ports) -> anyhow::Result<()> {
    let upstream = json!([{
        "DestinationType": "service",
        "DestinationName": DESTINATION,
        "LocalBindAddress": ports.upstream.ip(),
        "LocalBindPort": ports.upstream.port(),
    }]);
    let services = [
        // The worker serves its task logs; nobody in this story asks for them.
        definition(SOURCE, ports.database.port(), ports.source_public, upstream),
        definition(DESTINATION, ports.database.port(), ports.destination_public, json!([])),
    ];
    for service in &services {
        expect(http.put("/v1/agent/service/register", service).await?, &format!("registering {}", service["Name"]))?;
    }
    Ok(())
}

/// A service with a sidecar, as one would write it for Consul.
fn definition(name: &str, port: u16, public: SocketAddr, upstreams: Value) -> Value {
    json!({
        "ID": name,
        "Name": name,
        "Address": "127.0.0.1",
        "Port": port,
        "Connect": { "SidecarService": {
            "Address": "127.0.0.1",
            "Port": public.port(),
            "Checks": [{
                "Name": "Connect Sidecar Listening",
                "TCP": public.to_string(),
                "Interval": "1s",
                "Status": "passing",
            }],
            "Proxy": { "Upstreams": upstreams },
        }},
    })
}

fn settings(workers: usize, agent: SocketAddr, service: &str, admin: SocketAddr, log: PathBuf) -> config::Sidecar {
    config::Sidecar {
        consul: config::Consul {
            address: AgentAddress::Http { host: agent.ip().to_string(), port: agent.port(), tls: false, prefix: String::new() },
            proxies: vec![config::Proxy::SidecarFor(service.to_owned())],
            ..config::Consul::default()
        },
        // Two sidecars, a database and a client share the cores: pinning would put workers on top of each other.
        plane: config::DataPlane { workers, pin: false, ..config::DataPlane::default() },
        admin: config::Admin { bind: admin, ..config::Admin::default() },
        connection_log: LogTarget::File(log),
        ..config::Sidecar::default()
    }
}

/// A loopback address that is free now, below the ports that the system gives to clients.
fn free(from: u16) -> anyhow::Result<SocketAddr> {
    for port in from..from + PORTS_TRIED_MAX {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if std::net::TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no free port from {from} to {}; end what holds them", from + PORTS_TRIED_MAX)
}

async fn listen(from: u16) -> anyhow::Result<(tokio::net::TcpListener, SocketAddr)> {
    let address = free(from)?;
    Ok((tokio::net::TcpListener::bind(address).await?, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_passed_over() {
        let first = free(15_900).expect("free");
        let _held = std::net::TcpListener::bind(first).expect("bind");
        let second = free(first.port()).expect("free");
        assert!(second.port() > first.port());
    }

    #[test]
    fn definitions_are_consuls() {
        let value = definition("web", 80, "127.0.0.1:21000".parse().expect("address"), json!([]));
        assert_eq!(value["Connect"]["SidecarService"]["Port"], 21_000);
        assert_eq!(value["Connect"]["SidecarService"]["Checks"][0]["TCP"], "127.0.0.1:21000");
    }
}
