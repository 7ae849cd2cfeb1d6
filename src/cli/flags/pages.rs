//! Flags of `consul connect envoy` about the admin port's pages: which Envoy to be, and where others may read which page.
//!
//! Invariant: an empty value is no value, as in Consul, whose scripts write `-flag=""`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use super::super::UsageError;
use super::values;
use crate::config;
use crate::config::envoy::{PageAnswer, PageListener, PageRoute, PageTls, PathMatch, SCRAPE_PATH, Scrape};

/// What `/ready` is asked for by.
const READY: &str = "/ready";

/// The admin port's pages.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Pages for others")]
pub(super) struct Pages {
    /// Version of Envoy to say that this is, X.Y.Z
    #[arg(long, value_name = "VERSION", default_value = config::ENVOY_VERSION)]
    envoy_version: String,
    /// Answer /ready on this address too; with -envoy-ready-bind-port
    #[arg(long, value_name = "ADDR")]
    envoy_ready_bind_address: Option<String>,
    /// The port for it
    #[arg(long, value_name = "PORT")]
    envoy_ready_bind_port: Option<String>,
    /// Path of the listener that a registration's envoy_prometheus_bind_addr asks for
    #[arg(long, value_name = "PATH", default_value = SCRAPE_PATH)]
    prometheus_scrape_path: String,
    /// Local port that answers scrapes in this process's place
    #[arg(long, value_name = "PORT")]
    prometheus_backend_port: Option<String>,
    /// Serve scrapes over TLS, to clients of these CAs; with -prometheus-cert-file and -prometheus-key-file
    #[arg(long, value_name = "FILE")]
    prometheus_ca_file: Option<PathBuf>,
    /// The same, a folder of CAs
    #[arg(long, value_name = "FOLDER")]
    prometheus_ca_path: Option<PathBuf>,
    /// Certificate chain for it
    #[arg(long, value_name = "FILE")]
    prometheus_cert_file: Option<PathBuf>,
    /// Key for it
    #[arg(long, value_name = "FILE")]
    prometheus_key_file: Option<PathBuf>,
}

impl Pages {
    /// The version to claim.
    pub(super) fn envoy_version(&self) -> Result<String, UsageError> {
        let text = self.envoy_version.as_str();
        if text.is_empty() {
            return Ok(config::ENVOY_VERSION.to_owned());
        }
        let numbers: Vec<_> = text.split('.').map(str::parse::<u16>).collect();
        match numbers[..] {
            [Ok(_), Ok(_), Ok(_)] => Ok(text.to_owned()),
            _ => Err(UsageError(format!("-envoy-version `{text}` is no version; write it as {}", config::ENVOY_VERSION))),
        }
    }

    /// Listeners that are there from the start.
    pub(super) fn listeners(&self) -> Result<Vec<PageListener>, UsageError> {
        let address = self.envoy_ready_bind_address.as_deref().filter(|text| !text.is_empty());
        let port = port("-envoy-ready-bind-port", self.envoy_ready_bind_port.as_deref())?;
        // Consul makes a listener only of both.
        let (Some(address), Some(port)) = (address, port) else { return Ok(Vec::new()) };
        let host = if address.contains(':') { format!("[{}]", address.trim_matches(['[', ']'])) } else { address.to_owned() };
        let bind = values::socket_address(&format!("{host}:{port}"), IpAddr::V4(Ipv4Addr::LOCALHOST))
            .map_err(|why| UsageError(format!("-envoy-ready-bind-address {why}")))?;
        let ready = PageRoute { path: PathMatch::Exact(READY.to_owned()), answer: PageAnswer::Admin { rewrite: None } };
        let nothing = PageRoute { path: PathMatch::Prefix("/".to_owned()), answer: PageAnswer::Status(404) };
        Ok(vec![PageListener {
            name: "envoy_ready_listener".to_owned(),
            bind,
            routes: vec![ready, nothing],
            tls: None,
            sources: Vec::new(),
        }])
    }

    /// How scrapes are served.
    pub(super) fn scrape(&self) -> Result<Scrape, UsageError> {
        let path = match self.prometheus_scrape_path.as_str() {
            "" => SCRAPE_PATH,
            path if path.starts_with('/') => path,
            path => return Err(UsageError(format!("-prometheus-scrape-path `{path}` must begin with a slash"))),
        };
        let backend = port("-prometheus-backend-port", self.prometheus_backend_port.as_deref())?;
        let backend = backend.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        Ok(Scrape { path: path.to_owned(), backend, tls: self.tls()? })
    }

    fn tls(&self) -> Result<Option<PageTls>, UsageError> {
        let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let ca = given(&self.prometheus_ca_file).or_else(|| given(&self.prometheus_ca_path));
        match (ca, given(&self.prometheus_cert_file), given(&self.prometheus_key_file)) {
            (None, None, None) => Ok(None),
            (Some(ca), Some(cert_file), Some(key_file)) => Ok(Some(PageTls { cert_file, key_file, ca: Some(ca) })),
            _ => Err(UsageError(
                "TLS for Prometheus needs -prometheus-ca-file (or -prometheus-ca-path), -prometheus-cert-file and \
                 -prometheus-key-file: set all or none"
                    .to_owned(),
            )),
        }
    }
}

/// 0 and nothing are no port.
fn port(flag: &str, text: Option<&str>) -> Result<Option<u16>, UsageError> {
    match text.filter(|text| !text.is_empty()).map(str::parse) {
        None | Some(Ok(0)) => Ok(None),
        Some(Ok(port)) => Ok(Some(port)),
        Some(Err(_)) => Err(UsageError(format!("{flag} `{}` is no port", text.unwrap_or_default()))),
    }
}
