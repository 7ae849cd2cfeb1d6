//! Which try of which task talked to which service, as which identity.
//!
//! Invariant: at most [`TRIES_MAX`] rows; the one unseen longest makes room, and its sums are added to the forgotten ones, so
//! nothing that was counted is lost. Runs and tries are without end: they are for a person to look at, never for labels.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use super::callers::Counts;
use crate::mesh::caller::{Caller, Task, Who};
use crate::telemetry::denial::DenialId;
use crate::telemetry::record::ConnectionRecord;

/// Rows kept.
const TRIES_MAX: usize = 2_048;

/// What rows are told apart by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Try {
    /// The task instance's try.
    pub task: Arc<Task>,
    /// What it spoke as; `None` when the rules gave it nothing.
    pub identity: Option<Arc<str>>,
    /// Whom it called.
    pub upstream: Arc<str>,
}

/// What was seen of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// When its first connection was opened.
    pub first: SystemTime,
    /// When its last one closed.
    pub last: SystemTime,
    /// Its sums.
    pub counts: Counts,
    /// The last time that it was turned away here.
    pub last_denial: Option<DenialId>,
    /// The turn in which it was last counted.
    turn: u64,
}

/// The rows.
#[derive(Debug, Default)]
pub struct Tries {
    rows: HashMap<Try, Seen>,
    /// By the turn in which each was last counted.
    order: BTreeMap<u64, Try>,
    turn: u64,
    forgotten: (u64, Counts),
}

impl Tries {
    pub(super) fn count(&mut self, record: &ConnectionRecord, caller: &Caller, upstream: &Arc<str>) {
        let Who::Task(task) = &caller.who else { return };
        let identity = caller.verdict.as_ref().ok().map(|grant| Arc::clone(grant.identity()));
        let key = Try { task: Arc::clone(task), identity, upstream: Arc::clone(upstream) };
        let end = record.start.checked_add(record.total).unwrap_or(record.start);
        if !self.rows.contains_key(&key) {
            self.make_room();
        }
        self.turn += 1;
        let row = self.rows.entry(key.clone()).or_insert_with(|| Seen {
            first: record.start,
            last: end,
            counts: Counts::default(),
            last_denial: None,
            turn: self.turn,
        });
        row.first = row.first.min(record.start);
        row.last = row.last.max(end);
        row.counts.add(record);
        row.last_denial = record.denial.or(row.last_denial);
        self.order.remove(&row.turn);
        row.turn = self.turn;
        self.order.insert(self.turn, key);
    }

    fn make_room(&mut self) {
        while self.rows.len() >= TRIES_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            if let Some(row) = self.rows.remove(&oldest) {
                self.forgotten.0 += 1;
                self.forgotten.1.merge(&row.counts);
            }
        }
    }

    /// The rows, the one counted last first.
    pub fn iter(&self) -> impl Iterator<Item = (&Try, &Seen)> {
        self.order.values().rev().filter_map(|key| Some((key, self.rows.get(key)?)))
    }

    /// How many rows made room for others, and their sums.
    pub fn forgotten(&self) -> (u64, &Counts) {
        (self.forgotten.0, &self.forgotten.1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::callers::tests::{component, outbound, task};
    use super::*;

    fn count(tries: &mut Tries, record: &ConnectionRecord) {
        let (caller, upstream) = (record.caller.as_deref().expect("a caller"), record.upstream.as_ref().expect("one"));
        tries.count(record, caller, upstream);
    }

    #[test]
    fn a_try_is_one_row_with_its_span_and_its_last_denial() {
        let mut tries = Tries::default();
        let first = outbound(task("payroll", "load", "r1", 1), "db", Some(7));
        let later = ConnectionRecord {
            start: first.start + Duration::from_secs(60),
            ..outbound(task("payroll", "load", "r1", 1), "db", None)
        };
        count(&mut tries, &later);
        count(&mut tries, &first);
        for other in [task("payroll", "load", "r1", 2), task("payroll", "load", "r2", 1)] {
            count(&mut tries, &outbound(other, "db", None));
        }
        count(&mut tries, &outbound(task("payroll", "load", "r1", 1), "cache", None));
        count(&mut tries, &outbound(component("airflow-scheduler"), "db", None));
        assert_eq!(tries.iter().count(), 4, "a component is no task");
        let (key, row) = tries.iter().last().expect("the first one");
        assert_eq!((&*key.task.run, key.task.try_number, key.identity.as_deref()), ("r1", 1, Some("airflow-payroll")));
        assert_eq!((row.first, row.last), (first.start, later.start + later.total));
        assert_eq!((row.counts.connections, row.counts.denied, row.last_denial), (2, 1, first.denial));
    }

    #[test]
    fn the_one_unseen_longest_makes_room() {
        let mut tries = Tries::default();
        let nth = |number: usize| outbound(task("d", "t", &format!("r{number}"), 1), "db", None);
        for number in 0..TRIES_MAX {
            count(&mut tries, &nth(number));
        }
        count(&mut tries, &nth(0));
        count(&mut tries, &nth(TRIES_MAX));
        let runs: Vec<&str> = tries.iter().map(|(key, _)| &*key.task.run).collect();
        assert_eq!(runs.len(), TRIES_MAX);
        assert!(runs.contains(&"r0") && !runs.contains(&"r1"), "r1 was unseen longest");
        assert_eq!((tries.forgotten().0, tries.forgotten().1.connections, tries.order.len()), (1, 1, TRIES_MAX));
    }
}
