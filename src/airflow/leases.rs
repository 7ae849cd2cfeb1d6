//! Leased addresses: for a process that runs many tasks at once, as Airflow's triggerer does, a loopback address for each task
//! and upstream.
//!
//! Invariant: an address belongs to one task, one upstream and one user at a time; it goes with the process that leased it. It
//! is a bearer's right within that user: no more can be told of a process that speaks for many.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::process::Process;
use super::registry::Claim;
use crate::mesh::caller::{Caller, Lease, Task};

/// Leases at once.
const LEASES_MAX: usize = 8_192;
/// When there are too many, one that was not asked for in this time makes room: the provider package asks every 30 s of use.
const IDLE: Duration = Duration::from_secs(600);
/// Addresses tried before giving up: with the bound above, one in 2,000 is taken.
const TRIES_MAX: usize = 64;

/// Whose an address is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Holder {
    pub(super) process: Process,
    pub(super) uid: u32,
    pub(super) task: Arc<Task>,
    pub(super) upstream: Arc<str>,
}

/// All leases.
#[derive(Debug, Default)]
pub(super) struct Leases {
    by_holder: HashMap<Holder, IpAddr>,
    by_address: HashMap<IpAddr, Entry>,
}

/// A lease on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    address: IpAddr,
    process: Process,
    uid: u32,
    upstream: String,
    claim: Claim,
}

#[derive(Debug)]
struct Entry {
    holder: Holder,
    caller: Arc<Caller>,
    asked: Instant,
}

impl Leases {
    /// The holder's address, the same as long as it lives; `None` when there are too many.
    pub(super) fn lease(&mut self, holder: Holder, caller: Arc<Caller>, now: Instant) -> Option<IpAddr> {
        if let Some(address) = self.by_holder.get(&holder) {
            self.by_address.insert(*address, Entry { holder, caller, asked: now });
            return Some(*address);
        }
        if self.by_address.len() >= LEASES_MAX {
            let (address, entry) = self.by_address.iter().min_by_key(|(_, entry)| entry.asked)?;
            let (address, idle) = (*address, now.duration_since(entry.asked));
            let entry = (idle >= IDLE).then(|| self.by_address.remove(&address)).flatten()?;
            self.by_holder.remove(&entry.holder);
        }
        let address = (0..TRIES_MAX).map(|_| random()).find(|address| !self.by_address.contains_key(address))?;
        self.by_holder.insert(holder.clone(), address);
        self.by_address.insert(address, Entry { holder, caller, asked: now });
        Some(address)
    }

    /// Gives up what a process leased that has ended. Says whether there was anything.
    pub(super) fn end(&mut self, process: Process) -> bool {
        let before = self.by_address.len();
        self.by_address.retain(|_, entry| entry.holder.process != process);
        self.by_holder.retain(|holder, _| holder.process != process);
        self.by_address.len() < before
    }

    /// Whether a process has any.
    pub(super) fn has(&self, process: Process) -> bool {
        self.by_holder.keys().any(|holder| holder.process == process)
    }

    /// Judges every holder again.
    pub(super) fn judge(&mut self, mut judge: impl FnMut(&Holder) -> Arc<Caller>) {
        for entry in self.by_address.values_mut() {
            entry.caller = judge(&entry.holder);
        }
    }

    /// The callers, to keep their certificates warm.
    pub(super) fn callers(&self) -> impl Iterator<Item = &Arc<Caller>> {
        self.by_address.values().map(|entry| &entry.caller)
    }

    /// All of them, for a successor.
    pub(super) fn kept(&self) -> Vec<u8> {
        let kept = self.by_address.iter().map(|(address, entry)| Kept {
            address: *address,
            process: entry.holder.process,
            uid: entry.holder.uid,
            upstream: entry.holder.upstream.to_string(),
            claim: Claim::of(&entry.holder.task),
        });
        serde_json::to_vec(&kept.collect::<Vec<_>>()).unwrap_or_default()
    }

    /// Takes up what a predecessor kept, as far as `alive` holds of its process and nobody has the address.
    pub(super) fn take_up(
        &mut self,
        text: &[u8],
        now: Instant,
        alive: impl Fn(Process) -> bool,
        mut judge: impl FnMut(&Holder) -> Arc<Caller>,
    ) -> Vec<Process> {
        let mut processes = Vec::new();
        for kept in serde_json::from_slice::<Vec<Kept>>(text).unwrap_or_default() {
            let Ok(task) = kept.claim.check() else { continue };
            let holder =
                Holder { process: kept.process, uid: kept.uid, task: Arc::new(task), upstream: kept.upstream.as_str().into() };
            let free = !self.by_holder.contains_key(&holder) && !self.by_address.contains_key(&kept.address);
            if !free || self.by_address.len() >= LEASES_MAX || !kept.address.is_loopback() || !alive(holder.process) {
                continue;
            }
            let caller = judge(&holder);
            processes.push(holder.process);
            self.by_holder.insert(holder.clone(), kept.address);
            self.by_address.insert(kept.address, Entry { holder, caller, asked: now });
        }
        processes
    }

    /// For the workers.
    pub(super) fn table(&self) -> HashMap<IpAddr, Lease> {
        let lease = |entry: &Entry| Lease {
            caller: Arc::clone(&entry.caller),
            upstream: Arc::clone(&entry.holder.upstream),
            uid: entry.holder.uid,
        };
        self.by_address.iter().map(|(address, entry)| (*address, lease(entry))).collect()
    }
}

/// 127.64.0.0 to 127.127.255.255: away from what people write by hand, and from systemd-resolved's 127.0.0.53.
fn random() -> IpAddr {
    let [_, b, c, d] = rand::rng().random::<u32>().to_be_bytes();
    Ipv4Addr::new(127, 64 | (b & 63), c, d).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::caller::{Grant, Tier, Who};

    fn holder(pid: u32, task: &str, upstream: &str) -> Holder {
        let task =
            Task { dag: "d".into(), task: task.into(), run: "r".into(), try_number: 1, map_index: -1, instance: "".into() };
        Holder { process: Process { pid, start_ticks: 1 }, uid: 7, task: Arc::new(task), upstream: upstream.into() }
    }

    fn caller() -> Arc<Caller> {
        let grant = Grant::by_rule("airflow-x".into(), "r".into());
        Arc::new(Caller { who: Who::Component("c".into()), tier: Tier::Lease, verdict: Ok(grant) })
    }

    #[test]
    fn an_address_is_one_tasks_for_one_upstream_until_its_process_ends() {
        let (mut leases, now) = (Leases::default(), Instant::now());
        let mut lease = |holder| leases.lease(holder, caller(), now).expect("an address");
        let first = lease(holder(1, "a", "db"));
        assert_eq!(lease(holder(1, "a", "db")), first, "the same as long as it lives");
        let others = [holder(1, "b", "db"), holder(1, "a", "lake"), holder(2, "a", "db")].map(lease);
        assert!(!others.contains(&first) && first.is_loopback());
        assert!(leases.end(Process { pid: 1, start_ticks: 1 }) && !leases.end(Process { pid: 1, start_ticks: 1 }));
        assert_eq!(leases.table().into_keys().collect::<Vec<_>>(), [others[2]]);
    }

    #[test]
    fn beyond_the_bound_only_an_idle_one_makes_room() {
        let (mut leases, start) = (Leases::default(), Instant::now());
        let mut lease = |number: usize, now| leases.lease(holder(1, &number.to_string(), "db"), caller(), now);
        assert!((0..LEASES_MAX).all(|number| lease(number, start).is_some()));
        assert!(lease(LEASES_MAX, start).is_none());
        let later = start + IDLE;
        assert!((1..LEASES_MAX).all(|number| lease(number, later).is_some()));
        assert!(lease(LEASES_MAX, later).is_some(), "the first was idle");
        assert!(lease(0, later).is_none(), "and has none any more");
        assert_eq!((leases.by_holder.len(), leases.by_address.len()), (LEASES_MAX, LEASES_MAX));
    }

    #[test]
    fn a_successor_takes_up_what_lives() {
        let (mut old, now) = (Leases::default(), Instant::now());
        let addresses = [1, 2].map(|pid| old.lease(holder(pid, "a", "db"), caller(), now).expect("an address"));
        let mut new = Leases::default();
        let processes = new.take_up(&old.kept(), now, |process| process.pid == 1, |_| caller());
        assert_eq!(processes, [Process { pid: 1, start_ticks: 1 }]);
        assert_eq!(new.lease(holder(1, "a", "db"), caller(), now), Some(addresses[0]));
        assert_eq!(new.table().len(), 1);
        assert!(Leases::default().take_up(b"garbage", now, |_| true, |_| caller()).is_empty());
    }
}
