//! Everything that the airflow thread knows, and what it does with it: registrations become callers, callers a table for the
//! workers, questions answers.
//!
//! Invariant: a caller's verdict is always that of the rules in force; a task's caller goes with the task. Rules and catalog
//! are taken over whole or not at all. Knows no socket and no worker but their desks.

mod answers;
mod files;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attribution::{Attributed, Attributor, Scene, Unattributed};
use super::catalog::Catalog;
use super::cgroup::{self, Cgroup, Hierarchy, Place, Setting};
use super::leases::{self, Leases};
use super::process::{Host, Process, ProcessFacts, Watch};
use super::registry::{self, Membership, Part, Registration, Registry};
use super::rules::{self, CgroupChoice, Component, Facts, Names};
use super::{Settings, Wish};
use crate::mesh::Snapshot;
use crate::mesh::caller::{Caller, Callers, Grant, Refusal, Stranger, Task, Tier, Who};
use crate::store::desk::{Answer, Desk, Origin, Question};
use crate::store::{Publisher, Viewer};

use files::{InForce, Loaded, Stamp};

/// How often the certificates of those who live are wished for again: well within the time that keeps them from making room.
const WARM_INTERVAL: Duration = Duration::from_secs(20);

/// How soon a cgroup that could not be watched, or was joined again, is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// What is remembered, beside the registration socket.
const TASKS: &str = "tasks.json";
const LEASES: &str = "leases.json";
/// How long leases that changed may be known to this process alone: many change at once.
const KEEP_DELAY: Duration = Duration::from_millis(100);
/// Questions of a worker that are answered before anything else has its turn.
const ANSWERS_IN_A_ROW_MAX: usize = 64;
/// What to do about a caller whom nobody knows.
const NOBODY_REMEDY: &str = "for a task: install airflow-provider-ringfence where Airflow runs (`airflow mesh doctor` says what is \
                             missing); for a part of Airflow: add a [[component]] that matches it to the rules";

/// The one office of the process.
pub(super) struct Office {
    rules: InForce,
    catalog: Loaded<Catalog>,
    names: Names,
    host: Host,
    /// What is remembered of tasks and leases lies beside it.
    socket: PathBuf,
    /// Another process still has the tasks: what is remembered is read and not written.
    waits: bool,
    leases_changed: bool,
    registry: Registry,
    attributor: Attributor,
    hierarchy: Option<Hierarchy>,
    /// The cgroups of the components' units, looked up with every tick: a unit's comes and goes with it.
    units: Vec<Cgroup>,
    callers: HashMap<Process, Arc<Caller>>,
    leases: Leases,
    /// Where the workers listen for leased addresses: as at the start.
    lease_port: Option<u16>,
    /// Components that have called, with the identity that they speak as.
    components: HashMap<Arc<str>, Arc<Caller>>,
    publisher: Publisher<Callers>,
    viewer: Viewer<Snapshot>,
    admin: SocketAddr,
    wish: Wish,
    warm_at: Instant,
    /// What watches the ends of tasks finds the office by.
    myself: Weak<RefCell<Self>>,
}

impl Office {
    /// Opens it, with the tasks that an earlier run left.
    pub(super) fn open(context: Opening) -> Rc<RefCell<Self>> {
        let Opening { settings, publisher, viewer, admin, wish, waits } = context;
        let Settings { path, file } = settings;
        let stamp = Stamp::of(&path);
        for warning in &file.warnings {
            tracing::warn!(rules = %path.display(), "{warning}");
        }
        let host = Host::default();
        let hierarchy = Hierarchy::find(&host).unwrap_or_else(|error| {
            tracing::warn!(%error, "cgroups cannot be looked at");
            None
        });
        let place = place(&file.settings.cgroup, &host, hierarchy.as_ref());
        let mut registry = Registry::new(place, hierarchy.clone());
        let socket = file.settings.socket.clone();
        if waits {
            preview(&mut registry, &host, &socket);
        } else {
            recover(&mut registry, &host, &socket);
        }
        let lease_port = file.settings.lease_port;
        let catalog = Loaded { path: file.settings.catalog.clone(), stamp: None, value: Catalog::default() };
        let rules = InForce { path, stamp, settings: file.settings, components: file.components, rules: file.rules };
        let office = Rc::new(RefCell::new(Self {
            rules,
            catalog,
            names: Names::default(),
            host,
            socket,
            waits,
            leases_changed: false,
            registry,
            attributor: Attributor::new(hierarchy.clone()),
            hierarchy,
            units: Vec::new(),
            callers: HashMap::new(),
            leases: Leases::default(),
            lease_port,
            components: HashMap::new(),
            publisher,
            viewer,
            admin,
            wish,
            warm_at: Instant::now(),
            myself: Weak::new(),
        }));
        let mut open = office.borrow_mut();
        open.myself = Rc::downgrade(&office);
        open.reload_catalog();
        open.look_up();
        open.judge_all();
        let alive: Vec<_> = open.registry.registrations().cloned().collect();
        alive.into_iter().for_each(|registration| open.follow(registration));
        open.take_up_leases();
        drop(open);
        office
    }

    /// The registered task that a process belongs to.
    pub(super) fn task_of(&self, pid: u32) -> Option<Process> {
        match self.registry.member(&self.host.chain(pid).ok()??) {
            Membership::Of(registration) => Some(registration.process),
            Membership::Forgotten(process) => Some(process),
            Membership::None => None,
        }
    }

    /// What the rules in force say of a registered task.
    fn judge(&mut self, registration: &Registration) -> Arc<Caller> {
        self.judge_as(Arc::clone(&registration.task), registration.uid, registration.tier())
    }

    /// What the rules in force say of a task that runs as this user, however it is known. Its certificate is wished for.
    fn judge_as(&mut self, task: Arc<Task>, uid: u32, tier: Tier) -> Arc<Caller> {
        let facts = Facts {
            dag: &task.dag,
            task: &task.task,
            run: Some(&task.run),
            uid: Some(uid),
            queues: &self.rules.settings.queues,
            catalog: self.catalog.value.get(&task.dag),
        };
        let verdict = self.rules.rules.decide(&facts, &mut self.names);
        if let Ok(grant) = &verdict {
            (self.wish)(grant.identity());
        }
        Arc::new(Caller { who: Who::Task(task), tier, verdict })
    }

    /// Judges every living task again: the rules or what they rest on have changed.
    fn judge_all(&mut self) {
        let alive: Vec<_> = self.registry.registrations().cloned().collect();
        self.callers = alive.iter().map(|registration| (registration.process, self.judge(registration))).collect();
        self.components.clear();
        let mut leases = std::mem::take(&mut self.leases);
        leases.judge(|holder| self.judge_as(Arc::clone(&holder.task), holder.uid, Tier::Lease));
        self.leases = leases;
        self.publish();
    }

    /// Watches for the ends of a task: of its process, then of what that left in its cgroup.
    fn follow(&self, registration: Arc<Registration>) {
        let (office, host) = (self.myself.clone(), self.host.clone());
        tokio::task::spawn_local(async move {
            let process = registration.process;
            match Watch::open(&host, process) {
                Ok(Some(watch)) => drop(watch.ended().await),
                Ok(None) => {}
                Err(error) => tracing::warn!(%process, %error, "a task's end cannot be watched; it is taken for ended"),
            }
            let Some(open) = office.upgrade() else { return };
            open.borrow_mut().ended(process);
            drop(open);
            let Some(enclosure) = &registration.cgroup else { return };
            loop {
                if let Ok(watch) = cgroup::watch(enclosure) {
                    drop(watch.emptied().await);
                }
                match office.upgrade() {
                    Some(open) if !open.borrow_mut().emptied(enclosure.id) => {}
                    _ => return,
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        });
    }

    fn ended(&mut self, process: Process) {
        if let Some(gone) = self.registry.ended(process) {
            self.forget(&gone);
        }
    }

    /// Says whether the cgroup is nobody's any more.
    fn emptied(&mut self, cgroup: u64) -> bool {
        if let Some(gone) = self.registry.emptied(cgroup) {
            self.forget(&gone);
        }
        self.registry.by_cgroup(cgroup).is_none()
    }

    fn forget(&mut self, gone: &Registration) {
        tracing::debug!(dag = &*gone.task.dag, task = &*gone.task.task, process = %gone.process, "the task has ended");
        self.callers.remove(&gone.process);
        self.publish();
    }

    /// Tells the workers whom one look-up finds.
    fn publish(&mut self) {
        let enclosed = self.registry.registrations().filter_map(|registration| {
            Some((registration.cgroup.as_ref()?.id, Arc::clone(self.callers.get(&registration.process)?)))
        });
        let by_cgroup = enclosed.collect();
        let leases = self.leases.table();
        self.publisher.publish(Callers { generation: 0, by_cgroup, routes: Arc::clone(&self.rules.settings.routes), leases });
        metrics::gauge!("ringfence_airflow_tasks").set(f64::from(u32::try_from(self.registry.len()).unwrap_or(u32::MAX)));
    }

    /// Answers what the workers ask, a bounded number in a row. Says whether there may be more.
    pub(super) fn answer(&mut self, desks: &mut [Desk]) -> bool {
        let mut more = false;
        for desk in desks {
            for answered in 1..=ANSWERS_IN_A_ROW_MAX {
                let Some(question) = desk.question() else { break };
                more |= answered == ANSWERS_IN_A_ROW_MAX;
                match question {
                    Question::Warm(identity) => (self.wish)(&identity),
                    Question::Who { slot, generation, origin, .. } => {
                        let caller = self.attribute(origin.as_ref());
                        desk.answer(Answer { slot, generation, caller });
                    }
                }
            }
        }
        more
    }

    /// Who is behind a connection that the table did not know.
    fn attribute(&mut self, origin: Option<&Origin>) -> Arc<Caller> {
        let Some(origin) = origin else {
            return Arc::new(nobody(Stranger::default(), "the kernel does not know its connection any more", NOBODY_REMEDY));
        };
        let parts = parts(&self.rules.components);
        let scene = Scene {
            host: &self.host,
            registry: &self.registry,
            parts: &parts,
            units: &self.units,
            accept_titles: self.rules.settings.accept_titles,
        };
        let Attributed { who, tier, registration, why } = self.attributor.attribute(scene, origin, Instant::now());
        drop(parts);
        if self.waits && matches!(who, Who::Stranger(_)) && self.preview_again() {
            return self.attribute(Some(origin));
        }
        match (who, registration) {
            (Who::Task(_), Some(registration)) => match self.callers.get(&registration.process) {
                Some(known) if known.tier == tier => Arc::clone(known),
                Some(known) => Arc::new(Caller { tier, ..Caller::clone(known) }),
                None => self.judge(&registration),
            },
            (Who::Task(task), None) => self.judge_as(task, origin.uid, Tier::Title),
            (Who::Component(name), _) => self.component(name),
            (Who::Stranger(stranger), _) => {
                let remedy = why.as_ref().map_or(NOBODY_REMEDY, Unattributed::remedy);
                let why = why.as_ref().map_or_else(|| "nobody known opened it".to_owned(), Unattributed::to_string);
                Arc::new(nobody(stranger, &why, remedy))
            }
        }
    }

    /// Looks whether the process that still has the tasks has got new ones.
    fn preview_again(&mut self) -> bool {
        let before = self.registry.len();
        preview(&mut self.registry, &self.host, &self.socket);
        self.adopt_new();
        self.registry.len() > before
    }

    fn component(&mut self, name: Arc<str>) -> Arc<Caller> {
        let wish = &self.wish;
        let caller = self.components.entry(Arc::clone(&name)).or_insert_with(|| {
            wish(&name);
            let grant = Grant::by_rule(Arc::clone(&name), format!("component {name}").into());
            Arc::new(Caller { who: Who::Component(name), tier: Tier::Component, verdict: Ok(grant) })
        });
        Arc::clone(caller)
    }

    /// Cgroups of units come and go with them, and the names of this host's services are known only once the agent has
    /// answered.
    fn look_up(&mut self) {
        for service in &self.viewer.current().services {
            self.rules.rules.reserve(&service.name, "a service of this host");
        }
        let Some(hierarchy) = &self.hierarchy else { return };
        let units = self.rules.components.iter().filter_map(Component::unit);
        self.units = units.flat_map(|unit| hierarchy.of_unit(unit)).collect();
    }

    /// The process that had the tasks has left them to this one.
    pub(super) fn take_over(&mut self) {
        if !std::mem::replace(&mut self.waits, false) {
            return;
        }
        recover(&mut self.registry, &self.host, &self.socket);
        self.adopt_new();
        self.take_up_leases();
    }

    /// Judges and follows the tasks that were not known before.
    fn adopt_new(&mut self) {
        let new: Vec<_> = self.registry.registrations().filter(|one| !self.callers.contains_key(&one.process)).cloned().collect();
        if new.is_empty() {
            return;
        }
        for registration in new {
            let caller = self.judge(&registration);
            self.callers.insert(registration.process, caller);
            self.follow(registration);
        }
        self.publish();
    }

    fn take_up_leases(&mut self) {
        let text = match registry::own_text(&self.socket.with_file_name(LEASES)) {
            Ok(Some(text)) => text,
            Ok(None) => return,
            Err(error) => return tracing::warn!(%error, "the leases of an earlier run are lost"),
        };
        let (host, mut leases) = (self.host.clone(), std::mem::take(&mut self.leases));
        let alive = |process| host.is_alive(process).unwrap_or(false);
        let judge = |holder: &leases::Holder| self.judge_as(Arc::clone(&holder.task), holder.uid, Tier::Lease);
        let processes: HashSet<Process> = leases.take_up(&text, Instant::now(), alive, judge).into_iter().collect();
        self.leases = leases;
        processes.into_iter().for_each(|process| self.follow_lessee(process));
        self.publish();
    }

    /// Keeps the leases for whoever comes next.
    pub(super) fn keep_leases(&mut self) {
        if self.waits || !std::mem::replace(&mut self.leases_changed, false) {
            return;
        }
        if let Err(error) = registry::write_own(&self.socket.with_file_name(LEASES), &self.leases.kept()) {
            tracing::warn!(%error, "leases cannot be kept for a restart");
        }
    }

    /// Looks at files and clocks.
    pub(super) fn tick(&mut self) {
        self.look_up();
        if self.reload_rules() | self.reload_catalog() {
            self.judge_all();
        }
        let now = Instant::now();
        if now >= self.warm_at {
            self.warm_at = now + WARM_INTERVAL;
            let callers = self.callers.values().chain(self.components.values()).chain(self.leases.callers());
            let identities: BTreeSet<&Arc<str>> =
                callers.filter_map(|caller| caller.verdict.as_ref().ok()).map(Grant::identity).collect();
            identities.into_iter().for_each(|identity| (self.wish)(identity));
        }
    }
}

/// What an office is opened with.
pub(super) struct Opening {
    pub(super) settings: Settings,
    pub(super) publisher: Publisher<Callers>,
    pub(super) viewer: Viewer<Snapshot>,
    pub(super) admin: SocketAddr,
    pub(super) wish: Wish,
    /// A predecessor still has the tasks.
    pub(super) waits: bool,
}

fn nobody(stranger: Stranger, why: &str, remedy: &str) -> Caller {
    let refusal = Refusal { rule: "default".into(), why: why.into(), remedy: remedy.into() };
    Caller { who: Who::Stranger(stranger), tier: Tier::Unidentified, verdict: Err(refusal) }
}

/// Which part of Airflow a process is, by the rules.
fn parts(components: &[Component]) -> impl Fn(&ProcessFacts) -> Option<Part> {
    move |facts| {
        let facts = rules::ProcessFacts { cgroup_path: &facts.cgroup, uid: facts.uid, title: &facts.title };
        let component = components.iter().find(|component| component.matches(&facts))?;
        Some(Part { name: Arc::clone(&component.name), runs_tasks: component.runs_tasks })
    }
}

fn place(choice: &CgroupChoice, host: &Host, hierarchy: Option<&Hierarchy>) -> Option<Place> {
    let setting = match choice {
        CgroupChoice::Auto => Setting::Auto,
        CgroupChoice::Off => Setting::Off,
        CgroupChoice::At(path) => Setting::At(path.clone()),
    };
    match Place::open(&setting, host, hierarchy, cgroup::is_root()) {
        Ok(place) => {
            tracing::info!(cgroup = %place.directory().display(), "each task gets a cgroup of its own");
            Some(place)
        }
        Err(why) => {
            tracing::warn!(%why, "tasks get no cgroups of their own: a daemon that outlives its task loses its identity");
            None
        }
    }
}

/// The tasks of a predecessor that still has them.
fn preview(registry: &mut Registry, host: &Host, socket: &Path) {
    if let Err(error) = registry.preview(host, &socket.with_file_name(TASKS)) {
        tracing::warn!(%error, "the tasks of the process before are not known yet");
    }
}

/// The tasks that lived when ringfence ended, so that a restart takes no identity away.
fn recover(registry: &mut Registry, host: &Host, socket: &Path) {
    let path = socket.with_file_name(TASKS);
    match registry.recover(host, &path) {
        Ok(recovered) if recovered.alive > 0 => tracing::info!(?recovered, "tasks of the last run go on"),
        Ok(recovered) => tracing::debug!(?recovered, "no task of an earlier run lives"),
        Err(error) => tracing::error!(%error, "registrations cannot be kept for a restart"),
    }
}
