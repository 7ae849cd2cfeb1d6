//! `ringfence airflow init`: what a host of one or several roles needs, as files to review.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::file::File;
use super::intentions::ConsulRelease;
use super::output::Output;
use super::plan::{self, Deployment, Plan, Wishes};
use super::role::{Executor, Release, Role};
use super::wishes::{Extra, LogHost, check_name};
use super::{apply, intentions, settings, units};
use crate::app;
use crate::cli::{Environment, Exit, UsageError, flags};
use crate::config::{LogLevel, Logging};

const EXAMPLES: &str = "\
Examples:
  ringfence airflow init -role worker -upstream warehouse:25435:postgres
  ringfence airflow init -role worker -upstream warehouse:25435:postgres -out ./worker
  ringfence airflow init -role scheduler -role api-server -role dag-processor -out ./head -apply -token-file ./operator.token
  ringfence airflow init -role worker -log-host worker-1.example.com -out ./worker-1
  ringfence airflow init -role api-server -log-host worker-1.example.com -log-host trigger-1.example.com:triggerer
  ringfence airflow init -role scheduler -executor local -airflow 2 -consul 1.8

Without -out every file is printed. A file that is there and differs is not replaced without -force, and then nothing is
written. -apply registers the services at the agent and makes sure of their intentions; it says what it did, and a second
run changes nothing. Exit code 1: something was kept as it is because somebody else decided it; -force overrides.
No file holds a secret: airflow-secrets.env.example names the variables that need values.";

/// Flags of `airflow init`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    /// What runs on this host: scheduler, api-server (webserver), worker, triggerer, dag-processor; may be repeated
    #[arg(long, value_name = "ROLE", value_parser = Role::parse)]
    role: Vec<Role>,
    /// Name of the deployment: its services' names begin with it
    #[arg(long, value_name = "NAME", default_value = "airflow")]
    deployment: String,
    /// Release of Airflow: 2 or 3
    #[arg(long, value_name = "RELEASE", default_value = "3", value_parser = Release::parse)]
    airflow: Release,
    /// What runs the tasks: celery or local
    #[arg(long, value_name = "EXECUTOR", default_value = "celery", value_parser = Executor::parse)]
    executor: Executor,
    /// Version of Consul that the files are for: before 1.9 intentions are commands
    #[arg(long, value_name = "VERSION", default_value = "1.9", value_parser = ConsulRelease::parse)]
    consul: ConsulRelease,
    /// Consul service of the metadata database (PostgreSQL)
    #[arg(long, value_name = "SERVICE", default_value = "postgres", value_parser = service_name)]
    database: String,
    /// Consul service of the Celery broker (Redis)
    #[arg(long, value_name = "SERVICE", default_value = "redis", value_parser = service_name)]
    broker: String,
    /// Consul service of the Celery result backend (PostgreSQL) [default: that of -database]
    #[arg(long, value_name = "SERVICE", value_parser = service_name)]
    result_backend: Option<String>,
    /// A service for tasks: local port, and how a denied client is told (postgres, mysql, http, redis, close); may be repeated
    #[arg(long, value_name = "NAME:PORT[:REPLY]", value_parser = Extra::parse)]
    upstream: Vec<Extra>,
    /// Host whose task logs go through the mesh: on that host and on the api-server's; may be repeated
    #[arg(long, value_name = "HOST[:triggerer]", value_parser = LogHost::parse)]
    log_host: Vec<LogHost>,
    /// Name of a role's systemd unit, where it is not airflow-ROLE.service; may be repeated
    #[arg(long, value_name = "ROLE=UNIT", value_parser = unit)]
    unit: Vec<(Role, String)>,
    /// First of the 20 ports that are used on this host
    #[arg(long, value_name = "PORT", default_value_t = plan::PORT_BASE)]
    port_base: u16,
    /// Where the files will be installed on the host
    #[arg(long, value_name = "FOLDER", default_value = "/etc/ringfence", value_parser = config_folder)]
    config_folder: String,
    /// Write the files below this folder instead of printing them
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Replace files that differ and, with -apply, what somebody else registered or decided
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    force: bool,
    /// One JSON object a file or action
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
    /// Register the services at the agent and make sure of their intentions
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    apply: bool,
    #[command(flatten)]
    agent: flags::Agent,
}

pub(super) fn run(flags: &Flags, environment: &Environment) -> anyhow::Result<Exit> {
    let plan = flags.plan()?;
    let output = Output::new(flags.json);
    let files = files(&plan, flags.consul, &flags.config_folder);
    // Before anything is written: a wrong flag of the agent's must not leave half of what was asked for.
    let consul = flags.apply.then(|| flags.agent.resolve(environment)).transpose()?;
    match &flags.out {
        Some(folder) => output.write_all(&files, folder, flags.force)?,
        None => output.print_all(&files),
    }
    let Some(consul) = consul else { return Ok(Exit::Ok) };
    app::init_logs(&Logging { level: LogLevel::Error, json: flags.json });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(apply::apply(&consul, &plan, flags.consul, &output, flags.force))
}

impl Flags {
    fn plan(&self) -> Result<Plan, UsageError> {
        Plan::new(Wishes {
            deployment: Deployment {
                name: self.deployment.clone(),
                release: self.airflow,
                executor: self.executor,
                database: self.database.clone(),
                broker: self.broker.clone(),
                result_backend: self.result_backend.clone().unwrap_or_else(|| self.database.clone()),
            },
            roles: self.role.clone(),
            extras: self.upstream.clone(),
            log_hosts: self.log_host.clone(),
            units: self.unit.clone(),
            port_base: self.port_base,
        })
    }
}

/// Everything, in the order of INSTALL.txt, which comes first.
fn files(plan: &Plan, consul: ConsulRelease, folder: &str) -> Vec<File> {
    let mut files = units::files(plan, folder, consul);
    files.extend(plan.services.iter().map(|service| service.file(&plan.deployment)));
    files.extend(intentions::files(plan, consul));
    files.extend(settings::files(plan, folder));
    let first = |file: &File| (file.path != "INSTALL.txt", file.path.clone());
    files.sort_by_key(first);
    files
}

fn service_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned()).map_err(|why| format!("`{text}` {why}; write the name of a Consul service"))
}

fn config_folder(text: &str) -> Result<String, String> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.');
    let trimmed = text.trim_end_matches('/');
    if !trimmed.starts_with('/') || !trimmed.bytes().all(fine) {
        return Err(format!(
            "`{text}` is no absolute path of letters, digits, `-`, `_` and `.`, as unit files take it; the default is /etc/ringfence"
        ));
    }
    Ok(trimmed.to_owned())
}

fn unit(text: &str) -> Result<(Role, String), String> {
    let wrong = |what: &str| format!("`{text}`: {what}; write it as in worker=airflow-celery.service");
    let (role, unit) = text.split_once('=').ok_or_else(|| wrong("the `=` is missing"))?;
    let role = Role::parse(role)?;
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'@' | b':');
    let stem = unit.strip_suffix(".service").unwrap_or_default();
    if stem.is_empty() || !unit.bytes().all(fine) {
        return Err(wrong("that is no full name of a service unit"));
    }
    Ok((role, unit.to_owned()))
}

#[cfg(test)]
#[path = "init/tests.rs"]
mod tests;
