//! What systemd is told (`Type=notify`). Without systemd every call is a no-op; an error is logged once and never fatal.

use std::sync::atomic::{AtomicBool, Ordering};

use sd_notify::NotifyState;

/// READY=1: ready, or ready again after a reload.
pub(super) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// STATUS=: one line for `systemctl status`.
pub(super) fn status(text: &str) {
    send(&[NotifyState::Status(text)]);
}

/// RELOADING=1, with the time stamp that systemd needs for `Type=notify-reload`.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(_) => send(&[NotifyState::Reloading]),
    }
}

/// STOPPING=1.
pub(super) fn stopping(status: &str) {
    send(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// MAINPID=: another process is the service now.
pub(super) fn successor(pid: u32) {
    send(&[NotifyState::MainPid(pid), NotifyState::Status("finishing what has begun; another process serves")]);
}

fn send(states: &[NotifyState<'_>]) {
    static COMPLAINED: AtomicBool = AtomicBool::new(false);
    if let Err(error) = sd_notify::notify(false, states)
        && !COMPLAINED.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(%error, "systemd cannot be notified; check NotifyAccess and NOTIFY_SOCKET");
    }
}
