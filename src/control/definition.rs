//! A proxy's definition, typed: the agent's merged registration, or the flags of a service that was never registered.
//!
//! Invariant: what changes security and cannot be honoured refuses the whole proxy; what merely has no effect is named once.
//! Pure. Keys and defaults: Consul `agent/xds/config`, Envoy's where the built-in proxy differs (`config.rs`).

mod access_logs;
mod hatches;
mod pages;
mod stats;
mod upstream;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::StatsWishes;
use super::consul::watch::Name;
use super::consul::watch::chain::not_default;
use super::consul::wire;
use super::opaque::Opaque;
use crate::config;
use crate::config::Keepalive;
use crate::config::envoy::{AccessLog, PageListener, Scrape};
use crate::mesh::{Bind, DenyReply, Outlier};

pub(crate) use pages::ExposedChecks;
use upstream::upstream;
pub(crate) use upstream::{Destination, Tuning, Upstream};

/// Upstreams of one proxy that are believed.
const UPSTREAMS_MAX: usize = 1_024;

/// One proxy as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Definition {
    pub(crate) proxy_id: String,
    pub(crate) name: Name,
    /// Empty when the agent does not tell (Consul 1.8): the leaf's URI does.
    pub(crate) datacenter: String,
    pub(crate) public: Option<Public>,
    pub(crate) upstreams: Vec<Upstream>,
    /// Of proxy-defaults, merged into the registration since Consul 1.15.
    pub(crate) access_logs: Vec<AccessLog>,
    /// Listeners for pages of the admin port.
    pub(crate) pages: Vec<PageListener>,
    /// `expose.checks`.
    pub(crate) checks: Option<ExposedChecks>,
    /// What it says of stats.
    pub(crate) stats: StatsWishes,
    /// What has no effect here or could not be read, for one line of log.
    pub(crate) warnings: Vec<String>,
}

/// The public listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Public {
    pub(crate) bind: Bind,
    pub(crate) app: App,
    pub(crate) local_connect_timeout: Duration,
    /// From an escape hatch.
    pub(crate) local_keepalive: Option<Keepalive>,
    pub(crate) handshake_timeout: Duration,
    pub(crate) max_inbound_connections: u32,
    pub(crate) idle_timeout: Option<Duration>,
}

/// The app behind it, not yet resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum App {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Keys that would change who is let in or what is enforced, and that only Envoy can honour.
const SECURITY_KEYS: [&str; 2] = ["envoy_bootstrap_json_tpl", "envoy_extra_static_listeners_json"];
/// Keys with nothing to do at L4 or for this proxy's design.
const HARMLESS_KEYS: [&str; 6] = [
    "balance_inbound_connections",
    "local_request_timeout_ms",
    "local_idle_timeout_ms",
    "tcp_check_address",
    "disable_tcp_check",
    "balance_outbound_connections",
];

/// Reads a registration. `Err` is why this proxy must not run.
pub(crate) fn parse(service: &wire::Service, scrape: &Scrape) -> Result<Definition, String> {
    if service.kind != "connect-proxy" {
        return Err(format!(
            "`{}` is registered with kind `{}`, not `connect-proxy`: -proxy-id wants the id of a sidecar registration",
            service.id, service.kind
        ));
    }
    let proxy = &service.proxy;
    if proxy.destination_service_name.is_empty() {
        return Err(format!("`{}` names no destination service", service.id));
    }
    refuse_insecure(proxy)?;
    let config = Opaque::new(&proxy.config);
    refuse_keys(&config, "proxy.config", &hatches::OF_UPSTREAMS)?;
    let mut warnings = Vec::new();
    let mut public = public(service, &config, &mut warnings)?;
    let mut hatch_logs = Vec::new();
    hatches::of_public(&config, &mut public, &proxy.destination_service_name, &mut hatch_logs)?;
    let mut pages = pages::of(&config, scrape, &mut warnings);
    pages.extend(pages::exposed(service, &config, &mut warnings));
    let checks = if proxy.expose.checks { pages::checks(service, &config, &mut warnings) } else { None };
    let stats = stats::wishes(&config, &environment, &mut warnings);
    note_ignored(proxy, &config, &mut warnings);
    let name = Name {
        service: proxy.destination_service_name.clone(),
        namespace: not_default(&service.namespace),
        partition: not_default(&service.partition),
    };
    let mut upstreams = Vec::with_capacity(proxy.upstreams.len().min(UPSTREAMS_MAX));
    for wire in proxy.upstreams.iter().take(UPSTREAMS_MAX) {
        if let Some(upstream) = upstream(wire, proxy, &name, &mut warnings)? {
            upstreams.push(upstream);
        }
    }
    unique_binds(Some(&public), &upstreams)?;
    let mut access_logs = lenient(access_logs::access_logs(&proxy.access_logs).map(Some), &mut warnings).unwrap_or_default();
    access_logs.extend(hatch_logs);
    Ok(Definition {
        proxy_id: service.id.clone(),
        name,
        datacenter: service.datacenter.clone(),
        public: Some(public),
        upstreams,
        access_logs,
        pages,
        checks,
        stats,
        warnings,
    })
}

/// A variable of the environment, which statsd's addresses may name.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A service that exists only on the command line.
pub(crate) fn from_flags(flags: &config::ServiceProxy, settings: &config::Consul) -> Result<Definition, String> {
    let name = Name {
        service: flags.name.clone(),
        namespace: settings.namespace.clone().unwrap_or_default(),
        partition: settings.partition.clone().unwrap_or_default(),
    };
    let public = match (flags.listen, &flags.service_address) {
        (None, _) => None,
        (Some(_), None) => return Err("-listen needs -service-addr: where the app behind it listens".to_owned()),
        (Some(listen), Some(app)) => Some(Public {
            bind: Bind::Tcp(listen),
            app: app_address(app)?,
            local_connect_timeout: config::LOCAL_CONNECT_TIMEOUT,
            local_keepalive: None,
            handshake_timeout: config::HANDSHAKE_TIMEOUT,
            max_inbound_connections: 0,
            idle_timeout: None,
        }),
    };
    let upstreams: Vec<Upstream> = flags
        .upstreams
        .iter()
        .map(|flag| Upstream {
            label: flag.destination.clone(),
            bind: Bind::Tcp(flag.bind),
            destination: Destination::Service {
                name: Name { service: flag.destination.clone(), ..name.clone() },
                datacenter: String::new(),
            },
            connect_timeout: None,
            protocol: String::new(),
            mesh_gateway: String::new(),
            max_connections: None,
            outlier: Outlier::default(),
            tuning: Tuning::default(),
            deny_reply: DenyReply::Close,
            access_logs: Vec::new(),
            unhatched: None,
        })
        .collect();
    unique_binds(public.as_ref(), &upstreams)?;
    let proxy_id = flags.name.clone();
    Ok(Definition {
        proxy_id,
        name,
        datacenter: String::new(),
        public,
        upstreams,
        access_logs: Vec::new(),
        pages: Vec::new(),
        checks: None,
        stats: StatsWishes::default(),
        warnings: Vec::new(),
    })
}

fn app_address(text: &str) -> Result<App, String> {
    if let Some(path) = text.strip_prefix("unix://") {
        return Ok(App::Unix(path.into()));
    }
    let (host, port) =
        text.rsplit_once(':').ok_or_else(|| format!("-service-addr `{text}` must be HOST:PORT or unix:///PATH"))?;
    let port = port.parse().map_err(|_| format!("-service-addr `{text}`: `{port}` is no port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok(App::Tcp { host: if host.is_empty() { "127.0.0.1".into() } else { host.into() }, port })
}

fn refuse_insecure(proxy: &wire::Proxy) -> Result<(), String> {
    match proxy.mode.as_str() {
        "" | "direct" => {}
        mode => {
            return Err(format!(
                "proxy mode `{mode}` is not supported: set mode = \"direct\" and explicit upstreams, or keep Envoy for this service"
            ));
        }
    }
    if proxy.mutual_tls_mode.eq_ignore_ascii_case("permissive") {
        return Err("MutualTLSMode permissive lets plaintext in, which this proxy never does; set it to strict".to_owned());
    }
    match proxy.envoy_extensions.iter().find(|extension| extension.required) {
        Some(extension) => Err(format!(
            "Envoy extension `{}` is required and cannot be honoured; remove it or set Required = false",
            extension.name
        )),
        None => Ok(()),
    }
}

/// `misplaced` are escape hatches that stand elsewhere.
fn refuse_keys(config: &Opaque<'_>, place: &str, misplaced: &[&str]) -> Result<(), String> {
    match SECURITY_KEYS.iter().chain(misplaced).find(|key| config.get(key).is_some()) {
        Some(key) => Err(format!(
            "{place}.{key} cannot be honoured here: it would replace what Envoy enforces, or stands in the wrong place; remove the key, or \
             keep Envoy for this service"
        )),
        None => Ok(()),
    }
}

fn public(service: &wire::Service, config: &Opaque<'_>, warnings: &mut Vec<String>) -> Result<Public, String> {
    let proxy = &service.proxy;
    // Where to listen is not guessed: a wrong value here would open another port than the one meant.
    let address = config.text("bind_address")?.unwrap_or_else(|| service.address.clone());
    let port = match config.number("bind_port")? {
        None | Some(0) => service.port,
        Some(port) => u16::try_from(port).map_err(|_| format!("proxy.config.bind_port {port} is no port"))?,
    };
    if port == 0 {
        return Err(format!("`{}` is registered without a port: the public listener has nowhere to listen", service.id));
    }
    let ip = bind_ip(&address, Ipv4Addr::UNSPECIFIED, "proxy.config.bind_address")?;
    let app = if proxy.local_service_socket_path.is_empty() {
        if proxy.local_service_port == 0 {
            return Err(format!(
                "`{}` has neither local_service_port nor local_service_socket_path: no app to reach",
                service.id
            ));
        }
        let host = &proxy.local_service_address;
        App::Tcp { host: if host.is_empty() { "127.0.0.1".into() } else { host.clone() }, port: proxy.local_service_port }
    } else {
        App::Unix(PathBuf::from(&proxy.local_service_socket_path))
    };
    Ok(Public {
        bind: Bind::Tcp(SocketAddr::new(ip, port)),
        app,
        local_keepalive: None,
        local_connect_timeout: positive(
            lenient(config.millis("local_connect_timeout_ms"), warnings),
            config::LOCAL_CONNECT_TIMEOUT,
        ),
        handshake_timeout: positive(lenient(config.millis("handshake_timeout_ms"), warnings), config::HANDSHAKE_TIMEOUT),
        max_inbound_connections: lenient(config.small("max_inbound_connections"), warnings).unwrap_or(0),
        idle_timeout: None,
    })
}

fn note_ignored(proxy: &wire::Proxy, config: &Opaque<'_>, warnings: &mut Vec<String>) {
    if let Ok(Some(protocol)) = config.text("protocol")
        && protocol != "tcp"
    {
        warnings.push(format!("protocol {protocol} is carried as plain TCP"));
    }
    config.ignore(&HARMLESS_KEYS);
    warnings.extend(config.unread().iter().map(|key| format!("proxy.config.{} has no effect", key.escape_default())));
    for extension in &proxy.envoy_extensions {
        warnings.push(format!("Envoy extension {} has no effect", extension.name.escape_default()));
    }
}

fn bind_ip(text: &str, default: Ipv4Addr, place: &str) -> Result<IpAddr, String> {
    match text.trim_start_matches('[').trim_end_matches(']') {
        "" => Ok(IpAddr::V4(default)),
        "localhost" => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        text => text.parse().map_err(|_| {
            format!("{place}: `{}` is no IP address to listen on; set it to one (0.0.0.0 for all)", text.escape_default())
        }),
    }
}

/// Two listeners on one address would fail later and less clearly. An upstream may have a second one, for when its hatches do not
/// hold.
fn unique_binds(public: Option<&Public>, upstreams: &[Upstream]) -> Result<(), String> {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let all = public.iter().map(|public| (&public.bind, "the public listener"));
    let of_upstreams = upstreams.iter().flat_map(|upstream| {
        let unhatched = upstream.unhatched.iter().map(|plain| &plain.bind).filter(|bind| **bind != upstream.bind);
        std::iter::once(&upstream.bind).chain(unhatched).map(|bind| (bind, upstream.label.as_str()))
    });
    for (bind, who) in all.chain(of_upstreams) {
        if let Some(other) = seen.insert(bind.to_string(), who) {
            return Err(format!("{who} and {other} both want to listen on {bind}; change one of them"));
        }
    }
    Ok(())
}

/// A value that cannot be read is named and its default used: none of these changes security.
fn lenient<T>(value: Result<Option<T>, String>, notes: &mut Vec<String>) -> Option<T> {
    value.unwrap_or_else(|note| {
        notes.push(format!("{note}; the default is used"));
        None
    })
}

fn positive(value: Option<Duration>, default: Duration) -> Duration {
    value.filter(|value| !value.is_zero()).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(change: impl FnOnce(&mut Value)) -> wire::Service {
        let mut value = crate::control::fixture("agent-service-sidecar");
        change(&mut value);
        serde_json::from_value(value).expect("the capture parses")
    }

    #[test]
    fn the_capture_becomes_listeners() {
        let definition = parse(&service(|_| {}), &Scrape::default()).expect("accepted");
        let public = definition.public.expect("a public listener");
        assert_eq!(public.bind, Bind::Tcp("0.0.0.0:21500".parse().expect("address")));
        assert_eq!(public.app, App::Tcp { host: "127.0.0.1".into(), port: 8_793 });
        assert_eq!(public.local_connect_timeout, Duration::from_secs(1));
        let labels: Vec<_> = definition.upstreams.iter().map(|upstream| upstream.label.as_str()).collect();
        assert_eq!(labels, ["warehouse", "old-warehouse", "broker", "broker", "prepared_query:warehouse-query"]);
        let warehouse = &definition.upstreams[0];
        assert_eq!(warehouse.max_connections, Some(64));
        assert_eq!((warehouse.outlier.max_failures, warehouse.outlier.interval), (3, Duration::from_secs(5)));
        assert_eq!(warehouse.connect_timeout, Some(Duration::from_millis(2_500)));
        assert_eq!(definition.upstreams[2].bind, Bind::Unix { path: "/run/mesh/broker.sock".into(), mode: Some(0o660) });
        assert_eq!(definition.upstreams[3].mesh_gateway, "local");
        assert_eq!(definition.pages.len(), 1);
        assert_eq!(definition.warnings, [""; 0]);
    }

    #[test]
    fn what_changes_security_refuses_the_proxy() {
        let refused = |change: fn(&mut Value)| parse(&service(change), &Scrape::default()).expect_err("refused");
        for key in SECURITY_KEYS.iter().chain(&hatches::OF_PROXIES).chain(&hatches::OF_UPSTREAMS) {
            let mut value = crate::control::fixture("agent-service-sidecar");
            value["Proxy"]["Config"][*key] = json!("{}");
            let error = parse(&serde_json::from_value(value).expect("parses"), &Scrape::default()).expect_err("refused");
            assert!(error.contains(key), "{error}");
        }
        assert!(refused(|v| v["Proxy"]["Upstreams"][0]["Config"]["envoy_cluster_json"] = json!("{}")).contains("warehouse"));
        assert!(refused(|v| v["Proxy"]["Mode"] = json!("transparent")).contains("direct"));
        assert!(refused(|v| v["Proxy"]["MutualTLSMode"] = json!("permissive")).contains("strict"));
        assert!(refused(|v| v["Proxy"]["EnvoyExtensions"] = json!([{"Name":"builtin/wasm","Required":true}])).contains("wasm"));
        assert!(refused(|v| v["Kind"] = json!("")).contains("connect-proxy"));
        let transparent = serde_json::from_value(crate::control::fixture("agent-service-transparent")).expect("parses");
        assert!(parse(&transparent, &Scrape::default()).expect_err("refused").contains("transparent"));
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let definition = parse(
            &service(|v| {
                v["Proxy"]["Config"]["colour"] = json!("red");
            }),
            &Scrape::default(),
        )
        .expect("accepted");
        assert!(definition.warnings.iter().any(|warning| warning.contains("colour")), "{:?}", definition.warnings);
    }

    #[test]
    fn binds_are_never_guessed_or_shared() {
        let refused = |change: fn(&mut Value)| parse(&service(change), &Scrape::default()).expect_err("refused");
        assert!(refused(|v| v["Proxy"]["Config"]["bind_port"] = json!(70_000)).contains("70000"));
        assert!(refused(|v| v["Address"] = json!("web.example")).contains("0.0.0.0"));
        assert!(refused(|v| v["Proxy"]["Upstreams"][1]["LocalBindPort"] = json!(15_432)).contains("old-warehouse"));
        assert!(refused(|v| v["Proxy"]["Upstreams"][2]["LocalBindSocketMode"] = json!("rw")).contains("octal"));
        let bound = parse(
            &service(|v| {
                v["Proxy"]["Config"]["bind_address"] = json!("::1");
                v["Proxy"]["Config"]["bind_port"] = json!("9000");
            }),
            &Scrape::default(),
        )
        .expect("accepted");
        assert_eq!(bound.public.expect("public").bind, Bind::Tcp("[::1]:9000".parse().expect("address")));
    }

    #[test]
    fn peers_are_named_and_synthetic_upstreams_skipped() {
        let definition = parse(
            &service(|v| {
                v["Proxy"]["Upstreams"][1]["DestinationPeer"] = json!("east");
                v["Proxy"]["Upstreams"][0] = json!({"DestinationName":"*","CentrallyConfigured":true});
            }),
            &Scrape::default(),
        )
        .expect("accepted");
        assert_eq!(definition.upstreams.len(), 4);
        assert_eq!(definition.upstreams[0].label, "old-warehouse?peer=east");
        assert!(matches!(&definition.upstreams[0].destination, Destination::Unsupported(why) if why.contains("xDS")));
    }

    #[test]
    fn flags_alone_make_a_definition() {
        let flags = config::ServiceProxy {
            name: "batch".into(),
            listen: Some("127.0.0.1:20000".parse().expect("address")),
            service_address: Some("[::1]:8080".into()),
            upstreams: vec![config::UpstreamFlag { destination: "db".into(), bind: "127.0.0.1:9191".parse().expect("address") }],
        };
        let definition = from_flags(&flags, &config::Consul::default()).expect("accepted");
        assert_eq!(definition.public.expect("public").app, App::Tcp { host: "::1".into(), port: 8_080 });
        let no_app = config::ServiceProxy { service_address: None, ..flags };
        assert!(from_flags(&no_app, &config::Consul::default()).expect_err("refused").contains("-service-addr"));
    }
}
