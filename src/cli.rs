//! The command line: argv and environment become typed settings, and one command runs with them.
//!
//! Invariant: nothing below this room reads argv or the environment. A mistake of the user is a [`UsageError`] with exit
//! code 64 and a sentence that says what to write instead; it never starts half a process. Secrets are read here and
//! leave as `Zeroizing` values; no message repeats them.

mod agent;
mod argv;
mod check;
mod connect;
mod demo;
mod environment;
mod flags;
mod http;
mod values;

use std::ffi::OsString;
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
    /// `check` found a failure, or a step of `demo --once` did not hold.
    Failed = 1,
    /// The command line is wrong (EX_USAGE).
    Usage = 64,
    /// The kernel refuses what is needed (EX_UNAVAILABLE).
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
Flags are written as Consul's: -name value, -name=value or --name value.

Exit codes:
  0   ended as asked
  1   check: something failed; demo --once: a step did not hold
  64  the command line is wrong
  69  the kernel refuses io_uring or a feature of it
  70  a fault of this program
  78  a setting or file cannot work

Examples:
  ringfence demo
  ringfence connect -sidecar-for web
  ringfence check -sidecar-for web -token-file /etc/consul.d/web.token";

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
    /// Show two services talking through ringfence, with identities, intentions and rotation; needs no Consul
    Demo(demo::Flags),
    /// Run the embedded Consul-compatible agent alone, for local development; loopback only
    Agent(agent::Flags),
}

/// Runs the command that `arguments` (without the program's name) ask for.
pub fn run(arguments: impl Iterator<Item = OsString>, environment: &Environment) -> Exit {
    let parsed = match parse(arguments) {
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

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Parsed, Stop> {
    let arguments: Vec<String> = arguments
        .map(|argument| {
            argument.into_string().map_err(|raw| UsageError(format!("argument {} is no UTF-8", raw.to_string_lossy())))
        })
        .collect::<Result<_, _>>()?;
    let (command, rest) = split_command(&arguments)?;
    let envoy = matches!(command, "connect" | "check");
    let normal = argv::normalise(rest, &known(command), envoy)?;
    let line = ["ringfence", command].into_iter().filter(|word| !word.is_empty()).map(str::to_owned);
    let matches = last_one_wins(Cli::command()).try_get_matches_from(line.chain(normal.arguments)).map_err(stop)?;
    let cli = Cli::from_arg_matches(&matches).map_err(stop)?;
    Ok(Parsed { command: cli.command, ignored: normal.ignored })
}

/// A flag given twice counts as it was given last, as in Go: wrapper scripts and unit files override by appending.
/// Lists keep all they are given.
fn last_one_wins(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| {
        command.mut_subcommand(name, |command| {
            command.mut_args(|arg| match arg.get_action() {
                clap::ArgAction::Set | clap::ArgAction::SetTrue => {
                    let id = arg.get_id().clone();
                    arg.overrides_with(id)
                }
                _ => arg,
            })
        })
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

fn command_named(word: &str) -> Result<&str, UsageError> {
    let cli = Cli::command();
    let names: Vec<&str> = cli.get_subcommands().map(clap::Command::get_name).collect();
    if names.contains(&word) {
        return Ok(word);
    }
    let hint = argv::nearest(word, names.iter().copied()).map_or_else(String::new, |near| format!("; did you mean {near}?"));
    Err(UsageError(format!("unknown command `{word}`{hint} There are: {}", names.join(", "))))
}

/// The flags of `command`, as clap knows them.
fn known(command: &str) -> Known {
    let cli = Cli::command();
    let Some(command) = cli.find_subcommand(command) else {
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
    use std::io::Write;
    // Nobody is left to tell when standard error is gone.
    let _ = writeln!(std::io::stderr(), "ringfence: {error:#}");
    exit
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
            let parsed = parse(words(line)).expect(line);
            let Command::Connect(flags) = parsed.command else { panic!("{line} is no connect") };
            assert_eq!(flags.sidecar.proxies.sidecar_for, ["web"], "{line}");
        }
    }

    #[test]
    fn help_exists_everywhere_and_has_examples() {
        for line in ["", "--help", "-h", "connect --help", "connect -h", "check -help", "demo --help", "agent --help"] {
            let Err(Stop::Print(text)) = parse(words(line)) else { panic!("`{line}` prints no help") };
            assert!(text.contains("ringfence"), "{line}: {text}");
            assert!(text.contains("Example"), "{line}: {text}");
        }
        let Err(Stop::Print(text)) = parse(words("--version")) else { panic!("no version") };
        assert!(text.contains(env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for (line, wanted) in [
            ("conect -sidecar-for web", "did you mean connect?"),
            ("sidecar", "There are: connect, check, demo, agent"),
            ("connect -admin-bind 19000", "admin-bind"),
            ("connect -workers 0", "1 to"),
            ("connect -drain-time soon", "no duration"),
            ("agent -- x", "unexpected argument"),
            ("demo -once=perhaps", "neither true nor false"),
            ("agent -bind 0.0.0.0:8500", "loopback"),
        ] {
            let Err(Stop::Usage(UsageError(text))) = parse(words(line)) else { panic!("`{line}` was accepted") };
            assert!(text.contains(wanted), "{line}: {text}");
        }
    }
}
