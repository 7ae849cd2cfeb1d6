//! Who of this host talks to which service, added up from the records of closed connections that have a caller.
//!
//! Invariant: the sums balance. Every record with a caller is counted once in the totals, every one of a task once among the
//! tries too; what falls out of a bounded table is counted under its `other`, or among the forgotten. A connection is counted
//! when it closes, with all its bytes: the data plane tells nothing of an open one but what the listener's cells count.
//!
//! Knows no HTTP and no clock: the times are the records' own.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tries::Tries;
use crate::mesh::caller::{Caller, Who};
use crate::telemetry::close::CloseReason;
use crate::telemetry::record::ConnectionRecord;

/// Pairs of speaker and upstream told apart, over the life of the process. They are labels of metrics, so they never go.
const TOTALS_MAX: usize = 1_024;

/// Who speaks, without run and try: few enough for a metric's label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Speaker {
    /// Tasks of this DAG.
    Dag(Arc<str>),
    /// A part of Airflow itself.
    Component(Arc<str>),
    /// Nobody known.
    Unidentified,
    /// Whoever found no room of their own.
    Other,
}

impl Speaker {
    /// What kind of speaker: `dag`, `component`, `unidentified` or `other`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dag(_) => "dag",
            Self::Component(_) => "component",
            Self::Unidentified => "unidentified",
            Self::Other => "other",
        }
    }

    /// The DAG, if it is one.
    pub fn dag(&self) -> Option<&Arc<str>> {
        match self {
            Self::Dag(dag) => Some(dag),
            Self::Component(_) | Self::Unidentified | Self::Other => None,
        }
    }

    /// The component, if it is one.
    pub fn component(&self) -> Option<&Arc<str>> {
        match self {
            Self::Component(name) => Some(name),
            Self::Dag(_) | Self::Unidentified | Self::Other => None,
        }
    }

    /// The metric's label. A DAG's author chooses its name, so those who have none of their own stand under `component`,
    /// where only the host's rules file names things: no DAG can pass for them.
    pub(in crate::telemetry) fn label(&self) -> (&'static str, &str) {
        match self {
            Self::Dag(dag) => ("dag", dag),
            Self::Component(name) => ("component", name),
            Self::Unidentified | Self::Other => ("component", self.kind()),
        }
    }
}

impl From<&Caller> for Speaker {
    fn from(caller: &Caller) -> Self {
        match &caller.who {
            Who::Task(task) => Self::Dag(Arc::clone(&task.dag)),
            Who::Component(name) => Self::Component(Arc::clone(name)),
            Who::Stranger(_) => Self::Unidentified,
        }
    }
}

/// What is added up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections closed.
    pub connections: u64,
    /// Of those, turned away: here, or by the called side.
    pub denied: u64,
    /// Payload bytes from the called service to the caller.
    pub bytes_from_mesh: u64,
    /// Payload bytes from the caller to the called service.
    pub bytes_to_mesh: u64,
}

impl Counts {
    pub(super) fn add(&mut self, record: &ConnectionRecord) {
        let denied = record.denial.is_some() || record.reason == CloseReason::DeniedByPeer;
        self.merge(&Self {
            connections: 1,
            denied: u64::from(denied),
            bytes_from_mesh: record.bytes_from_mesh,
            bytes_to_mesh: record.bytes_to_mesh,
        });
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.connections += other.connections;
        self.denied += other.denied;
        self.bytes_from_mesh = self.bytes_from_mesh.wrapping_add(other.bytes_from_mesh);
        self.bytes_to_mesh = self.bytes_to_mesh.wrapping_add(other.bytes_to_mesh);
    }
}

/// Everybody's sums.
#[derive(Debug, Default)]
pub struct Callers {
    totals: BTreeMap<(Speaker, Arc<str>), Counts>,
    tries: Tries,
}

impl Callers {
    /// Counts a record, if it has a caller.
    pub(super) fn count(&mut self, record: &ConnectionRecord) {
        let Some(caller) = record.caller.as_deref() else { return };
        let upstream = record.upstream.as_ref().unwrap_or(&record.service);
        let mut key = (Speaker::from(caller), Arc::clone(upstream));
        if self.totals.len() >= TOTALS_MAX && !self.totals.contains_key(&key) {
            key = (Speaker::Other, Speaker::Other.kind().into());
        }
        self.totals.entry(key).or_default().add(record);
        self.tries.count(record, caller, upstream);
    }

    /// By speaker and upstream, in a stable order.
    pub fn totals(&self) -> impl Iterator<Item = (&Speaker, &Arc<str>, &Counts)> {
        self.totals.iter().map(|((speaker, upstream), counts)| (speaker, upstream, counts))
    }

    /// By task try.
    pub fn tries(&self) -> &Tries {
        &self.tries
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::mesh::caller::{Grant, Refusal, Stranger, Task, Tier};
    use crate::telemetry::cells::Direction;
    use crate::telemetry::denial::DenialId;
    use crate::telemetry::log::tests::inbound;

    pub(crate) fn task(dag: &str, task: &str, run: &str, try_number: u32) -> Caller {
        let task = Task { dag: dag.into(), task: task.into(), run: run.into(), try_number, map_index: -1, instance: "".into() };
        let grant = Grant::by_rule(format!("airflow-{dag}").into(), "by-dag".into());
        Caller { who: Who::Task(Arc::new(task)), tier: Tier::Cgroup, verdict: Ok(grant) }
    }

    pub(crate) fn component(name: &str) -> Caller {
        let grant = Grant::by_rule(name.into(), name.into());
        Caller { who: Who::Component(name.into()), tier: Tier::Component, verdict: Ok(grant) }
    }

    pub(crate) fn stranger() -> Caller {
        let refusal = Refusal { rule: "default".into(), why: "nobody known".into(), remedy: "register".into() };
        Caller { who: Who::Stranger(Stranger::default()), tier: Tier::Unidentified, verdict: Err(refusal) }
    }

    /// A connection of `caller` to `upstream`, denied when it has an id.
    pub(crate) fn outbound(caller: Caller, upstream: &str, denial: Option<u32>) -> ConnectionRecord {
        ConnectionRecord {
            direction: Direction::Outbound,
            service: "airflow-worker".into(),
            upstream: Some(upstream.into()),
            caller: Some(Arc::new(caller)),
            denial: denial.map(|number| DenialId::new(1, 0, number)),
            reason: if denial.is_some() { CloseReason::CallerDenied } else { CloseReason::Complete },
            decision: None,
            ..inbound(true)
        }
    }

    fn sum<'a>(counts: impl Iterator<Item = &'a Counts>) -> Counts {
        counts.fold(Counts::default(), |mut sum, counts| {
            sum.merge(counts);
            sum
        })
    }

    #[test]
    fn the_tables_balance_with_the_records_seen() {
        let mut callers = Callers::default();
        let (mut all, mut of_tasks) = (Counts::default(), Counts::default());
        for number in 0..40_000_u32 {
            let (dag, run) = (format!("d{}", number % 1_500), format!("r{}", number % 4_003));
            let caller = match number % 7 {
                0 => component("airflow-scheduler"),
                1 => stranger(),
                _ => task(&dag, "load", &run, number % 3),
            };
            let record = ConnectionRecord {
                bytes_from_mesh: u64::from(number),
                reason: if number % 11 == 0 { CloseReason::DeniedByPeer } else { CloseReason::Complete },
                ..outbound(caller, "warehouse", (number % 5 == 0).then_some(number))
            };
            callers.count(&record);
            all.add(&record);
            if record.caller.as_ref().is_some_and(|caller| caller.task().is_some()) {
                of_tasks.add(&record);
            }
        }
        callers.count(&inbound(true));
        assert_eq!(sum(callers.totals().map(|(_, _, counts)| counts)), all, "a record without a caller is not counted");
        let (_, forgotten) = callers.tries().forgotten();
        assert_eq!(sum(callers.tries().iter().map(|(_, seen)| &seen.counts).chain([forgotten])), of_tasks);
        assert!(all.denied > 0 && forgotten.denied > 0);
    }

    #[test]
    fn too_many_speakers_share_one_and_the_known_ones_go_on() {
        let mut callers = Callers::default();
        for number in 0..TOTALS_MAX + 5 {
            callers.count(&outbound(task(&format!("d{number}"), "t", "r", 1), "db", None));
        }
        callers.count(&outbound(task("d0", "t", "r", 1), "db", None));
        assert_eq!(callers.totals().count(), TOTALS_MAX + 1);
        let of = |wanted: &Speaker| callers.totals().find(|(speaker, ..)| *speaker == wanted).expect("there").2.connections;
        assert_eq!((of(&Speaker::Other), of(&Speaker::Dag("d0".into()))), (5, 2));
    }

    #[test]
    fn a_dag_named_like_the_nameless_passes_for_none_of_them() {
        for name in ["other", "unidentified"] {
            let label = Speaker::Dag(name.into());
            assert_eq!(label.label().0, "dag");
        }
        assert_eq!(Speaker::Unidentified.label(), ("component", "unidentified"));
        assert_eq!(Speaker::Other.label(), ("component", "other"));
    }
}
