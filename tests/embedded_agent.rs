//! Promise: the embedded agent answers over HTTP as a Consul agent does, to whoever follows Consul's rules.

use std::io::Write;
use std::time::{Duration, Instant};

use ringfence::agent::{Agent, AgentSettings, DefaultPolicy, Health, IntentionAction};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How long something that should happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(10);

struct Answer {
    status: u16,
    headers: String,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<String> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    }

    fn index(&self) -> u64 {
        self.header("X-Consul-Index").expect("an index").parse().expect("a number")
    }

    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).expect("JSON")
    }
}

/// One request on its own connection, with nothing between the test and the wire.
async fn ask(agent: &Agent, method: &str, path: &str, body: Option<Value>) -> Answer {
    raw(agent, method, path, body.map(|body| body.to_string()).unwrap_or_default(), "127.0.0.1", "").await
}

async fn raw(agent: &Agent, method: &str, path: &str, body: String, host: &str, extra: &str) -> Answer {
    let mut stream = TcpStream::connect(agent.address()).await.expect("connects");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{extra}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("answered");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let (status, headers) = head.split_once("\r\n").expect("a status line");
    let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Answer { status, headers: headers.to_owned(), body: body.to_owned() }
}

async fn get(agent: &Agent, path: &str) -> Answer {
    ask(agent, "GET", path, None).await
}

fn settings() -> AgentSettings {
    AgentSettings {
        bind: "127.0.0.1:0".parse().expect("an address"),
        check_interval: Duration::from_millis(100),
        ..AgentSettings::default()
    }
}

async fn start() -> Agent {
    Agent::start(settings()).await.expect("starts")
}

/// Starts a request and gives the agent time to put it to sleep.
macro_rules! asleep {
    ($agent:expr, $path:expr) => {{
        let (agent, path) = ($agent.clone(), $path);
        let waiting = tokio::spawn(async move { get(&agent, &path).await });
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert!(!waiting.is_finished(), "the query must wait");
        waiting
    }};
}

#[tokio::test]
async fn a_definition_blocks_on_its_hash_until_it_really_changes() {
    let agent = std::sync::Arc::new(start().await);
    let service = json!({"Name": "web", "Port": 8080, "Connect": {"SidecarService": {}}});
    agent.register(service.clone()).expect("registered");
    let first = get(&agent, "/v1/agent/service/web-sidecar-proxy").await;
    let hash = first.header("X-Consul-ContentHash").expect("a hash");
    assert_eq!(first.json()["ContentHash"], hash);
    let path = format!("/v1/agent/service/web-sidecar-proxy?wait=60s&hash={hash}");

    let waiting = asleep!(agent, path.clone());
    agent.register(service).expect("registered again");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "an unchanged registration does not end it");
    agent.put_config_entry(json!({"Kind": "proxy-defaults", "Config": {"local_connect_timeout_ms": 7}})).expect("stored");
    let changed = tokio::time::timeout(SOON, waiting).await.expect("soon").expect("joined");
    assert_eq!(changed.json()["Proxy"]["Config"]["local_connect_timeout_ms"], 7);

    let hash = changed.header("X-Consul-ContentHash").expect("a hash");
    let waiting = asleep!(agent, format!("/v1/agent/service/web-sidecar-proxy?wait=60s&hash={hash}"));
    assert!(agent.deregister("web"), "the parent takes its sidecar along");
    let gone = tokio::time::timeout(SOON, waiting).await.expect("soon").expect("joined");
    assert_eq!((gone.status, gone.body.as_str()), (404, "unknown service ID: web-sidecar-proxy"));
}

#[tokio::test]
async fn an_index_query_waits_for_its_own_topic_and_no_longer_than_asked() {
    let agent = std::sync::Arc::new(start().await);
    let first = get(&agent, "/v1/connect/intentions/match?by=destination&name=db").await;
    assert_eq!(first.json(), json!({"db": null}));
    let path = format!("/v1/connect/intentions/match?by=destination&name=db&wait=60s&index={}", first.index());
    let waiting = asleep!(agent, path);
    agent.register(json!({"Name": "other"})).expect("registered");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "a service is no news for intentions");
    agent.set_intention("web", "db", IntentionAction::Deny).expect("set");
    let second = tokio::time::timeout(SOON, waiting).await.expect("soon").expect("joined");
    assert_eq!(second.json()["db"][0]["Action"], "deny");
    assert!(second.index() > first.index());

    let begun = Instant::now();
    let same =
        get(&agent, &format!("/v1/connect/intentions/match?by=destination&name=db&wait=300ms&index={}", second.index())).await;
    assert_eq!(same.index(), second.index());
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    assert_eq!(get(&agent, "/v1/health/service/web?index=x").await.body, "Invalid index");
    assert_eq!(get(&agent, "/v1/health/service/web?index=1&wait=x").await.body, "Invalid wait time");
}

fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("PEM")
}

fn verifies(leaf: &Value, roots: &[String]) -> bool {
    let chain = certificates(leaf["CertPEM"].as_str().expect("a chain"));
    let roots: Vec<_> = roots.iter().flat_map(|pem| certificates(pem)).collect();
    let anchors: Vec<_> = roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).expect("an anchor")).collect();
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    webpki::EndEntityCert::try_from(&chain[0])
        .expect("a leaf")
        .verify_for_usage(algorithms.all, &anchors, &chain[1..], UnixTime::now(), webpki::KeyUsage::client_auth(), None, None)
        .is_ok()
}

#[tokio::test]
async fn a_rotation_reaches_waiting_queries_and_old_roots_still_verify() {
    let agent = std::sync::Arc::new(start().await);
    let old_leaf = get(&agent, "/v1/agent/connect/ca/leaf/web").await;
    let old_root = agent.roots_pem();
    let roots = get(&agent, "/v1/agent/connect/ca/roots").await;
    assert_eq!(roots.json()["Roots"].as_array().map(Vec::len), Some(1));
    let leaf_wait = asleep!(agent, format!("/v1/agent/connect/ca/leaf/web?wait=60s&index={}", old_leaf.index()));
    let roots_wait = asleep!(agent, format!("/v1/agent/connect/ca/roots?wait=60s&index={}", roots.index()));

    assert_eq!(ask(&agent, "PUT", "/v1/connect/ca/rotate", None).await.status, 200);
    let new_leaf = tokio::time::timeout(SOON, leaf_wait).await.expect("soon").expect("joined").json();
    let new_roots = tokio::time::timeout(SOON, roots_wait).await.expect("soon").expect("joined").json();
    let listed = new_roots["Roots"].as_array().expect("roots");
    assert_eq!(listed.iter().map(|root| root["Active"] == true).collect::<Vec<_>>(), [true, false]);
    assert_eq!(new_roots["TrustDomain"], roots.json()["TrustDomain"]);
    assert_eq!(certificates(new_leaf["CertPEM"].as_str().expect("a chain")).len(), 2);
    assert_ne!(new_leaf["PrivateKeyPEM"], old_leaf.json()["PrivateKeyPEM"]);
    assert!(verifies(&new_leaf, &old_root), "the presented chain ends in the old root");
    assert!(verifies(&new_leaf, &agent.roots_pem()[..1]), "and in the new one");
    assert!(verifies(&old_leaf.json(), &agent.roots_pem()), "an old leaf holds while its root is listed");
}

#[tokio::test]
async fn a_waiting_query_gets_the_renewed_leaf_and_retired_roots_go() {
    let short = AgentSettings { leaf_ttl: Duration::from_secs(4), old_root_retention: Duration::from_secs(1), ..settings() };
    let agent = std::sync::Arc::new(Agent::start(short).await.expect("starts"));
    let first = get(&agent, "/v1/agent/connect/ca/leaf/web").await;
    let path = format!("/v1/agent/connect/ca/leaf/web?wait=60s&index={}", first.index());
    let begun = Instant::now();
    let second = tokio::time::timeout(SOON, get(&agent, &path)).await.expect("renewed within its life");
    assert!(second.index() > first.index() && begun.elapsed() < Duration::from_secs(6));
    assert_ne!(second.json()["SerialNumber"], first.json()["SerialNumber"]);

    agent.rotate_ca().expect("rotated");
    assert_eq!(agent.roots_pem().len(), 2);
    let deadline = Instant::now() + SOON;
    while agent.roots_pem().len() > 1 {
        assert!(Instant::now() < deadline, "the retired root is never pruned");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn ca_configuration_rotates_and_refuses_as_consul_does() {
    let agent = start().await;
    let before = get(&agent, "/v1/connect/ca/roots").await.json()["ActiveRootID"].clone();
    let put =
        |config: Value| ask(&agent, "PUT", "/v1/connect/ca/configuration", Some(json!({"Provider": "consul", "Config": config})));
    let short = put(json!({"LeafCertTTL": "30m"})).await;
    assert_eq!(
        (short.status, short.body.as_str()),
        (500, "error configuring provider: leaf cert TTL must be greater or equal than 1h0m0s")
    );
    assert_eq!(
        get(&agent, "/v1/connect/ca/roots").await.json()["ActiveRootID"],
        before,
        "a refused configuration rotates nothing"
    );
    assert_eq!(put(json!({"LeafCertTTL": "2h"})).await.status, 200);
    assert_ne!(get(&agent, "/v1/connect/ca/roots").await.json()["ActiveRootID"], before);
    assert_eq!(get(&agent, "/v1/connect/ca/configuration").await.json()["Config"]["LeafCertTTL"], "2h0m0s");
    assert!(put(json!({"PrivateKey": "nonsense"})).await.body.contains("not an EC P-256 key"));
}

#[tokio::test]
async fn intentions_are_matched_in_order_and_decide() {
    let agent = Agent::start(AgentSettings { default_policy: DefaultPolicy::Deny, ..settings() }).await.expect("starts");
    for (source, destination, action) in [
        ("*", "*", IntentionAction::Deny),
        ("web", "*", IntentionAction::Allow),
        ("*", "db", IntentionAction::Deny),
        ("web", "db", IntentionAction::Allow),
    ] {
        agent.set_intention(source, destination, action).expect("set");
    }
    let list = get(&agent, "/v1/connect/intentions/match?by=destination&name=db").await;
    assert_eq!(list.header("X-Consul-Default-ACL-Policy").as_deref(), Some("deny"));
    let list = list.json();
    let order: Vec<_> =
        list["db"].as_array().expect("a list").iter().map(|i| i["Precedence"].as_u64().expect("a number")).collect();
    assert_eq!(order, [9, 8, 6, 5]);
    let by_source = get(&agent, "/v1/connect/intentions/match?by=source&name=api").await.json();
    assert_eq!(by_source["api"].as_array().map(Vec::len), Some(2));

    let authorize = |source: &str, target: &str| {
        let uri = format!("spiffe://{}/ns/default/dc/dc1/svc/{source}", agent.trust_domain());
        ask(&agent, "POST", "/v1/agent/connect/authorize", Some(json!({"Target": target, "ClientCertURI": uri})))
    };
    let allowed = authorize("web", "db").await.json();
    assert_eq!(allowed["Reason"], "Matched L4 intention: default/web => default/db (Precedence: 9, Action: ALLOW)");
    assert_eq!(authorize("api", "db").await.json()["Authorized"], false);
    agent.delete_intention("*", "*").expect("deleted");
    assert_eq!(authorize("api", "cache").await.json()["Reason"], "Default behavior configured by ACLs");
    let check = get(&agent, "/v1/connect/intentions/check?source=web&destination=db").await.json();
    assert_eq!(check, json!({"Allowed": true}));
    for (body, text) in [
        (json!({"Target": "b", "X": 1}), "Bad request: Request decode failed: json: unknown field \"X\""),
        (json!({"Target": "", "ClientCertURI": "spiffe://x.consul"}), "Bad request: Target service must be specified"),
        (json!({"Target": "b", "ClientCertURI": "foo"}), "Bad request: ClientCertURI not a valid Connect identifier"),
        (
            json!({"Target": "b", "ClientCertURI": "spiffe://x.consul"}),
            "Bad request: ClientCertURI not a valid Service identifier",
        ),
    ] {
        let answer = ask(&agent, "POST", "/v1/agent/connect/authorize", Some(body)).await;
        assert_eq!((answer.status, answer.body.as_str()), (400, text));
    }
}

#[tokio::test]
async fn intentions_by_id_and_by_name_are_one_store() {
    let agent = start().await;
    let a_to_b = json!({"SourceName": "a", "DestinationName": "b", "Action": "deny", "SourceType": "consul"});
    let id = ask(&agent, "POST", "/v1/connect/intentions", Some(a_to_b.clone())).await.json()["ID"]
        .as_str()
        .expect("an id")
        .to_owned();
    let again = ask(&agent, "POST", "/v1/connect/intentions", Some(a_to_b)).await;
    assert_eq!(again.status, 500);
    assert!(again.body.starts_with("duplicate intention found: DENY default/a => default/b (ID: "), "{}", again.body);
    assert_eq!(get(&agent, &format!("/v1/connect/intentions/{id}")).await.json()["SourceName"], "a");
    assert_eq!(get(&agent, "/v1/connect/intentions/exact?source=a&destination=b").await.json()["ID"], id);
    let sources = get(&agent, "/v1/config/service-intentions/b").await.json()["Sources"].clone();
    assert_eq!((&sources[0]["Name"], &sources[0]["Action"]), (&json!("a"), &json!("deny")));

    let allow = json!({"SourceName": "a", "DestinationName": "b", "Action": "allow"});
    ask(&agent, "PUT", &format!("/v1/connect/intentions/{id}"), Some(allow)).await.json();
    assert_eq!(get(&agent, "/v1/connect/intentions/check?source=a&destination=b").await.json()["Allowed"], true);
    ask(&agent, "PUT", "/v1/connect/intentions/exact?source=c&destination=b", Some(json!({"Action": "deny"}))).await.json();
    assert_eq!(get(&agent, "/v1/connect/intentions?filter=SourceName==c").await.json().as_array().map(Vec::len), Some(1));
    assert_eq!(ask(&agent, "DELETE", &format!("/v1/connect/intentions/{id}"), None).await.json(), true);
    assert_eq!(get(&agent, &format!("/v1/connect/intentions/{id}")).await.status, 404);
    assert_eq!(ask(&agent, "DELETE", "/v1/connect/intentions/exact?source=c&destination=b", None).await.json(), true);
    let gone = get(&agent, "/v1/config/service-intentions/b").await;
    assert_eq!((gone.status, gone.body.as_str()), (404, "Config entry not found for \"service-intentions\" / \"b\""));
    assert!(gone.index() > 1, "a client can wait for it to come back");
}

#[tokio::test]
async fn an_intention_of_a_config_entry_has_an_id_of_its_names() {
    let agent = start().await;
    let sources = json!([{"Name": "a", "Action": "deny"}, {"Name": "a", "Peer": "east", "Action": "deny"}]);
    agent.put_config_entry(json!({"Kind": "service-intentions", "Name": "b", "Sources": sources})).expect("stored");
    let list = get(&agent, "/v1/connect/intentions").await.json();
    let ids: Vec<&str> = list.as_array().expect("a list").iter().map(|one| one["ID"].as_str().expect("an ID")).collect();
    let [id, east] = ids.as_slice() else { panic!("{list}") };
    let (path, east) = (format!("/v1/connect/intentions/{id}"), format!("/v1/connect/intentions/{east}"));
    assert_eq!(get(&agent, "/v1/connect/intentions/match?by=destination&name=b").await.json()["b"], list);

    let renamed = json!({"SourceName": "c", "DestinationName": "b", "Action": "allow"});
    let refused = ask(&agent, "PUT", &path, Some(renamed)).await;
    assert_eq!(refused.status, 500);
    assert!(refused.body.contains(id) && refused.body.contains("delete it and create the other one"), "{}", refused.body);
    let allow = json!({"SourceName": "a", "DestinationName": "b", "Action": "allow"});
    assert_eq!(ask(&agent, "PUT", &path, Some(allow)).await.json()["ID"], *id);
    assert_eq!(get(&agent, &path).await.json()["Action"], "allow");
    assert_eq!(get(&agent, "/v1/config/service-intentions/b").await.json()["Sources"][0].get("LegacyID"), None);

    assert_eq!(ask(&agent, "DELETE", &path, None).await.json(), true);
    assert_eq!(get(&agent, &path).await.status, 404);
    assert_eq!(get(&agent, &east).await.json()["SourcePeer"], "east", "the one of the same name at a peer stays");
}

#[tokio::test]
async fn registration_is_strict_and_health_follows_checks() {
    let agent = start().await;
    let register = |body: Value| ask(&agent, "PUT", "/v1/agent/service/register", Some(body));
    let refused = register(json!({"Name": "web", "Foo": {}})).await;
    assert_eq!((refused.status, refused.body.as_str()), (400, "Request decode failed: json: unknown field \"Foo\""));
    assert_eq!(register(json!({"Port": 1})).await.body, "Missing service name");

    // An app that listens makes the sidecar's own check pass; the alias follows the parent's TTL check.
    let app = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let port = app.local_addr().expect("bound").port();
    register(json!({"name": "web", "port": 1, "check": {"ttl": "60s"}, "meta": {"version": "v1"},
        "connect": {"sidecar_service": {"port": port}}}))
    .await;
    assert!(get(&agent, "/v1/health/connect/web?passing").await.json().as_array().expect("a list").is_empty());
    assert_eq!(get(&agent, "/v1/agent/health/service/id/web").await.status, 503);
    assert_eq!(ask(&agent, "PUT", "/v1/agent/check/pass/service:web", None).await.status, 200);
    let deadline = Instant::now() + SOON;
    let path = "/v1/health/connect/web?passing=1&filter=Service.Meta.version%20%3D%3D%20v1";
    while get(&agent, path).await.json().as_array().expect("a list").is_empty() {
        assert!(Instant::now() < deadline, "{}", get(&agent, "/v1/agent/checks").await.body);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let text = get(&agent, "/v1/agent/health/service/id/web?format=text").await;
    assert_eq!((text.status, text.body.as_str()), (200, "passing"));
    assert_eq!(ask(&agent, "PUT", "/v1/agent/check/warn/service:web", None).await.status, 200);
    assert_eq!(get(&agent, "/v1/agent/health/service/name/web").await.status, 429);
    agent.set_health("web-sidecar-proxy", Some(Health::Critical)).expect("pinned");
    assert_eq!(get(&agent, "/v1/agent/health/service/id/web-sidecar-proxy").await.status, 503);

    let by_kind = get(
        &agent,
        "/v1/agent/services?filter=Kind%20%3D%3D%20%22connect-proxy%22%20and%20Proxy.DestinationServiceID%20%3D%3D%20web",
    )
    .await;
    assert_eq!(by_kind.json().as_object().expect("a map").keys().collect::<Vec<_>>(), ["web-sidecar-proxy"]);
    assert_eq!(get(&agent, "/v1/catalog/services").await.json(), json!({"consul": [], "web": [], "web-sidecar-proxy": []}));
}

#[tokio::test]
async fn chains_and_queries_answer() {
    let agent = start().await;
    agent.register(json!({"name": "db", "connect": {"sidecar_service": {}}})).expect("registered");
    agent.set_health("db-sidecar-proxy", Some(Health::Passing)).expect("pinned");
    agent
        .put_config_entry(
            json!({"Kind": "service-resolver", "Name": "old", "Redirect": {"Service": "db"}, "ConnectTimeout": "3s"}),
        )
        .expect("stored");
    let chain =
        ask(&agent, "POST", "/v1/discovery-chain/old?compile-dc=dc1", Some(json!({"OverrideConnectTimeout": "2s"}))).await.json();
    assert_eq!(chain["Chain"]["StartNode"], "resolver:db.default.dc1");
    assert_eq!(chain["Chain"]["Targets"]["db.default.dc1"]["SNI"], format!("db.default.dc1.internal.{}", agent.trust_domain()));
    agent.put_query(json!({"Name": "db-query", "Service": {"Service": "db", "OnlyPassing": true}})).expect("stored");
    let found = get(&agent, "/v1/query/db-query/execute?connect=true").await.json();
    assert_eq!(found["Nodes"][0]["Service"]["Proxy"]["DestinationServiceName"], "db");
    assert_eq!(get(&agent, "/v1/query/none/execute").await.body, "Query not found");
}

#[tokio::test]
async fn what_consul_refuses_is_refused_and_the_web_is_kept_out() {
    let agent = start().await;
    for (method, path, status, text) in [
        ("GET", "/v1/acl/token/self", 401, "ACL support disabled"),
        ("GET", "/v1/health/service/web?dc=elsewhere", 500, "No path to datacenter"),
        ("GET", "/v1/config/nope/x", 400, "invalid config entry kind: nope"),
        ("POST", "/v1/agent/services", 405, "method POST not allowed"),
        ("GET", "/v1/nope", 404, "Invalid URL path: not a recognized HTTP API endpoint"),
    ] {
        let answer = ask(&agent, method, path, None).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, text), "{path}");
        assert_eq!(answer.header("X-Consul-Default-ACL-Policy").as_deref(), Some("allow"));
    }
    assert_eq!(get(&agent, "/v1/health/service/web?ns=default").await.status, 400);
    assert_eq!(raw(&agent, "GET", "/v1/agent/connect/ca/leaf/web", String::new(), "evil.example", "").await.status, 403);
    assert_eq!(
        raw(&agent, "GET", "/v1/agent/connect/ca/leaf/web", String::new(), "localhost", "Origin: http://a\r\n").await.status,
        403
    );
    let huge = "x".repeat(2 << 20);
    assert_eq!(raw(&agent, "PUT", "/v1/agent/service/register", huge, "127.0.0.1", "").await.status, 413);
}

#[tokio::test]
async fn a_file_is_loaded_reloaded_and_kept_when_it_goes_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("mesh.hcl");
    let write = |text: &str| {
        // As editors do: a new file that replaces the old one.
        let mut file = tempfile::NamedTempFile::new_in(folder.path()).expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file.persist(&path).expect("renamed");
    };
    write("service { nam = \"web\" }");
    let error = Agent::start(AgentSettings { file: Some(path.clone()), ..settings() }).await.expect_err("refused").to_string();
    assert!(error.contains("mesh.hcl: service without a name: unknown field \"nam\""), "{error}");

    write("service { name = \"web\" port = 80 connect { sidecar_service {} } }");
    let agent = Agent::start(AgentSettings { file: Some(path.clone()), ..settings() }).await.expect("starts");
    agent.register(json!({"Name": "api"})).expect("registered");
    let services = async || {
        let all = get(&agent, "/v1/agent/services").await.json();
        all.as_object().expect("a map").keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(services().await, ["api", "web", "web-sidecar-proxy"]);
    write("service {");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(services().await, ["api", "web", "web-sidecar-proxy"], "a wrong file changes nothing");
    write("services = [{ name = \"db\" }]\nintentions { source_name = \"web\" destination_name = \"db\" action = \"deny\" }");
    let deadline = Instant::now() + SOON;
    while services().await != ["api", "db"] {
        assert!(Instant::now() < deadline, "never reloaded: {:?}", services().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(get(&agent, "/v1/connect/intentions/check?source=web&destination=db").await.json()["Allowed"], false);
}

#[tokio::test]
async fn stopping_answers_who_waits() {
    let agent = start().await;
    let index = get(&agent, "/v1/connect/ca/roots").await.index();
    let address = agent.address();
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let request =
        format!("GET /v1/connect/ca/roots?wait=60s&index={index} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(150)).await;
    let begun = Instant::now();
    agent.stop().await;
    assert!(begun.elapsed() < SOON);
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("answered");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(TcpStream::connect(address).await.is_err(), "nothing listens any more");
}
