//! Promise: Consul's own command line and its built-in proxy work against the embedded agent as against a real one.
//!
//! Needs the Consul program: RINGFENCE_CONSUL, or the place where `scripts/test` puts it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use ringfence::agent::{Agent, AgentSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// How long a proxy may take to come up, or a change to reach it.
const SOON: Duration = Duration::from_secs(30);
/// How long one exchange through both proxies may take.
const EXCHANGE: Duration = Duration::from_secs(5);

fn consul() -> PathBuf {
    let path = std::env::var_os("RINGFENCE_CONSUL")
        .map_or_else(|| PathBuf::from("/var/cache/ringfence/consul-1.8.7/usr/bin/consul"), PathBuf::from);
    assert!(path.is_file(), "no Consul program at {}: run scripts/test, or set RINGFENCE_CONSUL", path.display());
    path
}

/// Runs `consul …` and gives back its exit and what it printed.
async fn run(agent: &Agent, words: &[&str]) -> (bool, String) {
    let address = format!("http://{}", agent.address());
    let output = Command::new(consul()).args(words).env("CONSUL_HTTP_ADDR", address).env_remove("CONSUL_HTTP_TOKEN").output();
    let output = tokio::time::timeout(SOON, output).await.expect("ends in time").expect("runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Runs `consul …`, which must succeed and print `expected`.
async fn succeeds(agent: &Agent, words: &[&str], expected: &str) {
    let (success, text) = run(agent, words).await;
    assert!(success && text.contains(expected), "consul {words:?} printed {text:?}, not {expected:?}");
}

/// A free port below the ephemeral range, which a later bind cannot lose to an outgoing connection.
async fn free_port(from: u16) -> u16 {
    for port in from..from + 500 {
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            return port;
        }
    }
    panic!("no free port in {from}..{}", from + 500);
}

/// A TCP echo on a free port.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                // A client that goes away ends its own echo only.
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

/// Consul's built-in proxy; ends with the test.
fn proxy(agent: &Agent, service: &str) -> Child {
    let address = format!("-http-addr=http://{}", agent.address());
    Command::new(consul())
        .args(["connect", "proxy", "-sidecar-for", service, &address])
        .env_remove("CONSUL_HTTP_ADDR")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("starts")
}

/// One exchange through both proxies on a new connection.
async fn exchange(port: u16) -> bool {
    let attempt = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(b"hello through the mesh").await.ok()?;
        let mut answer = [0; 22];
        stream.read_exact(&mut answer).await.ok()?;
        (answer == *b"hello through the mesh").then_some(())
    };
    tokio::time::timeout(EXCHANGE, attempt).await.ok().flatten().is_some()
}

async fn until(port: u16, works: bool) {
    let deadline = Instant::now() + SOON;
    while exchange(port).await != works {
        assert!(Instant::now() < deadline, "an exchange never became {works}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn start() -> Agent {
    start_with(None).await
}

async fn start_with(file: Option<PathBuf>) -> Agent {
    let settings = AgentSettings {
        file,
        bind: "127.0.0.1:0".parse().expect("an address"),
        check_interval: Duration::from_millis(200),
        ..AgentSettings::default()
    };
    Agent::start(settings).await.expect("starts")
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}

#[tokio::test]
async fn the_built_in_proxy_carries_traffic_through_denial_and_rotation() {
    let (agent, folder) = (start().await, tempfile::tempdir().expect("a folder"));
    let app = echo().await.port();
    let (public_db, public_web, upstream) = (free_port(22_000).await, free_port(22_500).await, free_port(23_000).await);
    let file = write(
        folder.path(),
        "services.hcl",
        &format!(
            "services {{\n name = \"db\"\n port = {app}\n connect {{ sidecar_service {{ port = {public_db} }} }}\n}}\n\
             services {{\n name = \"web\"\n port = 1\n connect {{ sidecar_service {{ port = {public_web}\n proxy {{\n \
             upstreams {{ destination_name = \"db\" local_bind_port = {upstream} }}\n }} }} }}\n}}\n"
        ),
    );
    succeeds(&agent, &["services", "register", &file], "Registered service: db").await;
    assert_eq!(agent.port_of("db-sidecar-proxy"), Some(public_db));
    let _proxies = (proxy(&agent, "db"), proxy(&agent, "web"));
    until(upstream, true).await;

    let mut live = TcpStream::connect(("127.0.0.1", upstream)).await.expect("connects");
    succeeds(&agent, &["intention", "create", "-deny", "web", "db"], "Created: web => db (deny)").await;
    until(upstream, false).await;
    succeeds(&agent, &["intention", "create", "-replace", "-allow", "web", "db"], "").await;
    until(upstream, true).await;

    let config = write(folder.path(), "ca.json", r#"{"Provider": "consul", "Config": {"LeafCertTTL": "3h"}}"#);
    succeeds(&agent, &["connect", "ca", "set-config", "-config-file", &config], "Configuration updated!").await;
    assert_eq!(agent.roots_pem().len(), 2);
    for _ in 0..20 {
        assert!(exchange(upstream).await, "a new connection failed during the rotation");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    live.write_all(b"x").await.expect("the connection from before the rotation lives");
    let mut byte = [0];
    tokio::time::timeout(EXCHANGE, live.read_exact(&mut byte)).await.expect("in time").expect("echoed");
    agent.stop().await;
}

/// The ID that the list gives to the intention.
async fn intention_id(agent: &Agent, source: &str, destination: &str) -> String {
    let (success, text) = run(agent, &["intention", "get", source, destination]).await;
    let id = text.lines().find_map(|line| line.strip_prefix("ID:")).map(|id| id.trim().to_owned());
    assert!(success && id.as_ref().is_some_and(|id| id.len() == 36), "{text}");
    id.expect("checked")
}

#[tokio::test]
async fn the_command_line_changes_intentions_that_a_file_declares() {
    let folder = tempfile::tempdir().expect("a folder");
    let bootstrap = "config_entries {\n bootstrap = [\n  { kind = \"service-intentions\" name = \"db\"\n    sources = [\n     \
        { name = \"web\" action = \"deny\" },\n     { name = \"api\" action = \"allow\" }\n    ] }\n ]\n}\n";
    let alone = "kind = \"service-intentions\"\nname = \"db\"\nsources = [\n { name = \"web\" action = \"deny\" },\n \
        { name = \"api\" action = \"allow\" }\n]\n";
    let mut ids = Vec::new();
    for (name, text) in [("bootstrap.hcl", bootstrap), ("entry.hcl", alone)] {
        let agent = start_with(Some(write(folder.path(), name, text).into())).await;
        succeeds(&agent, &["intention", "get", "web", "db"], "deny").await;
        let id = intention_id(&agent, "web", "db").await;
        succeeds(&agent, &["intention", "get", &id], "web").await;

        succeeds(&agent, &["intention", "create", "-replace", "-allow", "web", "db"], "").await;
        succeeds(&agent, &["intention", "check", "web", "db"], "Allowed").await;
        assert_eq!(intention_id(&agent, "web", "db").await, id, "a replacement keeps the ID");
        let (success, text) = run(&agent, &["intention", "create", "-deny", "web", "db"]).await;
        assert!(!success && text.contains("duplicate intention found") && text.contains(&id), "{text}");

        succeeds(&agent, &["intention", "delete", "web", "db"], "Intention deleted.").await;
        let (success, text) = run(&agent, &["intention", "get", "web", "db"]).await;
        assert!(!success && text.contains("not found"), "{text}");
        let api = intention_id(&agent, "api", "db").await;
        assert_ne!(api, id);
        succeeds(&agent, &["intention", "delete", &api], "Intention deleted.").await;
        let (success, text) = run(&agent, &["intention", "delete", &api]).await;
        assert!(!success && text.contains(&api), "{text}");
        agent.stop().await;
        ids.push((id, api));
    }
    assert_eq!(ids[0], ids[1], "an ID outlives a restart and the way of declaring");
}

#[tokio::test]
async fn the_command_line_reads_and_writes_everything_that_an_operator_uses() {
    let (agent, folder) = (start().await, tempfile::tempdir().expect("a folder"));
    let file = write(
        folder.path(),
        "web.json",
        r#"{"service": {"name": "web", "port": 1, "tags": ["blue"], "connect": {"sidecar_service": {}}}}"#,
    );
    succeeds(&agent, &["services", "register", &file], "Registered service: web").await;
    succeeds(&agent, &["catalog", "services", "-tags"], "blue").await;
    succeeds(&agent, &["catalog", "services"], "web-sidecar-proxy").await;
    succeeds(&agent, &["catalog", "nodes"], "127.0.0.1").await;
    succeeds(&agent, &["catalog", "datacenters"], "dc1").await;

    succeeds(&agent, &["intention", "create", "-deny", "a", "b"], "Created: a => b (deny)").await;
    let (success, text) = run(&agent, &["intention", "create", "-deny", "a", "b"]).await;
    assert!(!success && text.contains("duplicate intention found"), "{text}");
    succeeds(&agent, &["intention", "get", "a", "b"], "deny").await;
    succeeds(&agent, &["intention", "match", "b"], "a => b (deny)").await;
    let (success, text) = run(&agent, &["intention", "check", "a", "b"]).await;
    assert!(!success && text.contains("Denied"), "{text}");
    succeeds(&agent, &["intention", "delete", "a", "b"], "Intention deleted.").await;
    succeeds(&agent, &["intention", "check", "a", "b"], "Allowed").await;

    succeeds(&agent, &["connect", "ca", "get-config"], "\"LeafCertTTL\": \"72h0m0s\"").await;
    let entry = write(
        folder.path(),
        "resolver.hcl",
        "Kind = \"service-resolver\"\nName = \"web\"\nConnectTimeout = \"3s\"\nSubsets = { v1 = { Filter = \"Service.Meta.version == v1\" } }\n",
    );
    succeeds(&agent, &["config", "write", &entry], "").await;
    succeeds(&agent, &["config", "list", "-kind", "service-resolver"], "web").await;
    succeeds(&agent, &["config", "read", "-kind", "service-resolver", "-name", "web"], "\"ConnectTimeout\": \"3s\"").await;
    succeeds(&agent, &["config", "delete", "-kind", "service-resolver", "-name", "web"], "Config entry deleted").await;
    let (success, text) = run(&agent, &["config", "read", "-kind", "service-resolver", "-name", "web"]).await;
    assert!(!success && text.contains("Config entry not found"), "{text}");

    succeeds(&agent, &["maint", "-enable", "-service", "web", "-reason", "test"], "Service maintenance is now enabled").await;
    succeeds(&agent, &["maint", "-disable", "-service", "web"], "Service maintenance is now disabled").await;
    succeeds(&agent, &["services", "deregister", "-id", "web"], "Deregistered service: web").await;
    let (success, text) = run(&agent, &["catalog", "services"]).await;
    assert!(success && !text.contains("web"), "{text}");
    agent.stop().await;
}
