//! The whole control plane against a scripted agent.

mod fake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fake::{Answer, Fake, Script};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::config::{AgentAddress, Login, Proxy, ServiceProxy, TokenSource, UpstreamFlag};
use crate::mesh::Service;
use crate::policy::{Authorized, DefaultPolicy, Denied};
use crate::store::{self, Viewer};
use crate::tls::fixtures::Ca;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(10);

struct Running {
    viewer: Viewer<Snapshot>,
    status: watch::Receiver<Status>,
    commands: mpsc::Sender<Command>,
    task: tokio::task::JoinHandle<Result<(), ControlError>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn settings(port: u16, proxies: Vec<Proxy>) -> config::Consul {
    let address = AgentAddress::Http { host: "127.0.0.1".into(), port, tls: false, prefix: String::new() };
    config::Consul { address, proxies, ..config::Consul::default() }
}

fn start(settings: config::Consul) -> Running {
    let (publisher, _readers) = store::new(Snapshot::default(), 1);
    let viewer = publisher.viewer();
    let (status_sender, status) = watch::channel(Status::default());
    let (commands, receiver) = mpsc::channel(4);
    let task = tokio::spawn(run(settings, 1, publisher, status_sender, receiver));
    Running { viewer, status, commands, task }
}

fn web() -> Vec<Proxy> {
    vec![Proxy::SidecarFor("web".into())]
}

impl Running {
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            let status = self.status.borrow().clone();
            assert!(start.elapsed() < PATIENCE, "{what} did not come; {status:?}");
            assert!(!self.task.is_finished(), "the control plane ended");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn until_ready(&self) {
        self.until("readiness", |running| running.status.borrow().ready && !running.endpoints().is_empty()).await;
    }

    fn service(&self) -> Option<Arc<Service>> {
        self.viewer.current().services.first().cloned()
    }

    fn generation(&self) -> u64 {
        self.viewer.current().generation
    }

    fn endpoints(&self) -> Vec<String> {
        let Some(service) = self.service() else { return Vec::new() };
        let targets = service.upstreams.iter().flat_map(|upstream| &upstream.targets);
        targets.flat_map(|target| target.endpoints.iter()).map(|endpoint| endpoint.address.to_string()).collect()
    }

    fn decide(&self, ca: &Ca, peer: &str) -> Result<Authorized, Denied> {
        self.service().expect("a service").intentions.decide(&ca.id(peer))
    }

    fn problem(&self) -> String {
        self.status.borrow().services.first().and_then(|service| service.problem.clone()).unwrap_or_default()
    }
}

#[tokio::test]
async fn a_sidecar_becomes_ready_and_follows_intentions_within_milliseconds() {
    let ca = Ca::new("t.consul");
    let fake = Fake::start(fake::mesh(&ca, &["web"])).await;
    let running = start(settings(fake.port, web()));
    running.until_ready().await;
    let service = running.service().expect("a service");
    assert_eq!((&*service.name, &*service.proxy_id), ("web", "web-sidecar-proxy"));
    assert_eq!(service.identity.as_ref().map(|identity| identity.svid.id.clone()), Some(ca.id("web")));
    assert_eq!(running.endpoints(), ["127.0.0.1:21001"]);
    assert!(running.decide(&ca, "api").is_err());
    assert!(fake.asked("connect/authorize").iter().all(|line| line.starts_with("POST")));
    assert!(fake.asked("health").iter().all(|line| !line.contains("passing")), "warning instances count");
    assert!(fake.asked("?").iter().all(|line| !line.contains("ns=") && !line.contains("partition=")));

    for (index, action) in [(20, "allow"), (21, "deny"), (22, "allow")] {
        let changed = Instant::now();
        fake.set("/v1/connect/intentions/match", Answer::ok(index, fake::intentions("web", action)));
        running.until(action, |running| running.decide(&ca, "api").is_ok() == (action == "allow")).await;
        assert!(changed.elapsed() < Duration::from_millis(90), "{action} took {:?}", changed.elapsed());
    }
}

#[tokio::test]
async fn an_index_that_jumps_or_falls_changes_nothing() {
    let ca = Ca::new("t.consul");
    let fake = Fake::start(fake::mesh(&ca, &["web"])).await;
    let running = start(settings(fake.port, web()));
    running.until_ready().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let generation = running.generation();
    for index in [183, 184, 3] {
        fake.change(|script| {
            for answer in script.answers.values_mut().filter(|answer| answer.index.is_some()) {
                answer.index = Some(index);
            }
        });
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(running.generation(), generation);
    assert!(fake.asked("ca/roots?index=184").len() == 1, "{:?}", fake.asked("ca/roots"));
    fake.set("/v1/health/connect/db", Answer::ok(4, fake::instances(21_002)));
    running.until("the new endpoint", |running| running.endpoints() == ["127.0.0.1:21002"]).await;
}

#[tokio::test]
async fn an_outage_changes_nothing_and_ends_quickly() {
    let ca = Ca::new("t.consul");
    let fake = Fake::start(fake::mesh(&ca, &["web"])).await;
    let running = start(settings(fake.port, web()));
    running.until_ready().await;
    let generation = running.generation();
    fake.change(|script| script.down = true);
    running.until("trouble", |running| running.problem().contains("No known Consul servers")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(running.generation(), generation);
    assert!(running.status.borrow().ready);
    assert!(fake.asked("health/connect/db").len() < 12, "retries back off: {:?}", fake.asked("health/connect/db"));
    fake.change(|script| {
        script.down = false;
        script.answers.insert("/v1/health/connect/db".into(), Answer::ok(30, fake::instances(21_003)));
    });
    running.until("recovery", |running| running.endpoints() == ["127.0.0.1:21003"] && running.problem().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(fake.asked("health/connect/db").last().is_some_and(|line| line.contains("index=30")), "it blocks again");
}

#[tokio::test]
async fn garbage_keeps_the_last_good_state() {
    let ca = Ca::new("t.consul");
    let fake = Fake::start(fake::mesh(&ca, &["web"])).await;
    fake.set("/v1/connect/intentions/match", Answer::ok(7, fake::intentions("web", "allow")));
    let running = start(settings(fake.port, web()));
    running.until_ready().await;
    let before = running.service().expect("a service");
    let other = Ca::new("t.consul");
    let oversized = vec![b' '; 9 << 20];
    let garbage: [(&str, Vec<u8>); 6] = [
        ("/v1/connect/intentions/match", b"{\"web\": 7}".to_vec()),
        ("/v1/health/connect/db", b"<html>".to_vec()),
        ("/v1/discovery-chain/db", oversized),
        ("/v1/agent/connect/ca/leaf/web", fake::leaf(&other, "web").to_string().into_bytes()),
        ("/v1/agent/connect/ca/roots", b"null".to_vec()),
        ("/v1/agent/service/web-sidecar-proxy", b"[]".to_vec()),
    ];
    for (path, body) in garbage {
        fake.set(path, Answer { status: 200, index: Some(50), hash: Some("h2".into()), body });
    }
    for text in ["intentions/match", "health/connect", "longer than", "refused", "ca/roots"] {
        running.until(text, |running| running.problem().contains(text)).await;
    }
    let after = running.service().expect("a service");
    assert!(Arc::ptr_eq(&before, &after), "nothing was published");
    assert!(running.decide(&ca, "api").is_ok());
}

#[tokio::test]
async fn a_token_file_is_read_again_when_the_agent_forgets_the_token() {
    let ca = Ca::new("t.consul");
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("token");
    std::fs::write(&file, "first\n").expect("written");
    let fake = Fake::start(Script { token: Some("first".into()), ..fake::mesh(&ca, &["web"]) }).await;
    let running = start(config::Consul { token: TokenSource::File(file.clone()), ..settings(fake.port, web()) });
    running.until_ready().await;
    std::fs::write(&file, "second\n").expect("written");
    fake.change(|script| {
        script.token = Some("second".into());
        script.answers.insert("/v1/health/connect/db".into(), Answer::ok(31, fake::instances(21_004)));
    });
    running.until("the new token", |running| running.endpoints() == ["127.0.0.1:21004"]).await;
    assert!(!fake.asked(" second").is_empty());
    std::fs::write(&file, "third\n").expect("written");
    running.commands.send(Command::Reload).await.expect("running");
    // The agent does not know it: what was learned stays, empty lists included.
    running
        .until("the refusal of the token of the reload", |running| {
            let next = fake.asked("match").len() as u64 + 100;
            fake.set("/v1/connect/intentions/match", Answer::ok(next, fake::intentions("web", "deny")));
            running.problem().contains("does not know the ACL token")
        })
        .await;
    assert!(!fake.asked(" third").is_empty());
    fake.set("/v1/health/connect/db", Answer::ok(32, "[]"));
    running.until("the empty list", |running| running.problem().contains("health/connect")).await;
    assert_eq!(running.endpoints(), ["127.0.0.1:21004"]);
    let status = format!("{:?}", running.status.borrow().clone());
    assert!(!status.contains("second") && !status.contains("first"));
}

#[tokio::test]
async fn a_login_is_renewed_and_given_back() {
    let ca = Ca::new("t.consul");
    let folder = tempfile::tempdir().expect("folder");
    let bearer = folder.path().join("jwt");
    std::fs::write(&bearer, "ey.bearer").expect("written");
    let fake = Fake::start(Script { token: Some("t1".into()), ..fake::mesh(&ca, &["web"]) }).await;
    let token = |secret: &str, ends: &str| {
        Answer::ok(0, format!(r#"{{"SecretID":"{secret}","AccessorID":"x","ExpirationTime":"{ends}"}}"#)).unindexed()
    };
    fake.set("/v1/acl/login", token("t1", "2020-01-01T00:00:00Z"));
    fake.set("/v1/acl/logout", Answer::ok(0, "true").unindexed());
    let login = Login { method: "jwt".into(), bearer_token_file: bearer, meta: vec![("host".into(), "h".into())] };
    let running = start(config::Consul { token: TokenSource::Login(login), ..settings(fake.port, web()) });
    running.until_ready().await;
    assert!(fake.asked("acl/login").iter().all(|line| line.ends_with(" -")), "a login carries no token");
    // The first token's life was over at once, so the shortest interval applies.
    fake.set("/v1/acl/login", token("t2", "2999-01-01T00:00:00Z"));
    fake.change(|script| script.token = None);
    running.until("the second login", |_| fake.asked("acl/login").len() == 2).await;
    running.until("the first logout", |_| fake.asked("acl/logout") == ["POST /v1/acl/logout t1"]).await;
    fake.set("/v1/health/connect/db", Answer::ok(33, fake::instances(21_005)));
    running.until("the new token", |_| !fake.asked(" t2").is_empty()).await;
    running.commands.send(Command::Stop).await.expect("running");
    let start = Instant::now();
    while fake.asked("/acl/logout t2").is_empty() {
        assert!(start.elapsed() < PATIENCE, "no logout at the end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_definition_that_goes_away_is_kept_and_asked_for() {
    let ca = Ca::new("t.consul");
    let fake = Fake::start(fake::mesh(&ca, &["web"])).await;
    let running = start(settings(fake.port, vec![Proxy::ProxyId("web-sidecar-proxy".into())]));
    running.until_ready().await;
    fake.set("/v1/agent/service/web-sidecar-proxy", Answer::status(404, "unknown service ID: web-sidecar-proxy"));
    running.until("the 404", |running| running.problem().contains("unknown service ID")).await;
    assert!(running.service().is_some(), "within the grace");
    fake.set("/v1/agent/service/web-sidecar-proxy", Answer::hashed("h9", fake::definition("web", 21_100, 9_555)));
    running
        .until("the new definition", |running| {
            let bind = |service: Arc<Service>| service.upstreams.first().map(|upstream| upstream.bind.to_string());
            running.service().and_then(bind).as_deref() == Some("127.0.0.1:9555") && running.problem().is_empty()
        })
        .await;
}

#[tokio::test]
async fn a_sidecar_that_is_not_registered_yet_is_waited_for() {
    let ca = Ca::new("t.consul");
    let mut script = fake::mesh(&ca, &["web"]);
    let listed = script.answers.insert("/v1/agent/services".into(), Answer::ok(0, "{}").unindexed()).expect("was there");
    let fake = Fake::start(script).await;
    let running = start(settings(fake.port, web()));
    running.until("the reason", |running| running.problem().contains("No sidecar proxy registered for web")).await;
    assert!(!running.status.borrow().ready);
    fake.set("/v1/agent/services", listed);
    running.until_ready().await;
}

#[tokio::test]
async fn consul_1_8_has_no_index_on_match_and_no_change_is_missed() {
    let ca = Ca::new("t.consul");
    let mut script = fake::mesh(&ca, &["web"]);
    script.answers.insert("/v1/connect/intentions/match".into(), Answer::ok(0, r#"{"web":null}"#).unindexed());
    script.answers.insert("/v1/connect/intentions".into(), Answer::ok(40, "[]"));
    script.answers.insert(
        "/v1/agent/connect/authorize".into(),
        Answer::ok(0, r#"{"Authorized":true,"Reason":"ACLs disabled, access is allowed by default"}"#).unindexed(),
    );
    let fake = Fake::start(script).await;
    let running = start(settings(fake.port, web()));
    running.until_ready().await;
    assert_eq!(running.service().expect("a service").intentions.default_policy(), DefaultPolicy::Allow);
    assert!(running.decide(&ca, "api").is_ok());
    for (index, action) in [(41, "deny"), (42, "allow"), (43, "deny")] {
        fake.change(|script| {
            script.answers.insert("/v1/connect/intentions".into(), Answer::ok(index, "[]"));
            script
                .answers
                .insert("/v1/connect/intentions/match".into(), Answer::ok(0, fake::intentions("web", action)).unindexed());
        });
        running.until(action, |running| running.decide(&ca, "api").is_ok() == (action == "allow")).await;
    }
    assert!(!fake.asked("match?by=destination&name=web&index=").is_empty(), "it blocks on the list's index");
}

#[tokio::test]
async fn cold_start_without_policy_denies() {
    let ca = Ca::new("t.consul");
    let mut script = fake::mesh(&ca, &["web"]);
    script.answers.insert("/v1/connect/intentions/match".into(), Answer::status(403, "Permission denied"));
    let fake = Fake::start(script).await;
    let running = start(settings(fake.port, web()));
    running.until("the reason", |running| running.problem().contains("intentions:read")).await;
    running.until("an identity", |running| running.service().is_some_and(|service| service.identity.is_some())).await;
    assert!(running.decide(&ca, "api").is_err());
    assert!(!running.status.borrow().ready);
}

#[tokio::test]
async fn sixty_four_services_share_watches_and_stay_within_the_agents_limit() {
    let ca = Ca::new("t.consul");
    let names: Vec<String> = (0..64).map(|number| format!("s{number}")).collect();
    let names_text: Vec<&str> = names.iter().map(String::as_str).collect();
    let fake = Fake::start(fake::mesh(&ca, &names_text)).await;
    fake.set("/v1/connect/intentions/match", Answer::ok(7, r#"{"any":null}"#));
    let sidecars = names.iter().take(60).map(|name| Proxy::ProxyId(format!("{name}-sidecar-proxy")));
    let flags = names.iter().skip(60).map(|name| {
        let upstreams = vec![UpstreamFlag { destination: "db".into(), bind: "127.0.0.1:9999".parse().expect("address") }];
        Proxy::Service(ServiceProxy { name: name.clone(), listen: None, service_address: None, upstreams })
    });
    let running = start(settings(fake.port, sidecars.chain(flags).collect()));
    running.until("64 services", |running| running.status.borrow().ready).await;
    let blocked = |text: &str| {
        let lines = fake.asked(text).into_iter().filter(|line| line.contains("index="));
        lines.map(|line| line.split("index=").next().map(str::to_owned)).collect::<std::collections::BTreeSet<_>>().len()
    };
    // Definitions come first and take places; those that intentions need are given up within a polling interval.
    running.until("a blocking query a leaf", |_| blocked("ca/leaf/") == 64).await;
    running.until("a blocking query an intention list", |_| blocked("intentions/match") == 60).await;
    assert_eq!(blocked("ca/roots"), 1, "the roots are watched once");
    running.until("a blocking query for the shared upstream", |_| blocked("health/connect/db") == 1).await;
    assert!(fake.asked("health/connect/db").len() < 16, "{:?}", fake.asked("health/connect/db"));
    assert!(fake.open() <= 176 && fake.open_most() < 190, "{} open, {} at most", fake.open(), fake.open_most());
}

#[tokio::test]
async fn settings_that_cannot_work_end_at_once() {
    let refused = |settings: config::Consul| async move {
        let (publisher, _readers) = store::new(Snapshot::default(), 1);
        let (status, _) = watch::channel(Status::default());
        let (_commands, receiver) = mpsc::channel(1);
        run(settings, 1, publisher, status, receiver).await.expect_err("refused").to_string()
    };
    assert!(refused(settings(1, Vec::new())).await.contains("-sidecar-for"));
    let bad_token = TokenSource::Static(zeroize::Zeroizing::new("a\nb".into()));
    let text = refused(config::Consul { token: bad_token, ..settings(1, web()) }).await;
    assert!(text.contains("token") && !text.contains('\n'), "{text}");
    let tls = config::AgentTls { ca_file: Some("/nonexistent/ca.pem".into()), ..config::AgentTls::default() };
    let address = AgentAddress::Http { host: "localhost".into(), port: 1, tls: true, prefix: String::new() };
    assert!(refused(config::Consul { tls, address, ..settings(1, web()) }).await.contains("/nonexistent/ca.pem"));
}

#[tokio::test]
async fn an_absent_agent_is_named_and_waited_for() {
    let ca = Ca::new("t.consul");
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = free.local_addr().expect("an address").port();
    drop(free);
    let running = start(settings(port, web()));
    running.until("the reason", |running| running.problem().contains("cannot be reached")).await;
    assert!(running.problem().contains("CONSUL_HTTP_ADDR"));
    assert!(!running.status.borrow().agent_reachable);
    assert!(running.service().is_none());
    drop(ca);
}
