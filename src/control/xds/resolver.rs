//! Host names of STRICT_DNS and LOGICAL_DNS clusters, resolved here because workers never do, and again at the cluster's rate.
//!
//! Invariant: one task a name; a name that cannot be resolved keeps the addresses that it had.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::control::backoff::jittered;
use crate::control::consul::watch::hosts;

/// Answers that may wait to be taken.
const ANSWERS_MAX: usize = 64;
/// Names that are resolved at once; more is a mistake at the other end.
const NAMES_MAX: usize = 1_024;

/// One name's new addresses, or why it has none.
pub(super) type Answer = (String, Result<Vec<IpAddr>, String>);

/// The tasks.
pub(super) struct Resolver {
    tasks: BTreeMap<String, (Duration, AbortHandle)>,
    sender: mpsc::Sender<Answer>,
}

impl Resolver {
    pub(super) fn new() -> (Self, mpsc::Receiver<Answer>) {
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        (Self { tasks: BTreeMap::new(), sender }, answers)
    }

    /// Resolves exactly these names from now on, each as often as asked.
    pub(super) fn follow(&mut self, wanted: &BTreeMap<String, Duration>) {
        self.tasks.retain(|name, (refresh, task)| {
            let keep = wanted.get(name) == Some(refresh);
            if !keep {
                task.abort();
            }
            keep
        });
        for (name, refresh) in wanted.iter().take(NAMES_MAX) {
            self.tasks
                .entry(name.clone())
                .or_insert_with(|| (*refresh, tokio::spawn(watch(name.clone(), *refresh, self.sender.clone())).abort_handle()));
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.tasks.values().for_each(|(_, task)| task.abort());
    }
}

async fn watch(name: String, refresh: Duration, answers: mpsc::Sender<Answer>) {
    let mut last = None;
    loop {
        let found = hosts::resolve(&name).await;
        if last.as_ref() != Some(&found) {
            last = Some(found.clone());
            if answers.send((name.clone(), found)).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(jittered(refresh)).await;
    }
}
