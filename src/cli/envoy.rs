//! `ringfence envoy`, and being called by the name `envoy`: Envoy's command line, so that `consul connect envoy -envoy-binary`,
//! Nomad, systemd units and scripts start this program in Envoy's place.
//!
//! Invariant: nothing that was written for Envoy means something else here: a flag does what Envoy's does, or has no meaning
//! and is named in one log line, or is refused. Errors are told on standard error and end with exit code 1, as Envoy's do.

mod flags;
#[cfg_attr(not(feature = "xds"), allow(dead_code, reason = "without xDS no bootstrap is read"))]
mod options;
#[cfg(feature = "xds")]
mod read;
#[cfg(feature = "xds")]
mod settings;

use std::ffi::OsStr;
use std::path::Path;

use super::{Environment, Exit, print};
#[cfg(feature = "xds")]
use crate::app;
use crate::config;
use flags::Stop;
#[cfg(feature = "xds")]
use options::Mode;
use options::Options;

/// The file name under which this program is Envoy.
const NAME: &str = "envoy";
/// The version of Envoy that is claimed: Consul refuses one that it does not know.
const ENVOY_VERSION_VARIABLE: &str = "RINGFENCE_ENVOY_VERSION";
/// What Envoy answers when hot restart is off: its protocol is not spoken here, SIGUSR2 upgrades instead.
const HOT_RESTART_VERSION: &str = "disabled\n";

/// A command line of Envoy's. Not read by clap, whose rules are others.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub(super) struct Flags {
    /// What the program was called, for its messages.
    #[arg(skip)]
    program: String,
    /// As written.
    #[arg(value_name = "ENVOY'S FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Whether this is a command line for Envoy: by the program's name, the command `envoy`, or a flag that only Envoy has.
pub(super) fn called(program: &OsStr, arguments: &[String]) -> Option<Flags> {
    let call = |arguments: &[String]| Flags { program: program.to_string_lossy().into_owned(), arguments: arguments.to_vec() };
    if Path::new(program).file_name() == Some(OsStr::new(NAME)) {
        return Some(call(arguments));
    }
    match arguments {
        [first, rest @ ..] if first == NAME => Some(call(rest)),
        [first, ..] if first.starts_with('-') => {
            let before = arguments.iter().take_while(|argument| *argument != "--");
            let names = before.map(|argument| argument.split('=').next().unwrap_or_default());
            let only_envoys = ["-c", "--config-path", "--config-yaml", "--hot-restart-version"];
            names.into_iter().any(|name| only_envoys.contains(&name)).then(|| call(arguments))
        }
        _ => None,
    }
}

/// The version line in Envoy's form: Consul takes the first number of three parts for Envoy's version.
pub(super) fn version(program: &str, environment: &Environment) -> String {
    let envoy = claimed_version(environment);
    format!("\n{program}  version: ringfence/{envoy}/Clean/RELEASE/ringfence-{}\n\n", env!("CARGO_PKG_VERSION"))
}

pub(super) fn claimed_version(environment: &Environment) -> &str {
    environment.get(ENVOY_VERSION_VARIABLE).unwrap_or(config::ENVOY_VERSION)
}

/// Does what Envoy would.
pub(super) fn run(call: &Flags, environment: &Environment) -> Exit {
    let program = &call.program;
    let given = match flags::parse(&call.arguments) {
        Ok(given) => given,
        Err(Stop::Help) => return say(&flags::help(program)),
        Err(Stop::Version) => return say(&version(program, environment)),
        Err(Stop::Wrong { argument, why }) => {
            return complain(&format!("PARSE ERROR: Argument: {argument}\n             {why}\n\n{}", flags::brief(program)));
        }
    };
    if given.has("hot-restart-version") {
        // Where Envoy says it.
        eprint(HOT_RESTART_VERSION);
        return Exit::Ok;
    }
    match Options::of(&given, environment) {
        Ok(options) => serve(&options, environment),
        Err(why) => complain(&format!("error: {why}\n")),
    }
}

#[cfg(feature = "xds")]
fn serve(options: &Options, environment: &Environment) -> Exit {
    let path = options.config_path.as_deref().map(Path::display).map_or_else(String::new, |path| path.to_string());
    let wrong = |error: &dyn std::fmt::Display| complain(&format!("error initializing configuration '{path}': {error}\n"));
    let settings = match settings::of(options, environment) {
        Ok(settings) => settings,
        Err(error) => return wrong(&error),
    };
    if options.mode == Mode::Validate {
        return say(&format!("configuration '{path}' OK\n"));
    }
    if let Some(path) = &options.log_path
        && let Err(error) = app::log_to_file(path)
    {
        return complain(&format!("error: --log-path {}: {error}\n", path.display()));
    }
    app::init_logs(&settings.logging);
    for note in &settings.notes {
        tracing::info!("{note}");
    }
    match app::run(settings.sidecar) {
        Ok(()) => Exit::Ok,
        Err(error) => wrong(&error),
    }
}

#[cfg(not(feature = "xds"))]
fn serve(_: &Options, _: &Environment) -> Exit {
    complain("error: this ringfence was built without the feature xds and reads no bootstrap: run `ringfence connect`\n")
}

fn say(text: &str) -> Exit {
    print(text);
    Exit::Ok
}

/// Envoy's exit code for all that is wrong is 1.
fn complain(text: &str) -> Exit {
    eprint(text);
    Exit::Failed
}

fn eprint(text: &str) {
    use std::io::Write;
    // Nobody is left to tell when standard error is gone.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn only_what_is_written_for_envoy_is_taken_for_it() {
        for (program, line, wanted) in [
            ("/usr/bin/envoy", "", Some("")),
            ("envoy", "--version", Some("--version")),
            ("ringfence", "envoy -c x", Some("-c x")),
            ("ringfence", "-c x -l debug", Some("-c x -l debug")),
            ("/opt/ringfence", "--config-path x --disable-hot-restart", Some("--config-path x --disable-hot-restart")),
            ("ringfence", "-l debug --config-yaml {}", Some("-l debug --config-yaml {}")),
            ("ringfence", "--config-path=x", Some("--config-path=x")),
            ("ringfence", "--hot-restart-version", Some("--hot-restart-version")),
            ("ringfence", "", None),
            ("ringfence", "-sidecar-for web", None),
            ("ringfence", "-sidecar-for web -- -c x", None),
            ("ringfence", "connect envoy -sidecar-for web", None),
            ("ringfence", "connect -c x", None),
            ("ringfence", "--version", None),
            ("/opt/envoy/ringfence", "--help", None),
        ] {
            let call = called(OsStr::new(program), &words(line));
            assert_eq!(call.map(|flags| flags.arguments), wanted.map(words), "{program} {line}");
        }
    }

    #[test]
    fn the_first_number_of_the_version_is_the_one_that_is_claimed() {
        let number = regex::Regex::new(r"\d+\.\d+\.\d+").expect("a pattern");
        let first = |environment: &Environment| {
            let line = version("envoy", environment);
            assert!(line.contains(&format!("ringfence-{}", env!("CARGO_PKG_VERSION"))), "{line}");
            number.find(&line).expect("a version").as_str().to_owned()
        };
        assert_eq!(first(&Environment::default()), "1.40.0");
        let other = [(ENVOY_VERSION_VARIABLE.to_owned(), "1.34.2".to_owned())];
        assert_eq!(first(&other.into_iter().collect()), "1.34.2");
    }
}
