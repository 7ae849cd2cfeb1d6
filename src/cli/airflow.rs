//! `ringfence airflow`: what an Airflow deployment needs around the sidecar.
//!
//! Invariant: files are shown or written for review, and nothing of the deployment is changed but what `-apply` lists. No
//! secret is read, asked for or written: passwords stand as names of variables, whose values the host's owner fills in.
//!
//! Order of work: [`role`] knows Airflow, [`plan`] chooses names and ports for one host, the other modules write one kind of
//! file each, [`output`] delivers them, [`apply`] tells the agent.

mod apply;
mod file;
mod init;
mod intentions;
mod output;
mod plan;
mod role;
mod service;
mod settings;
mod units;
mod wishes;

use clap::{Args, Subcommand};

use super::{Environment, Exit};

const EXAMPLES: &str = "\
Examples:
  ringfence airflow init -role worker
  ringfence airflow init -help";

/// Commands of `airflow`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true, disable_help_subcommand = true)]
pub(super) struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Write what a host of one or several roles needs: registrations, settings, intentions, rules and units, to review
    Init(Box<init::Flags>),
}

pub(super) fn run(flags: &Flags, environment: &Environment) -> anyhow::Result<Exit> {
    match &flags.command {
        Command::Init(flags) => init::run(flags, environment),
    }
}
