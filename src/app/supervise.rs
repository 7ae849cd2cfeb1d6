//! The main thread of `ringfence connect`: signals, wishes of the admin port, what systemd is told and given to keep.
//!
//! SIGTERM and SIGINT drain, then end; a second one ends at once. SIGHUP reloads, SIGUSR1 opens log files again. SIGUSR2 starts the program's file anew beside
//! this process, with the same listening sockets: when that one serves, this one finishes what it has begun and ends.
//!
//! Where systemd keeps descriptors, the listening sockets outlive the process however it ends, and new connections wait in
//! their queues for the next one. Nothing is left to the next process but sockets: established connections end with their
//! process, because a unit that is stopped must be gone.

use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::shelf::Shelf;
use super::{AppError, Sidecar, notify, process};
use crate::admin::{Action, Drain};
use crate::config::{self, DataPlane};
use crate::sys::handover::{self, Inherited, Successor};

/// How often readiness, ended threads and the drain's progress are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long after it is ready the first answers of all watches are here: then what they alone needed goes as well.
const SETTLED: Duration = Duration::from_secs(5);

/// Runs one sidecar until a signal or the admin port ends it.
pub fn run(settings: config::Sidecar) -> Result<(), AppError> {
    process::prepare()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| AppError::Unavailable(format!("the main thread's runtime cannot start: {error}")))?;
    runtime.block_on(async {
        let plane = settings.plane.clone();
        // Before the first thread: from here on no signal kills a half-started process.
        let mut signals = Signals::new()?;
        let inherited = Inherited::take();
        let shelf = Shelf::open(&inherited, plane.workers);
        let mut sidecar = Sidecar::start_with(settings, inherited)?;
        tracing::info!(admin = %sidecar.admin_address(), pid = std::process::id(), "started");
        let ended = Supervision::new(&plane, shelf).run(&mut sidecar, &mut signals).await;
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
    /// What keeps the listening sockets.
    shelf: Shelf,
    /// READY=1 was sent.
    ready: bool,
    /// When what only the start needed goes for the last time.
    settles: Option<Instant>,
    /// Listeners were closed on the admin port's demand: that they are missing is no fault.
    listeners_drained: bool,
    /// When the admin port's demand to close listeners is due, and whether only the inbound ones.
    close_listeners: Option<(Instant, bool)>,
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
    fn new(plane: &DataPlane, shelf: Shelf) -> Self {
        Self {
            drain_time: if shelf.is_sure() { plane.restart_drain_time } else { plane.drain_time },
            shelf,
            ready: false,
            settles: None,
            listeners_drained: false,
            close_listeners: None,
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
                Wake::Asked(Action::Drain(drain)) => {
                    self.drain_listeners(drain);
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
                Wake::Upgrade | Wake::Asked(Action::Upgrade) => {
                    self.upgrade(sidecar);
                    Next::GoOn
                }
                Wake::Tick => self.tick(sidecar)?,
            };
            if next == Next::End {
                self.drop_successor();
                if self.shelf.is_there() {
                    sidecar.keep_sockets();
                }
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
        if self.shelf.is_there() {
            self.shelf.close();
            sidecar.leave(self.drain_time);
        } else {
            sidecar.drain(self.drain_time);
        }
        self.drain_deadline = Some(Instant::now() + self.drain_time);
        Next::GoOn
    }

    /// Envoy's /drain_listeners: no new connections, the process and what is open stay until they are told to end.
    fn drain_listeners(&mut self, drain: Drain) {
        if drain.skip_exit {
            tracing::info!("listeners go on: skip_exit was asked for, and open connections are never closed by a drain");
            return;
        }
        let wait = if drain.graceful { self.drain_time } else { Duration::ZERO };
        let at = Instant::now() + wait;
        // The wider demand and the earlier time win.
        let (at, inbound_only) = match self.close_listeners {
            Some((before, only)) => (before.min(at), only && drain.inbound_only),
            None => (at, drain.inbound_only),
        };
        tracing::info!(?wait, inbound_only, "listeners will be closed; open connections go on");
        self.close_listeners = Some((at, inbound_only));
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

    fn upgrade(&mut self, sidecar: &Sidecar) {
        sidecar.tell_upgrade(|upgrade| upgrade.wishes += 1);
        let why_not = match (self.ready, self.drain_deadline.is_some(), self.successor.is_some()) {
            (_, true, _) => Some("it is ending, or has been replaced"),
            (false, false, _) => Some("it is not ready itself yet; /healthz says what is missing"),
            (true, false, true) => Some("it is being replaced already"),
            (true, false, false) => None,
        };
        if let Some(why) = why_not {
            tracing::warn!("not upgrading this process: {why}");
            return sidecar.tell_upgrade(|upgrade| upgrade.error = Some(why.to_owned()));
        }
        match handover::start_successor(std::env::args_os(), self.shelf.names()) {
            Ok(successor) => {
                tracing::info!(pid = successor.pid(), "started the program anew; it takes over when it is ready");
                sidecar.tell_upgrade(|upgrade| (upgrade.successor, upgrade.error) = (Some(successor.pid()), None));
                self.successor = Some((successor, Instant::now() + config::HANDOVER_TIMEOUT));
            }
            Err(error) => {
                tracing::error!(%error, "the program cannot be started anew; this process goes on");
                sidecar.tell_upgrade(|upgrade| upgrade.error = Some(format!("the program cannot be started: {error}")));
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
            self.shelf.close();
            sidecar.hand_over();
            self.leaving = Some(successor);
            self.drain_deadline = Some(Instant::now() + config::HANDOVER_DRAIN);
        } else if let Some(status) = successor.ended() {
            tracing::error!(%status, "the new process ended before it was ready; this one goes on");
            let why = format!("the new process ended before it was ready ({status}); the log has its reason");
            sidecar.tell_upgrade(|upgrade| (upgrade.successor, upgrade.error) = (None, Some(why)));
        } else if Instant::now() >= deadline {
            tracing::error!(timeout = ?config::HANDOVER_TIMEOUT, "the new process is not ready in time and is ended; this one goes on");
            let why = format!("the new process was not ready within {:?}; the log has its reason", config::HANDOVER_TIMEOUT);
            sidecar.tell_upgrade(|upgrade| (upgrade.successor, upgrade.error) = (None, Some(why)));
            successor.kill();
        } else {
            self.successor = Some((successor, deadline));
        }
    }

    fn tick(&mut self, sidecar: &mut Sidecar) -> Result<Next, AppError> {
        // A busy process needs its code, and its workers are not to wait for it.
        if self.settles.take_if(|due| *due <= Instant::now()).is_some() && sidecar.is_idle() {
            process::settle();
        }
        self.watch_successor(sidecar);
        sidecar.take_over_if_released();
        if !sidecar.has_predecessor() {
            self.shelf.follow(sidecar.listener_changes());
        }
        if let Some((_, inbound_only)) = self.close_listeners.take_if(|(at, _)| *at <= Instant::now()) {
            self.listeners_drained = true;
            sidecar.close_listeners(inbound_only);
        }
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
            sidecar.settle();
            process::settle();
            self.settles = Some(Instant::now() + SETTLED);
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
