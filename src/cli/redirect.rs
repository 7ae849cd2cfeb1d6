//! `ringfence redirect-traffic`: nftables rules that lead the traffic of Airflow's tasks to the sidecar, without a changed DAG.
//!
//! Invariant: one table of its own (`inet ringfence`) is all that is changed, each time in one transaction. The traffic of root,
//! of whoever serves the redirect listener and to loopback is never redirected. Nothing is kept: after a boot the host asks
//! again, and when the routes of the rules file change, too (`-check` tells).
//!
//! Order of work: [`plan`] joins flags and rules file, [`table`] writes the rules, [`nft`] loads and lists them, [`difference`]
//! compares.

mod cgroup;
mod difference;
mod network;
mod nft;
mod plan;
mod table;

use std::path::PathBuf;

use clap::Args;
use nix::unistd::{Uid, User};

use super::{Exit, UsageError, print};
use crate::airflow::Settings;
use crate::app::AppError;
use cgroup::Cgroup;
use difference::Difference;
use network::Allow;
use plan::{Plan, Selection};

const EXAMPLES: &str = "\
Examples:
  ringfence redirect-traffic -airflow /etc/ringfence/airflow.toml -user airflow -user etl
  ringfence redirect-traffic -airflow FILE -cgroup system.slice/airflow-worker.service -print
  ringfence redirect-traffic -airflow FILE -user airflow -lock -allow 10.0.0.2:53 -allow 10.8.0.0/16:443
  ringfence redirect-traffic -airflow FILE -user airflow -check -json
  ringfence redirect-traffic -remove

TCP connections that these users or cgroups open to the networks of the [[route]] tables come to the
`redirect` listener of `ringfence connect -airflow` with the same file. The rules are gone after a
boot: load them with a unit. Run the command again when routes change; it replaces its table whole,
and what is connected stays connected. Only -remove ends what was redirected: stop the tasks first.

With -lock they reach nothing else outside this host: TCP is reset, all the rest dropped. Loopback
stays open. -allow CIDR[:PORT] opens TCP to a network, and DNS over UDP if the port is 53 or absent.
Counters: nft list table inet ringfence

Exit code 0 when it is done or -check found no difference, 1 when -check found one.";

/// Flags of `redirect-traffic`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    /// The rules file of `connect -airflow`: its `redirect` listeners and [[route]] tables
    #[arg(long, value_name = "FILE")]
    airflow: Option<PathBuf>,
    /// Redirect what this user's processes open; may be repeated
    #[arg(long, value_name = "NAME|UID", value_parser = user)]
    user: Vec<u32>,
    /// Redirect what processes in this cgroup v2 and below it open, whoever owns them; may be repeated
    #[arg(long, value_name = "PATH", value_parser = Cgroup::parse)]
    cgroup: Vec<Cgroup>,
    /// Let them reach nothing else outside this host
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    lock: bool,
    /// With -lock: what they may reach all the same; may be repeated
    #[arg(long, value_name = "CIDR[:PORT]", value_parser = Allow::parse)]
    allow: Vec<Allow>,
    /// Show the rules and load nothing
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    print: bool,
    /// Take the rules away, if there are any
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    remove: bool,
    /// Compare what is loaded with what would be
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    check: bool,
    /// With -check: one JSON object
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Load,
    Print,
    Remove,
    Check,
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Exit> {
    let action = flags.action()?;
    if action == Action::Remove {
        need_root()?;
        nft::load(&table::removal())?;
        print("the rules are taken away; connections that were redirected end, unless another table translates addresses\n");
        return Ok(Exit::Ok);
    }
    let plan = flags.plan()?;
    let unserved = plan.refuse_loop()?;
    let text = table::replacement(&plan);
    if action == Action::Print {
        print(&text);
        return Ok(Exit::Ok);
    }
    need_root()?;
    plan.selection.cgroups.iter().try_for_each(Cgroup::find)?;
    if action == Action::Check {
        return flags.check(&text);
    }
    nft::load(&text)?;
    print(&summary(&plan));
    for listener in unserved {
        super::complain(&format!("nobody listens at {listener} yet: these connections are refused until ringfence runs"));
    }
    Ok(Exit::Ok)
}

impl Flags {
    fn action(&self) -> Result<Action, UsageError> {
        let wrong = |text: &str| Err(UsageError(text.to_owned()));
        let action = match (self.print, self.remove, self.check) {
            (false, false, false) => Action::Load,
            (true, false, false) => Action::Print,
            (false, true, false) => Action::Remove,
            (false, false, true) => Action::Check,
            _ => return wrong("-print, -remove and -check exclude each other; write one of them"),
        };
        if self.json && action != Action::Check {
            return wrong("-json is for -check");
        }
        if !self.allow.is_empty() && !self.lock {
            return wrong("-allow opens what -lock closes; add -lock, or leave -allow out");
        }
        if action != Action::Remove && self.airflow.is_none() {
            return wrong("-airflow is missing: write the rules file that `ringfence connect` runs with");
        }
        if action != Action::Remove && self.user.is_empty() && self.cgroup.is_empty() {
            return wrong("whose traffic? write -user NAME, or -cgroup PATH for all processes of a unit");
        }
        Ok(action)
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        let file = self.airflow.clone().unwrap_or_default();
        let settings = Settings::load(&file).map_err(|error| AppError::Config(error.to_string()))?;
        let mut users = self.user.clone();
        users.sort_unstable();
        users.dedup();
        let selection = Selection { users, cgroups: self.cgroup.clone() };
        let lock = self.lock.then(|| self.allow.clone());
        Ok(Plan::new(&file.display().to_string(), settings.redirects(), settings.routes(), selection, lock)?)
    }

    fn check(&self, text: &str) -> anyhow::Result<Exit> {
        let difference = Difference::of(nft::loaded()?.as_deref(), &nft::as_listed(text)?);
        print(&if self.json { format!("{}\n", difference.json()) } else { format!("{}\n", difference.text()) });
        Ok(if difference == Difference::None { Exit::Ok } else { Exit::Failed })
    }
}

fn summary(plan: &Plan) -> String {
    let mut text = String::from("TCP is redirected:\n");
    for one in &plan.redirections {
        let port = one.port.map_or_else(|| "every port".to_owned(), |port| format!("port {port}"));
        text += &format!("  {}, {port} -> {} ({})\n", one.network, one.listener, one.upstream);
    }
    match &plan.lock {
        None => text += "All the rest is as it was.\n",
        Some(allowed) if allowed.is_empty() => text += "Nothing else outside this host can be reached.\n",
        Some(allowed) => {
            let allowed: Vec<_> = allowed.iter().map(Allow::to_string).collect();
            text += &format!("Nothing else outside this host can be reached, but: {}\n", allowed.join(", "));
        }
    }
    text
}

fn need_root() -> Result<(), AppError> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    Err(AppError::Unavailable("only root may see and change nftables: run it with sudo, or look with -print".to_owned()))
}

fn user(text: &str) -> Result<u32, String> {
    let uid = match text.parse::<u32>() {
        Ok(uid) => uid,
        Err(_) => match User::from_name(text) {
            Ok(Some(user)) => user.uid.as_raw(),
            Ok(None) => return Err(format!("there is no user `{text}` on this host; write a user's name or uid")),
            Err(error) => return Err(format!("user `{text}` cannot be looked up: {error}; write the uid")),
        },
    };
    match uid {
        // The unit of ringfence runs as root.
        0 => Err("root's traffic is the host's own and ringfence's; name the users of Airflow and of its tasks".to_owned()),
        u32::MAX => Err(format!("uid {uid} is nobody's")),
        uid => Ok(uid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            airflow: Some("/a.toml".into()),
            user: vec![54_321],
            cgroup: Vec::new(),
            lock: false,
            allow: Vec::new(),
            print: false,
            remove: false,
            check: false,
            json: false,
        }
    }

    #[test]
    fn what_cannot_stand_together_is_refused() {
        let allow = vec![Allow::parse("10.0.0.0/8").expect("a network")];
        assert_eq!(flags().action(), Ok(Action::Load));
        assert_eq!(Flags { airflow: None, user: Vec::new(), remove: true, ..flags() }.action(), Ok(Action::Remove));
        assert_eq!(Flags { lock: true, allow: allow.clone(), check: true, json: true, ..flags() }.action(), Ok(Action::Check));
        for (wrong, part) in [
            (Flags { print: true, remove: true, ..flags() }, "exclude each other"),
            (Flags { json: true, ..flags() }, "-json is for -check"),
            (Flags { allow, ..flags() }, "add -lock"),
            (Flags { airflow: None, ..flags() }, "-airflow is missing"),
            (Flags { user: Vec::new(), ..flags() }, "whose traffic?"),
        ] {
            assert!(wrong.action().expect_err(part).0.contains(part), "{part}");
        }
    }

    #[test]
    fn a_user_is_a_name_or_a_uid_and_never_root() {
        assert_eq!(user("54321"), Ok(54_321));
        for (text, part) in
            [("root", "host's own"), ("0", "host's own"), ("no-such-user-here", "there is no user"), ("4294967295", "nobody's")]
        {
            assert!(user(text).expect_err(text).contains(part), "{text}");
        }
    }
}
