//! The process's own log lines, to standard error.

use tracing_subscriber::EnvFilter;

use crate::config::{LogLevel, Logging};

/// Starts logging. A second call changes nothing: the first settings hold for the process.
pub fn init(logging: &Logging) {
    let level = match logging.level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warn => "warn",
        LogLevel::Error => "error",
    };
    // The HTTP library logs each connection at debug; whoever wants our debug lines does not want those. Its trace
    // lines hold headers and so tokens: they stay off whatever the level is.
    let filter = EnvFilter::new(format!("{level},hyper=warn,hyper_util=warn,rustls=warn,h2=warn,mio=warn"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        // A reader that went away costs the line, never the process: told of it, the library would print and so panic.
        .log_internal_errors(false);
    let started = if logging.json { builder.json().try_init() } else { builder.with_ansi(false).try_init() };
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}
