//! The process's own log lines, to standard error, which may be put onto a file.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use crate::config::{LogLevel, Logging};

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
        _ => EnvFilter::new(format!("{level},hyper=warn,hyper_util=warn,rustls=warn,h2=warn,mio=warn")),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        // A reader that went away costs the line, never the process: told of it, the library would print and so panic.
        .log_internal_errors(false);
    let started = if logging.json { builder.json().try_init() } else { builder.with_ansi(false).try_init() };
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}
