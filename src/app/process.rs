//! What holds for the whole process: limits, core dumps, the kernel's features, panics.

use std::io::Write;

use super::AppError;
use crate::{ring, sys};

/// Below this, a busy host's sidecar runs out of descriptors: two sockets a connection.
const DESCRIPTORS_WANTED: u64 = 65_536;

/// Prepares the process for carrying keys and many connections. Call once, before the first sidecar.
pub fn prepare() -> Result<(), AppError> {
    // Keys and traffic secrets live in memory: without this a crash would write them to disk.
    if let Err(error) = sys::forbid_core_dumps() {
        return Err(AppError::Unavailable(format!("core dumps cannot be switched off: {error}; keys must not reach a disk")));
    }
    match sys::raise_descriptor_limit() {
        Ok((before, now)) if now < DESCRIPTORS_WANTED => {
            tracing::warn!(before, now, "few file descriptors: raise LimitNOFILE to {DESCRIPTORS_WANTED} or more");
        }
        Ok((before, now)) => tracing::debug!(before, now, "descriptor limit"),
        Err(error) => tracing::warn!(%error, "the descriptor limit cannot be raised"),
    }
    // A bootstrap left free heap behind, with its pages touched: rings and tables that are made there would keep them.
    sys::let_go_of_free_heap();
    // Before the first thread: what a connection will need is not there yet, and would only be read twice.
    if let Err(error) = sys::let_go_of_code() {
        tracing::debug!(%error, "code of the command line stays in memory");
    }
    let probe = ring::probe().map_err(|error| AppError::Unavailable(error.to_string()))?;
    tracing::debug!(kernel = probe.kernel, no_iowait = probe.no_iowait, "io_uring has all that is needed");
    Ok(())
}

/// What only the start needed goes. Call when the process is not busy.
pub(super) fn settle() {
    sys::let_go_of_free_heap();
    if let Err(error) = sys::let_go_of_code() {
        tracing::debug!(%error, "code of the start stays in memory");
    }
}

/// Makes a panic in any thread end the process with one clear line, so that no half-dead sidecar keeps its port.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let message = message(info.payload());
        let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        // Standard error may be closed; there is nobody else to tell.
        let _ = writeln!(
            std::io::stderr(),
            "ringfence: fault in thread `{name}` at {place}: {message}; the process ends at once, please report this line"
        );
        std::process::abort();
    }));
}

/// What a panic says: the payload of `panic!` is one of these two.
fn message(payload: &dyn std::any::Any) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_panic_message_are_told() {
        assert_eq!(message(&"plain"), "plain");
        assert_eq!(message(&String::from("formatted")), "formatted");
        assert_eq!(message(&7), "no message");
    }
}
