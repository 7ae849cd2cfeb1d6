//! What Envoy's flags and our own variables ask for, checked.

use std::path::PathBuf;
use std::time::Duration;

use super::super::{Environment, values};
use super::flags::Given;
use crate::admin;
use crate::config::{LogLevel, LogTarget};

/// `--mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Serve,
    Validate,
}

/// RINGFENCE_FEEDER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feeder {
    /// Consul's HTTP agent API.
    Http,
    /// The xDS server of the bootstrap.
    Xds,
}

/// Flags and variables understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) config_path: Option<PathBuf>,
    pub(super) config_yaml: Option<String>,
    pub(super) mode: Mode,
    /// Unknown fields of the bootstrap are dropped.
    pub(super) tolerant: bool,
    pub(super) concurrency: Option<usize>,
    /// Zero ends at once.
    pub(super) drain_time: Option<Duration>,
    pub(super) admin_address_path: Option<PathBuf>,
    pub(super) log_level: LogLevel,
    /// As it was given.
    pub(super) component_levels: String,
    pub(super) log_path: Option<PathBuf>,
    pub(super) service_cluster: Option<String>,
    pub(super) service_node: Option<String>,
    /// (tag, value)
    pub(super) stats_tags: Vec<(String, String)>,
    pub(super) feeder: Option<Feeder>,
    pub(super) http_as_tcp: bool,
    pub(super) connection_log: LogTarget,
    /// Flags that were given and change nothing.
    pub(super) without_effect: Vec<&'static str>,
}

impl Options {
    /// The error is Envoy's sentence where Envoy has one.
    pub(super) fn of(given: &Given, environment: &Environment) -> Result<Self, String> {
        let text = |name: &str| given.text(name).filter(|text| !text.is_empty());
        let mode = match given.text("mode") {
            None | Some("serve") => Mode::Serve,
            Some("validate") => Mode::Validate,
            Some(other) => return Err(format!("unknown mode '{other}'")),
        };
        if let Some(other) = given.text("drain-strategy").filter(|strategy| !matches!(*strategy, "gradual" | "immediate")) {
            return Err(format!("unknown drain-strategy '{other}'"));
        }
        if let Some(epoch) = given.number("restart-epoch").filter(|epoch| *epoch > 0 && given.has("use-dynamic-base-id")) {
            return Err(format!("cannot use --restart-epoch={epoch} with --use-dynamic-base-id"));
        }
        for component in text("component-log-level").into_iter().flat_map(|list| list.split(',')) {
            let (name, level) =
                component.split_once(':').ok_or_else(|| format!("component log level not correctly specified '{component}'"))?;
            log_level(level)?;
            if !admin::is_logger(name) {
                return Err(format!("invalid component specified '{name}'"));
            }
        }
        let concurrency = given.number("concurrency").map(|count| values::workers(&count.max(1).to_string())).transpose()?;
        let switch = |name: &str| match environment.get(name) {
            None | Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(other) => Err(format!("{name} is '{other}': write 1 or 0")),
        };
        let abrupt = switch("RINGFENCE_ABRUPT_SIGTERM")? || given.has("ringfence-abrupt-sigterm");
        let drain_time = given.number("drain-time-s").map(|seconds| Duration::from_secs(seconds.into()));
        let feeder = match environment.get("RINGFENCE_FEEDER") {
            None => None,
            Some("http") => Some(Feeder::Http),
            Some("xds") => Some(Feeder::Xds),
            Some(other) => return Err(format!("RINGFENCE_FEEDER is '{other}': write http or xds")),
        };
        let connection_log = environment.get("RINGFENCE_CONNECTION_LOG").map(values::log_target).transpose()?;
        let options = Self {
            config_path: text("config-path").map(PathBuf::from),
            config_yaml: text("config-yaml").map(str::to_owned),
            mode,
            tolerant: given.has("allow-unknown-static-fields") || given.has("allow-unknown-fields"),
            concurrency,
            drain_time: if abrupt { Some(Duration::ZERO) } else { drain_time },
            admin_address_path: text("admin-address-path").map(PathBuf::from),
            log_level: log_level(given.text("log-level").unwrap_or("info"))?,
            component_levels: text("component-log-level").unwrap_or_default().to_owned(),
            log_path: text("log-path").map(PathBuf::from),
            service_cluster: text("service-cluster").map(str::to_owned),
            service_node: text("service-node").map(str::to_owned),
            stats_tags: given.all("stats-tag").map(stats_tag).collect::<Result<_, _>>()?,
            feeder,
            http_as_tcp: switch("RINGFENCE_HTTP_AS_TCP")?,
            connection_log: connection_log.unwrap_or_default(),
            without_effect: given.without_effect().collect(),
        };
        Ok(options)
    }
}

fn log_level(text: &str) -> Result<LogLevel, String> {
    Ok(match text {
        "trace" => LogLevel::Trace,
        "debug" => LogLevel::Debug,
        "info" => LogLevel::Info,
        "warning" | "warn" => LogLevel::Warn,
        "error" | "critical" => LogLevel::Error,
        "off" => LogLevel::Off,
        _ => return Err(format!("invalid log level specified '{text}'")),
    })
}

fn stats_tag(text: &str) -> Result<(String, String), String> {
    let wrong = || format!("misformatted stats-tag '{text}'");
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let fine = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()) && !value.is_empty() && !value.contains('.');
    if fine { Ok((name.to_owned(), value.to_owned())) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::super::flags;
    use super::*;

    fn of(line: &str, variables: &[(&str, &str)]) -> Result<Options, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Options::of(&flags::parse(&words).expect("flags"), &variables.collect())
    }

    #[test]
    fn flags_and_variables_become_options() {
        let options = of("-c x --mode validate --concurrency 0 --drain-time-s 7 -l warning --stats-tag a:b --log-format %v", &[]);
        let options = options.expect("it is right");
        assert_eq!((options.mode, options.concurrency), (Mode::Validate, Some(1)));
        assert_eq!(options.drain_time, Some(Duration::from_secs(7)));
        assert_eq!(options.log_level, LogLevel::Warn);
        assert_eq!(options.stats_tags, [("a".to_owned(), "b".to_owned())]);
        assert_eq!(options.without_effect, ["log-format"]);
        let abrupt =
            of("--drain-time-s 7", &[("RINGFENCE_ABRUPT_SIGTERM", "1"), ("RINGFENCE_FEEDER", "http")]).expect("it is right");
        assert_eq!((abrupt.drain_time, abrupt.feeder), (Some(Duration::ZERO), Some(Feeder::Http)));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, variable, wanted) in [
            ("-l loud", ("", ""), "invalid log level specified 'loud'"),
            ("--mode fast", ("", ""), "unknown mode 'fast'"),
            ("--drain-strategy x", ("", ""), "unknown drain-strategy 'x'"),
            ("--component-log-level x", ("", ""), "component log level not correctly specified 'x'"),
            ("--component-log-level x:y", ("", ""), "invalid log level specified 'y'"),
            ("--component-log-level config:info,x:debug", ("", ""), "invalid component specified 'x'"),
            ("--stats-tag ab", ("", ""), "misformatted stats-tag 'ab'"),
            ("--stats-tag a:b.c", ("", ""), "misformatted stats-tag 'a:b.c'"),
            ("--use-dynamic-base-id --restart-epoch 1", ("", ""), "cannot use --restart-epoch=1"),
            ("--concurrency 99999", ("", ""), "99999"),
            ("", ("RINGFENCE_FEEDER", "grpc"), "write http or xds"),
            ("", ("RINGFENCE_HTTP_AS_TCP", "yes"), "write 1 or 0"),
            ("", ("RINGFENCE_ABRUPT_SIGTERM", "yes"), "write 1 or 0"),
        ] {
            let error = of(line, &[variable]).expect_err(line);
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }
}
