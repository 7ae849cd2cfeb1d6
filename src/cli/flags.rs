//! The flags that `connect` and `check` share, and how flags and environment become settings.
//!
//! Invariant: precedence is Consul's: a flag beats its variable; of tokens `-token-file` beats `-token`, that beats
//! CONSUL_HTTP_TOKEN_FILE, that beats CONSUL_HTTP_TOKEN. Nothing here opens a file or a connection (names are resolved).

mod pages;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use zeroize::Zeroizing;

use super::environment::Environment;
use super::{UsageError, argv, values};
use crate::config::envoy::{AccessLog, AccessLogFormat};
use crate::config::{self, LogLevel, LogTarget, TokenSource, UpstreamFlag};

/// Everything that makes a sidecar.
#[derive(Debug, Clone, Args)]
pub(super) struct Sidecar {
    #[command(flatten)]
    pub(super) proxies: Proxies,
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    process: Process,
    #[command(flatten)]
    pages: pages::Pages,
}

/// Which proxies this process is.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Which service")]
pub(super) struct Proxies {
    /// Run the sidecar that is registered for this service instance; may be repeated [env: CONNECT_SIDECAR_FOR]
    #[arg(long, value_name = "SERVICE_ID")]
    pub(super) sidecar_for: Vec<String>,
    /// Run the proxy that is registered under this ID; may be repeated [env: CONNECT_PROXY_ID]
    #[arg(long, value_name = "ID")]
    proxy_id: Vec<String>,
    /// Be the sidecar of a service that was never registered as one
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// With -service and -listen: where its app listens
    #[arg(long, value_name = "ADDR:PORT", value_parser = values::app_address)]
    service_addr: Option<String>,
    /// With -service: a local listener for an upstream; may be repeated
    #[arg(long, value_name = "NAME:[ADDR:]PORT", value_parser = values::upstream)]
    upstream: Vec<UpstreamFlag>,
    /// With -service: where peers come in
    #[arg(long, value_name = "ADDR:PORT", value_parser = public_address)]
    listen: Option<SocketAddr>,
    /// Name that mesh gateways are registered under
    #[arg(long, value_name = "NAME", default_value = "mesh-gateway")]
    mesh_gateway_service: String,
}

/// How the agent is reached.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Consul agent")]
pub(super) struct Agent {
    /// host:port, http(s)://host:port[/prefix] or unix:///path [env: CONSUL_HTTP_ADDR] [default: 127.0.0.1:8500]
    #[arg(long, value_name = "ADDR")]
    http_addr: Option<String>,
    /// ACL token; everybody on this host can read it in the process list, -token-file is better [env: CONSUL_HTTP_TOKEN]
    #[arg(long, value_name = "TOKEN", hide_default_value = true)]
    token: Option<Secret>,
    /// File with the ACL token; read again when it changes and when the agent refuses [env: CONSUL_HTTP_TOKEN_FILE]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// CA certificates to trust for https [env: CONSUL_CACERT]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Folder of CA certificates to trust for https [env: CONSUL_CAPATH]
    #[arg(long, value_name = "FOLDER")]
    ca_path: Option<PathBuf>,
    /// Client certificate for https [env: CONSUL_CLIENT_CERT]
    #[arg(long, value_name = "FILE")]
    client_cert: Option<PathBuf>,
    /// Its key [env: CONSUL_CLIENT_KEY]
    #[arg(long, value_name = "FILE")]
    client_key: Option<PathBuf>,
    /// Name to expect in the agent's certificate [env: CONSUL_TLS_SERVER_NAME]
    #[arg(long, value_name = "NAME")]
    tls_server_name: Option<String>,
    /// Enterprise namespace [env: CONSUL_NAMESPACE]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Enterprise admin partition [env: CONSUL_PARTITION]
    #[arg(long, value_name = "NAME")]
    partition: Option<String>,
    /// Datacenter to ask for; the agent's own when absent
    #[arg(long, value_name = "NAME")]
    datacenter: Option<String>,
    /// Get tokens by logging in with this auth method
    #[arg(long, value_name = "NAME")]
    login_method: Option<String>,
    /// File with the bearer token for the login; read at each login
    #[arg(long, value_name = "FILE")]
    login_bearer_token_file: Option<PathBuf>,
    /// Metadata of the login; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = values::key_value)]
    login_meta: Vec<(String, String)>,
}

/// How the process runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Process")]
struct Process {
    /// Where the admin port listens; it has no access control
    #[arg(long, value_name = "ADDR:PORT", default_value = "localhost:19000", value_parser = admin_address)]
    admin_bind: SocketAddr,
    /// Log of requests to the admin port
    #[arg(long, value_name = "FILE", default_value = "/dev/null")]
    admin_access_log_path: PathBuf,
    /// Leave stats that stayed zero, and upstreams that were never used, out of /stats/prometheus, as ?usedonly does
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    stats_usedonly: bool,
    /// Leave out the tags that Consul's metrics had before 1.9 (consul_service and its like)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    omit_deprecated_tags: bool,
    /// Worker threads, each with its own io_uring [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = values::workers)]
    workers: Option<usize>,
    /// How long live connections go on after SIGTERM [default: 30s; 3s where systemd keeps the listening sockets, so that new connections wait]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    drain_time: Option<Duration>,
    /// TCP keepalive on both legs; 0 switches it off. Over xDS a cluster may have its own
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = values::duration)]
    keepalive: Duration,
    /// How long an accepted connection waits for the first certificate or endpoint
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::duration)]
    hold_time: Duration,
    /// Resume TLS sessions of the certificate in use; identity and intention are decided anew on every connection
    #[arg(long, value_name = "on|off", default_value = "on", action = clap::ArgAction::Set, value_parser = values::on_off)]
    tls_resumption: bool,
    /// Tell local callers apart by these rules: each Airflow task speaks under its own identity (TOML, see README)
    #[arg(long, value_name = "FILE")]
    airflow: Option<PathBuf>,
    /// One JSON line a connection: stdout, stderr, none or a file, which SIGHUP opens again
    #[arg(long, value_name = "TARGET", default_value = "stdout", value_parser = values::log_target)]
    connection_log: LogTarget,
    /// Envoy's access log besides: stdout, stderr, none or a file, which SIGHUP opens again [default: what Consul's proxy-defaults say]
    #[arg(long, value_name = "TARGET", value_parser = values::log_target)]
    access_log: Option<LogTarget>,
    /// Its format: default (Envoy's), json (Consul's), or a text with Envoy's operators and %RINGFENCE(field)%
    #[arg(long, value_name = "FORMAT", default_value = "json", value_parser = values::access_log_format)]
    access_log_format: AccessLogFormat,
    /// trace, debug, info, warn or error
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = log_level)]
    log_level: LogLevel,
    /// Log lines as JSON
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    log_json: bool,
}

/// Settings made of flags and environment, with what the user should be told.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) sidecar: config::Sidecar,
    pub(super) logging: config::Logging,
    /// One line each.
    pub(super) warnings: Vec<String>,
}

impl Sidecar {
    /// `-admin-bind`.
    pub(super) fn admin_bind(&self) -> SocketAddr {
        self.process.admin_bind
    }

    pub(super) fn settings(&self, environment: &Environment, ignored: &[String]) -> Result<Settings, UsageError> {
        let mut warnings = Vec::new();
        if !ignored.is_empty() {
            warnings.push(format!("these flags are for Envoy and are ignored: {}", ignored.join(" ")));
        }
        if self.agent.token.is_some() {
            warnings.push("-token can be read in the process list by everybody on this host: use -token-file".to_owned());
        }
        if !self.process.admin_bind.ip().is_loopback() {
            let bind = self.process.admin_bind;
            warnings.push(format!("the admin port on {bind} has no access control and can be reached from other hosts"));
        }
        let consul = config::Consul {
            proxies: self.proxies.resolve(environment)?,
            mesh_gateway_service: self.proxies.mesh_gateway_service.clone(),
            tls_resumption: self.process.tls_resumption,
            scrape: self.pages.scrape()?,
            ..self.agent.resolve(environment)?
        };
        if consul.tls.skip_verify {
            warnings.push("CONSUL_HTTP_SSL_VERIFY=false: the agent's certificate is not checked".to_owned());
        }
        let defaults = config::DataPlane::default();
        let plane = config::DataPlane {
            workers: self.process.workers.unwrap_or(defaults.workers),
            drain_time: self.process.drain_time.unwrap_or(defaults.drain_time),
            restart_drain_time: self.process.drain_time.unwrap_or(defaults.restart_drain_time),
            keepalive: self.process.keepalive,
            hold_time: self.process.hold_time,
            ..defaults
        };
        let access_log = &self.process.admin_access_log_path;
        let access_log = (access_log != Path::new("/dev/null") && access_log != Path::new("")).then(|| access_log.clone());
        Ok(Settings {
            sidecar: config::Sidecar {
                consul,
                plane,
                admin: config::Admin {
                    bind: self.process.admin_bind,
                    access_log,
                    envoy_version: self.pages.envoy_version()?,
                    address_path: None,
                    component_levels: String::new(),
                },
                pages: self.pages.listeners()?,
                connection_log: self.process.connection_log.clone(),
                access_logs: self.process.access_logs(),
                airflow: self.process.airflow.clone(),
                stats: config::envoy::Stats {
                    omit_unused: self.process.stats_usedonly,
                    omit_deprecated_tags: self.process.omit_deprecated_tags,
                    ..config::envoy::Stats::default()
                },
                ..config::Sidecar::default()
            },
            logging: config::Logging { level: self.process.log_level, json: self.process.log_json },
            warnings,
        })
    }
}

impl Process {
    /// One log of connections, and one of those that no listener wanted, as Consul has Envoy write them.
    fn access_logs(&self) -> Vec<AccessLog> {
        let of = |target: &LogTarget, unmatched_only| AccessLog {
            target: target.clone(),
            format: self.access_log_format.clone(),
            unmatched_only,
            only: None,
        };
        self.access_log.iter().flat_map(|target| [of(target, false), of(target, true)]).collect()
    }
}

impl Proxies {
    fn resolve(&self, environment: &Environment) -> Result<Vec<config::Proxy>, UsageError> {
        let usage = |text: &str| Err(UsageError(text.to_owned()));
        let sidecar_for = non_empty(&self.sidecar_for);
        let proxy_id = non_empty(&self.proxy_id);
        if let Some(name) = self.service.as_deref().filter(|name| !name.is_empty()) {
            if !sidecar_for.is_empty() || !proxy_id.is_empty() {
                return usage("-service is for a service without a registered sidecar: leave out -sidecar-for and -proxy-id");
            }
            return Ok(vec![config::Proxy::Service(self.unregistered(name)?)]);
        }
        if self.service_addr.is_some() || !self.upstream.is_empty() || self.listen.is_some() {
            return usage(
                "-service-addr, -upstream and -listen need -service NAME; a registered sidecar has them in its definition",
            );
        }
        let flags = sidecar_for
            .into_iter()
            .map(config::Proxy::SidecarFor)
            .chain(proxy_id.into_iter().map(config::Proxy::ProxyId))
            .collect::<Vec<_>>();
        let proxies = if flags.is_empty() { Self::of_environment(environment) } else { flags };
        if proxies.is_empty() {
            return usage("which service? write -sidecar-for SERVICE_ID, -proxy-id ID or -service NAME; --help has examples");
        }
        for (index, proxy) in proxies.iter().enumerate() {
            if proxies[..index].contains(proxy) {
                return Err(UsageError(format!("{} is named twice", describe(proxy))));
            }
        }
        Ok(proxies)
    }

    /// Consul prefers the proxy's ID when it has both.
    fn of_environment(environment: &Environment) -> Vec<config::Proxy> {
        let proxy_id = environment.get("CONNECT_PROXY_ID").map(|id| config::Proxy::ProxyId(id.to_owned()));
        let sidecar_for = || environment.get("CONNECT_SIDECAR_FOR").map(|id| config::Proxy::SidecarFor(id.to_owned()));
        proxy_id.or_else(sidecar_for).into_iter().collect()
    }

    fn unregistered(&self, name: &str) -> Result<config::ServiceProxy, UsageError> {
        let usage = |text: &str| Err(UsageError(text.to_owned()));
        match (self.listen, &self.service_addr) {
            (Some(_), None) => return usage("-listen needs -service-addr ADDR:PORT: where the app listens"),
            (None, Some(_)) => return usage("-service-addr needs -listen ADDR:PORT: where peers come in"),
            (None, None) if self.upstream.is_empty() => {
                return usage("-service needs -upstream NAME:PORT, or -listen ADDR:PORT with -service-addr ADDR:PORT, or both");
            }
            _ => {}
        }
        for (index, upstream) in self.upstream.iter().enumerate() {
            if self.upstream[..index].iter().any(|other| other.bind == upstream.bind) {
                return Err(UsageError(format!("two -upstream flags listen on {}", upstream.bind)));
            }
        }
        Ok(config::ServiceProxy {
            name: name.to_owned(),
            listen: self.listen,
            service_address: self.service_addr.clone(),
            upstreams: self.upstream.clone(),
        })
    }
}

impl Agent {
    pub(super) fn resolve(&self, environment: &Environment) -> Result<config::Consul, UsageError> {
        let flag_or = |flag: &Option<String>, name: &str| {
            let flag = flag.as_deref().filter(|value| !value.is_empty());
            flag.or_else(|| environment.get(name)).map(str::to_owned)
        };
        let path_or = |flag: &Option<PathBuf>, name: &str| {
            let flag = flag.clone().filter(|path| !path.as_os_str().is_empty());
            flag.or_else(|| environment.get(name).map(PathBuf::from))
        };
        let boolean = |name: &str| environment.get(name).map(|value| argv::boolean(name, value)).transpose();
        let ssl = boolean("CONSUL_HTTP_SSL")?.unwrap_or(false);
        let address = flag_or(&self.http_addr, "CONSUL_HTTP_ADDR").unwrap_or_else(|| config::AGENT_ADDRESS.to_owned());
        let tls = config::AgentTls {
            ca_file: path_or(&self.ca_file, "CONSUL_CACERT"),
            ca_path: path_or(&self.ca_path, "CONSUL_CAPATH"),
            client_cert: path_or(&self.client_cert, "CONSUL_CLIENT_CERT"),
            client_key: path_or(&self.client_key, "CONSUL_CLIENT_KEY"),
            server_name: flag_or(&self.tls_server_name, "CONSUL_TLS_SERVER_NAME"),
            skip_verify: !boolean("CONSUL_HTTP_SSL_VERIFY")?.unwrap_or(true),
        };
        if tls.client_cert.is_some() != tls.client_key.is_some() {
            return Err(UsageError(
                "-client-cert and -client-key (CONSUL_CLIENT_CERT and CONSUL_CLIENT_KEY) go together: set both or neither".into(),
            ));
        }
        Ok(config::Consul {
            address: values::agent_address(&address, ssl)
                .map_err(|why| UsageError(format!("agent address (-http-addr, CONSUL_HTTP_ADDR) {why}")))?,
            tls,
            basic_auth: environment.get("CONSUL_HTTP_AUTH").map(basic_auth),
            token: self.token_source(environment)?,
            namespace: flag_or(&self.namespace, "CONSUL_NAMESPACE"),
            partition: flag_or(&self.partition, "CONSUL_PARTITION"),
            datacenter: self.datacenter.clone().filter(|name| !name.is_empty()),
            ..config::Consul::default()
        })
    }

    fn token_source(&self, environment: &Environment) -> Result<TokenSource, UsageError> {
        let file = self.token_file.clone().filter(|path| !path.as_os_str().is_empty());
        let token = self.token.as_ref().filter(|token| !token.0.is_empty());
        if let Some(login) = self.login()? {
            if file.is_some() || token.is_some() {
                return Err(UsageError("-login-method gets its own tokens: leave out -token and -token-file".into()));
            }
            return Ok(TokenSource::Login(login));
        }
        if let Some(path) = file {
            return Ok(TokenSource::File(path));
        }
        if let Some(Secret(token)) = token {
            return Ok(TokenSource::Static(token.clone()));
        }
        if let Some(path) = environment.get("CONSUL_HTTP_TOKEN_FILE") {
            return Ok(TokenSource::File(PathBuf::from(path)));
        }
        let token = environment.get("CONSUL_HTTP_TOKEN").map(|token| Zeroizing::new(token.to_owned()));
        Ok(token.map_or(TokenSource::None, TokenSource::Static))
    }

    fn login(&self) -> Result<Option<config::Login>, UsageError> {
        match (&self.login_method, &self.login_bearer_token_file) {
            (Some(method), Some(file)) => {
                Ok(Some(config::Login { method: method.clone(), bearer_token_file: file.clone(), meta: self.login_meta.clone() }))
            }
            (Some(_), None) => Err(UsageError("-login-method needs -login-bearer-token-file FILE".into())),
            (None, Some(_)) => Err(UsageError("-login-bearer-token-file needs -login-method NAME".into())),
            (None, None) if !self.login_meta.is_empty() => Err(UsageError("-login-meta needs -login-method NAME".into())),
            (None, None) => Ok(None),
        }
    }
}

/// A flag whose value no message may repeat.
#[derive(Clone)]
struct Secret(Zeroizing<String>);

impl std::str::FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// The flag that `proxy` came from, for messages.
fn describe(proxy: &config::Proxy) -> String {
    match proxy {
        config::Proxy::SidecarFor(id) => format!("-sidecar-for {id}"),
        config::Proxy::ProxyId(id) => format!("-proxy-id {id}"),
        config::Proxy::Service(service) => format!("-service {}", service.name),
    }
}

/// `user` alone has an empty password, as in Consul.
fn basic_auth(text: &str) -> Zeroizing<String> {
    Zeroizing::new(if text.contains(':') { text.to_owned() } else { format!("{text}:") })
}

fn non_empty(values: &[String]) -> Vec<String> {
    values.iter().filter(|value| !value.is_empty()).cloned().collect()
}

fn public_address(text: &str) -> Result<SocketAddr, String> {
    let address = values::socket_address(text, IpAddr::V4(Ipv4Addr::UNSPECIFIED))?;
    if address.port() == 0 { Err(format!("`{text}`: port 0 cannot be dialed by peers")) } else { Ok(address) }
}

pub(super) fn admin_address(text: &str) -> Result<SocketAddr, String> {
    values::socket_address(text, IpAddr::V4(Ipv4Addr::LOCALHOST))
}

pub(super) fn log_level(text: &str) -> Result<LogLevel, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "trace" => LogLevel::Trace,
        "debug" => LogLevel::Debug,
        "info" => LogLevel::Info,
        "warn" | "warning" => LogLevel::Warn,
        "err" | "error" => LogLevel::Error,
        _ => return Err(format!("`{text}` is no log level; write trace, debug, info, warn or error")),
    })
}

#[cfg(test)]
#[path = "flags/tests.rs"]
mod tests;
