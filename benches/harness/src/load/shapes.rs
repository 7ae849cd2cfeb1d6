//! Which shape runs what, and the steps that all of them share.
//!
//! Invariant: each step counts its own outcome, so that a shape only says what happens when. A shape ends when its last task did,
//! and every task ends: its waits are bounded and its schedule is. Fails only if the timer cannot be made.

mod churn;
mod quiet;
mod steady;

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::cli::{Plan, Shape};
use crate::client::{Client, Sizes};
use crate::pace::{Due, Schedule, Timer, Window};
use crate::pattern::Random;
use crate::record::{Recorder, Report};

/// Between two heartbeats of exec-api.
pub(crate) const HEARTBEAT_S: f64 = 5.0;
/// Of the connections of idle-haul one in so many is not silent.
pub(crate) const IDLE_BUSY_ONE_IN: usize = 10;
/// Connections that are being opened at a time before a run is measured.
const OPENERS: usize = 64;
/// Until the first message is due: long enough to start every task before.
const LEAD_MS: u64 = 20;
/// Between a failed connect and the next try, so that a proxy that is down is not hammered.
const RETRY_PAUSE_MS: u64 = 20;
/// A message that only has to arrive.
const TINY: Sizes = Sizes { request_bytes: 16, response_bytes: 16 };

/// One run under way.
struct Run {
    plan: Plan,
    recorder: Recorder,
    timer: Rc<Timer>,
    connections_begun: Cell<u64>,
}

/// Runs the plan and reports.
pub(crate) async fn run(plan: Plan) -> anyhow::Result<Report> {
    let timer =
        Timer::start().context("cannot make a timerfd: raise `ulimit -n` or allow timerfd_create in the seccomp profile")?;
    let run = Rc::new(Run { plan, recorder: Recorder::new(), timer, connections_begun: Cell::new(0) });
    let start = match run.plan.shape {
        Shape::Request => steady::request(&run).await?,
        Shape::Bulk => steady::bulk(&run).await?,
        Shape::SlowReader => steady::slow_reader(&run).await?,
        Shape::Fairness => steady::fairness(&run).await?,
        Shape::Connect => churn::connect(&run).await?,
        Shape::MetaChurn => churn::meta_churn(&run).await?,
        Shape::ExecApi => churn::exec_api(&run).await?,
        Shape::SqlSmall => churn::sql_small(&run).await?,
        Shape::Storm => churn::storm(&run).await?,
        Shape::IdleHaul => quiet::idle_haul(&run).await?,
        Shape::Hold => quiet::hold(&run).await?,
    };
    Ok(run.recorder.report(run.plan.shape.name(), start.elapsed(), run.plan.rate_per_s()))
}

impl Run {
    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.plan.timeout_s)
    }

    /// The measured time, which begins in a moment.
    fn window(&self) -> Window {
        let start = Instant::now() + Duration::from_millis(LEAD_MS);
        Window { start, end: start + Duration::from_secs_f64(self.plan.seconds), grace: self.timeout() }
    }

    /// The sizes that the command line names.
    fn sizes(&self) -> Sizes {
        Sizes { request_bytes: self.plan.request_bytes, response_bytes: self.plan.response_bytes }
    }

    /// Waits for the next beat: when it was due, and its number.
    async fn due(&self, schedule: &mut Schedule) -> Option<(Instant, u64)> {
        match schedule.next(Instant::now()) {
            Due::At { at, beat } => {
                self.timer.until(at).await;
                Some((at, beat))
            }
            Due::GivenUp(unsent) => {
                self.recorder.given_up(unsent);
                None
            }
            Due::Over => None,
        }
    }

    /// Opens a connection that was due at `at`; `index` chooses the address.
    async fn connect(&self, index: usize, at: Instant) -> Option<Client> {
        let number = self.connections_begun.get();
        self.connections_begun.set(number + 1);
        let seq = Random::new(self.plan.seed ^ (number << 20)).next() as u32;
        let to = self.plan.to[index % self.plan.to.len()];
        match Client::connect(to, seq, self.timeout(), &self.recorder.traffic).await {
            Ok(client) => {
                self.recorder.opened();
                self.recorder.connect.record(at.elapsed());
                Some(client)
            }
            Err(failure) => {
                self.recorder.failure(&failure);
                None
            }
        }
    }

    /// One message: when the first byte of its answer came. After none the connection is finished.
    async fn exchange(&self, client: &mut Client, sizes: Sizes) -> Option<Instant> {
        match client.exchange(sizes).await {
            Ok(first_byte_at) => {
                self.recorder.message();
                Some(first_byte_at)
            }
            Err(failure) => {
                self.recorder.failure(&failure);
                None
            }
        }
    }

    /// Opens a connection and has it answer once, so that it is known to reach through both sidecars.
    async fn open(&self, index: usize, at: Instant) -> Option<Client> {
        let mut client = self.connect(index, at).await?;
        let first_byte_at = self.exchange(&mut client, TINY).await?;
        self.recorder.first_answer.record(first_byte_at.saturating_duration_since(at));
        Some(client)
    }

    async fn pause_after_failure(&self) {
        self.timer.until(Instant::now() + Duration::from_millis(RETRY_PAUSE_MS)).await;
    }
}

/// Opens `count` connections, a few at a time; none where one failed.
async fn open_all(run: &Rc<Run>, count: usize) -> anyhow::Result<Vec<Option<Client>>> {
    let opened = join((0..OPENERS.min(count)).map(|opener| {
        let run = Rc::clone(run);
        async move {
            let mut opened = Vec::new();
            for index in (opener..count).step_by(OPENERS) {
                opened.push((index, run.open(index, Instant::now()).await));
            }
            opened
        }
    }))
    .await?;
    let mut opened: Vec<_> = opened.into_iter().flatten().collect();
    opened.sort_unstable_by_key(|(index, _)| *index);
    Ok(opened.into_iter().map(|(_, client)| client).collect())
}

/// Runs all tasks and waits for the last.
async fn join<T: Future<Output: 'static> + 'static>(tasks: impl Iterator<Item = T>) -> anyhow::Result<Vec<T::Output>> {
    let handles: Vec<_> = tasks.map(tokio_uring::spawn).collect();
    let mut outputs = Vec::with_capacity(handles.len());
    for handle in handles {
        outputs.push(handle.await.context("a task of the load generator panicked: this is a defect of it")?);
    }
    Ok(outputs)
}
