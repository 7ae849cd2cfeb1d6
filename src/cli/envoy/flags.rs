//! Envoy's flags, in the way its command line is written: `--name value`, `-x value`, each at most once.
//!
//! Invariant: every flag of Envoy 1.40 is known, and so are those that older Consuls pass. `--name=value` is taken besides, which
//! Envoy itself refuses. Knows no meaning of any flag.

/// How a flag is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Switch,
    Text,
    /// Text that may be given several times.
    Texts,
    Number,
}

/// What becomes of a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// It does what Envoy's does.
    Same,
    /// It is accepted; there is nothing here that it could steer, or what it asks for holds anyway.
    Nothing,
}

/// One flag.
#[derive(Debug)]
pub(super) struct Flag {
    pub(super) name: &'static str,
    short: Option<char>,
    kind: Kind,
    pub(super) used: Use,
    about: &'static str,
}

const fn flag(name: &'static str, kind: Kind, used: Use, about: &'static str) -> Flag {
    Flag { name, short: None, kind, used, about }
}

const fn short(flag: Flag, letter: char) -> Flag {
    Flag { short: Some(letter), ..flag }
}

use Kind::{Number, Switch, Text, Texts};
use Use::{Nothing, Same};

const FLAGS: &[Flag] = &[
    short(flag("config-path", Text, Same, "The bootstrap: a file, a FIFO or /dev/fd/N, opened once; JSON or YAML"), 'c'),
    flag("config-yaml", Text, Same, "A bootstrap in place, merged over that of --config-path"),
    flag("mode", Text, Same, "'serve', or 'validate' to check the bootstrap and end"),
    flag("allow-unknown-static-fields", Switch, Same, "Drop fields that the bootstrap's messages do not have"),
    flag("allow-unknown-fields", Switch, Same, "The same, under its older name"),
    flag("concurrency", Number, Same, "Worker threads; one a core where absent"),
    flag("drain-time-s", Number, Same, "How long live connections go on after SIGTERM, seconds; 30 where absent"),
    flag("admin-address-path", Text, Same, "File that the admin port's address is written to"),
    short(flag("log-level", Text, Same, "trace, debug, info, warning or warn, error, critical, off"), 'l'),
    flag("log-path", Text, Same, "File for log lines, in place of standard error"),
    flag("service-cluster", Text, Same, "Overrides node.cluster"),
    flag("service-node", Text, Same, "Overrides node.id"),
    flag("stats-tag", Texts, Same, "TAG:VALUE for all stats"),
    flag("hot-restart-version", Switch, Same, "Says that Envoy's hot restart is off, and ends"),
    flag("ringfence-abrupt-sigterm", Switch, Same, "ringfence's own: SIGTERM ends at once, as it ends Envoy"),
    flag(
        "component-log-level",
        Text,
        Same,
        "NAME:LEVEL,... of Envoy's loggers; each sets the level of the part that it stands for",
    ),
    flag("log-format", Text, Nothing, "Log lines have one format"),
    flag("log-format-escaped", Switch, Nothing, "Control characters never reach a log line as they are"),
    flag("enable-fine-grain-logging", Switch, Nothing, "Levels are set by part, not by source file"),
    flag("log-stacktrace-single-entry", Switch, Nothing, "A fault is one line"),
    flag("skip-deprecated-logs", Switch, Nothing, "Deprecated fields are not logged"),
    flag("base-id", Number, Nothing, "There is no shared memory to tell apart"),
    flag("use-dynamic-base-id", Switch, Nothing, "The same"),
    flag("base-id-path", Text, Nothing, "The same"),
    flag("restart-epoch", Number, Nothing, "SIGUSR2 upgrades instead"),
    flag("disable-hot-restart", Switch, Nothing, "It is off"),
    flag("parent-shutdown-time-s", Number, Nothing, "Connections of the process before live until they end"),
    flag("drain-strategy", Text, Nothing, "gradual or immediate: TCP cannot be told to go"),
    flag("skip-hot-restart-on-no-parent", Switch, Nothing, "Hot restart is off"),
    flag("skip-hot-restart-parent-stats", Switch, Nothing, "Hot restart is off"),
    flag("socket-path", Text, Nothing, "Hot restart is off"),
    flag("socket-mode", Text, Nothing, "Hot restart is off"),
    flag("service-zone", Text, Nothing, "Zones do not weigh in"),
    flag("local-address-ip-version", Text, Nothing, "Found out by itself"),
    flag("cpuset-threads", Switch, Nothing, "The cores that this process may use are counted anyway"),
    flag("file-flush-interval-msec", Number, Nothing, "Log files are flushed as lines come"),
    flag("file-flush-min-size-kb", Number, Nothing, "The same"),
    flag("reject-unknown-dynamic-fields", Switch, Nothing, "What matters is refused by name either way"),
    flag("ignore-unknown-dynamic-fields", Switch, Nothing, "The same"),
    flag("disable-extensions", Text, Nothing, "There are none"),
    flag("enable-mutex-tracing", Switch, Nothing, "Workers have no mutex"),
    flag("enable-core-dump", Switch, Nothing, "Never: keys must not reach a disk"),
    flag("max-obj-name-len", Number, Nothing, "Of older Envoys; names have no such bound"),
    flag("max-stats", Number, Nothing, "Of older Envoys"),
];

/// Most arguments that are looked at.
const ARGUMENTS_MAX: usize = 4_096;
/// Columns of the usage text.
const WIDTH: usize = 75;

/// What was given, as written and in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Given(Vec<(&'static str, String)>);

impl Given {
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(given, _)| *given == name)
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// A number; that it is one was checked before.
    pub(super) fn number(&self, name: &str) -> Option<u32> {
        self.text(name).and_then(|text| text.parse().ok())
    }

    /// Those that change nothing.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = &'static str> {
        let names = self.0.iter().map(|(name, _)| *name);
        names.filter(|name| FLAGS.iter().any(|flag| flag.name == *name && flag.used == Nothing))
    }
}

/// Why nothing is given.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Help,
    Version,
    /// As Envoy words it.
    Wrong {
        argument: String,
        why: String,
    },
}

/// Reads arguments in order: the first `--help`, `--version` or mistake decides.
pub(super) fn parse(arguments: &[String]) -> Result<Given, Stop> {
    let wrong = |argument: String, why: &str| Stop::Wrong { argument, why: why.to_owned() };
    let mut given = Given::default();
    let mut rest = arguments.iter().take(ARGUMENTS_MAX);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-h" | "--help" => return Err(Stop::Help),
            "--version" => return Err(Stop::Version),
            "--" | "--ignore_rest" => break,
            _ => {}
        }
        let (name, attached) = match argument.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (argument.as_str(), None),
        };
        let flag = FLAGS.iter().find(|flag| match name.strip_prefix("--") {
            Some(long) => flag.name == long,
            None => flag.short.is_some_and(|letter| name == format!("-{letter}")),
        });
        let Some(flag) = flag else { return Err(wrong(argument.clone(), "Couldn't find match for argument")) };
        if flag.kind != Texts && given.has(flag.name) {
            return Err(wrong(flag.label(), "Argument already set!"));
        }
        let value = match (flag.kind, attached) {
            (Switch, None) => String::new(),
            (Switch, Some(_)) => return Err(wrong(argument.clone(), "Couldn't find match for argument")),
            (_, Some(value)) => value.to_owned(),
            (_, None) => rest.next().cloned().ok_or_else(|| wrong(flag.label(), "Missing a value for this argument!"))?,
        };
        if flag.kind == Number && value.parse::<u32>().is_err() {
            return Err(wrong(flag.label(), &format!("Couldn't read argument value from string '{value}'")));
        }
        given.0.push((flag.name, value));
    }
    Ok(given)
}

impl Flag {
    /// As Envoy names it in errors.
    fn label(&self) -> String {
        match self.short {
            Some(letter) => format!("-{letter} (--{})", self.name),
            None => format!("(--{})", self.name),
        }
    }

    /// What stands for its value in usage texts.
    fn value(&self) -> &'static str {
        match self.kind {
            Switch => "",
            Text | Texts => " <string>",
            Number => " <uint32_t>",
        }
    }
}

/// The usage that follows a mistake.
pub(super) fn brief(program: &str) -> String {
    format!("Brief USAGE: \n{}\nFor complete USAGE and HELP type: \n   {program} --help\n\n", synopsis(program))
}

/// `--help`.
pub(super) fn help(program: &str) -> String {
    let mut text = format!("\nUSAGE: \n\n{}\n\nWhere: \n\n", synopsis(program));
    for flag in FLAGS {
        let letter = flag.short.map_or_else(String::new, |letter| format!("-{letter}{},  ", flag.value()));
        let repeated = if flag.kind == Texts { "  (accepted multiple times)" } else { "" };
        let effect = if flag.used == Nothing { "Accepted, without effect: " } else { "" };
        text.push_str(&format!("   {letter}--{}{}{repeated}\n", flag.name, flag.value()));
        text.push_str(&format!("     {effect}{}\n\n", flag.about));
    }
    text.push_str("   --,  --ignore_rest\n     What follows is not read\n\n");
    text.push_str("   --version\n     The version of Envoy that this stands in for, and ringfence's own\n\n");
    text.push_str("   -h,  --help\n     This\n\n");
    text.push_str("   ringfence in Envoy's place: an L4 sidecar for Consul Connect. Environment:\n");
    text.push_str("     RINGFENCE_ENVOY_VERSION   the version to claim, X.Y.Z\n");
    text.push_str("     RINGFENCE_FEEDER          http or xds: where the mesh is learned from\n");
    text.push_str("     RINGFENCE_HTTP_AS_TCP     1: over xDS, services of protocol http are served as bytes (see the README)\n");
    text.push_str("     RINGFENCE_CONNECTION_LOG  stdout, stderr, none or a file: one JSON line a connection\n");
    text.push_str("     RINGFENCE_ABRUPT_SIGTERM  1: as --ringfence-abrupt-sigterm\n\n");
    text
}

/// All flags in brackets, broken into lines.
fn synopsis(program: &str) -> String {
    let one = |flag: &Flag| {
        let repeated = if flag.kind == Texts { " ..." } else { "" };
        let name = flag.short.map_or_else(|| format!("--{}", flag.name), |letter| format!("-{letter}"));
        format!("[{name}{}]{repeated}", flag.value())
    };
    let words = FLAGS.iter().map(one).chain(["[--]", "[--version]", "[-h]"].map(str::to_owned));
    let mut lines = String::new();
    let mut line = format!("   {program} ");
    for word in words {
        if line.len() + word.len() >= WIDTH {
            lines.push_str(line.trim_end());
            lines.push('\n');
            line = " ".repeat(10);
        }
        line.push_str(&word);
        line.push(' ');
    }
    lines.push_str(line.trim_end());
    lines.push('\n');
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn flags_are_read_in_each_form() {
        let line = "-c a.json --log-level debug --concurrency 2 --stats-tag a:b --stats-tag=c:d --disable-hot-restart -- --what";
        let given = parse(&words(line)).expect("it is right");
        assert_eq!(given.text("config-path"), Some("a.json"));
        assert_eq!(given.text("log-level"), Some("debug"));
        assert_eq!(given.number("concurrency"), Some(2));
        assert_eq!(given.all("stats-tag").collect::<Vec<_>>(), ["a:b", "c:d"]);
        assert_eq!(given.without_effect().collect::<Vec<_>>(), ["disable-hot-restart"]);
        assert_eq!(parse(&words("--version --nope")), Err(Stop::Version));
        assert_eq!(parse(&words("-l debug -h")), Err(Stop::Help));
    }

    #[test]
    fn mistakes_are_worded_as_envoy_words_them() {
        for (line, argument, why) in [
            ("--nope", "--nope", "Couldn't find match for argument"),
            ("web", "web", "Couldn't find match for argument"),
            ("-cx", "-cx", "Couldn't find match for argument"),
            ("--nope --version", "--nope", "Couldn't find match for argument"),
            ("-c", "-c (--config-path)", "Missing a value for this argument!"),
            ("--mode a --mode b", "(--mode)", "Argument already set!"),
            ("-l a --log-level b", "-l (--log-level)", "Argument already set!"),
            ("--concurrency x", "(--concurrency)", "Couldn't read argument value from string 'x'"),
        ] {
            let wrong = Stop::Wrong { argument: argument.to_owned(), why: why.to_owned() };
            assert_eq!(parse(&words(line)), Err(wrong), "{line}");
        }
    }

    #[test]
    fn the_usage_fits_a_terminal_and_names_every_flag() {
        let text = help("envoy");
        for flag in FLAGS {
            assert!(text.contains(&format!("--{}", flag.name)), "{}", flag.name);
        }
        assert!(brief("envoy").lines().all(|line| line.len() <= WIDTH + 5), "{}", brief("envoy"));
    }
}
