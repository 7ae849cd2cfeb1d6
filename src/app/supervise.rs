//! The main thread of `ringfence connect`: signals, wishes of the admin port, what systemd is told.
//!
//! SIGTERM and SIGINT drain, then end; a second one ends at once. SIGHUP reloads, SIGUSR1 opens log files again. SIGUSR2 starts the program's file anew beside
//! this process, with the same listening sockets: when that one serves, this one finishes what it has begun and ends.

use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{AppError, Sidecar, notify, process};
use crate::admin::Action;
use crate::config;
use crate::sys::handover::{self, Inherited, Successor};

/// How often readiness, ended threads and the drain's progress are looked at.
const TICK: Duration = Duration::from_millis(50);

/// Runs one sidecar until a signal or the admin port ends it.
pub fn run(settings: config::Sidecar) -> Result<(), AppError> {
    process::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| AppError::Unavailable(format!("the main thread's runtime cannot start: {error}")))?;
    runtime.block_on(async {
        let drain_time = settings.plane.drain_time;
        // Before the first thread: from here on no signal kills a half-started process.
        let mut signals = Signals::new()?;
        let mut sidecar = Sidecar::start_with(settings, Inherited::take())?;
        tracing::info!(admin = %sidecar.admin_address(), pid = std::process::id(), "started");
        let ended = Supervision::new(drain_time).run(&mut sidecar, &mut signals).await;
        // A failure is worth more to the reader than what stopping says after it.
        let stopped = sidecar.stop().await;
        if let (Err(_), Err(error)) = (&ended, &stopped) {
            tracing::error!(%error, "found while stopping");
        }
        ended.and(stopped)
    })
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    upgrade: Signal,
    reopen: Signal,
}

impl Signals {
    fn new() -> Result<Self, AppError> {
        let on = |kind| signal(kind).map_err(|error| AppError::Internal(format!("signals cannot be received: {error}")));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hang_up: on(SignalKind::hangup())?,
            upgrade: on(SignalKind::user_defined2())?,
            reopen: on(SignalKind::user_defined1())?,
        })
    }
}

/// What woke the main thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    End,
    Reload,
    Upgrade,
    Asked(Action),
    Tick,
}

struct Supervision {
    drain_time: Duration,
    /// READY=1 was sent.
    ready: bool,
    /// The admin port asked for a drain: workers without connections are no fault.
    listeners_drained: bool,
    /// When the drain must be over.
    drain_deadline: Option<Instant>,
    /// The process that is to take over, and until when it must be ready.
    successor: Option<(Successor, Instant)>,
    /// The process that has taken over and is to be told, a tick later, that this one's threads have left everything.
    leaving: Option<Successor>,
    /// The last STATUS= sent.
    told: String,
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    GoOn,
    End,
}

impl Supervision {
    fn new(drain_time: Duration) -> Self {
        Self {
            drain_time,
            ready: false,
            listeners_drained: false,
            drain_deadline: None,
            successor: None,
            leaving: None,
            told: String::new(),
        }
    }

    async fn run(&mut self, sidecar: &mut Sidecar, signals: &mut Signals) -> Result<(), AppError> {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            let wake = tokio::select! {
                _ = signals.terminate.recv() => Wake::End,
                _ = signals.interrupt.recv() => Wake::End,
                _ = signals.hang_up.recv() => Wake::Reload,
                _ = signals.upgrade.recv() => Wake::Upgrade,
                _ = signals.reopen.recv() => Wake::Asked(Action::ReopenLogs),
                action = sidecar.next_action() => Wake::Asked(action),
                _ = ticks.tick() => Wake::Tick,
            };
            let next = match wake {
                Wake::End => self.end_asked(sidecar),
                Wake::Asked(Action::Quit) => Next::End,
                Wake::Asked(Action::Drain) => {
                    // Envoy's /drain_listeners: no new connections, the process stays until it is told to end.
                    self.listeners_drained = true;
                    sidecar.drain();
                    Next::GoOn
                }
                Wake::Asked(Action::ReopenLogs) => {
                    sidecar.reopen_logs();
                    Next::GoOn
                }
                Wake::Reload => {
                    self.reload(sidecar);
                    Next::GoOn
                }
                Wake::Upgrade => {
                    self.upgrade();
                    Next::GoOn
                }
                Wake::Tick => self.tick(sidecar)?,
            };
            if next == Next::End {
                self.drop_successor();
                notify::stopping("closing");
                return Ok(());
            }
        }
    }

    /// The first signal drains, the second ends at once.
    fn end_asked(&mut self, sidecar: &Sidecar) -> Next {
        if self.drain_deadline.is_some() || self.drain_time.is_zero() {
            tracing::info!("ending at once");
            return Next::End;
        }
        self.drop_successor();
        tracing::info!(drain_time = ?self.drain_time, "draining: no new connections; a second signal ends at once");
        notify::stopping("draining");
        sidecar.drain();
        self.drain_deadline = Some(Instant::now() + self.drain_time);
        Next::GoOn
    }

    fn reload(&self, sidecar: &Sidecar) {
        tracing::info!("reloading tokens, certificates of the agent connection and log files");
        // systemd waits for READY after RELOADING; before the first readiness that would be a lie.
        if self.ready {
            notify::reloading();
        }
        sidecar.reload();
        if self.ready {
            notify::ready(&self.told);
        }
    }

    fn upgrade(&mut self) {
        if self.successor.is_some() || self.drain_deadline.is_some() || !self.ready {
            tracing::warn!("not upgrading: this process is not ready yet, is ending, or is being replaced already");
            return;
        }
        match handover::start_successor(std::env::args_os()) {
            Ok(successor) => {
                tracing::info!(pid = successor.pid(), "started the program anew; it takes over when it is ready");
                self.successor = Some((successor, Instant::now() + config::HANDOVER_TIMEOUT));
            }
            Err(error) => {
                tracing::error!(%error, "the program cannot be started anew; this process goes on");
            }
        }
    }

    /// A process that has not taken over yet must not, once this one is told to end.
    fn drop_successor(&mut self) {
        if let Some((successor, _)) = self.successor.take() {
            tracing::warn!(pid = successor.pid(), "ending the new process too: it was not ready yet");
            successor.kill();
        }
    }

    /// Looks after a process that is to take over.
    fn watch_successor(&mut self, sidecar: &Sidecar) {
        if let Some(mut successor) = self.leaving.take() {
            successor.release();
        }
        let Some((mut successor, deadline)) = self.successor.take() else { return };
        if successor.is_ready() {
            tracing::info!(pid = successor.pid(), "the new process serves; this one finishes what it has begun");
            notify::successor(successor.pid());
            sidecar.hand_over();
            self.leaving = Some(successor);
            self.drain_deadline = Some(Instant::now() + config::HANDOVER_DRAIN);
        } else if let Some(status) = successor.ended() {
            tracing::error!(%status, "the new process ended before it was ready; this one goes on");
        } else if Instant::now() >= deadline {
            tracing::error!(timeout = ?config::HANDOVER_TIMEOUT, "the new process is not ready in time and is ended; this one goes on");
            successor.kill();
        } else {
            self.successor = Some((successor, deadline));
        }
    }

    fn tick(&mut self, sidecar: &mut Sidecar) -> Result<Next, AppError> {
        self.watch_successor(sidecar);
        sidecar.take_over_if_released();
        if let Some(error) = sidecar.take_failure() {
            return Err(error);
        }
        if let Some(deadline) = self.drain_deadline {
            let over = Instant::now() >= deadline;
            if over {
                tracing::info!("drain time is over: closing what is left");
            }
            return Ok(if over || sidecar.is_finished() { Next::End } else { Next::GoOn });
        }
        if self.listeners_drained {
            return Ok(Next::GoOn);
        }
        if sidecar.is_finished() {
            return Err(AppError::Internal("a worker ended unasked; the log has its reason".to_owned()));
        }
        self.tell(sidecar);
        Ok(Next::GoOn)
    }

    /// Tells systemd and the log about readiness, once, and about problems as they change.
    fn tell(&mut self, sidecar: &mut Sidecar) {
        let missing = sidecar.missing();
        let text = missing.as_deref().map_or_else(
            || format!("serving {}", services(sidecar)),
            |missing| if self.ready { format!("serving with the last good state: {missing}") } else { missing.to_owned() },
        );
        let newly_ready = missing.is_none() && !self.ready;
        if newly_ready {
            self.ready = true;
            sidecar.set_live();
            sidecar.tell_predecessor();
            notify::ready(&text);
            tracing::info!("ready: {text}");
        } else if text != self.told {
            notify::status(&text);
            tracing::info!("{text}");
        }
        self.told = text;
    }
}

fn services(sidecar: &Sidecar) -> String {
    let status = sidecar.status();
    let names: Vec<&str> = status.services.iter().map(|one| one.service.as_deref().unwrap_or(&one.proxy_id)).collect();
    names.join(", ")
}
