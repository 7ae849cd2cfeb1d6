//! `ringfence check`: looks at everything that `connect` with the same flags would need.
//!
//! Invariant: it changes nothing. It listens nowhere, registers nothing, and its token of a login is logged out. What it
//! checks, it checks the way the sidecar does: the control plane's own code collects, the data plane's own TLS probes.
//! Every wait has a bound, so a dead agent or a silent peer is a line of the report and not a hanging terminal.

mod agent;
mod host;
mod mesh;
mod probe;
mod report;

use anyhow::Context;
use clap::Args;

use super::{Environment, Exit, flags};
use crate::app;
use crate::config::{LogLevel, Logging};
use report::Report;

const EXAMPLES: &str = "\
Examples:
  ringfence check -sidecar-for web
  ringfence check -sidecar-for web -token-file /etc/consul.d/web.token -json

Prints one line for each thing: ok, warn or FAIL, what, what was found, and the remedy. Exit code 1 if anything failed. Each
healthy endpoint of an upstream is dialed once, so the service there sees a connection that says nothing.";

/// Flags of `check`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) sidecar: flags::Sidecar,
    /// One JSON object a line
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
}

pub(super) fn run(flags: &Flags, environment: &Environment, ignored: &[String]) -> anyhow::Result<Exit> {
    let settings = flags.sidecar.settings(environment, ignored)?;
    // The report is what is read; the rooms below speak only when more is asked for than the default.
    let level = if settings.logging.level == LogLevel::Info { LogLevel::Error } else { settings.logging.level };
    app::init_logs(&Logging { level, json: settings.logging.json });
    let mut report = Report::new(flags.json);
    for warning in &settings.warnings {
        report.warn("flags", warning, "");
    }
    host::check(&settings.sidecar, &mut report);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(async {
        if agent::check(&settings.sidecar.consul, &mut report).await {
            mesh::check(settings.sidecar.consul, &mut report).await;
        }
    });
    Ok(report.finish())
}
