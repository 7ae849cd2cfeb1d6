//! Which process that looks like a part of Airflow is believed to be one.
//!
//! Invariant: a process that only took a part's place, in its cgroup and after it, is not believed. A task's orphan stays in
//! the cgroup of the unit that ran the task, and may give itself any title; but it is always younger than the unit's real
//! process, and not below it. So of two in one cgroup that are not related, only the elder is that part; and beside a part
//! that runs tasks, no later one is any part. Only the cgroup `/`, where a host without systemd has everything, may hold
//! parts of different names.
//!
//! Without cgroup v2 this cannot be told, and every look-alike is believed: the rules' `unit`, `user` and `title` alone decide.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::cgroup::{Hierarchy, members_of};
use super::super::process::{Chain, Host, HostError, Process, ProcessFacts};

/// Processes of one cgroup that are compared.
const ELDERS_MAX: usize = 4_096;
/// The cgroup of whatever nobody put into one.
const SHARED: &str = "/";
/// Verdicts that are remembered; then the list begins anew.
const VERDICTS_MAX: usize = 1_024;

/// A part of Airflow, as the rules name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Its Consul service name.
    pub(crate) name: Arc<str>,
    /// Whether tasks run below it.
    pub(crate) runs_tasks: bool,
}

/// Which part of Airflow a process looks like, by the rules.
pub(crate) type Parts<'a> = dyn Fn(&ProcessFacts) -> Option<Part> + 'a;

/// The highest process of a chain that looks like a part of Airflow.
#[derive(Debug)]
pub(crate) struct Root<'a> {
    pub(crate) facts: &'a ProcessFacts,
    pub(crate) part: Part,
}

/// The highest of these processes which looks like a part that `fits`.
pub(crate) fn highest<'a>(processes: &'a [ProcessFacts], parts: &Parts<'_>, fits: impl Fn(&Part) -> bool) -> Option<Root<'a>> {
    processes.iter().rev().find_map(|facts| parts(facts).filter(&fits).map(|part| Root { facts, part }))
}

/// The verdicts so far.
#[derive(Debug)]
pub(crate) struct Roots {
    hierarchy: Option<Hierarchy>,
    /// By root and by what its chain ends in: the elder, for those not believed.
    verdicts: HashMap<(Process, Process, Arc<str>), Option<Process>>,
}

impl Roots {
    /// `None` without cgroup v2.
    pub(crate) fn new(hierarchy: Option<Hierarchy>) -> Self {
        Self { hierarchy, verdicts: HashMap::new() }
    }

    /// Begins anew.
    pub(crate) fn forget(&mut self) {
        self.verdicts.clear();
    }

    /// The process whose place this root of the chain took, if it did that.
    pub(crate) fn usurped(
        &mut self,
        host: &Host,
        parts: &Parts<'_>,
        chain: &Chain,
        root: &Root<'_>,
    ) -> Result<Option<Process>, HostError> {
        // What the root descends from is as old as its claim: a shell that started two workers vouches for both.
        let claim = chain.top().process;
        let key = (root.facts.process, claim, Arc::clone(&root.part.name));
        if let Some(verdict) = self.verdicts.get(&key) {
            // The elder may have ended since: then the younger one is on its own.
            match *verdict {
                None => return Ok(None),
                Some(elder) if host.is_alive(elder)? => return Ok(Some(elder)),
                Some(_) => {}
            }
        }
        let verdict = self.elder(host, parts, chain, root)?;
        if self.verdicts.len() >= VERDICTS_MAX {
            self.verdicts.clear();
        }
        self.verdicts.insert(key, verdict);
        Ok(verdict)
    }

    /// A process in the root's cgroup that looks like a rival, and began before the root's whole line did.
    fn elder(&self, host: &Host, parts: &Parts<'_>, chain: &Chain, root: &Root<'_>) -> Result<Option<Process>, HostError> {
        let Some(directory) = self.hierarchy.as_ref().and_then(|hierarchy| hierarchy.directory_of(&root.facts.cgroup)) else {
            return Ok(None);
        };
        let is_shared = &*root.facts.cgroup == SHARED;
        let is_rival = |part: Part| part.name == root.part.name || (part.runs_tasks && !is_shared);
        let claim = chain.top().process;
        for pid in members_of(&directory)?.into_iter().take(ELDERS_MAX) {
            let is_older = host.process(pid)?.is_some_and(|process| process.start_ticks < claim.start_ticks);
            let is_related = chain.processes.iter().any(|facts| facts.process.pid == pid);
            if is_older
                && !is_related
                && let Some(facts) = host.facts(pid)?
                && parts(&facts).is_some_and(is_rival)
            {
                return Ok(Some(facts.process));
            }
        }
        Ok(None)
    }
}
