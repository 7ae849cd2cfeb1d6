//! The listening sockets that systemd keeps for the next process, looked after as they come and go.
//!
//! Invariant: until a drain begins, what is kept is what listens; from then on nothing changes there, so that the ends of
//! listeners with this process are no ends of their sockets. A failure is told once and costs the next restart only.

use std::collections::BTreeSet;

use crate::sys::DescriptorStore;
use crate::sys::handover::Inherited;

/// What keeps the sockets, if anything does.
#[derive(Debug)]
pub(super) struct Shelf {
    store: Option<DescriptorStore>,
    /// The changes of listeners that it has followed.
    followed: Option<u64>,
    is_closed: bool,
    complained: bool,
}

impl Shelf {
    /// Has it keep no more sockets of an address than there are workers to accept from them: before any worker runs, so that
    /// nothing new comes in at those that will be closed.
    pub(super) fn open(inherited: &Inherited, workers: usize) -> Self {
        let store = DescriptorStore::of_process(inherited.kept().clone());
        let mut shelf = Self { store, followed: None, is_closed: false, complained: false };
        if let Some(store) = shelf.store.as_mut().filter(|_| inherited.is_orphaned()) {
            let surplus = inherited.surplus(workers);
            let result = store.give_up(surplus);
            shelf.complain(result);
        }
        shelf
    }

    /// Whether the process's sockets may outlive it.
    pub(super) fn is_there(&self) -> bool {
        self.store.is_some()
    }

    /// Whether they are known to.
    pub(super) fn is_sure(&self) -> bool {
        self.store.as_ref().is_some_and(DescriptorStore::is_sure)
    }

    /// Names of what is kept.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.store.as_ref().map(|store| store.names().clone()).unwrap_or_default()
    }

    /// Keeps what listens now, after so many changes.
    pub(super) fn follow(&mut self, changes: u64) {
        if self.is_closed || self.followed == Some(changes) {
            return;
        }
        self.followed = Some(changes);
        if let Some(result) = self.store.as_mut().map(DescriptorStore::follow) {
            self.complain(result);
        }
    }

    /// Nothing changes any more: the sockets are somebody else's.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
    }

    fn complain(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::warn!(%error, "the listening sockets cannot be kept for a restart; check NotifyAccess and FileDescriptorStoreMax");
        }
    }
}
