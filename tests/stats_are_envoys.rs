//! `/stats` is Envoy's: names, tags and pages that scripts, scrapers and Consul's UI read, with numbers that balance under load,
//! and sinks that get them.

mod support;

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::sidecar::Metrics;
use support::traffic::{self, Live};
use support::{Agent, Definition, Echo, Pair, Sidecar, bytes, tool_on_path, wait_for, wait_until};

/// A stat's value on the text page.
fn number(page: &str, name: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("no {name}")).parse().expect("a number")
}

fn text(sidecar: &Sidecar, query: &str) -> String {
    sidecar.client().get(&format!("/stats{query}")).ok("stats").body
}

fn prometheus(sidecar: &Sidecar, query: &str) -> Metrics {
    Metrics::of(sidecar.client().get(&format!("/stats/prometheus{query}")).ok("stats").body)
}

/// The sum of one stat over the scopes that begin and end so.
fn sum(page: &str, scope: &str, name: &str) -> u64 {
    let lines = page.lines().filter(|line| line.starts_with(scope) && !line.contains(".worker_"));
    let values = lines.filter_map(|line| line.split_once(&format!(".{name}: ")).map(|(_, value)| value));
    values.map(|value| value.parse::<u64>().expect("a number")).sum()
}

#[test]
fn counters_balance_under_churn() {
    let app = Echo::start();
    let pair = Pair::tuned(Agent::start(), app.address, |web| web.workers(2), |db| db.workers(2), |define| define);
    let mut pair = pair.wait_open();
    let live = (0..5).map(|_| Live::open(pair.upstream)).collect::<Vec<_>>();
    for seed in 0..60 {
        pair.echo(&bytes(seed, 5_000)).expect("an echo");
        traffic::reset(traffic::connect(pair.upstream).expect("web's upstream listens"));
    }
    for (sidecar, far) in [(&pair.web, "cluster.db."), (&pair.db, "cluster.local_app")] {
        wait_until("opened = closed + active, on both sides", support::PATIENCE, || {
            let page = text(sidecar, "");
            let listener = |name| sum(&page, "listener.", name);
            let cluster = |name| sum(&page, far, name);
            listener("downstream_cx_active") == 5
                && listener("downstream_cx_total") == listener("downstream_cx_destroy") + 5
                && cluster("upstream_cx_active") == 5
                && cluster("upstream_cx_total") == cluster("upstream_cx_destroy") + 5
                && listener("downstream_cx_total") >= 65
        });
    }
    drop(live);
    wait_until("bytes in = bytes out over the pair", support::PATIENCE, || {
        let (web, db) = (text(&pair.web, ""), text(&pair.db, ""));
        let upstream = "tcp.upstream.db.default.dc1.downstream_cx";
        let received = number(&web, &format!("{upstream}_rx_bytes_total"));
        received >= 60 * 5_000
            && received == number(&db, "tcp.public_listener.downstream_cx_rx_bytes_total")
            && received == number(&db, "cluster.local_app.upstream_cx_tx_bytes_total")
            && sum(&web, "cluster.db.", "upstream_cx_rx_bytes_total")
                == number(&db, "tcp.public_listener.downstream_cx_tx_bytes_total")
            && sum(&web, "listener.", "downstream_cx_active") + sum(&web, "cluster.db.", "upstream_cx_active") == 0
    });
    let db = text(&pair.db, "");
    assert_eq!(number(&db, "connect_authz.rbac.denied"), 0);
    assert!(number(&db, "connect_authz.rbac.allowed") >= 65);
    assert!(sum(&db, "listener.", "ssl.handshake") >= sum(&db, "listener.", "ssl.session_reused"));
    assert_eq!(sum(&db, "listener.", "ssl.versions.TLSv1.3"), sum(&db, "listener.", "ssl.handshake"));
    let web = text(&pair.web, "");
    assert_eq!(["cluster_manager.cluster_added", "listener_manager.listener_added"].map(|name| number(&web, name)), [2, 2]);
    assert_eq!(["membership_change", "membership_total"].map(|name| sum(&web, "cluster.db.", name)), [1, 1]);
    let fetched = ["update_attempt", "update_success"].map(|name| sum(&web, "cluster.db.", name));
    assert!(fetched[1] >= 1 && fetched[0] == fetched[1] + 1, "{fetched:?}");
    pair.assert_healthy();
}

#[test]
fn pages_are_asked_for_as_envoys_are() {
    let app = Echo::start();
    let pair = Pair::local(app.address).wait_open();
    let client = pair.web.client();
    for (path, said) in [
        ("/stats?filter=(", "Invalid re2 regex: "),
        ("/stats/prometheus?filter=(", "Invalid re2 regex: "),
        ("/stats?format=bogus", "usage: /stats?format=(html|active-html|json|prometheus|text)\n\n"),
        ("/stats?type=bogus", "invalid &type= param"),
    ] {
        let answer = client.get(path);
        assert!(answer.status == 400 && answer.body.starts_with(said), "{path}: {} {}", answer.status, answer.body);
    }
    // What `consul troubleshoot proxy` asks.
    let answer = client.get("/stats?format=json&filter=upstream_cx_connect_fail&type=Counters").ok("stats").json();
    let stats = answer["stats"].as_array().expect("a list");
    assert!(stats.iter().any(|stat| stat["name"] == "cluster.local_app.upstream_cx_connect_fail" && stat["value"] == 0));
    assert!(client.get("/stats?format=json&filter=update_rejected").ok("stats").body.contains("cds.update_rejected"));
    assert_eq!(text(&pair.web, "?filter=^server.live$"), "server.live: 1\n");
    assert_eq!(client.get("/reset_counters").status, 405);

    let (all, used) = (text(&pair.web, ""), text(&pair.web, "?usedonly"));
    assert!(used.lines().count() * 2 < all.lines().count(), "most series stay zero");
    let names = |page: &str| page.lines().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect::<Vec<_>>();
    assert!(names(&used).iter().all(|name| names(&all).contains(name)));

    let counted = "tcp.upstream.db.default.dc1.downstream_cx_total";
    let before = number(&text(&pair.web, ""), counted);
    assert!(before >= 1);
    assert_eq!(client.post("/reset_counters", &Value::Null).ok("reset").body, "OK\n");
    assert_eq!(number(&text(&pair.web, ""), counted), 0);
    pair.echo(b"again").expect("an echo");
    wait_until("counted again", support::PATIENCE, || number(&text(&pair.web, ""), counted) == 1);
    let ours = pair.web.metrics().sum("ringfence_connections_total", &[("upstream", "db")]);
    assert_eq!(ours, before + 1, "ringfence's own counters only grow");
}

/// As Prometheus asks; Envoy answers in full whoever asks.
#[test]
fn a_scrape_is_compressed_for_whoever_asks_for_it() {
    let app = Echo::start();
    let pair = Pair::local(app.address).wait_open();
    let curl = |path: &str| {
        let url = format!("http://{}{path}", pair.web.admin);
        let mut command = Command::new(tool_on_path("curl"));
        command.args(["-sf", "--noproxy", "*", "--compressed", "-w", "\n%header{content-encoding} %{size_download}", &url]);
        let answer = command.output().expect("curl runs");
        assert!(answer.status.success(), "{path}: {answer:?}");
        let answer = String::from_utf8(answer.stdout).expect("a page in UTF-8");
        let (page, how) = answer.rsplit_once('\n').expect("what -w writes");
        let (encoding, sent) = how.split_once(' ').expect("two words");
        (page.to_owned(), encoding.to_owned(), sent.parse::<usize>().expect("bytes"))
    };
    let series = |page: &str| -> BTreeSet<String> {
        page.lines().map(|line| line.rsplit_once(' ').map_or(line, |(series, _)| series).to_owned()).collect()
    };
    for path in ["/stats/prometheus", "/stats?format=prometheus"] {
        // What happens meanwhile adds series.
        let plain = || series(&pair.web.client().get(path).ok("stats").body);
        let (before, (page, encoding, sent), after) = (plain(), curl(path), plain());
        assert_eq!(encoding, "gzip", "{path}");
        assert!(before.is_subset(&series(&page)) && series(&page).is_subset(&after), "{path}: {page}");
        assert!(sent * 10 < page.len(), "{path}: {sent} bytes for {}", page.len());
    }
    assert_eq!(curl("/ready"), ("LIVE\n".to_owned(), String::new(), 5), "what is small anyway stays as it is");
}

/// The selectors of Consul 1.10's UI (prometheus.js), for a service at layer 4.
#[test]
fn consuls_ui_finds_its_series() {
    let app = Echo::start();
    let idle = |db: Definition| db.upstream("idle", support::ports::free_address());
    let pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db, idle).wait_open();
    pair.echo(&bytes(1, 1_000)).expect("an echo");
    let source = |service| {
        [("consul_source_service", service), ("consul_source_datacenter", "dc1"), ("consul_source_namespace", "default")]
    };
    let with = |service, more: &[(&'static str, &'static str)]| {
        source(service).iter().copied().chain(more.iter().copied()).collect::<Vec<_>>()
    };
    let inbound = with("db", &[("envoy_tcp_prefix", "public_listener")]);
    let upstream = with(
        "web",
        &[("envoy_tcp_prefix", "upstream"), ("consul_upstream_service", "db"), ("consul_upstream_datacenter", "dc1")],
    );
    let downstream = with(
        "web",
        &[
            ("consul_destination_service", "db"),
            ("consul_destination_datacenter", "dc1"),
            ("consul_destination_namespace", "default"),
            ("envoy_cluster_name", "db"),
        ],
    );
    let (web, db) = (prometheus(&pair.web, ""), prometheus(&pair.db, ""));
    for (page, labels, family) in [
        (&db, &inbound, "envoy_tcp_downstream_cx"),
        (&web, &upstream, "envoy_tcp_downstream_cx"),
        (&web, &downstream, "envoy_cluster_upstream_cx"),
    ] {
        assert!(page.sum(&format!("{family}_total"), labels) >= 2, "{family} {labels:?}\n{}", page.text());
        for direction in ["rx", "tx"] {
            assert!(page.sum(&format!("{family}_{direction}_bytes_total"), labels) >= 1_000, "{family} {direction} {labels:?}");
        }
    }
    assert_eq!(web.sum("envoy_control_plane_connected_state", &source("web")), 1);
    assert!(web.has("ringfence_connections_total"), "ringfence's own families follow");
    for (sidecar, service, upstream, used) in [(&pair.web, "web", "db", true), (&pair.db, "db", "idle", false)] {
        let series =
            format!("ringfence_connections_total{{direction=\"outbound\",service=\"{service}\",upstream=\"{upstream}\"}}");
        let (all, narrow) = (prometheus(sidecar, ""), prometheus(sidecar, "?usedonly"));
        assert_eq!((all.text().contains(&series), narrow.text().contains(&series)), (true, used), "{series}");
        assert!(narrow.text().len() * 2 < all.text().len());
    }
    // A text page is well-formed only if no series is there twice.
    let series: Vec<&str> = web
        .text()
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .filter_map(|line| line.rsplit_once(' ').map(|(series, _)| series))
        .collect();
    assert_eq!(series.iter().collect::<BTreeSet<_>>().len(), series.len());
}

/// What the sink's growth is compared with.
const COUNTED: &str = "tcp.public_listener.downstream_cx_total";

#[test]
fn a_sink_of_the_registration_gets_growth_gauges_and_durations() {
    let app = Echo::start();
    let sink = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    sink.set_read_timeout(Some(Duration::from_millis(20))).expect("read timeout");
    let url = format!("udp://{}", sink.local_addr().expect("bound"));
    let define = |definition: Definition| {
        let definition = definition.config("envoy_dogstatsd_url", url.clone()).config("envoy_stats_flush_interval", "1s");
        definition.config("envoy_stats_tags", json!(["team=finance"]))
    };
    let pair = Pair::tuned(Agent::start(), app.address, |web| web, |db| db, define).wait_open();
    for _ in 0..20 {
        pair.echo(b"x").expect("an echo");
    }
    let (mut grown, mut gauge, mut timing) = (0, false, false);
    wait_for("everything in the sink", support::PATIENCE, || {
        let mut datagram = [0; 65_536];
        // All that waits, before anything slower: a full socket loses datagrams.
        let mut told = String::new();
        while let Ok(length) = sink.recv(&mut datagram) {
            told.push_str(&String::from_utf8_lossy(&datagram[..length]));
            told.push('\n');
        }
        for line in told.lines().filter(|line| !line.is_empty()) {
            assert!(line.starts_with("envoy.") && line.contains("team:finance"), "{line}");
            let of_db = line.contains("consul.source.service:db");
            if let Some(rest) = line.strip_prefix("envoy.tcp.downstream_cx_total:") {
                assert!(rest.contains("|c|#") && rest.contains("envoy.tcp_prefix:public_listener") && of_db, "{line}");
                grown += rest.split('|').next().and_then(|number| number.parse::<u64>().ok()).expect("a number");
            }
            gauge |= line.starts_with("envoy.server.live:1|g|#");
            timing |= line.starts_with("envoy.listener.downstream_cx_length_ms:") && line.contains("|ms|#");
        }
        // Read after the datagram: the agent's checks connect meanwhile, and growth told twice would be more than there is.
        let counted = number(&text(&pair.db, &format!("?filter=^{COUNTED}$")), COUNTED);
        assert!(grown <= counted, "{grown} of {counted}");
        let whole = grown == counted && counted > 20;
        if whole && gauge && timing { Ok(()) } else { Err(format!("{grown} of {counted}, {gauge}, {timing}")) }
    });
}

/// Each metric that a panel of the dashboard asks for is one that is exported.
#[test]
fn the_dashboard_asks_for_what_is_exported() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/dist/grafana/ringfence.json")).expect("is there");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let mut expressions = Vec::new();
    support::find_all(&dashboard, "expr", &mut expressions);
    let app = Echo::start();
    let pair = Pair::local(app.address).wait_open();
    let pages = format!("{}{}", prometheus(&pair.web, "").text(), prometheus(&pair.db, "").text());
    let mut exported: BTreeSet<&str> = pages.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    // Some are there only once something happened, such as a task's connection.
    exported.extend(ringfence::telemetry::export::METRICS.iter().map(|metric| metric.name));
    let names = regex::Regex::new(r"\b(?:envoy|ringfence)_\w+").expect("well-formed");
    let labels: BTreeSet<&str> = ["envoy_tcp_prefix", "envoy_tls_certificate"].into();
    let mut asked = BTreeSet::new();
    for expression in &expressions {
        asked.extend(
            names.find_iter(expression.as_str().expect("text")).map(|name| name.as_str()).filter(|name| !labels.contains(name)),
        );
    }
    assert!(asked.len() > 30, "{} metrics in {} queries", asked.len(), expressions.len());
    let missing: Vec<&&str> =
        asked.iter().filter(|name| !exported.contains(name.strip_suffix("_bucket").unwrap_or(name))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
