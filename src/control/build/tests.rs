//! The snapshot that a state makes: listeners, targets, what stays the same `Arc`, and what is refused.

use std::time::{Duration, Instant};

use super::*;
use crate::control::consul::watch::checks::Exposed;
use crate::control::consul::watch::health::{self, State as Health};
use crate::control::consul::watch::{Event, Name, Update, What};
use crate::control::consul::wire;
use crate::control::report;
use crate::policy::{Action, DefaultPolicy, Intention};
use crate::tls::fixtures::{Ca, chain_pem, key_pem, now};

fn name(service: &str) -> Name {
    Name { service: service.into(), namespace: String::new(), partition: String::new() }
}

struct Bench {
    state: State,
    ca: Ca,
    published: Vec<Arc<Service>>,
}

impl Bench {
    fn new() -> Self {
        let settings =
            config::Consul { proxies: vec![config::Proxy::SidecarFor("airflow-worker".into())], ..config::Consul::default() };
        Self { state: State::new(&settings, 1), ca: Ca::new("t.consul"), published: Vec::new() }
    }

    fn tell(&mut self, key: Key, update: Update) -> super::super::state::Urgency {
        self.state.apply(Event { key, what: What::Data(update) }, Instant::now(), now())
    }

    fn define(&mut self) {
        let service = serde_json::from_value(crate::control::fixture("agent-service-sidecar")).expect("parses");
        self.tell(Key::Definition(0), Update::Definition(Box::new(service)));
    }

    fn identify(&mut self) {
        let roots = wire::Roots {
            active_root_id: "a".into(),
            trust_domain: "t.consul".into(),
            roots: vec![wire::Root {
                id: "a".into(),
                root_cert: chain_pem(std::slice::from_ref(self.ca.certificate())),
                signing_key_id: String::new(),
            }],
        };
        self.tell(Key::Roots, Update::Roots(roots));
        let svid = self.ca.svid("airflow-worker");
        let leaf = wire::Leaf {
            cert_pem: chain_pem(&svid.chain),
            private_key_pem: wire::Private(zeroize::Zeroizing::new(key_pem(&svid.key))),
        };
        self.tell(Key::Leaf(name("airflow-worker")), Update::Leaf(leaf));
    }

    /// The agent came back as another cluster, and our new leaf is not there yet.
    fn other_trust_domain(&mut self) {
        let other = Ca::new("other.consul");
        let pem = chain_pem(std::slice::from_ref(other.certificate()));
        let root = wire::Root { id: "b".into(), root_cert: pem, signing_key_id: String::new() };
        let roots = wire::Roots { active_root_id: "b".into(), trust_domain: "other.consul".into(), roots: vec![root] };
        self.tell(Key::Roots, Update::Roots(roots));
    }

    /// Answers every chain of the definition with one target in `datacenter`, reached as `gateway` says.
    fn chains(&mut self, datacenter: &str, gateway: chain::Gateway) {
        for key in self.state.wanted() {
            let Key::Chain(ask) = key else { continue };
            let chain = chain::Chain {
                targets: vec![chain::Target {
                    id: format!("{}.default.{datacenter}", ask.name.service),
                    sni: format!("{}.sni", ask.name.service),
                    name: ask.name.clone(),
                    datacenter: datacenter.into(),
                    filter: String::new(),
                    only_passing: false,
                    gateway,
                }],
                connect_timeout: Some(Duration::from_secs(3)),
                balance: Balance::RoundRobin,
                is_default: true,
                notes: Vec::new(),
            };
            self.tell(Key::Chain(ask), Update::Chain(chain));
        }
    }

    fn health(&mut self, service: &str, datacenter: &str, kind: health::Kind, list: Vec<Instance>) {
        let ask = health::Ask { kind, name: name(service), datacenter: datacenter.into(), filter: String::new() };
        assert!(self.state.wanted().contains(&Key::Health(ask.clone())), "{ask:?} is watched");
        self.tell(Key::Health(ask), Update::Instances(list));
    }

    fn build(&mut self) -> Vec<Arc<Service>> {
        self.published = services(&self.state, &self.published);
        self.published.clone()
    }

    fn targets(&mut self, upstream: &str) -> Vec<Arc<Target>> {
        let services = self.build();
        services[0].upstreams.iter().find(|candidate| &*candidate.name == upstream).expect("the upstream").targets.clone()
    }
}

fn addresses(target: &Target) -> Vec<(String, bool)> {
    target.endpoints.iter().map(|endpoint| (endpoint.address.to_string(), endpoint.healthy)).collect()
}

#[test]
fn listeners_appear_with_the_definition_and_deny_until_more_is_known() {
    let mut bench = Bench::new();
    assert!(bench.build().is_empty());
    bench.define();
    let service = bench.build().remove(0);
    assert!(service.identity.is_none() && service.public.is_some());
    assert_eq!(service.intentions.default_policy(), DefaultPolicy::Unknown);
    assert_eq!(service.upstreams.len(), 5);
    assert!(service.upstreams.iter().all(|upstream| upstream.targets.is_empty()));
    assert!(same(&bench.published.clone(), &bench.build()), "nothing new, nothing published");
}

#[test]
fn what_did_not_change_is_the_same_arc() {
    let mut bench = Bench::new();
    bench.define();
    bench.identify();
    bench.chains("dc1", chain::Gateway::None);
    bench.health(
        "warehouse",
        "dc1",
        health::Kind::Connect,
        vec![Instance::simple("warehouse", "dc1", ("10.0.0.1", 1), ("", 0), Health::Passing)],
    );
    let before = bench.build().remove(0);
    assert_eq!(before.upstreams[0].targets[0].expected.to_vec(), [bench.ca.id("warehouse")]);
    assert_eq!(before.upstreams[0].connect_timeout, Duration::from_millis(2_500), "the upstream's own wins");

    let allow = Intention {
        id: String::new(),
        source: "web".into(),
        source_namespace: String::new(),
        source_partition: String::new(),
        source_peer: String::new(),
        destination: "airflow-worker".into(),
        action: Action::Allow,
        precedence: 9,
    };
    let key = Key::Intentions(name("airflow-worker"));
    assert_eq!(bench.tell(key.clone(), Update::Default(DefaultPolicy::Allow)), super::super::state::Urgency::None);
    assert!(bench.build()[0].intentions.decide(&bench.ca.id("web")).is_err(), "a default alone lets nobody in");
    let urgency = bench.tell(key, Update::Intentions(vec![allow]));
    assert_eq!(urgency, super::super::state::Urgency::Now);
    let after = bench.build().remove(0);
    assert!(after.intentions.decide(&bench.ca.id("web")).is_ok());
    let ptr_eq = |a: &Option<Arc<_>>, b: &Option<Arc<_>>| Arc::ptr_eq(a.as_ref().expect("set"), b.as_ref().expect("set"));
    assert!(ptr_eq(&before.public, &after.public));
    assert!(Arc::ptr_eq(before.identity.as_ref().expect("set"), after.identity.as_ref().expect("set")));
    assert!(before.upstreams.iter().zip(&after.upstreams).all(|(a, b)| Arc::ptr_eq(a, b)));
}

#[test]
fn a_new_chain_keeps_the_old_targets_until_its_own_are_known() {
    let mut bench = Bench::new();
    bench.define();
    bench.identify();
    bench.chains("dc1", chain::Gateway::None);
    bench.other_trust_domain();
    let instance = |address| vec![Instance::simple("old-warehouse", "dc1", (address, 1), ("198.51.100.1", 2), Health::Passing)];
    bench.health("old-warehouse", "dc1", health::Kind::Connect, instance("10.0.0.1"));
    let first = bench.targets("old-warehouse").remove(0);
    assert_eq!(addresses(&first), [("10.0.0.1:1".to_owned(), true)]);
    assert_eq!(first.expected[0].trust_domain(), "t.consul", "peers are expected where our certificate belongs");
    bench.chains("dc2", chain::Gateway::None);
    assert_eq!(&*bench.targets("old-warehouse")[0].id, "old-warehouse.default.dc1", "still the old target");
    let remote = vec![Instance::simple("old-warehouse", "dc2", ("10.9.9.9", 1), ("198.51.100.1", 2), Health::Passing)];
    bench.health("old-warehouse", "dc2", health::Kind::Connect, remote);
    let targets = bench.targets("old-warehouse");
    assert_eq!(addresses(&targets[0]), [("198.51.100.1:2".to_owned(), true)], "the WAN address of another datacenter");
    assert!(targets[0].expected[0].as_str().contains("/dc/dc2/"));
    bench.health("old-warehouse", "dc2", health::Kind::Connect, Vec::new());
    assert!(bench.targets("old-warehouse")[0].endpoints.is_empty(), "a list that is empty is honoured");
}

#[test]
fn gateways_are_dialed_only_while_the_service_behind_them_lives() {
    for (gateway, datacenter, dialed) in
        [(chain::Gateway::Local, "dc1", "10.0.0.8:443"), (chain::Gateway::Remote, "dc2", "198.51.100.9:8443")]
    {
        let mut bench = Bench::new();
        bench.define();
        bench.identify();
        bench.chains("dc2", gateway);
        let list = |state| vec![Instance::simple("warehouse", "dc2", ("10.9.9.9", 1), ("", 0), state)];
        bench.health("warehouse", "dc2", health::Kind::Connect, list(Health::Passing));
        assert!(bench.targets("warehouse").is_empty(), "the gateways are not known yet");
        let gateways =
            vec![Instance::simple("mesh-gateway", datacenter, ("10.0.0.8", 443), ("198.51.100.9", 8_443), Health::Passing)];
        bench.health("mesh-gateway", datacenter, health::Kind::Gateway, gateways);
        let targets = bench.targets("warehouse");
        assert_eq!(addresses(&targets[0]), [(dialed.to_owned(), true)]);
        assert_eq!((&*targets[0].sni, targets[0].expected[0].as_str().contains("svc/warehouse")), ("warehouse.sni", true));
        bench.health("warehouse", "dc2", health::Kind::Connect, list(Health::Critical));
        assert_eq!(addresses(&bench.targets("warehouse")[0]), [(dialed.to_owned(), false)]);
    }
}

#[test]
fn a_prepared_query_accepts_whoever_it_names() {
    let mut bench = Bench::new();
    bench.define();
    bench.identify();
    let key = Key::Query { name: "warehouse-query".into(), datacenter: String::new() };
    let list = vec![
        Instance::simple("warehouse", "dc1", ("10.0.0.1", 1), ("", 0), Health::Passing),
        Instance::simple("lake", "dc1", ("db.example", 2), ("", 0), Health::Warning),
    ];
    bench.tell(key, Update::Instances(list));
    let host = Key::Host("db.example".into());
    assert!(bench.state.wanted().contains(&host), "names among the addresses are resolved");
    bench.tell(host, Update::Host(vec!["10.0.0.2".parse().expect("address")]));
    let targets = bench.targets("prepared_query:warehouse-query");
    assert_eq!(targets[0].expected.to_vec(), [bench.ca.id("lake"), bench.ca.id("warehouse")]);
    assert_eq!(&*targets[0].sni, "warehouse-query.default.dc1.query.t.consul");
    for upstream in &bench.build()[0].upstreams {
        let wanted = if upstream.name.starts_with("prepared_query:") { config::PANIC_PERCENT } else { 0 };
        assert_eq!(upstream.panic_percent, wanted, "{}: as Consul tells Envoy", upstream.name);
    }
    assert_eq!(addresses(&targets[0]), [("10.0.0.1:1".to_owned(), true), ("10.0.0.2:2".to_owned(), true)]);
}

#[cfg(feature = "xds")]
#[test]
fn escape_hatches_hold_until_a_discovery_chain_is_configured() {
    let mut bench = Bench::new();
    let mut service = crate::control::fixture("agent-service-sidecar");
    let log = serde_json::json!({"name": "envoy.file_access_log", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog", "path": "/var/log/warehouse"}});
    let hatch = serde_json::json!({
        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9001}}, "access_log": [log],
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "warehouse", "cluster": "warehouse", "idle_timeout": "60s"}}]}]});
    service["Proxy"]["Upstreams"][0]["Config"]["envoy_listener_json"] = hatch.to_string().into();
    let service = serde_json::from_value(service).expect("parses");
    bench.tell(Key::Definition(0), Update::Definition(Box::new(service)));
    bench.identify();
    bench.chains("dc1", chain::Gateway::None);
    let told = |bench: &mut Bench| {
        let upstream = Arc::clone(&bench.build()[0].upstreams[0]);
        let status = report::status(&mut bench.state, true, true, now());
        let problem = status.services[0].problem.clone().unwrap_or_default();
        (
            upstream.bind.to_string(),
            upstream.idle_timeout,
            status.access_logs.len(),
            problem.contains("escape hatches do not hold"),
        )
    };
    assert_eq!(told(&mut bench), ("127.0.0.1:9001".to_owned(), Some(Duration::from_secs(60)), 1, false));
    bench.state.chains.values_mut().for_each(|chain| chain.is_default = false);
    assert_eq!(told(&mut bench), ("127.0.0.1:15432".to_owned(), None, 0, true));
}

#[test]
fn a_registration_that_stays_away_drains_after_the_grace() {
    let mut bench = Bench::new();
    bench.define();
    let start = Instant::now();
    let gone = || Event { key: Key::Definition(0), what: What::Gone("unknown service ID".into()) };
    bench.state.apply(gone(), start, now());
    bench.state.tick(start + Duration::from_secs(59), now());
    assert_eq!(bench.build().len(), 1, "within the grace");
    bench.define();
    bench.state.tick(start + Duration::from_secs(61), now());
    assert_eq!(bench.build().len(), 1, "it came back in time");
    bench.state.apply(gone(), start, now());
    bench.state.tick(start + Duration::from_secs(61), now());
    assert!(bench.build().is_empty());
    assert!(bench.state.wanted().contains(&Key::Definition(0)), "and it is still asked for");
}

#[test]
fn a_refused_definition_keeps_the_accepted_one_and_says_so() {
    let mut bench = Bench::new();
    bench.define();
    let transparent = serde_json::from_value(crate::control::fixture("agent-service-transparent")).expect("parses");
    bench.tell(Key::Definition(0), Update::Definition(Box::new(transparent)));
    assert_eq!(bench.build().len(), 1);
    let status = report::status(&mut bench.state, true, true, now());
    assert!(!status.ready);
    assert!(status.services[0].problem.as_ref().expect("a problem").contains("transparent"), "{status:?}");
}

#[test]
fn readiness_needs_everything_and_stays() {
    let mut bench = Bench::new();
    let ready = |bench: &mut Bench| report::status(&mut bench.state, true, true, now()).ready;
    bench.define();
    bench.identify();
    assert!(!ready(&mut bench));
    let key = Key::Intentions(name("airflow-worker"));
    bench.tell(key.clone(), Update::Intentions(Vec::new()));
    assert!(!ready(&mut bench), "the default is not known");
    bench.tell(key.clone(), Update::Default(DefaultPolicy::Deny));
    assert!(!report::status(&mut bench.state, false, true, now()).ready, "known, but not published");
    assert!(ready(&mut bench));
    bench.state.apply(Event { key, what: What::Trouble("500".into()) }, Instant::now(), now());
    let status = report::status(&mut bench.state, true, false, now());
    assert!(status.ready && !status.agent_reachable);
    assert_eq!(status.services[0].problem.as_deref(), Some("500"));
}

#[test]
fn exposed_checks_are_pages_until_the_agent_says_otherwise() {
    let mut bench = Bench::new();
    let mut service: wire::Service =
        serde_json::from_value(crate::control::fixture("agent-service-sidecar")).expect("the capture parses");
    service.proxy.expose.checks = true;
    bench.tell(Key::Definition(0), Update::Definition(Box::new(service)));
    let asked = bench.state.wanted().into_iter().find(|key| matches!(key, Key::Checks(_))).expect("a watch of checks");
    let pages = |bench: &mut Bench| -> Vec<u16> {
        let status = report::status(&mut bench.state, true, true, now());
        status.services[0].pages.iter().map(|page| page.bind.port()).filter(|port| *port >= 21_600).collect()
    };
    let tell = |bench: &mut Bench, told: &[(&str, Option<u16>)]| {
        let exposed = |port| Exposed { port, path: "/health".into(), http2: false };
        let checks = told.iter().map(|(id, port)| ((*id).to_owned(), port.map(exposed))).collect();
        assert_eq!(bench.tell(asked.clone(), Update::Checks(checks)), super::super::state::Urgency::None);
        pages(bench)
    };
    assert!(pages(&mut bench).is_empty());
    assert_eq!(tell(&mut bench, &[("a", Some(21_600)), ("b", None)]), [21_600]);
    assert_eq!(tell(&mut bench, &[("a", None), ("b", Some(21_601))]), [21_600, 21_601], "an output that says nothing of it");
    assert_eq!(tell(&mut bench, &[]), [21_600, 21_601], "as for a token that lost its rights");
    assert_eq!(tell(&mut bench, &[("b", Some(21_602))]), [21_602]);
    bench.define();
    assert!(!bench.state.wanted().contains(&asked));
    assert!(pages(&mut bench).is_empty(), "checks are not exposed any more");
}
