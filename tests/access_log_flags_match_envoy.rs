//! Each way in which a connection fails is provoked on a real Envoy 1.40 and on ringfence in the same place, with the same
//! access log format; what they write must be equal.
//!
//! Not compared, on purpose: BoringSSL's words for a TLS failure against rustls' (only what scripts look for), and what a denied
//! peer's line says of the app (Envoy had dialed it, ringfence never does).

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Agent, Custom, Definition, Echo, Mesh, PATIENCE, Process, Sidecar, ports, tls, traffic, wait_for};

/// Everything that does not depend on a time, on a port that the kernel chose, or on the TLS version.
const FORMAT: &str = "%UPSTREAM_CLUSTER% %RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG% %UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS% \
     %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %BYTES_RECEIVED% %BYTES_SENT% \
     %UPSTREAM_WIRE_BYTES_SENT% %UPSTREAM_WIRE_BYTES_RECEIVED% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% \
     %CONNECTION_TERMINATION_DETAILS% %DOWNSTREAM_LOCAL_CLOSE_REASON% %DOWNSTREAM_DETECTED_CLOSE_TYPE% \
     %UPSTREAM_DETECTED_CLOSE_TYPE% %UPSTREAM_PEER_URI_SAN% %UPSTREAM_LOCAL_URI_SAN% %UPSTREAM_PEER_DNS_SAN% \
     %UPSTREAM_PEER_CERT_V_END% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% \
     %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_PEER_URI_SAN% %REQUESTED_SERVER_NAME% %ROUTE_NAME% %HOSTNAME% %ACCESS_LOG_TYPE% \
     %REQ(:METHOD)% %DYNAMIC_METADATA(a:b)% %FILTER_STATE(x)% %START_TIME(%Z)% %% %UPSTREAM_TRANSPORT_FAILURE_REASON%";
/// How long either gives an endpoint that says nothing.
const CONNECT_TIMEOUT_MS: u64 = 1_000;

/// A service that web calls: how it fails, and where each proxy listens for it.
struct Case {
    name: &'static str,
    endpoint: Option<SocketAddr>,
    healthy: bool,
    max_connections: Option<u32>,
    idle_timeout: Option<&'static str>,
    envoy: SocketAddr,
    ringfence: SocketAddr,
}

impl Case {
    fn new(name: &'static str, endpoint: impl Into<Option<SocketAddr>>) -> Self {
        let (envoy, ringfence) = (ports::free_address(), ports::free_address());
        Self { name, endpoint: endpoint.into(), healthy: true, max_connections: None, idle_timeout: None, envoy, ringfence }
    }

    fn register(&self, agent: &Agent) {
        let Some(endpoint) = self.endpoint else { return };
        // Without a check it is healthy, whether it listens or not.
        let closed = json!([{"Name": "listening", "TCP": ports::free_address().to_string(), "Interval": "1s", "Timeout": "1s"}]);
        let service = json!({
            "Kind": "connect-proxy", "Name": format!("{}-sidecar-proxy", self.name), "Address": endpoint.ip().to_string(),
            "Port": endpoint.port(), "Proxy": {"DestinationServiceName": self.name},
            "Checks": if self.healthy { json!([]) } else { closed },
        });
        agent.client().put("/v1/agent/service/register", &service).ok("registration");
    }

    fn sni(&self, agent: &Agent) -> String {
        format!("{}.default.dc1.internal.{}", self.name, agent.trust_domain())
    }

    fn envoy_listener(&self, agent: &Agent, log: &Path) -> Value {
        let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
        let access_log = json!({"name": "log", "typed_config": {"@type": typed("access_loggers.file.v3.FileAccessLog"), "path": log,
            "log_format": {"text_format_source": {"inline_string": format!("{FORMAT}\n")}}}});
        let mut listener = self.plain_listener(agent, self.envoy);
        listener["filter_chains"][0]["filters"][0]["typed_config"]["access_log"] = json!([access_log]);
        listener
    }

    /// For Envoy, and for the escape hatch of a registration.
    fn plain_listener(&self, agent: &Agent, at: SocketAddr) -> Value {
        let mut proxy = json!({"@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tcp", "cluster": self.sni(agent)});
        if let Some(timeout) = self.idle_timeout {
            proxy["idle_timeout"] = json!(timeout);
        }
        json!({"name": self.name, "address": address(at), "filter_chains": [{"filters": [{"name": "tcp", "typed_config": proxy}]}]})
    }

    fn envoy_cluster(&self, agent: &Agent) -> Value {
        let leaf = agent.leaf("web");
        let peer = format!("spiffe://{}/ns/default/dc/dc1/svc/{}", agent.trust_domain(), self.name);
        let tls = json!({
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": self.sni(agent),
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": {"inline_string": leaf.chain_pem}, "private_key": {"inline_string": leaf.key_pem}}],
                "validation_context": {
                    "trusted_ca": {"inline_string": agent.roots_pem()},
                    "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
                },
            },
        });
        let health = if self.healthy { "HEALTHY" } else { "UNHEALTHY" };
        let endpoints: Vec<Value> =
            self.endpoint.iter().map(|at| json!({"endpoint": {"address": address(*at)}, "health_status": health})).collect();
        let mut cluster = json!({
            "name": self.sni(agent), "type": "STATIC", "connect_timeout": format!("{CONNECT_TIMEOUT_MS}ms").replace("1000ms", "1s"),
            "common_lb_config": {"healthy_panic_threshold": {"value": 0}}, "outlier_detection": {},
            "load_assignment": {"cluster_name": self.sni(agent), "endpoints": [{"lb_endpoints": endpoints}]},
            "transport_socket": {"name": "tls", "typed_config": tls},
        });
        if let Some(most) = self.max_connections {
            cluster["circuit_breakers"] = json!({"thresholds": [{"max_connections": most}]});
        }
        cluster
    }
}

fn address(at: SocketAddr) -> Value {
    json!({"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}})
}

fn start_envoy(cases: &[Case], agent: &Agent, log: &Path) -> Process {
    let listeners: Vec<Value> = cases.iter().map(|case| case.envoy_listener(agent, log)).collect();
    let clusters: Vec<Value> = cases.iter().map(|case| case.envoy_cluster(agent)).collect();
    let admin = ports::free_address();
    let config =
        json!({"admin": {"address": address(admin)}, "static_resources": {"listeners": listeners, "clusters": clusters}});
    let mut command = Command::new(support::tool(support::cache().join("envoy-1.40/envoy")));
    command.args(["--config-yaml", &config.to_string(), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
    command.args(["--file-flush-interval-msec", "50"]);
    let mut process = Process::start("envoy", &command);
    wait_for("Envoy is live", PATIENCE, || {
        process.assert_running();
        let answer = support::http::Client::new(admin, None).try_get("/ready")?;
        if answer.status == 200 { Ok(()) } else { Err(process.tail()) }
    });
    process
}

fn lines_of(log: &Path, case: &Case) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let prefix = format!("{}.", case.name);
    whole.lines().filter(|line| line.starts_with(&prefix)).map(str::to_owned).collect()
}

/// The `count`-th line of a case.
fn line(log: &Path, case: &Case, count: usize) -> String {
    wait_for(&format!("line {count} of {} in {}", case.name, log.display()), PATIENCE, || {
        let mut lines = lines_of(log, case);
        if lines.len() >= count { Ok(lines.remove(count - 1)) } else { Err(std::fs::read_to_string(log).unwrap_or_default()) }
    })
}

/// Everything but the last word, and that: the reason why the transport failed.
fn parts(line: &str) -> (&str, &str) {
    line.rsplit_once(' ').expect("a line has words")
}

/// Sends some bytes and takes what comes until the end.
fn call(at: SocketAddr) {
    let Ok(mut stream) = traffic::connect(at) else { return };
    // The refusal may come before the write.
    let _ = stream.write_all(b"hello");
    traffic::read_to_end(&stream);
}

/// A connection over which an echo came back.
fn open(at: SocketAddr) -> TcpStream {
    let mut stream = traffic::connect(at).expect("a listener");
    stream.write_all(b"hello").expect("written");
    stream.read_exact(&mut [0; 5]).expect("the echo");
    stream
}

#[test]
fn each_failure_of_an_upstream() {
    let agent = Agent::start();
    for name in ["echo", "limited", "idle", "other", "cut"] {
        agent.register(&Definition::new(name));
    }
    let serve = |service: &str, then: fn(tls::ServerStream)| {
        let config = tls::server_config(&agent.leaf(service));
        Custom::start(move |tcp| {
            if let Ok(stream) = tls::accept(tcp, &config) {
                then(stream);
            }
        })
    };
    let echo = |mut stream: tls::ServerStream| {
        let mut bytes = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if stream.write_all(&bytes[..count]).and_then(|()| stream.flush()).is_err() {
                return;
            }
        }
        stream.conn.send_close_notify();
        let _ = stream.flush();
    };
    let cut = |mut stream: tls::ServerStream| {
        let _ = stream.read(&mut [0; 64]);
        traffic::reset(stream.sock);
    };
    let (good, limited, idle, other) = (serve("echo", echo), serve("limited", echo), serve("idle", echo), serve("other", echo));
    let cutting = serve("cut", cut);
    let garbage = Custom::start(|mut tcp| {
        let _ = tcp.read(&mut [0; 64]);
        let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = tcp.read(&mut [0; 64]);
    });
    let silent = Custom::start(|mut tcp| {
        let _ = tcp.read_to_end(&mut Vec::new());
    });
    let abrupt = Custom::start(|mut tcp| {
        let _ = tcp.read(&mut [0; 1]);
        traffic::reset(tcp);
    });
    let cases = [
        Case::new("echo", good.address),
        Case { max_connections: Some(1), ..Case::new("limited", limited.address) },
        Case { idle_timeout: Some("1s"), ..Case::new("idle", idle.address) },
        Case::new("cut", cutting.address),
        Case::new("refused", ports::free_address()),
        Case::new("abrupt", abrupt.address),
        Case::new("garbage", garbage.address),
        Case::new("wrongsan", other.address),
        Case::new("silent", silent.address),
        Case::new("nobody", None),
        Case { healthy: false, ..Case::new("unhealthy", good.address) },
    ];
    let mut web = Definition::new("web");
    for case in &cases {
        let mut config = json!({"connect_timeout_ms": CONNECT_TIMEOUT_MS});
        if let Some(most) = case.max_connections {
            config["limits"] = json!({"max_connections": most});
        }
        if case.idle_timeout.is_some() {
            config["envoy_listener_json"] = json!(case.plain_listener(&agent, case.ringfence).to_string());
        }
        web = web.upstream_with(case.name, case.ringfence, &config);
        case.register(&agent);
    }
    agent.register(&web);
    let folder = support::scratch();
    let (theirs, ours) = (folder.path().join("envoy.log"), folder.path().join("ringfence.log"));
    let arguments = ["-access-log", ours.to_str().expect("a path"), "-access-log-format", FORMAT, "-drain-time", "1s"];
    let mut web = Sidecar::of("web").arguments(&arguments).start(&agent);
    let mut envoy = start_envoy(&cases, &agent, &theirs);
    let [echo, limited, idle, failing @ ..] = &cases;
    // Endpoints come after readiness.
    wait_for("the first echo", PATIENCE, || traffic::echo(echo.ringfence, b"hello").map_err(|error| error.to_string()));

    let mut seen = Vec::new();
    for case in failing {
        call(case.envoy);
        call(case.ringfence);
        let (theirs, ours) = (line(&theirs, case, 1), line(&ours, case, 1));
        let ((their_facts, their_reason), (our_facts, our_reason)) = (parts(&theirs), parts(&ours));
        assert_eq!(our_facts, their_facts, "{}", case.name);
        let by_tls = |reason: &str| reason.starts_with("TLS_error:|") && reason.ends_with(":TLS_error_end");
        match case.name {
            "abrupt" | "garbage" | "wrongsan" => assert!(by_tls(their_reason) && by_tls(our_reason), "{theirs}\n{ours}"),
            _ => assert_eq!(our_reason, their_reason, "{}", case.name),
        }
        let failed = "CERTIFICATE_VERIFY_FAILED";
        assert_eq!(our_reason.contains(failed), their_reason.contains(failed), "{theirs}\n{ours}");
        seen.push((case.name, ours.split(' ').nth(1).unwrap_or_default().to_owned()));
    }
    let wanted = [("cut", "UR"), ("refused", "UF,URX"), ("abrupt", "UF,URX"), ("garbage", "UF,URX"), ("wrongsan", "UF,URX")];
    let wanted = wanted.into_iter().chain([("silent", "UF,URX"), ("nobody", "UH"), ("unhealthy", "UH")]);
    assert_eq!(seen, wanted.map(|(name, flags)| (name, flags.to_owned())).collect::<Vec<_>>());

    let held = [open(limited.envoy), open(limited.ringfence)];
    call(limited.envoy);
    call(limited.ringfence);
    assert_eq!(line(&ours, limited, 1), line(&theirs, limited, 1));
    assert!(line(&ours, limited, 1).contains(" UO UpstreamOverflow "));
    drop(held);
    assert_eq!(line(&ours, limited, 2), line(&theirs, limited, 2), "closed by the client");

    let _rest = [open(idle.envoy), open(idle.ringfence)];
    assert_eq!(line(&ours, idle, 1), line(&theirs, idle, 1));
    assert!(line(&ours, idle, 1).contains(" tcp_session_idle_timeout "));

    let before = lines_of(&ours, echo).len();
    traffic::reset(open(echo.envoy));
    traffic::reset(open(echo.ringfence));
    assert_eq!(line(&ours, echo, before + 1), line(&theirs, echo, 1), "reset by the client");
    assert!(line(&ours, echo, before + 1).contains(" RemoteReset Normal "));

    let _held = [open(echo.envoy), open(echo.ringfence)];
    envoy.signal("TERM");
    web.process.signal("TERM");
    envoy.wait_exit(PATIENCE);
    web.process.wait_exit(PATIENCE);
    let flags = |line: String| line.split(' ').nth(1).unwrap_or_default().to_owned();
    let drained = line(&ours, echo, before + 2);
    assert!(drained.contains(" drained ") || drained.contains(" shutdown "), "{drained}");
    assert_eq!(flags(drained), flags(line(&theirs, echo, 2)), "cut by the end of the process");
}

#[test]
fn a_denial_names_who_was_denied() {
    let app = Echo::start();
    let agent = Agent::start();
    let db = Definition::new("db").app(app.address);
    agent.register(&db);
    agent.register(&Definition::new("web"));
    agent.deny("web", "db");
    let folder = support::scratch();
    let log = folder.path().join("access.log");
    let format = "%RESPONSE_FLAGS% %CONNECTION_TERMINATION_DETAILS% %UPSTREAM_HOST% %DOWNSTREAM_PEER_URI_SAN% %RINGFENCE(decision)% \
         %RINGFENCE(reason)% %DOWNSTREAM_PEER_SERIAL%";
    let arguments = ["-access-log", log.to_str().expect("a path"), "-access-log-format", format];
    let mut sidecar = Sidecar::of("db").arguments(&arguments).start(&agent);
    let web = agent.leaf("web");
    if let Ok(mut stream) = tls::client(db.public, Some(&web)) {
        let _ = stream.read(&mut [0; 64]);
    }
    let line = wait_for("a line of the denial", PATIENCE, || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.lines().find(|line| line.contains("denied")).map(str::to_owned).ok_or(text)
    });
    let serial = web.serial.replace(':', "").trim_start_matches('0').to_lowercase();
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[..6], ["-", "rbac_access_denied_matched_policy[none]", "-", &web.uri, "denied", "denied"]);
    assert_eq!(words[6].trim_start_matches('0'), serial, "{line}");
    assert_eq!(app.accepted(), 0);

    // Moved away as logrotate does, and opened again.
    std::fs::rename(&log, folder.path().join("access.log.1")).expect("moved");
    sidecar.process.signal("HUP");
    wait_for("the log is opened again", Duration::from_secs(10), || {
        if let Ok(mut stream) = tls::client(db.public, Some(&web)) {
            let _ = stream.read(&mut [0; 64]);
        }
        if log.exists() { Ok(()) } else { Err("no new file".to_owned()) }
    });
    sidecar.assert_healthy();
}
