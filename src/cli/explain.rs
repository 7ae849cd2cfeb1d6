//! `ringfence explain`: why a connection was denied, or what a task's connection would meet.
//!
//! Invariant: it asks the running sidecar and decides nothing itself; nothing is dialed, fetched or changed for it. Whatever is
//! asked has a bound on time and size. What a task chose (names, command lines) is shown as text only (`terminal`).

mod denial;
mod door;
mod forecast;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::admin::Admin;
use super::argv::{Kind, Known};
use super::{Exit, UsageError, flags};
use crate::config;

const EXAMPLES: &str = "\
Examples:
  ringfence explain 5f3a9c0100000007
  ringfence explain 5f3a9c0100000007 -admin 127.0.0.1:19001 -json
  ringfence explain -dag payroll_daily -task load -to warehouse
  ringfence explain -dag payroll_daily -task load -run manual__2026-11-24T00:00:00 -to warehouse

The id stands in the refused task's own log (id=...) and in the connection log (denial). With -dag the running sidecar tells
what its rules would give the task, whether the upstream would let that identity in as far as this host knows, and which
endpoints are healthy.

Exit code 0 when it is explained and, with -to, nothing known here would deny it; 1 when there is no such denial, or it would
be denied.";

const USAGE: &str = "ringfence explain ID [-admin ADDR:PORT] [-json]
       ringfence explain -dag DAG -task TASK [-run RUN] [-to SERVICE] [-socket PATH] [-admin ADDR:PORT] [-json]";

/// Flags of `explain`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES, override_usage = USAGE)]
pub(super) struct Flags {
    /// The denial's id; `explain ID` says the same
    #[arg(long, value_name = "ID", value_parser = denial_id)]
    id: Option<String>,
    /// A DAG, whether it runs now or not
    #[arg(long, value_name = "DAG")]
    dag: Option<String>,
    /// A task of it
    #[arg(long, value_name = "TASK")]
    task: Option<String>,
    /// A run id, for rules that ask for the run type
    #[arg(long, value_name = "RUN")]
    run: Option<String>,
    /// The upstream that the task would call
    #[arg(long, value_name = "SERVICE")]
    to: Option<String>,
    /// The sidecar's registration socket
    #[arg(long, value_name = "PATH", default_value = door::SOCKET)]
    socket: PathBuf,
    /// The sidecar's admin port [default: what the sidecar says at its socket, or localhost:19000]
    #[arg(long, value_name = "ADDR:PORT", value_parser = flags::admin_address)]
    admin: Option<SocketAddr>,
    /// JSON, as the sidecar gave it
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
}

/// What is asked.
enum Asked<'a> {
    Denial(&'a str),
    Task { dag: &'a str, task: &'a str },
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Exit> {
    let asked = flags.asked()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(async {
        match asked {
            Asked::Denial(id) => denial::explain(id, &Admin::at(flags.admin.unwrap_or(config::ADMIN_BIND))?, flags.json).await,
            Asked::Task { dag, task } => forecast::explain(flags, dag, task).await,
        }
    })
}

impl Flags {
    fn asked(&self) -> Result<Asked<'_>, UsageError> {
        let wrong = |text: &str| Err(UsageError(text.to_owned()));
        match (&self.id, &self.dag, &self.task) {
            (Some(_), None, None) if self.run.is_some() || self.to.is_some() => {
                wrong("an id tells of one denial as it was; leave out -run and -to")
            }
            (Some(id), None, None) => Ok(Asked::Denial(id)),
            (Some(_), ..) => wrong("an id tells of one denial, -dag and -task of what would happen; write one of both"),
            (None, Some(dag), Some(task)) => Ok(Asked::Task { dag, task }),
            (None, Some(_), None) => wrong("-dag needs -task: the rules may tell tasks apart"),
            (None, None, Some(_)) => wrong("-task needs -dag"),
            (None, None, None) => {
                wrong("what is to be explained? write the id of a denial, or -dag DAG -task TASK [-to SERVICE]")
            }
        }
    }
}

/// Writes the one argument without a flag as `-id`.
pub(super) fn name_the_id(arguments: &[String], known: &Known) -> Vec<String> {
    let mut named = Vec::with_capacity(arguments.len());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let Some(flag) = argument.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
            named.push(format!("-id={argument}"));
            continue;
        };
        named.push(argument.clone());
        let takes_value = known.iter().any(|(name, kind)| *name == flag.trim_start_matches('-') && *kind == Kind::Value);
        if takes_value {
            named.extend(rest.next().cloned());
        }
    }
    named
}

fn denial_id(text: &str) -> Result<String, String> {
    const DIGITS: usize = 16;
    let id = text.trim_start_matches("id=");
    if id.len() == DIGITS && id.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok(id.to_ascii_lowercase());
    }
    Err(format!("`{text}` is no denial's id; write the {DIGITS} hexadecimal digits behind `id=` in the task's log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: None, dag: None, task: None, run: None, to: None, socket: "/x".into(), admin: None, json: false }
    }

    #[test]
    fn an_id_is_sixteen_digits_as_the_log_writes_it() {
        assert_eq!(denial_id("5F3A9C0100000007"), Ok("5f3a9c0100000007".to_owned()));
        assert_eq!(denial_id("id=5f3a9c0100000007"), Ok("5f3a9c0100000007".to_owned()));
        for text in ["", "5f3a", "5f3a9c01000000070", "5f3a9c010000000g", "../snapshot00000"] {
            assert!(denial_id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_id_needs_no_flag_wherever_it_stands() {
        let known = vec![("admin".to_owned(), Kind::Value), ("json".to_owned(), Kind::Switch)];
        let named = |line: &str| {
            let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            name_the_id(&words, &known).join(" ")
        };
        assert_eq!(named("5f -json"), "-id=5f -json");
        assert_eq!(named("-json -admin :1 5f"), "-json -admin :1 -id=5f");
        assert_eq!(named("--admin=:1 5f"), "--admin=:1 -id=5f");
        assert_eq!(named("-admin"), "-admin");
    }

    #[test]
    fn what_cannot_stand_together_is_refused() {
        let some = |text: &str| Some(text.to_owned());
        assert!(Flags { id: some("5f"), ..flags() }.asked().is_ok());
        assert!(Flags { dag: some("d"), task: some("t"), ..flags() }.asked().is_ok());
        for wrong in [
            flags(),
            Flags { id: some("5f"), dag: some("d"), ..flags() },
            Flags { id: some("5f"), to: some("db"), ..flags() },
            Flags { dag: some("d"), ..flags() },
            Flags { task: some("t"), ..flags() },
        ] {
            assert!(wrong.asked().is_err(), "{wrong:?}");
        }
    }
}
