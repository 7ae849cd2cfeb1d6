//! The one lock around the state, and everything that waits on it: blocking queries, probes, housekeeping.
//!
//! Invariant: the lock is held for one closure and never across an await, so the std mutex is right here; this room runs on
//! no data thread. Whoever changed something wakes every waiter; a waiter looks again and sleeps on if it is not concerned.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use rand::Rng;
use tokio::sync::{Semaphore, watch};

use super::AgentError;
use super::check::{self, Probe};
use super::duration;
use super::state::State;

/// Most blocking queries asleep at once.
pub(super) const WAITING_MAX: usize = 4_096;
/// Longest wait of a blocking query (Consul's).
pub(super) const WAIT_MAX: Duration = Duration::from_secs(600);
/// Wait of a blocking query that names none (Consul's).
pub(super) const WAIT_DEFAULT: Duration = Duration::from_secs(300);
/// Consul spreads the end of a wait over this share of it.
const WAIT_JITTER: u32 = 16;
/// Housekeeping looks at least this often.
const HOUSEKEEPING_MAX: Duration = Duration::from_secs(60);

/// What the tasks of one agent share.
pub(super) struct Shared {
    #[expect(clippy::disallowed_types, reason = "never held over an await, never on a data thread: see the module's invariant")]
    state: std::sync::Mutex<State>,
    changed: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    waiting: Semaphore,
    runtime: tokio::runtime::Handle,
}

/// What a blocking query asks for.
#[derive(Debug, Clone, Default)]
pub(super) struct Wait {
    /// `index=`: answer when the index is higher. 0 answers at once.
    pub(super) index: u64,
    /// `hash=`: answer when the content differs. Empty answers at once.
    pub(super) hash: String,
    /// `wait=`: the longest wait.
    pub(super) most: Duration,
}

/// What a look at the state found.
pub(super) struct Look<R> {
    /// Whether this answers the query.
    pub(super) ready: bool,
    /// The answer, sent when ready or when the wait is over.
    pub(super) value: R,
    /// When to look again even if nothing changes.
    pub(super) again_in: Option<Duration>,
}

impl Wait {
    /// Reads `index`, `wait` and `hash`; the texts of refusals are Consul's.
    pub(super) fn parse(index: Option<&str>, wait: Option<&str>, hash: Option<&str>) -> Result<Self, &'static str> {
        let index = match index {
            None | Some("") => 0,
            Some(text) => text.parse().map_err(|_| "Invalid index")?,
        };
        let most = match wait {
            None | Some("") => Duration::ZERO,
            Some(text) => duration::parse(text).ok_or("Invalid wait time")?,
        };
        let most = if most.is_zero() { WAIT_DEFAULT } else { most.min(WAIT_MAX) };
        Ok(Self { index, hash: hash.unwrap_or_default().to_owned(), most })
    }
}

impl Shared {
    #[expect(clippy::disallowed_types, reason = "see the field")]
    pub(super) fn new(state: State) -> Arc<Self> {
        Arc::new(Self {
            changed: watch::Sender::new(state.index()),
            state: std::sync::Mutex::new(state),
            stopping: watch::Sender::new(false),
            waiting: Semaphore::new(WAITING_MAX),
            runtime: tokio::runtime::Handle::current(),
        })
    }

    /// Looks at the state.
    pub(super) fn read<R>(&self, look: impl FnOnce(&State) -> R) -> R {
        // A panic inside a closure is a bug that was reported; the state is plain data and stays usable.
        look(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the state, starts the probes of new checks and wakes whoever waits.
    pub(super) fn change<R>(self: &Arc<Self>, act: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.index();
        let out = act(&mut state);
        for check in state.checks.values_mut().filter(|check| check.wants_probe()) {
            let task = run_probe(Arc::downgrade(self), check.id.clone(), check.definition.clone());
            check.probe = Some(Probe(self.runtime.spawn(task).abort_handle()));
        }
        let after = state.index();
        drop(state);
        if after != before {
            self.changed.send_replace(after);
        }
        out
    }

    /// Looks until it is ready, the wait is over or the agent stops.
    pub(super) async fn wait<R>(
        self: &Arc<Self>,
        wait: &Wait,
        mut look: impl FnMut(&mut State) -> Result<Look<R>, AgentError>,
    ) -> Result<R, AgentError> {
        let mut changed = self.changed.subscribe();
        let mut stopping = self.stopping.subscribe();
        let deadline = tokio::time::Instant::now() + wait.most + jitter(wait.most);
        let mut permit = None;
        loop {
            let now = tokio::time::Instant::now();
            let found = self.change(&mut look)?;
            if found.ready || now >= deadline || *stopping.borrow() {
                return Ok(found.value);
            }
            if permit.is_none() {
                permit = Some(self.waiting.try_acquire().map_err(|_| AgentError::TooManyWaiting)?);
            }
            let again = found.again_in.map_or(deadline, |again| (now + again).min(deadline));
            tokio::select! {
                _ = changed.changed() => {}
                _ = stopping.changed() => {}
                () = tokio::time::sleep_until(again) => {}
            }
        }
    }

    /// Ends every wait, and the probes with their checks.
    pub(super) fn stop(&self) {
        self.stopping.send_replace(true);
        self.state.lock().unwrap_or_else(PoisonError::into_inner).checks.clear();
    }

    /// Resolves when the agent stops.
    pub(super) async fn stopped(&self) {
        let mut stopping = self.stopping.subscribe();
        // The sender lives in self: waiting for it cannot fail.
        let _ = stopping.wait_for(|stop| *stop).await;
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("index", &*self.changed.borrow()).finish_non_exhaustive()
    }
}

/// Expires TTL checks, reaps critical services and prunes roots until the agent stops.
pub(super) async fn housekeeping(shared: Arc<Shared>) {
    let mut changed = shared.changed.subscribe();
    loop {
        let sleep = shared.change(|state| {
            state.expire(Instant::now());
            state.prune_roots(SystemTime::now());
            let deadline = state.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let root = state.root_prune_in(SystemTime::now());
            [deadline, root, Some(HOUSEKEEPING_MAX)].into_iter().flatten().min().unwrap_or(HOUSEKEEPING_MAX)
        });
        tokio::select! {
            () = tokio::time::sleep(sleep.max(Duration::from_millis(10))) => {}
            _ = changed.changed() => {}
            () = shared.stopped() => return,
        }
    }
}

/// Feeds one check until it, or the agent, goes away.
async fn run_probe(shared: Weak<Shared>, id: String, definition: super::definition::CheckDefinition) {
    let mut ticks = tokio::time::interval(check::interval(&definition));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (health, output) = check::probe(&definition).await;
        let Some(shared) = shared.upgrade() else {
            return;
        };
        shared.change(|state| state.set_health(&id, health, output));
    }
}

fn jitter(wait: Duration) -> Duration {
    (wait / WAIT_JITTER).mul_f64(rand::rng().random_range(0.0..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentSettings;
    use crate::agent::state::Topic;

    fn shared() -> Arc<Shared> {
        Shared::new(State::new(AgentSettings::default(), SystemTime::now()).expect("a state"))
    }

    fn roots(index: u64, most: Duration) -> (Wait, impl FnMut(&mut State) -> Result<Look<u64>, AgentError>) {
        let look = move |state: &mut State| {
            let value = state.index_of(&[Topic::Roots]);
            Ok(Look { ready: index == 0 || value > index, value, again_in: None })
        };
        (Wait { index, most, ..Wait::default() }, look)
    }

    #[tokio::test]
    async fn a_wait_ends_with_a_change_of_its_topic_and_no_other() {
        let shared = shared();
        let waiter = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                let (wait, look) = roots(1, Duration::from_secs(100));
                shared.wait(&wait, look).await
            }
        });
        tokio::time::sleep(Duration::from_millis(30)).await;
        shared.change(|state| state.bump([Topic::Config]));
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(!waiter.is_finished(), "another topic does not end it");
        let index = shared.change(|state| state.bump([Topic::Roots]));
        assert_eq!(waiter.await.expect("joined").expect("answered"), index);
    }

    #[tokio::test]
    async fn a_wait_ends_after_its_time_plus_a_sixteenth_at_most() {
        let shared = shared();
        let start = tokio::time::Instant::now();
        let (wait, look) = roots(99, Duration::from_millis(320));
        assert_eq!(shared.wait(&wait, look).await.expect("answered"), 1, "a future index waits and answers with what there is");
        let took = start.elapsed();
        // The upper bound leaves room for a busy machine; the jitter itself is bounded below.
        assert!((0.32..3.0).contains(&took.as_secs_f64()), "{took:?}");
        assert!((0..100).all(|_| jitter(Duration::from_secs(16)) <= Duration::from_secs(1)));
    }

    #[test]
    fn parameters_are_bounded_and_refused_with_consuls_words() {
        assert_eq!(Wait::parse(Some("x"), None, None).expect_err("refused"), "Invalid index");
        assert_eq!(Wait::parse(None, Some("x"), None).expect_err("refused"), "Invalid wait time");
        assert_eq!(Wait::parse(Some("3"), Some("99h"), None).expect("valid").most, WAIT_MAX);
        assert_eq!(Wait::parse(Some("3"), None, None).expect("valid").most, WAIT_DEFAULT);
    }
}
