//! The certificate store without locks: one [`Publisher`], one [`Reader`] a worker, acknowledged generations.
//!
//! Invariant: a reader sees whole snapshots only, in growing generations; a generation that every reader has
//! acknowledged is the oldest still in use, so the publisher knows when an old key is gone everywhere.
//!
//! The reader's cost a loop turn is one load of a line that only changes on publication. Taking a new snapshot is one
//! reference-count pair a publication and worker. Knows nothing of who publishes or who is woken: the publisher calls
//! the [`Wake`] it was given.

#[cfg(not(loom))]
pub mod desk;

use std::sync::Arc;

use crate::mesh::Generation;

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Rouses a worker that sleeps in its ring. Called after every publication, from the publisher's thread.
pub trait Wake: Send {
    /// Must not block.
    fn wake(&self);
}

struct Shared<T> {
    slot: slot::Slot<T>,
    generation: Padded,
    acknowledged: Vec<Padded>,
}

/// Alone in its cache lines (two, for the adjacent-line prefetcher).
#[repr(align(128))]
struct Padded(AtomicU64);

/// The one side that publishes.
pub struct Publisher<T> {
    shared: Arc<Shared<T>>,
    wakes: Vec<Box<dyn Wake>>,
    last: u64,
}

/// One worker's side.
pub struct Reader<T> {
    shared: Arc<Shared<T>>,
    current: Arc<T>,
    generation: u64,
    index: usize,
}

/// Makes a store of `readers` readers that start with `initial` at generation 0.
pub fn new<T: Generation>(initial: T, readers: usize) -> (Publisher<T>, Vec<Reader<T>>) {
    let initial = Arc::new(initial);
    let shared = Arc::new(Shared {
        slot: slot::Slot::new(Arc::clone(&initial)),
        generation: Padded(AtomicU64::new(0)),
        acknowledged: (0..readers).map(|_| Padded(AtomicU64::new(0))).collect(),
    });
    let readers = (0..readers)
        .map(|index| Reader { shared: Arc::clone(&shared), current: Arc::clone(&initial), generation: 0, index })
        .collect();
    (Publisher { shared, wakes: Vec::new(), last: 0 }, readers)
}

impl<T: Generation> Publisher<T> {
    /// Adds a worker to rouse on publication.
    pub fn add_wake(&mut self, wake: Box<dyn Wake>) {
        self.wakes.push(wake);
    }

    /// Shares `next` whole and rouses every worker. Returns its generation.
    pub fn publish(&mut self, mut next: T) -> u64 {
        self.last += 1;
        next.set_generation(self.last);
        self.shared.slot.store(Arc::new(next));
        self.shared.generation.0.store(self.last, Ordering::Release);
        for wake in &self.wakes {
            wake.wake();
        }
        self.last
    }

    /// The last generation published.
    pub fn generation(&self) -> u64 {
        self.last
    }

    /// The oldest generation that a worker may still use. Equal to [`Self::generation`] once everybody has moved on.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.iter().map(|cell| cell.0.load(Ordering::Acquire)).min().unwrap_or(self.last)
    }

    /// The published value, for the admin side.
    pub fn current(&self) -> Arc<T> {
        self.shared.slot.load()
    }

    /// A read-only view for threads that are no workers: it acknowledges nothing.
    pub fn viewer(&self) -> Viewer<T> {
        Viewer { shared: Arc::clone(&self.shared) }
    }
}

/// Looks at the published value without taking part in acknowledgement.
pub struct Viewer<T> {
    shared: Arc<Shared<T>>,
}

impl<T> Viewer<T> {
    /// The published value.
    pub fn current(&self) -> Arc<T> {
        self.shared.slot.load()
    }

    /// The oldest generation that a worker still uses.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.iter().map(|cell| cell.0.load(Ordering::Acquire)).min().unwrap_or(0)
    }
}

impl<T> Clone for Viewer<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Reader<T> {
    /// The snapshot to use this turn.
    pub fn current(&self) -> &Arc<T> {
        &self.current
    }

    /// Takes the newest snapshot if there is a newer one, and returns the one it replaces. Call once a loop turn.
    ///
    /// The old one is acknowledged only by [`Self::acknowledge`], when the worker holds nothing of it any more.
    pub fn refresh(&mut self) -> Option<Arc<T>> {
        let published = self.shared.generation.0.load(Ordering::Acquire);
        if published == self.generation {
            return None;
        }
        // The slot may already be newer than `published`; the next turn then refreshes once more to the same value.
        let next = self.shared.slot.load();
        self.generation = published;
        Some(std::mem::replace(&mut self.current, next))
    }

    /// Tells the publisher that this worker uses nothing older than what [`Self::refresh`] last gave it.
    pub fn acknowledge(&self) {
        self.shared.acknowledged[self.index].0.store(self.generation, Ordering::Release);
    }
}

#[cfg(not(loom))]
mod slot {
    use std::sync::Arc;

    /// `arc-swap` keeps the hazard handling out of this crate.
    pub(super) struct Slot<T>(arc_swap::ArcSwap<T>);

    impl<T> Slot<T> {
        pub(super) fn new(value: Arc<T>) -> Self {
            Self(arc_swap::ArcSwap::new(value))
        }
        pub(super) fn store(&self, value: Arc<T>) {
            self.0.store(value);
        }
        pub(super) fn load(&self) -> Arc<T> {
            self.0.load_full()
        }
    }
}

#[cfg(loom)]
mod slot {
    use std::sync::Arc;

    /// loom cannot look into `arc-swap`; an atomic slot with its contract stands in, and what is checked is the protocol
    /// built on it: generation, refresh, acknowledge.
    pub(super) struct Slot<T>(loom::sync::Mutex<Arc<T>>);

    impl<T> Slot<T> {
        pub(super) fn new(value: Arc<T>) -> Self {
            Self(loom::sync::Mutex::new(value))
        }
        pub(super) fn store(&self, value: Arc<T>) {
            *self.0.lock().expect("loom lock") = value;
        }
        pub(super) fn load(&self) -> Arc<T> {
            Arc::clone(&self.0.lock().expect("loom lock"))
        }
    }
}

impl<T> std::fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("generation", &self.last).finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for Reader<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for Viewer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Viewer").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Value {
        generation: u64,
        twice: u64,
    }

    impl Generation for Value {
        fn set_generation(&mut self, generation: u64) {
            self.generation = generation;
            self.twice = generation * 2;
        }
    }

    #[cfg(not(loom))]
    #[test]
    fn readers_move_on_and_the_publisher_knows() {
        let (mut publisher, mut readers) = new(Value { generation: 0, twice: 0 }, 2);
        assert_eq!(publisher.publish(Value { generation: 0, twice: 0 }), 1);
        assert_eq!(publisher.acknowledged(), 0);
        for reader in &mut readers {
            assert_eq!(reader.refresh().map(|old| old.generation), Some(0));
            assert!(reader.refresh().is_none(), "nothing newer");
            assert_eq!(reader.current().generation, 1);
            reader.acknowledge();
        }
        assert_eq!(publisher.acknowledged(), 1);
    }

    /// One publisher, two workers, three generations: no mix is ever read, generations grow, and an acknowledged
    /// generation is never in use again. Run with `RUSTFLAGS="--cfg loom"`.
    #[cfg(loom)]
    #[test]
    fn loom_no_reader_sees_a_mix_or_goes_back() {
        loom::model(|| {
            let (mut publisher, readers) = new(Value { generation: 0, twice: 0 }, 2);
            let threads: Vec<_> = readers
                .into_iter()
                .map(|mut reader| {
                    loom::thread::spawn(move || {
                        for _ in 0..2 {
                            let before = reader.current().generation;
                            reader.refresh();
                            let now = reader.current();
                            assert_eq!(now.twice, now.generation * 2);
                            assert!(now.generation >= before);
                            assert!(now.generation >= reader.generation);
                            reader.acknowledge();
                        }
                        reader
                    })
                })
                .collect();
            for _ in 0..2 {
                publisher.publish(Value { generation: 0, twice: 0 });
                assert!(publisher.acknowledged() <= publisher.generation());
            }
            for thread in threads {
                let mut reader = thread.join().expect("reader thread");
                reader.refresh();
                reader.acknowledge();
                assert_eq!(reader.current().generation, 2);
            }
            assert_eq!(publisher.acknowledged(), 2);
        });
    }
}
