//! `ringfence connect`: the sidecar.

mod upgrade;

use clap::Args;

use super::{Environment, Exit, UsageError, flags};
use crate::app;

const EXAMPLES: &str = "\
Examples:
  ringfence connect -sidecar-for web
  ringfence connect -sidecar-for web -sidecar-for api -token-file /etc/consul.d/host.token
  ringfence connect -proxy-id web-1-sidecar-proxy -http-addr unix:///run/consul.sock
  ringfence connect -service web -service-addr 127.0.0.1:8080 -listen :8443 -upstream db:9191
  ringfence connect -sidecar-for web -login-method jwt -login-bearer-token-file /run/web.jwt
  ringfence connect -upgrade -admin-bind localhost:19000

A line written for `consul connect envoy` or `consul connect proxy` works as it is. SIGTERM drains for -drain-time and ends,
a second one ends at once; SIGHUP reads token and certificate files again and opens log files again. SIGUSR2 upgrades without a
loss: it starts the program's file anew with the same flags and listening sockets; once that one serves, this one finishes its
open connections and ends. -upgrade has the running process do so by its admin port, waits until the new one serves and says
what happened: exit code 0 when it serves, 1 when the old one goes on, 69 when there is none.

Under systemd with FileDescriptorStoreMax= the listening sockets outlive the process: after SIGTERM, a crash or kill -9 new
connections wait for the next process instead of being refused.";

/// Flags of `connect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) sidecar: flags::Sidecar,
    /// Replace the process that runs at -admin-bind by the program as it is on disk now, without a lost connection
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set, help_heading = "Upgrade")]
    upgrade: bool,
    /// With -upgrade: say what happened as JSON
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set, help_heading = "Upgrade")]
    json: bool,
}

pub(super) fn run(flags: &Flags, environment: &Environment, ignored: &[String]) -> anyhow::Result<Exit> {
    if flags.upgrade {
        return upgrade::run(flags.sidecar.admin_bind(), flags.json);
    }
    if flags.json {
        return Err(UsageError("-json goes with -upgrade; -log-json writes log lines as JSON".to_owned()).into());
    }
    let settings = flags.sidecar.settings(environment, ignored)?;
    app::init_logs(&settings.logging);
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    app::run(settings.sidecar)?;
    Ok(Exit::Ok)
}
