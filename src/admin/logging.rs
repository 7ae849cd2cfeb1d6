//! `/logging`: log levels, shown and changed while the process runs.
//!
//! Invariant: what libraries log of their own at debug and trace stays off whatever is asked for: there are headers, and so
//! tokens, in it. Envoy's loggers are accepted by name; those that are of a room here set that room's level, where the most
//! verbose of its loggers decides. The others are remembered and change nothing.

use std::fmt::Write;
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::Response;

use super::routes::{self, TEXT};
use crate::config::LogLevel;

/// Sets the process's log filter (`tracing-subscriber`'s directives). An error says why not.
#[derive(Clone)]
pub struct Apply(Arc<Directives>);

/// Takes directives into force.
type Directives = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl Apply {
    /// By this function.
    pub fn new(apply: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(apply))
    }
}

impl std::fmt::Debug for Apply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Apply")
    }
}

/// Log levels in force.
#[derive(Debug)]
pub(super) struct Levels {
    /// In the order of [`LOGGERS`].
    levels: Vec<Level>,
    apply: Option<Apply>,
}

/// What is never logged in detail, whatever the level is.
pub const LIBRARIES: &str = "hyper=warn,hyper_util=warn,rustls=warn,h2=warn,tonic=warn,tower=warn,mio=warn";

/// Loggers by name, and the room that they are of.
const LOGGERS: &[(&str, Option<&str>)] = &[
    ("a2a", None),
    ("admin", Some("admin")),
    ("agent", Some("agent")),
    ("ai_protocol_manager", None),
    ("airflow", Some("airflow")),
    ("alternate_protocols_cache", None),
    ("app", Some("app")),
    ("assert", None),
    ("aws", None),
    ("backtrace", None),
    ("basic_auth", None),
    ("buffer", Some("buffer")),
    ("cache_filter", None),
    ("client", Some("control")),
    ("compression", None),
    ("config", Some("control")),
    ("conn_handler", Some("proxy")),
    ("connection", Some("proxy")),
    ("control", Some("control")),
    ("credential_injector", None),
    ("decompression", None),
    ("dns", Some("control")),
    ("dubbo", None),
    ("dynamic_modules", None),
    ("envoy_bug", None),
    ("ext_authz", None),
    ("ext_proc", None),
    ("file", Some("telemetry")),
    ("filter", Some("proxy")),
    ("forward_proxy", None),
    ("geolocation", None),
    ("golang", None),
    ("grpc", Some("control")),
    ("happy_eyeballs", None),
    ("hc", None),
    ("health_checker", None),
    ("http", None),
    ("http2", None),
    ("hystrix", None),
    ("init", Some("app")),
    ("io", Some("ring")),
    ("ip_tagging", None),
    ("json_rpc", None),
    ("jwt", None),
    ("kafka", None),
    ("key_value_store", None),
    ("local_rate_limit", None),
    ("lua", None),
    ("main", Some("app")),
    ("matcher", None),
    ("mcp", None),
    ("mesh", Some("mesh")),
    ("misc", None),
    ("mongo", None),
    ("multi_connection", None),
    ("notification", None),
    ("oauth2", None),
    ("policy", Some("policy")),
    ("pool", Some("proxy")),
    ("proxy", Some("proxy")),
    ("quic", None),
    ("quic_stream", None),
    ("rate_limit_quota", None),
    ("rbac", Some("policy")),
    ("rds", None),
    ("redis", None),
    ("ring", Some("ring")),
    ("rocketmq", None),
    ("router", None),
    ("runtime", None),
    ("secret", Some("identity")),
    ("sse", None),
    ("stats", Some("telemetry")),
    ("stats_sinks", Some("telemetry")),
    ("store", Some("store")),
    ("sys", Some("sys")),
    ("tap", None),
    ("telemetry", Some("telemetry")),
    ("testing", None),
    ("thrift", None),
    ("tls", Some("tls")),
    ("tracing", None),
    ("udp", None),
    ("upstream", Some("proxy")),
    ("wasm", None),
    ("websocket", None),
];

/// A level in Envoy's words, the quietest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Off,
    Critical,
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

impl Level {
    const ALL: [Self; 7] = [Self::Trace, Self::Debug, Self::Info, Self::Warning, Self::Error, Self::Critical, Self::Off];

    fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Critical => "critical",
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        let text = if text == "warn" { "warning" } else { text };
        Self::ALL.into_iter().find(|level| level.as_str() == text).ok_or("unknown logger level")
    }

    /// As a directive. Nothing is logged above error.
    fn directive(self) -> &'static str {
        match self {
            Self::Critical => "error",
            Self::Warning => "warn",
            level => level.as_str(),
        }
    }
}

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Trace => Self::Trace,
            LogLevel::Debug => Self::Debug,
            LogLevel::Info => Self::Info,
            LogLevel::Warn => Self::Warning,
            LogLevel::Error => Self::Error,
            LogLevel::Off => Self::Off,
        }
    }
}

impl Levels {
    /// All loggers at `level`; without `apply` nothing can be changed.
    pub(super) fn new(level: LogLevel, apply: Option<Apply>) -> Self {
        Self { levels: vec![level.into(); LOGGERS.len()], apply }
    }

    /// Sets what the command line asks for; what cannot be set is said.
    pub(super) fn start_with(mut self, component_levels: &str) -> Self {
        if let Err(why) = self.change(&[("paths".to_owned(), component_levels.to_owned())]) {
            tracing::warn!(%component_levels, %why, "--component-log-level has no effect");
        }
        self
    }

    /// The most verbose level.
    pub(super) fn overall(&self) -> String {
        self.levels.iter().max().map_or("info", |level| level.as_str()).to_owned()
    }

    /// Does what the parameters say, and lists the levels.
    pub(super) fn answer(&mut self, parameters: &[(String, String)]) -> Response {
        match self.change(parameters) {
            Ok(()) => routes::answer(StatusCode::OK, TEXT, format!("{}\n", self.list())),
            Err(why) => {
                let text = format!(
                    "error: {why}\n\n\
                     usage: /logging?<name>=<level> (change single level)\n\
                     usage: /logging?paths=name1:level1,name2:level2,... (change multiple levels)\n\
                     usage: /logging?level=<level> (change all levels)\n\
                     levels: {} \n{}\n",
                    Level::ALL.map(Level::as_str).join(" "),
                    self.list()
                );
                routes::answer(StatusCode::BAD_REQUEST, TEXT, text)
            }
        }
    }

    fn change(&mut self, parameters: &[(String, String)]) -> Result<(), String> {
        let [(name, value)] = parameters else {
            return if parameters.is_empty() { Ok(()) } else { Err("invalid number of parameters".to_owned()) };
        };
        let mut next = self.levels.clone();
        match name.as_str() {
            "level" => next.fill(Level::parse(value)?),
            "group" => return Err("group parameter requires fine-grain logging, which is not there".to_owned()),
            "paths" => {
                for pair in value.split(',').filter(|pair| !pair.is_empty()) {
                    let (name, level) = pair.split_once(':').ok_or("empty logger name or empty logger level")?;
                    next[logger(name)?] = Level::parse(level)?;
                }
            }
            name => next[logger(name)?] = Level::parse(value)?,
        }
        if next != self.levels {
            let apply = self.apply.as_ref().ok_or("log levels of this process cannot be changed")?;
            (apply.0)(&directives(&next))?;
            self.levels = next;
            tracing::info!(%name, %value, "log level changed");
        }
        Ok(())
    }

    fn list(&self) -> String {
        LOGGERS.iter().zip(&self.levels).fold("active loggers:\n".to_owned(), |mut text, ((name, _), level)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {name}: {}", level.as_str());
            text
        })
    }
}

/// Whether a logger has this name: every one of Envoy's 1.40, and those of this process.
pub fn is_logger(name: &str) -> bool {
    logger(name).is_ok()
}

fn logger(name: &str) -> Result<usize, &'static str> {
    LOGGERS.iter().position(|(known, _)| *known == name).ok_or("unknown logger name")
}

/// A filter for these levels: each room at the most verbose of its loggers, everything else at the level of `main`.
fn directives(levels: &[Level]) -> String {
    let of = |room: &str| {
        let own = LOGGERS.iter().zip(levels).filter(|((_, owner), _)| *owner == Some(room));
        own.map(|(_, level)| *level).max()
    };
    let base = of("app").unwrap_or(Level::Info);
    let mut text = base.directive().to_owned();
    let mut rooms: Vec<&str> = LOGGERS.iter().filter_map(|(_, room)| *room).collect();
    rooms.sort_unstable();
    rooms.dedup();
    for room in rooms {
        if let Some(level) = of(room) {
            let _ = write!(text, ",ringfence::{room}={}", level.directive());
        }
    }
    let _ = write!(text, ",{LIBRARIES}");
    text
}

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;

    use super::*;

    fn one(name: &str, value: &str) -> Vec<(String, String)> {
        vec![(name.to_owned(), value.to_owned())]
    }

    #[test]
    fn a_level_reaches_the_filter_and_libraries_stay_quiet() {
        let applied = Arc::new(ArcSwap::from_pointee(String::new()));
        let seen = Arc::clone(&applied);
        let apply = Apply::new(move |text: &str| {
            seen.store(Arc::new(text.to_owned()));
            Ok(())
        });
        let mut levels = Levels::new(LogLevel::Info, Some(apply));
        levels.change(&one("connection", "debug")).expect("changed");
        let filter = applied.load_full();
        assert!(filter.starts_with("info,") && filter.contains("ringfence::proxy=debug"), "{filter}");
        assert!(filter.contains("ringfence::control=info") && filter.ends_with(LIBRARIES), "{filter}");
        levels.change(&one("level", "trace")).expect("changed");
        let filter = applied.load_full();
        assert!(filter.starts_with("trace,") && filter.contains("hyper=warn"), "{filter}");
        assert!(tracing_subscriber::EnvFilter::try_new(&*filter).is_ok());
    }

    #[test]
    fn a_process_starts_with_what_its_command_line_says() {
        let applied = Arc::new(ArcSwap::from_pointee(String::new()));
        let apply = Apply::new({
            let applied = Arc::clone(&applied);
            move |text| {
                applied.store(Arc::new(text.to_owned()));
                Ok(())
            }
        });
        let levels = Levels::new(LogLevel::Warn, Some(apply)).start_with("connection:trace,config:off");
        let filter = applied.load_full();
        assert!(filter.starts_with("warn,") && filter.contains("ringfence::proxy=trace"), "{filter}");
        assert!(levels.list().contains("config: off"));
        assert!(is_logger("upstream") && !is_logger("level"));
    }

    #[test]
    fn what_cannot_be_set_changes_nothing() {
        let mut levels = Levels::new(LogLevel::Warn, Some(Apply::new(|_| Err("no".to_owned()))));
        for (name, value, wanted) in [
            ("level", "loud", "unknown logger level"),
            ("nobody", "debug", "unknown logger name"),
            ("paths", "admin:debug,nobody:debug", "unknown logger name"),
            ("paths", "admin", "empty logger name"),
            ("admin", "debug", "no"),
        ] {
            let error = levels.change(&one(name, value)).expect_err("refused");
            assert!(error.contains(wanted), "{error}");
            assert!(levels.levels.iter().all(|level| *level == Level::Warning));
        }
        assert!(levels.change(&[one("a", "b"), one("c", "d")].concat()).is_err());
    }

    #[test]
    fn loggers_are_sorted_and_told_apart() {
        assert!(LOGGERS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
