//! The slow path of "who is this?": a local connection that the table of cgroups does not answer, by the processes that hold
//! its socket and their parents.
//!
//! Invariant: all holders that are found must be the same task or the same part of Airflow, or the connection is nobody's.
//! Being a part of Airflow is the weaker claim: it needs a whole line of parents without a task or a task's supervisor in it.
//! A question costs a bounded search, and each user has only so many a second that lead to nobody.
//!
//! Knows no rule: an attribution is who it is, and the rules say what follows.

mod unattributed;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::cgroup::{Cgroup, Hierarchy};
use super::process::{CANDIDATES_MAX, Chain, Host, Process, ProcessFacts};
use super::registry::{Membership, Parts, Rates, Registration, Registry, Role, Roots, TitledTask, highest, role};
use crate::mesh::caller::{Stranger, Task, Tier, Who};
use crate::store::desk::Origin;

pub(crate) use unattributed::Unattributed;

/// Searches for one user's sockets a second.
pub(crate) const SEARCHES_A_SECOND: f64 = 50.0;
/// And at once.
pub(crate) const SEARCHES_BURST: f64 = 100.0;
/// What a search through all processes of the user costs, in searches through the likely ones.
pub(crate) const WIDE_SEARCH_COST: f64 = 10.0;
/// Processes of Airflow's own that were met last and are looked at first.
const RECENT_MAX: usize = 64;
/// Characters of a stranger's command that are told.
const COMMAND_SHOWN: usize = 256;
/// Characters of its parents' names.
const ANCESTRY_SHOWN: usize = 256;

/// What a question is answered from.
#[derive(Clone, Copy)]
pub(crate) struct Scene<'a> {
    /// The host's processes.
    pub(crate) host: &'a Host,
    /// The tasks.
    pub(crate) registry: &'a Registry,
    /// Which part of Airflow a process looks like.
    pub(crate) parts: &'a Parts<'a>,
    /// The cgroups of the parts' units.
    pub(crate) units: &'a [Cgroup],
    /// Whether the title of an Airflow 2 supervisor is believed.
    pub(crate) accept_titles: bool,
}

/// Who it is, and how that is known.
#[derive(Debug)]
pub(crate) struct Attributed {
    /// Who.
    pub(crate) who: Who,
    /// How.
    pub(crate) tier: Tier,
    /// The registration, where there is one. It has the user that counts.
    pub(crate) registration: Option<Arc<Registration>>,
    /// Why it is nobody known.
    pub(crate) why: Option<Unattributed>,
}

/// Whom one holder speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Speaker {
    Task(Arc<Registration>),
    Part(Arc<str>),
    Titled(TitledTask),
}

/// Answers the questions, and remembers what makes the next answer cheap.
#[derive(Debug)]
pub(crate) struct Attributor {
    searches: Rates,
    /// Taken for the question under way.
    spent: f64,
    roots: Roots,
    recent: VecDeque<Process>,
}

impl Attributor {
    /// `None` without cgroup v2.
    pub(crate) fn new(hierarchy: Option<Hierarchy>) -> Self {
        let searches = Rates::new(SEARCHES_A_SECOND, SEARCHES_BURST);
        Self { searches, spent: 0.0, roots: Roots::new(hierarchy), recent: VecDeque::new() }
    }

    /// Who opened the connection from this origin.
    pub(crate) fn attribute(&mut self, scene: Scene<'_>, origin: &Origin, now: Instant) -> Attributed {
        if let Some(registration) = scene.registry.by_cgroup(origin.cgroup) {
            return task(Arc::clone(registration), Tier::Cgroup);
        }
        self.spent = 0.0;
        let chains = match self.holders(scene, origin, now) {
            Ok(chains) => chains,
            Err(why) => return stranger(origin, None, why),
        };
        let speaker = self.speaker(scene, &chains);
        if speaker.is_ok() {
            // The bound is on what leads nowhere: a storm of tasks has as many supervisors, each with a connection of its own.
            self.searches.give_back(origin.uid, self.spent, now);
        }
        match speaker {
            Ok(Speaker::Task(registration)) => task(registration, Tier::Ancestor),
            Ok(Speaker::Part(name)) => {
                self.remember(&chains);
                Attributed { who: Who::Component(name), tier: Tier::Component, registration: None, why: None }
            }
            Ok(Speaker::Titled(titled)) => {
                let who = Who::Task(Arc::new(titled.into()));
                Attributed { who, tier: Tier::Title, registration: None, why: None }
            }
            Err(why) => stranger(origin, chains.first(), why),
        }
    }

    /// Forgets which processes were believed to be parts of Airflow.
    pub(crate) fn forget_roots(&mut self) {
        self.roots.forget();
    }

    /// The one whom all holders speak for.
    fn speaker(&mut self, scene: Scene<'_>, chains: &[Chain]) -> Result<Speaker, Unattributed> {
        let mut speakers = chains.iter().map(|chain| self.speaks_for(scene, chain));
        let first = speakers.next().unwrap_or(Err(Unattributed::Gone))?;
        for other in speakers {
            if !other.is_ok_and(|other| other == first) {
                return Err(Unattributed::Several);
            }
        }
        Ok(first)
    }

    /// Whom this holder speaks for.
    fn speaks_for(&mut self, scene: Scene<'_>, chain: &Chain) -> Result<Speaker, Unattributed> {
        match scene.registry.member(chain) {
            Membership::Of(registration) => return Ok(Speaker::Task(registration)),
            Membership::Forgotten(process) => return Err(Unattributed::Forgotten(process)),
            Membership::None => {}
        }
        if !chain.complete {
            return Err(Unattributed::Lineage);
        }
        if is_of_a_task(chain) {
            return self.titled(scene, chain);
        }
        let Some(root) = highest(&chain.processes, scene.parts, |_| true) else { return Err(Unattributed::Nobody) };
        match self.roots.usurped(scene.host, scene.parts, chain, &root)? {
            Some(elder) => Err(Unattributed::Usurped { elder, part: root.part.name }),
            None => Ok(Speaker::Part(root.part.name)),
        }
    }

    /// The task that the highest title of Airflow 2 names: what a task forges stands below that.
    fn titled(&mut self, scene: Scene<'_>, chain: &Chain) -> Result<Speaker, Unattributed> {
        if !scene.accept_titles {
            return Err(Unattributed::Unregistered);
        }
        let found = chain.processes.iter().enumerate().rev().find_map(|(at, facts)| Some((at, titled_task(facts)?)));
        let (at, titled) = found.ok_or(Unattributed::Unregistered)?;
        let above = &chain.processes[at + 1..];
        let root = highest(above, scene.parts, |part| part.runs_tasks).ok_or(Unattributed::Nobody)?;
        match self.roots.usurped(scene.host, scene.parts, chain, &root)? {
            Some(elder) => Err(Unattributed::Usurped { elder, part: root.part.name }),
            None => Ok(Speaker::Titled(titled)),
        }
    }

    /// The processes that hold the socket, with their parents.
    fn holders(&mut self, scene: Scene<'_>, origin: &Origin, now: Instant) -> Result<Vec<Chain>, Unattributed> {
        if let Some(pid) = origin.pid {
            self.pay(origin, 1.0, now)?;
            // The number was the client's when it connected; another user's process has only been given it since.
            let chain = scene.host.chain(pid)?.filter(|chain| chain.own().uid == origin.uid);
            return chain.map(|chain| vec![chain]).ok_or(Unattributed::Gone);
        }
        if origin.inode == 0 {
            return Err(Unattributed::Gone);
        }
        self.pay(origin, 1.0, now)?;
        let likely = self.likely(scene, origin);
        // What could not all be searched may still be found among all of the user's.
        let chains = match self.search(scene, origin, &likely) {
            Err(Unattributed::TooLarge) => Vec::new(),
            found => found?,
        };
        if !chains.is_empty() {
            return Ok(chains);
        }
        self.pay(origin, WIDE_SEARCH_COST, now)?;
        let mut others = scene.host.of_user(origin.uid)?;
        others.retain(|pid| !likely.contains(pid));
        let chains = self.search(scene, origin, &others)?;
        if chains.is_empty() { Err(Unattributed::Gone) } else { Ok(chains) }
    }

    /// Takes what a search costs, before any of it is done.
    fn pay(&mut self, origin: &Origin, cost: f64, now: Instant) -> Result<(), Unattributed> {
        if !self.searches.take(origin.uid, cost, now) {
            return Err(Unattributed::TooMany);
        }
        self.spent += cost;
        Ok(())
    }

    fn search(&self, scene: Scene<'_>, origin: &Origin, candidates: &[u32]) -> Result<Vec<Chain>, Unattributed> {
        let holders = scene.host.holders(origin.inode, candidates);
        let mut chains = Vec::new();
        for holder in &holders.found {
            // A number that was given out again meanwhile has other parents.
            if let Some(chain) = scene.host.chain(holder.pid)?
                && chain.own().process == *holder
            {
                chains.push(chain);
            }
        }
        if chains.is_empty() && holders.unreadable > 0 {
            return Err(Unattributed::Unreadable { processes: holders.unreadable });
        }
        if chains.is_empty() && holders.cut {
            return Err(Unattributed::TooLarge);
        }
        Ok(chains)
    }

    /// The processes that may well hold a socket of this origin, the likeliest first.
    fn likely(&self, scene: Scene<'_>, origin: &Origin) -> Vec<u32> {
        let mut pids: Vec<u32> = self.recent.iter().map(|process| process.pid).collect();
        for registration in scene.registry.registrations().filter(|registration| registration.uid == origin.uid) {
            match &registration.cgroup {
                Some(cgroup) => pids.extend(cgroup.members().unwrap_or_default()),
                None => pids.extend(scene.host.descendants(&[registration.process.pid])),
            }
            if pids.len() >= CANDIDATES_MAX {
                break;
            }
        }
        pids.extend(scene.units.iter().flat_map(|unit| unit.members().unwrap_or_default()));
        let mut seen = std::collections::HashSet::new();
        pids.retain(|pid| seen.insert(*pid));
        pids.truncate(CANDIDATES_MAX);
        pids
    }

    fn remember(&mut self, chains: &[Chain]) {
        for process in chains.iter().map(|chain| chain.own().process) {
            self.recent.retain(|known| *known != process);
            self.recent.push_front(process);
        }
        self.recent.truncate(RECENT_MAX);
    }
}

/// Whether a process runs a task, or stands below one that supervises tasks. A supervisor itself, where no author's code
/// runs in it, is a part of Airflow: its connections are those of the worker.
fn is_of_a_task(chain: &Chain) -> bool {
    let own = matches!(role(&chain.own().title), Some(Role::Runner | Role::Supervisor2(_)));
    let is_above = |facts: &ProcessFacts| !matches!(role(&facts.title), None | Some(Role::Parser));
    own || chain.ancestors().iter().any(is_above)
}

fn titled_task(facts: &ProcessFacts) -> Option<TitledTask> {
    match role(&facts.title)? {
        Role::Supervisor2(titled) | Role::Slot(titled) => titled,
        Role::Supervisor(_) | Role::Pool | Role::Runner | Role::Parser => None,
    }
}

impl From<TitledTask> for Task {
    /// The title tells neither the try nor a uuid.
    fn from(titled: TitledTask) -> Self {
        let TitledTask { dag, task, run, map_index } = titled;
        Self { dag: dag.into(), task: task.into(), run: run.into(), try_number: 0, map_index, instance: "".into() }
    }
}

fn task(registration: Arc<Registration>, tier: Tier) -> Attributed {
    let who = Who::Task(Arc::clone(&registration.task));
    Attributed { who, tier, registration: Some(registration), why: None }
}

fn stranger(origin: &Origin, chain: Option<&Chain>, why: Unattributed) -> Attributed {
    let cut = |text: &str, max| text.chars().take(max).collect::<String>().into_boxed_str();
    let stranger = Stranger {
        uid: Some(origin.uid),
        pid: chain.map(|chain| chain.own().process.pid).or(origin.pid),
        command: chain.map(|chain| cut(&chain.own().title, COMMAND_SHOWN)).unwrap_or_default(),
        ancestry: chain.map(|chain| cut(&chain.ancestry(), ANCESTRY_SHOWN)).unwrap_or_default(),
    };
    Attributed { who: Who::Stranger(stranger), tier: Tier::Unidentified, registration: None, why: Some(why) }
}

impl std::fmt::Debug for Scene<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scene").field("units", &self.units).field("accept_titles", &self.accept_titles).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
