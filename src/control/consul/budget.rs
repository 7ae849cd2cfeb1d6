//! How many connections to the agent this process holds: a blocking query pins one, and the agent allows 200 a client
//! address (`http_max_conns_per_client`), everything on this host counted together.
//!
//! Invariant: places in use never exceed the limit in force, and a lower class never takes a place that a higher class
//! has announced. Who gets no place polls instead. A reset or 429 lowers the limit; it grows back with time.
//!
//! All callers run on the rotation thread; the atomics only make the handles `Send`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};

/// Blocking queries open at once.
pub(crate) const BLOCKING_QUERIES_MAX: usize = 160;
/// Short requests under way at once, blocking queries not counted. With [`IDLE_CONNECTIONS_MAX`] the sum stays below 200.
pub(crate) const SHORT_REQUESTS_MAX: usize = 16;
/// Idle connections kept for short requests.
pub(crate) const IDLE_CONNECTIONS_MAX: usize = 8;
/// Places that definitions leave for endpoints and chains, which are learned of only after them.
const DEFINITION_HEADROOM: usize = 24;
/// The limit never falls below this.
const LIMIT_MIN: usize = 4;
/// Nor do short requests at once.
const SHORT_MIN: usize = 2;
/// At most one lowering in this time: an agent's restart resets every connection at once and must count once.
const LOWER_INTERVAL: Duration = Duration::from_secs(2);
/// How fast the limit grows back.
const GROW_INTERVAL: Duration = Duration::from_secs(5);
const GROW_STEP: usize = 8;

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// The agent renews a leaf only while a query is pending.
    Leaf = 0,
    /// Roots and intentions: changes must arrive within milliseconds.
    Policy = 1,
    /// Endpoints and chains, answered from the agent's memory as well: polling is nearly as good.
    Background = 2,
    /// Registrations: the agent's own, changed seldom, one a service.
    Definition = 3,
}

const CLASSES: [Class; 4] = [Class::Leaf, Class::Policy, Class::Background, Class::Definition];

/// The accounts. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: AtomicUsize,
    short: Semaphore,
    short_total: AtomicUsize,
    wanted: [AtomicUsize; CLASSES.len()],
    used: [AtomicUsize; CLASSES.len()],
    /// Asks one holder of that class to make room.
    yield_one: [Notify; CLASSES.len()],
    moved: watch::Sender<Moved>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Moved {
    lowered: Option<Instant>,
    grown: Option<Instant>,
}

/// A place in use; returned when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    shared: Arc<Shared>,
    class: Class,
}

/// An announced watch; withdrawn when dropped.
#[derive(Debug)]
pub(crate) struct Wanted {
    shared: Arc<Shared>,
    class: Class,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit: AtomicUsize::new(limit),
                short: Semaphore::new(SHORT_REQUESTS_MAX),
                short_total: AtomicUsize::new(SHORT_REQUESTS_MAX),
                wanted: Default::default(),
                used: Default::default(),
                yield_one: Default::default(),
                moved: watch::Sender::new(Moved::default()),
            }),
        }
    }

    /// Announces a watch of `class`, whether or not it ever gets a place.
    pub(crate) fn announce(&self, class: Class) -> Wanted {
        self.shared.wanted[class as usize].fetch_add(1, Ordering::Relaxed);
        Wanted { shared: Arc::clone(&self.shared), class }
    }

    /// A place for one blocking query, or `None`: poll. A refusal asks one lower query to make room.
    pub(crate) fn enter(&self, class: Class) -> Option<Place> {
        let shared = &self.shared;
        let reserved: usize =
            (0..class as usize).map(|higher| load(&shared.wanted[higher]).saturating_sub(load(&shared.used[higher]))).sum();
        let reserved = reserved + if class == Class::Definition { DEFINITION_HEADROOM } else { 0 };
        if shared.in_use() + reserved >= load(&shared.limit) {
            shared.ask_to_yield(class);
            return None;
        }
        shared.used[class as usize].fetch_add(1, Ordering::Relaxed);
        Some(Place { shared: Arc::clone(shared), class })
    }

    /// Waits for the turn of a short request.
    pub(crate) async fn short(&self) -> Option<SemaphorePermit<'_>> {
        // Never closed; a closed one would only lose the bound.
        self.shared.short.acquire().await.ok()
    }

    /// Ends when the holder of a place should give it up; never for leaves and policy.
    pub(crate) async fn asked_to_yield(&self, class: Class) {
        match class {
            Class::Background | Class::Definition => self.shared.yield_one[class as usize].notified().await,
            Class::Leaf | Class::Policy => std::future::pending().await,
        }
    }

    /// The agent reset a new connection or answered 429: hold fewer.
    pub(crate) fn congested(&self, now: Instant) {
        let mut moved = *self.shared.moved.borrow();
        if moved.lowered.is_some_and(|last| now.duration_since(last) < LOWER_INTERVAL) {
            return;
        }
        moved.lowered = Some(now);
        self.shared.moved.send_replace(moved);
        let total = load(&self.shared.short_total);
        let fewer = self.shared.short.forget_permits((total / 2).min(total.saturating_sub(SHORT_MIN)));
        self.shared.short_total.store(total - fewer, Ordering::Relaxed);
        let in_use = self.shared.in_use();
        let before = load(&self.shared.limit);
        let limit = before.min(in_use.max(LIMIT_MIN));
        let lowered = (limit - limit / 8).max(LIMIT_MIN);
        self.shared.limit.store(lowered, Ordering::Relaxed);
        if in_use > lowered {
            self.shared.ask_to_yield(Class::Policy);
        }
        if lowered == before {
            return;
        }
        tracing::warn!(limit = lowered, "the agent refuses connections; fewer blocking queries, the rest is polled");
    }

    /// Lets the limit grow back; call now and then.
    pub(crate) fn grow(&self, now: Instant) {
        let mut moved = *self.shared.moved.borrow();
        let limit = load(&self.shared.limit);
        let recent = |at: Option<Instant>| at.is_some_and(|last| now.duration_since(last) < GROW_INTERVAL);
        let short = load(&self.shared.short_total);
        let full = limit >= BLOCKING_QUERIES_MAX && short >= SHORT_REQUESTS_MAX;
        if full || recent(moved.lowered) || recent(moved.grown) {
            return;
        }
        if short < SHORT_REQUESTS_MAX {
            self.shared.short.add_permits(1);
            self.shared.short_total.store(short + 1, Ordering::Relaxed);
        }
        moved.grown = Some(now);
        self.shared.moved.send_replace(moved);
        self.shared.limit.store((limit + GROW_STEP).min(BLOCKING_QUERIES_MAX), Ordering::Relaxed);
    }

    /// Places in use.
    pub(crate) fn in_use(&self) -> usize {
        self.shared.in_use()
    }
}

impl Shared {
    fn in_use(&self) -> usize {
        self.used.iter().map(load).sum()
    }

    /// Asks one holder of the lowest class in use below `class`.
    fn ask_to_yield(&self, class: Class) {
        let lowest = CLASSES.iter().rev().find(|lower| load(&self.used[**lower as usize]) > 0);
        if let Some(lower) = lowest.filter(|lower| **lower > class && **lower >= Class::Background) {
            self.yield_one[*lower as usize].notify_one();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.used[self.class as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.shared.wanted[self.class as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

fn load(cell: &AtomicUsize) -> usize {
    cell.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 services with three upstreams each: every leaf, every intention list and the roots block, the rest shares
    /// what is left, and everything together stays below the agent's 200.
    #[test]
    fn sixty_four_services_fit() {
        let budget = Budget::new(BLOCKING_QUERIES_MAX);
        let announced: Vec<_> = (0..64)
            .flat_map(|_| [Class::Leaf, Class::Policy, Class::Background, Class::Background, Class::Background])
            .chain([Class::Policy])
            .map(|class| (class, budget.announce(class)))
            .collect();
        // The worst order: background first.
        let mut places = Vec::new();
        for wanted in [Class::Background, Class::Policy, Class::Leaf] {
            places.extend(announced.iter().filter(|(class, _)| *class == wanted).map(|_| budget.enter(wanted)));
        }
        let got = |class| places.iter().flatten().filter(|place| place.class == class).count();
        assert_eq!((got(Class::Leaf), got(Class::Policy)), (64, 65));
        assert_eq!(got(Class::Background), BLOCKING_QUERIES_MAX - 129);
        const { assert!(BLOCKING_QUERIES_MAX + SHORT_REQUESTS_MAX + IDLE_CONNECTIONS_MAX < 200) };
    }

    #[tokio::test]
    async fn a_higher_class_makes_a_background_query_yield() {
        let budget = Budget::new(2);
        let _held = (budget.enter(Class::Background).expect("room"), budget.enter(Class::Background).expect("room"));
        assert!(budget.enter(Class::Definition).is_none());
        let asked = tokio::time::timeout(Duration::from_millis(20), budget.asked_to_yield(Class::Background)).await;
        assert!(asked.is_err(), "a lower class asks nobody");
        let _wanted = budget.announce(Class::Leaf);
        assert!(budget.enter(Class::Leaf).is_none());
        tokio::time::timeout(Duration::from_secs(1), budget.asked_to_yield(Class::Background)).await.expect("asked");
        drop(_held);
        let leaf = budget.enter(Class::Leaf).expect("room now");
        assert!(budget.enter(Class::Background).is_some(), "nothing is reserved once the leaf has its place");
        drop(leaf);
        assert_eq!(budget.in_use(), 0);
    }

    #[test]
    fn resets_lower_the_limit_once_and_it_grows_back() {
        let budget = Budget::new(BLOCKING_QUERIES_MAX);
        let places: Vec<_> = (0..100).map(|_| budget.enter(Class::Background).expect("room")).collect();
        let start = Instant::now();
        for _ in 0..100 {
            budget.congested(start);
        }
        assert_eq!(load(&budget.shared.limit), 88);
        assert!(budget.enter(Class::Leaf).is_none());
        drop(places);
        budget.grow(start + Duration::from_secs(1));
        assert_eq!(load(&budget.shared.limit), 88, "not yet");
        for step in 2..40 {
            budget.grow(start + GROW_INTERVAL * step);
        }
        assert_eq!(load(&budget.shared.limit), BLOCKING_QUERIES_MAX);
        for step in 0..100 {
            budget.congested(start + Duration::from_secs(1_000) + LOWER_INTERVAL * step);
        }
        assert_eq!(load(&budget.shared.limit), LIMIT_MIN);
        assert_eq!(budget.shared.short.available_permits(), SHORT_MIN);
        for step in 0..100 {
            budget.grow(start + Duration::from_secs(10_000) + GROW_INTERVAL * step);
        }
        assert_eq!(budget.shared.short.available_permits(), SHORT_REQUESTS_MAX);
    }
}
