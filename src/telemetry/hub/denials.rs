//! The last denials, each with all that the connection log says of it, to be asked for by id.
//!
//! Invariant: at most [`DENIALS_MAX`] are kept and at most [`LINES_BYTES_MAX`] of text. The oldest makes room, but whoever has
//! a quarter of all makes it among their own: a task that is denied in a loop does not push out the reason of another.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use serde_json::value::RawValue;

use super::callers::Speaker;
use crate::identity::SpiffeId;
use crate::telemetry::denial::DenialId;
use crate::telemetry::record::ConnectionRecord;

/// Denials kept.
pub const DENIALS_MAX: usize = 1_000;
/// Text kept of them; a line of ordinary names has about 1 KiB.
const LINES_BYTES_MAX: usize = 4 << 20;
/// Denials of one source and service before they push out each other only.
const SHARE_MAX: usize = DENIALS_MAX / 4;

/// One denial.
#[derive(Debug)]
pub struct Denial {
    /// The DAG of the caller, where it was a task.
    pub dag: Option<Arc<str>>,
    /// The connection log's line, a JSON object.
    pub line: Box<RawValue>,
    id: Box<str>,
    source: Source,
}

/// Whose denials count together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Source {
    speaker: Option<Speaker>,
    /// The identity of a peer, where it is no caller of this host.
    peer: Option<SpiffeId>,
    service: Arc<str>,
}

/// All that are kept.
#[derive(Debug, Default)]
pub struct Denials {
    /// In the order in which they came.
    kept: BTreeMap<u64, Denial>,
    by_id: HashMap<Box<str>, u64>,
    by_source: HashMap<Source, VecDeque<u64>>,
    bytes: usize,
    next: u64,
}

impl Denials {
    /// Keeps a denied connection's line.
    pub(super) fn keep(&mut self, id: DenialId, record: &ConnectionRecord, line: Box<RawValue>) {
        let caller = record.caller.as_deref();
        let source = Source {
            speaker: caller.map(Speaker::from),
            peer: record.source.clone().filter(|_| caller.is_none()),
            service: Arc::clone(record.upstream.as_ref().unwrap_or(&record.service)),
        };
        let length = line.get().len();
        while self.kept.len() >= DENIALS_MAX || self.bytes + length > LINES_BYTES_MAX && !self.kept.is_empty() {
            self.drop_one(&source);
        }
        let dag = caller.and_then(|caller| caller.task()).map(|task| Arc::clone(&task.dag));
        let id: Box<str> = id.to_string().into();
        self.next += 1;
        self.bytes += length;
        self.by_id.insert(id.clone(), self.next);
        self.by_source.entry(source.clone()).or_default().push_back(self.next);
        self.kept.insert(self.next, Denial { dag, line, id, source });
    }

    /// Makes room for a denial of `newcomer`.
    fn drop_one(&mut self, newcomer: &Source) {
        let own = self.by_source.get(newcomer).filter(|own| own.len() >= SHARE_MAX).and_then(|own| own.front());
        let Some(number) = own.copied().or_else(|| self.kept.keys().next().copied()) else { return };
        let Some(gone) = self.kept.remove(&number) else { return };
        self.bytes -= gone.line.get().len();
        // An id that came again stands for the newer one.
        if self.by_id.get(&gone.id) == Some(&number) {
            self.by_id.remove(&gone.id);
        }
        if let Some(same) = self.by_source.get_mut(&gone.source) {
            // Of one source the oldest always goes first.
            same.pop_front();
            if same.is_empty() {
                self.by_source.remove(&gone.source);
            }
        }
    }

    /// The denial of this name, while it is kept.
    pub fn get(&self, id: &str) -> Option<&Denial> {
        self.kept.get(self.by_id.get(id)?)
    }

    /// All that are kept, the newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Denial> {
        self.kept.values().rev()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::callers::tests::{outbound, task};
    use super::*;
    use crate::telemetry::log;

    fn id(number: u32) -> String {
        DenialId::new(1, 0, number).to_string()
    }

    fn deny(denials: &mut Denials, dag: &str, number: u32) {
        let record = outbound(task(dag, "load", "r", 1), "db", Some(number));
        let line = log::json(&record).expect("a line");
        denials.keep(record.denial.expect("denied"), &record, line);
    }

    #[test]
    fn a_denial_is_found_by_its_id_with_the_logs_own_line() {
        let mut denials = Denials::default();
        deny(&mut denials, "payroll", 7);
        deny(&mut denials, "sales", 8);
        let found = denials.get(&id(7)).expect("kept");
        assert_eq!(found.dag.as_deref(), Some("payroll"));
        let line: serde_json::Value = serde_json::from_str(found.line.get()).expect("JSON");
        assert_eq!((&line["denial"], &line["caller"]["dag"]), (&id(7).into(), &"payroll".into()));
        assert!(denials.get(&id(9)).is_none() && denials.get("../7").is_none());
        let order: Vec<_> = denials.newest().map(|denial| denial.dag.as_deref()).collect();
        assert_eq!(order, [Some("sales"), Some("payroll")]);
    }

    #[test]
    fn a_task_that_is_denied_in_a_loop_hides_nobody_elses_reason() {
        let mut denials = Denials::default();
        deny(&mut denials, "payroll", 1);
        for number in 2..5_000 {
            deny(&mut denials, "loop", number);
        }
        assert_eq!(denials.len(), DENIALS_MAX);
        assert!(denials.get(&id(1)).is_some() && denials.get(&id(2)).is_none() && denials.get(&id(4_999)).is_some());
    }

    #[test]
    fn nothing_grows_beyond_its_bound() {
        let mut denials = Denials::default();
        for number in 0..3_000 {
            deny(&mut denials, &format!("dag{number}"), number);
        }
        assert_eq!((denials.len(), denials.by_id.len(), denials.by_source.len()), (DENIALS_MAX, DENIALS_MAX, DENIALS_MAX));
        assert!(denials.get(&id(1_999)).is_none() && denials.get(&id(2_000)).is_some(), "the oldest went");
        let long = "x".repeat(64 << 10);
        for number in 0..200 {
            deny(&mut denials, &format!("{long}{number}"), number);
        }
        assert!(denials.bytes <= LINES_BYTES_MAX && denials.len() < 200, "{} bytes", denials.bytes);
        let kept: usize = denials.newest().map(|denial| denial.line.get().len()).sum();
        assert_eq!(kept, denials.bytes);
    }

    #[test]
    fn an_id_that_comes_again_stands_for_the_newer_denial() {
        let mut denials = Denials::default();
        deny(&mut denials, "old", 7);
        deny(&mut denials, "new", 7);
        for number in 100..100 + DENIALS_MAX as u32 - 1 {
            deny(&mut denials, &format!("dag{number}"), number);
        }
        assert_eq!(denials.get(&id(7)).expect("kept").dag.as_deref(), Some("new"));
    }
}
