//! The admin port beside a real Envoy 1.40's: same statuses, headers, error texts and shapes for the same question.

mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;

use serde_json::{Value, json};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Process, Sidecar, ports, wait_for};

const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.";
const NETWORK: &str = "type.googleapis.com/envoy.extensions.filters.network.";

#[derive(Debug)]
struct Answer {
    status: u16,
    content_type: String,
    cache_control: String,
    nosniff: String,
    server: String,
    body: String,
}

fn ask(admin: SocketAddr, method: &str, path: &str) -> Answer {
    let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None).max_idle_connections(0);
    let agent: ureq::Agent = config.timeout_global(Some(PATIENCE)).build().into();
    let uri = format!("http://{admin}{path}");
    let request = ureq::http::Request::builder().method(method).uri(&uri).body(()).expect("a request");
    let mut response = agent.run(request).unwrap_or_else(|error| panic!("{method} {uri}: {error}"));
    let header = |name: &str| response.headers().get(name).map_or("", |value| value.to_str().unwrap_or_default()).to_owned();
    let (content_type, cache_control) = (header("content-type"), header("cache-control"));
    let (nosniff, server) = (header("x-content-type-options"), header("server"));
    let body = response.body_mut().read_to_string().expect("text");
    Answer { status: response.status().as_u16(), content_type, cache_control, nosniff, server, body }
}

/// A sidecar of `db` with one upstream, and an Envoy that is configured as Consul would have it for the same.
struct Pair {
    envoy: SocketAddr,
    ours: SocketAddr,
    _envoy: Process,
    _sidecar: Sidecar,
    _app: support::servers::Custom,
    _consul: Consul,
}

impl Pair {
    fn start() -> Self {
        let app = Echo::start();
        let consul = Consul::start();
        let upstream = ports::free_address();
        let db = Definition::new("db").app(app.address).upstream("cache", upstream);
        consul.register(&Definition::new("cache").app(app.address));
        consul.register(&db);
        let admin = ports::free_address();
        let envoy = start_envoy(&consul, admin, app.address);
        let mut sidecar = Sidecar::start(&consul, "db");
        sidecar.wait_ready();
        Self { envoy: admin, ours: sidecar.admin, _envoy: envoy, _sidecar: sidecar, _app: app, _consul: consul }
    }

    fn both(&self, method: &str, path: &str) -> (Answer, Answer) {
        (ask(self.envoy, method, path), ask(self.ours, method, path))
    }

    fn json(&self, path: &str) -> (Value, Value) {
        let (envoy, ours) = self.both("GET", path);
        assert_eq!((ours.status, &ours.content_type), (envoy.status, &envoy.content_type), "{path}");
        let parse = |answer: Answer| serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{path}: {error}"));
        (parse(envoy), parse(ours))
    }
}

fn start_envoy(consul: &Consul, admin: SocketAddr, app: SocketAddr) -> Process {
    let leaf = consul.leaf("db");
    let trust_domain = consul.trust_domain();
    let address = |at: SocketAddr| json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}});
    let common = json!({
        "tls_params": {},
        "tls_certificates": [{"certificate_chain": {"inline_string": leaf.chain_pem}, "private_key": {"inline_string": leaf.key_pem}}],
        "validation_context": {"trusted_ca": {"inline_string": consul.roots_pem()}},
    });
    let tcp_proxy = |prefix: &str, cluster: &str| {
        json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
            "@type": format!("{NETWORK}tcp_proxy.v3.TcpProxy"), "stat_prefix": prefix, "cluster": cluster}})
    };
    let cluster = |name: &str| {
        json!({"name": name, "type": "STATIC", "connect_timeout": "5s", "load_assignment": {
            "cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(app)}}]}]}})
    };
    let sni = format!("cache.default.dc1.internal.{trust_domain}");
    let mut cache = cluster(&sni);
    cache["outlier_detection"] = json!({});
    cache["transport_socket"] = json!({"name": "tls", "typed_config": {
        "@type": format!("{TLS}UpstreamTlsContext"), "sni": sni, "common_tls_context": common}});
    let rbac = json!({"name": "envoy.filters.network.rbac", "typed_config": {
        "@type": format!("{NETWORK}rbac.v3.RBAC"), "stat_prefix": "connect_authz", "rules": {}}});
    let public = json!({"name": "public_listener", "address": address(ports::free_address()), "traffic_direction": "INBOUND",
        "filter_chains": [{"filters": [rbac, tcp_proxy("public_listener", "local_app")],
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": format!("{TLS}DownstreamTlsContext"), "require_client_certificate": true, "common_tls_context": common}}}]});
    let upstream = json!({"name": "cache", "address": address(ports::free_address()), "traffic_direction": "OUTBOUND",
        "filter_chains": [{"filters": [tcp_proxy("upstream.cache.default.dc1", &sni)]}]});
    let config = json!({
        "admin": {"address": address(admin)},
        "node": {"id": "db-sidecar-proxy", "cluster": "db", "metadata": {"namespace": "default", "envoy_version": "1.40.0"}},
        "static_resources": {"listeners": [public, upstream], "clusters": [cluster("local_app"), cache]},
    });
    let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
    command.args(["--config-yaml", &config.to_string(), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
    let mut process = Process::start("envoy", &command);
    let client = support::http::Client::new(admin, None);
    wait_for("Envoy is ready", PATIENCE, || {
        process.assert_running();
        let answer = client.try_get("/ready").map_err(|error| format!("{error}\n{}", process.tail()))?;
        if answer.status == 200 { Ok(()) } else { Err(answer.body) }
    });
    process
}

/// Every path through `value` with the kind of what is there; elements of a list are alike.
fn shape(value: &Value) -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| walk(value, &format!("{path}.{name}"), found)),
            Value::Array(list) => list.iter().for_each(|value| walk(value, &format!("{path}[]"), found)),
            Value::String(_) => _ = found.insert(format!("{path}: text")),
            Value::Number(_) => _ = found.insert(format!("{path}: number")),
            Value::Bool(_) => _ = found.insert(format!("{path}: bool")),
            Value::Null => _ = found.insert(format!("{path}: null")),
        }
    }
    let mut found = BTreeSet::new();
    walk(value, "", &mut found);
    found
}

#[test]
fn answers_are_envoys() {
    let pair = Pair::start();
    // Told all at once.
    let mut differ = Vec::new();

    // Whole answers.
    for (method, path) in [
        ("GET", "/ready"),
        ("POST", "/ready"),
        ("GET", "/hot_restart_version"),
        ("GET", "/init_dump"),
        ("GET", "/quitquitquit"),
        ("PUT", "/quitquitquit"),
        ("GET", "/drain_listeners"),
        ("GET", "/healthcheck/fail"),
        ("GET", "/logging"),
        ("GET", "/runtime_modify"),
        ("GET", "/cpuprofiler"),
        ("POST", "/cpuprofiler"),
        ("POST", "/heapprofiler?enable=y"),
        ("POST", "/runtime_modify"),
        ("POST", "/runtime_modify?a=b"),
        ("POST", "/reopen_logs"),
        ("POST", "/healthcheck/fail"),
        ("GET", "/ready"),
        ("POST", "/healthcheck/ok"),
        ("GET", "/ready"),
        ("GET", "/clusters?filter=("),
        ("GET", "/config_dump?resource=nope"),
        ("GET", "/config_dump?resource=static_endpoint_configs"),
        ("GET", "/config_dump?resource=bootstrap"),
        ("GET", "/config_dump?mask=nope"),
        ("GET", "/config_dump?resource=dynamic_active_secrets"),
    ] {
        let (envoy, ours) = pair.both(method, path);
        if format!("{ours:?}") != format!("{envoy:?}") {
            differ.push(format!("{method} {path}: {ours:?}, Envoy: {envoy:?}"));
        }
    }

    // The same up to where each names what it has.
    for (method, path, same) in [
        ("GET", "/nope", "invalid path. admin commands are:\n  /: "),
        ("GET", "/help", "admin commands are:\n  /: "),
        ("POST", "/logging", "active loggers:\n  a"),
        ("POST", "/logging?level=nope", "error: unknown logger level\n\nusage: /logging?<name>=<level> (change single level)\n"),
        ("POST", "/logging?nobody=debug", "error: unknown logger name\n\nusage: "),
        ("POST", "/logging?level=info&x=info", "error: invalid number of parameters\n"),
        ("GET", "/contention", "Mutex contention tracing is not enabled. "),
        ("GET", "/config_dump?name_regex=(", "INVALID_ARGUMENT: Error while parsing name_regex from (: "),
        ("GET", "/", "<!DOCTYPE html>\n"),
    ] {
        let (envoy, ours) = pair.both(method, path);
        for answer in [&envoy, &ours] {
            if !answer.body.starts_with(same) {
                differ.push(format!("{method} {path}: {answer:?}"));
            }
        }
        let head = |answer: &Answer| {
            let Answer { status, content_type, cache_control, nosniff, server, .. } = answer;
            format!("{status} {content_type} {cache_control} {nosniff} {server}")
        };
        if head(&ours) != head(&envoy) {
            differ.push(format!("{method} {path}: {}, Envoy: {}", head(&ours), head(&envoy)));
        }
    }

    // The same fields with the same kinds.
    let (envoy, ours) = pair.json("/runtime");
    assert_eq!(ours, envoy);
    for path in ["/certs", "/memory", "/listeners?format=json"] {
        let (envoy, ours) = pair.json(path);
        if shape(&ours) != shape(&envoy) {
            differ.push(format!("{path}: {ours}, Envoy: {envoy}"));
        }
    }
    let (envoy, ours) = pair.json("/clusters?format=json");
    let mut wanted = shape(&envoy);
    wanted.insert(".cluster_statuses[].added_via_api: bool".to_owned());
    let ours: BTreeSet<_> = shape(&ours).into_iter().filter(|path| !path.ends_with("stats[].value: text")).collect();
    if ours != wanted {
        differ.push(format!("/clusters: {ours:?}, Envoy: {wanted:?}"));
    }
    let (envoy, ours) = pair.json("/server_info");
    assert_eq!(
        envoy["version"].as_str().map(|text| text.split('/').count()),
        ours["version"].as_str().map(|text| text.split('/').count())
    );
    assert_eq!((&ours["state"], &ours["hot_restart_version"]), (&envoy["state"], &envoy["hot_restart_version"]));
    for field in ["id", "cluster", "metadata"] {
        if ours["node"][field] != envoy["node"][field] {
            differ.push(format!("node.{field}: {}, Envoy: {}", ours["node"][field], envoy["node"][field]));
        }
    }
    let fields = |value: &Value| value.as_object().map(|fields| fields.keys().cloned().collect::<BTreeSet<_>>());
    if fields(&ours) != fields(&envoy) {
        differ.push(format!("/server_info: {:?}, Envoy: {:?}", fields(&ours), fields(&envoy)));
    }

    // The names in the text of /clusters, without clusters and endpoints.
    let names = |admin| -> BTreeSet<String> {
        let name = |line: &str| {
            let parts: Vec<&str> = line.split("::").collect();
            let from = if parts.get(1).is_some_and(|part| part.contains(':')) { 2 } else { 1 };
            parts[from..parts.len() - 1].join("::")
        };
        ask(admin, "GET", "/clusters").body.lines().map(name).collect()
    };
    if names(pair.ours) != names(pair.envoy) {
        differ.push(format!("/clusters: {:?}, Envoy: {:?}", names(pair.ours), names(pair.envoy)));
    }

    for path in ["/config_dump", "/config_dump?include_eds"] {
        let (envoy, ours) = pair.json(path);
        let kinds = |dump: &Value| -> Vec<String> {
            dump["configs"].as_array().into_iter().flatten().map(|one| one["@type"].to_string()).collect()
        };
        if kinds(&ours) != kinds(&envoy) {
            differ.push(format!("{path}: {:?}, Envoy: {:?}", kinds(&ours), kinds(&envoy)));
        }
    }
    // A listener as Consul has it: what Envoy shows of it, we show.
    let listener = |dump: &Value| dump["configs"][0]["filter_chains"].clone();
    let envoy = ask(pair.envoy, "GET", "/config_dump?resource=static_listeners");
    let ours = ask(pair.ours, "GET", "/config_dump?resource=dynamic_listeners");
    let parse = |answer: Answer| serde_json::from_str::<Value>(&answer.body).expect("JSON");
    let (mut envoy, mut ours) = (parse(envoy), parse(ours));
    for (dump, lead) in [(&mut envoy, "/configs/0/listener"), (&mut ours, "/configs/0/active_state/listener")] {
        *dump = json!({"configs": [dump.pointer(lead).expect("a listener").clone()]});
    }
    let missing: Vec<_> = shape(&listener(&envoy)).difference(&shape(&listener(&ours))).cloned().collect();
    differ.extend(missing.into_iter().map(|path| format!("a listener lacks {path}")));
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

#[test]
fn listeners_are_closed_on_demand_and_connections_go_on() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    let app = Echo::start();
    let consul = Consul::start();
    let upstream = ports::free_address();
    let db = Definition::new("db").app(app.address);
    consul.register(&db);
    consul.register(&Definition::new("web").upstream("db", upstream));
    consul.allow("web", "db");
    let mut server = Sidecar::start(&consul, "db");
    let mut web = Sidecar::of("web").arguments(&["-drain-time=1s"]).start(&consul);
    server.wait_ready();
    web.wait_ready();
    support::wait_until("the first echo", PATIENCE, || support::traffic::echo(upstream, b"first").is_ok());
    let mut open = TcpStream::connect(upstream).expect("connects");
    let back = |stream: &mut TcpStream| {
        stream.write_all(b"still here").expect("sends");
        let mut echo = [0; 10];
        stream.read_exact(&mut echo).expect("the connection goes on");
    };
    back(&mut open);

    // Never stops accepting; then only after the drain time; then at once.
    assert_eq!(ask(web.admin, "POST", "/drain_listeners?graceful&skip_exit").body, "OK\n");
    assert_eq!(ask(web.admin, "POST", "/drain_listeners?inboundonly").body, "OK\n");
    support::pause(std::time::Duration::from_millis(300));
    support::traffic::echo(upstream, b"outbound goes on").expect("an echo");
    assert!(TcpStream::connect(db.public).is_ok(), "the other process is not concerned");
    assert_eq!(ask(web.admin, "POST", "/drain_listeners?graceful").body, "OK\n");
    support::traffic::echo(upstream, b"within the drain time").expect("an echo");
    support::wait_until("the listener closes", PATIENCE, || TcpStream::connect(upstream).is_err());
    // Beyond the drain time, which is for the end of the process.
    support::pause(std::time::Duration::from_millis(1_500));
    back(&mut open);
    assert_eq!(ask(web.admin, "GET", "/ready").body, "LIVE\n");
    web.process.assert_running();
    assert_eq!(ask(web.admin, "POST", "/quitquitquit").body, "OK\n");
    assert!(web.process.wait_exit(PATIENCE).success());
}
