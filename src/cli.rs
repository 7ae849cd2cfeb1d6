//! The command line: argv and environment become typed settings, and one command runs with them.
//!
//! Invariant: nothing below this room reads argv or the environment. A mistake of the user is a [`UsageError`] with exit
//! code 64 and a sentence that says what to write instead; it never starts half a process. Secrets are read here and
//! leave as `Zeroizing` values; no message repeats them.

mod admin;
mod agent;
mod airflow;
mod argv;
mod check;
mod connect;
mod demo;
mod environment;
mod envoy;
mod explain;
mod flags;
mod http;
mod redirect;
mod terminal;
mod top;
mod values;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use environment::Environment;

use crate::app::AppError;
use argv::{Kind, Known};

/// How the process ends, after `sysexits.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All went well.
    Ok = 0,
    /// `check` found a failure, a step of `demo --once` did not hold, or `explain` tells of a denial to come or finds none.
    Failed = 1,
    /// The command line is wrong (EX_USAGE).
    Usage = 64,
    /// The kernel refuses what is needed, or the sidecar that is asked does not answer (EX_UNAVAILABLE).
    Unavailable = 69,
    /// A fault of this program (EX_SOFTWARE).
    Internal = 70,
    /// Settings or files cannot work (EX_CONFIG).
    Config = 78,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The command line is wrong; the text says what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub(crate) String);

const AFTER_HELP: &str = "\
Flags are written as Consul's: -name value, -name=value or --name value. Under the name `envoy`, or with Envoy's -c,
--config-path or --config-yaml, the whole line is Envoy's.

Exit codes:
  0   ended as asked
  1   check: something failed; demo --once: a step did not hold; explain: would be denied, or no such denial;
      redirect-traffic -check: other rules are loaded, or none;
      airflow init -apply: something was kept as somebody else decided it; envoy: whatever is wrong
  64  the command line is wrong
  69  the kernel refuses io_uring or a feature of it; explain, top: the sidecar does not answer
  70  a fault of this program
  78  a setting or file cannot work

Examples:
  ringfence demo
  ringfence connect -sidecar-for web
  consul connect envoy -sidecar-for web -envoy-binary /usr/bin/ringfence
  ringfence check -sidecar-for web -token-file /etc/consul.d/web.token
  ringfence explain 5f3a9c0100000007
  ringfence top
  ringfence airflow init -role worker
  ringfence redirect-traffic -airflow /etc/ringfence/airflow.toml -user airflow";

/// The L4 mutual-TLS sidecar for Consul Connect, on io_uring.
#[derive(Debug, Parser)]
#[command(name = "ringfence", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar of one or several services of this host, in place of Envoy or Consul's built-in proxy
    Connect(connect::Flags),
    /// Look at everything that `connect` with the same flags would need, and say what to mend
    Check(check::Flags),
    /// Tell why a connection was denied, or what a task's connection would meet
    Explain(explain::Flags),
    /// Show which tasks and services talk now: connections, bytes, rates, denials
    Top(top::Flags),
    /// Be Envoy: its flags, bootstrap, exit codes and admin port; `ringfence envoy --help` lists what is the same
    #[command(disable_help_flag = true)]
    Envoy(envoy::Flags),
    /// Set up the hosts of an Airflow deployment
    Airflow(airflow::Flags),
    /// Redirect the traffic of Airflow's tasks to the sidecar by nftables, lock the rest, or take that away
    RedirectTraffic(redirect::Flags),
    /// Show two services talking through ringfence, with identities, intentions and rotation; needs no Consul
    Demo(demo::Flags),
    /// Run the embedded Consul-compatible agent alone, for local development; loopback only
    Agent(agent::Flags),
}

/// Runs the command that `arguments` ask for, or the program's own name does.
pub fn run(program: &OsStr, arguments: impl Iterator<Item = OsString>, environment: &Environment) -> Exit {
    let parsed = match parse(program, arguments, environment) {
        Ok(parsed) => parsed,
        Err(Stop::Print(text)) => {
            print(&text);
            return Exit::Ok;
        }
        Err(Stop::Usage(error)) => return fail(&error.into()),
    };
    let done = match parsed.command {
        Command::Connect(flags) => connect::run(&flags, environment, &parsed.ignored),
        Command::Check(flags) => check::run(&flags, environment, &parsed.ignored),
        Command::Explain(flags) => explain::run(&flags),
        Command::Top(flags) => top::run(&flags),
        Command::Envoy(flags) => Ok(envoy::run(&flags, environment)),
        Command::Airflow(flags) => airflow::run(&flags, environment),
        Command::RedirectTraffic(flags) => redirect::run(&flags),
        Command::Demo(flags) => demo::run(&flags),
        Command::Agent(flags) => agent::run(&flags),
    };
    done.unwrap_or_else(|error| fail(&error))
}

/// A command line understood.
#[derive(Debug)]
struct Parsed {
    command: Command,
    /// Written for Envoy, dropped here.
    ignored: Vec<String>,
}

/// Why nothing runs.
#[derive(Debug)]
enum Stop {
    /// Help or version.
    Print(String),
    Usage(UsageError),
}

impl From<UsageError> for Stop {
    fn from(error: UsageError) -> Self {
        Self::Usage(error)
    }
}

fn parse(program: &OsStr, arguments: impl Iterator<Item = OsString>, environment: &Environment) -> Result<Parsed, Stop> {
    let arguments: Vec<String> = arguments
        .map(|argument| {
            argument.into_string().map_err(|raw| UsageError(format!("argument {} is no UTF-8", raw.to_string_lossy())))
        })
        .collect::<Result<_, _>>()?;
    if let Some(flags) = envoy::called(program, &arguments) {
        return Ok(Parsed { command: Command::Envoy(flags), ignored: Vec::new() });
    }
    // What `consul connect envoy` asks its -envoy-binary first, whatever the name of that is.
    if arguments.first().is_some_and(|first| first == "--version") {
        return Err(Stop::Print(envoy::version(&program.to_string_lossy(), environment)));
    }
    let (command, rest) = split_command(&arguments)?;
    let (nested, rest) = split_nested(command, rest)?;
    let (envoy, known) = (matches!(command, "connect" | "check"), known(command, nested));
    let rest = if command == "explain" { &explain::name_the_id(rest, &known) } else { rest };
    let normal = argv::normalise(rest, &known, envoy)?;
    let line = ["ringfence", command, nested].into_iter().filter(|word| !word.is_empty()).map(str::to_owned);
    let matches = last_one_wins(Cli::command()).try_get_matches_from(line.chain(normal.arguments)).map_err(stop)?;
    let cli = Cli::from_arg_matches(&matches).map_err(stop)?;
    Ok(Parsed { command: cli.command, ignored: normal.ignored })
}

/// A flag given twice counts as it was given last, as in Go: wrapper scripts and unit files override by appending.
/// Lists keep all they are given.
fn last_one_wins(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let command = names.into_iter().fold(command, |command, name| command.mut_subcommand(name, last_one_wins));
    command.mut_args(|arg| match arg.get_action() {
        clap::ArgAction::Set | clap::ArgAction::SetTrue => {
            let id = arg.get_id().clone();
            arg.overrides_with(id)
        }
        _ => arg,
    })
}

/// The command's name (empty for the program itself) and its arguments.
fn split_command(arguments: &[String]) -> Result<(&str, &[String]), UsageError> {
    match arguments {
        [] => Ok(("", &[])),
        [first, ..] if matches!(first.as_str(), "-h" | "-help" | "--help" | "-V" | "-version" | "--version") => {
            Ok(("", &arguments[..1]))
        }
        // A unit file of `consul connect envoy -sidecar-for web` needs its program's name changed only: with or without
        // the words before the flags.
        [first, ..] if first.starts_with('-') => Ok(("connect", arguments)),
        [first, second, rest @ ..] if first == "connect" && matches!(second.as_str(), "envoy" | "proxy") => Ok(("connect", rest)),
        [first, rest @ ..] => Ok((command_named(first)?, rest)),
    }
}

/// The name of a command inside `command` (empty where it has none), and what follows it.
fn split_nested<'a>(command: &str, rest: &'a [String]) -> Result<(&'a str, &'a [String]), UsageError> {
    let cli = Cli::command();
    match (cli.find_subcommand(command), rest) {
        (Some(outer), [first, rest @ ..]) if outer.has_subcommands() && !first.starts_with('-') => {
            Ok((named(outer, first, &format!("{command} {first}"))?, rest))
        }
        _ => Ok(("", rest)),
    }
}

fn command_named(word: &str) -> Result<&str, UsageError> {
    named(&Cli::command(), word, word)
}

/// `word`, if it is a command inside `outer`; `shown` is how a mistake repeats it.
fn named<'a>(outer: &clap::Command, word: &'a str, shown: &str) -> Result<&'a str, UsageError> {
    let names: Vec<&str> = outer.get_subcommands().map(clap::Command::get_name).collect();
    if names.contains(&word) {
        return Ok(word);
    }
    let hint = argv::nearest(word, names.iter().copied()).map_or_else(String::new, |near| format!("; did you mean {near}?"));
    Err(UsageError(format!("unknown command `{shown}`{hint} There are: {}", names.join(", "))))
}

/// The flags of `command`, or of `nested` inside it, as clap knows them.
fn known(command: &str, nested: &str) -> Known {
    let cli = Cli::command();
    let Some(command) = cli.find_subcommand(command).map(|outer| outer.find_subcommand(nested).unwrap_or(outer)) else {
        return Vec::new();
    };
    command
        .get_arguments()
        .filter_map(|argument| {
            let switch = argument.get_num_args().is_some_and(|range| range.min_values() == 0);
            Some((argument.get_long()?.to_owned(), if switch { Kind::Switch } else { Kind::Value }))
        })
        .collect()
}

fn stop(error: clap::Error) -> Stop {
    use clap::error::ErrorKind;
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        | ErrorKind::MissingSubcommand => Stop::Print(text),
        // clap's first paragraph names flag, value and reason; its usage lines speak of `--` flags that nobody wrote.
        _ => {
            let first = text.split("\n\n").next().unwrap_or_default();
            Stop::Usage(UsageError(first.trim_start_matches("error: ").trim().to_owned()))
        }
    }
}

/// Says why on standard error and picks the exit code.
fn fail(error: &anyhow::Error) -> Exit {
    let exit = if error.is::<UsageError>() {
        Exit::Usage
    } else if let Some(error) = error.downcast_ref::<AppError>() {
        match error {
            AppError::Unavailable(_) => Exit::Unavailable,
            AppError::Config(_) => Exit::Config,
            AppError::Internal(_) => Exit::Internal,
        }
    } else {
        Exit::Internal
    };
    complain(&format!("{error:#}"));
    exit
}

/// One line on standard error.
fn complain(text: &str) {
    use std::io::Write;
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(std::io::stderr(), "ringfence: {text}");
}

/// Prints; a reader that went away (`| head`) is no fault.
fn print(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> impl Iterator<Item = OsString> + '_ {
        line.split_whitespace().map(OsString::from)
    }

    fn read(line: &str) -> Result<Parsed, Stop> {
        parse(OsStr::new("ringfence"), words(line), &Environment::default())
    }

    #[test]
    fn the_definition_of_all_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_unit_file_of_consul_needs_its_programs_name_changed_only() {
        for line in [
            "connect -sidecar-for web",
            "connect envoy -sidecar-for web",
            "connect proxy -sidecar-for=web",
            "-sidecar-for web",
            "connect envoy -ignore-envoy-compatibility=true --sidecar-for web -- -l debug",
        ] {
            let parsed = read(line).expect(line);
            let Command::Connect(flags) = parsed.command else { panic!("{line} is no connect") };
            assert_eq!(flags.sidecar.proxies.sidecar_for, ["web"], "{line}");
        }
    }

    #[test]
    fn help_exists_everywhere_and_has_examples() {
        let lines = [
            "",
            "--help",
            "-h",
            "connect --help",
            "connect -h",
            "check -help",
            "demo --help",
            "agent --help",
            "explain -h",
            "top -h",
        ];
        for line in lines.into_iter().chain(["airflow", "airflow -h", "airflow init -help", "redirect-traffic -h"]) {
            let Err(Stop::Print(text)) = read(line) else { panic!("`{line}` prints no help") };
            assert!(text.contains("ringfence"), "{line}: {text}");
            assert!(text.contains("Example"), "{line}: {text}");
        }
        let Err(Stop::Print(text)) = read("--version") else { panic!("no version") };
        assert!(text.contains(env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for (line, wanted) in [
            ("conect -sidecar-for web", "did you mean connect?"),
            ("sidecar", "There are: connect, check, explain, top"),
            ("connect -admin-bind 19000", "admin-bind"),
            ("connect -workers 0", "1 to"),
            ("connect -drain-time soon", "no duration"),
            ("agent -- x", "unexpected argument"),
            ("demo -once=perhaps", "neither true nor false"),
            ("agent -bind 0.0.0.0:8500", "loopback"),
            ("explain 12", "16 hexadecimal digits"),
            ("top -interval 1ms", "100ms"),
            ("airflow innit", "unknown command `airflow innit`; did you mean init?"),
            ("airflow init -rol worker", "unknown flag -rol; did you mean -role?"),
            ("redirect-traffic -user root", "host's own"),
            ("redirect-traffic -lock -print -alow 10.0.0.0/8", "did you mean -allow?"),
            ("airflow init -role boss", "scheduler, api-server"),
        ] {
            let Err(Stop::Usage(UsageError(text))) = read(line) else { panic!("`{line}` was accepted") };
            assert!(text.contains(wanted), "{line}: {text}");
        }
    }
}
