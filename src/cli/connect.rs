//! `ringfence connect`: the sidecar.

use clap::Args;

use super::{Environment, Exit, flags};
use crate::app;

const EXAMPLES: &str = "\
Examples:
  ringfence connect -sidecar-for web
  ringfence connect -sidecar-for web -sidecar-for api -token-file /etc/consul.d/host.token
  ringfence connect -proxy-id web-1-sidecar-proxy -http-addr unix:///run/consul.sock
  ringfence connect -service web -service-addr 127.0.0.1:8080 -listen :8443 -upstream db:9191
  ringfence connect -sidecar-for web -login-method jwt -login-bearer-token-file /run/web.jwt

A line written for `consul connect envoy` or `consul connect proxy` works as it is. SIGTERM drains for -drain-time and ends,
a second one ends at once; SIGHUP reads token and certificate files again and opens log files again. SIGUSR2 upgrades without a
loss: it starts the program's file anew with the same flags and listening sockets; once that one serves, this one finishes its
open connections and ends.";

/// Flags of `connect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) sidecar: flags::Sidecar,
}

pub(super) fn run(flags: &Flags, environment: &Environment, ignored: &[String]) -> anyhow::Result<Exit> {
    let settings = flags.sidecar.settings(environment, ignored)?;
    app::init_logs(&settings.logging);
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    app::run(settings.sidecar)?;
    Ok(Exit::Ok)
}
