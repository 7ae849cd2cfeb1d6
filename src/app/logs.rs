//! The process's own log lines, to standard error, which may be put onto a file.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use crate::admin::{Apply, LIBRARIES};
use crate::config::{LogLevel, Logging};

/// The process's log, once it is started: its first level and what changes it.
static STARTED: OnceLock<(LogLevel, Apply)> = OnceLock::new();

/// The file that standard error was put onto.
static FILE: OnceLock<PathBuf> = OnceLock::new();

/// Puts standard error onto a file, faults and all (`--log-path`); [`reopen`] opens it again.
pub fn to_file(path: &Path) -> io::Result<()> {
    put(path)?;
    // A second path in one process has no reader: the first one holds.
    let _ = FILE.set(path.to_owned());
    Ok(())
}

/// Opens the file of [`to_file`] again, after somebody has moved it away.
pub(super) fn reopen() {
    if let Some(path) = FILE.get()
        && let Err(error) = put(path)
    {
        tracing::warn!(path = %path.display(), %error, "the log file cannot be opened again; lines go on to the one before");
    }
}

fn put(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(rustix::stdio::dup2_stderr(file)?)
}

/// Starts logging. A second call changes nothing: the first settings hold for the process.
pub fn init(logging: &Logging) {
    let level = match logging.level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
        LogLevel::Off => "off",
    };
    // The HTTP library logs each connection at debug; whoever wants our debug lines does not want those. Its trace
    // lines hold headers and so tokens: they stay off whatever the level is.
    let filter = match logging.level {
        LogLevel::Off => EnvFilter::new(level),
        _ => EnvFilter::new(format!("{level},{LIBRARIES}")),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        // A reader that went away costs the line, never the process: told of it, the library would print and so panic.
        .log_internal_errors(false);
    let (started, apply): (_, Apply) = if logging.json {
        let builder = builder.json().with_filter_reloading();
        let handle = builder.reload_handle();
        (builder.try_init(), Apply::new(move |text| change(text, |filter| handle.reload(filter))))
    } else {
        let builder = builder.with_ansi(false).with_filter_reloading();
        let handle = builder.reload_handle();
        (builder.try_init(), Apply::new(move |text| change(text, |filter| handle.reload(filter))))
    };
    match started {
        // Whoever is first has set it.
        Ok(()) => _ = STARTED.set((logging.level, apply)),
        Err(_) => tracing::debug!("logging was started before"),
    }
}

/// The level that logging was started with, and what changes it; nothing does where it was not started here.
pub(super) fn level() -> (LogLevel, Option<Apply>) {
    STARTED.get().map_or((LogLevel::Info, None), |(level, apply)| (*level, Some(apply.clone())))
}

fn change(directives: &str, reload: impl Fn(EnvFilter) -> Result<(), tracing_subscriber::reload::Error>) -> Result<(), String> {
    let filter = EnvFilter::try_new(directives).map_err(|error| error.to_string())?;
    reload(filter).map_err(|error| error.to_string())
}
