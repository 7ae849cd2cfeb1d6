//! What the office answers at the registration socket. The shapes are the provider package's (`airflow_ringfence.client`).

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::leases::Holder;
use super::super::process::{Process, Watch};
use super::super::registration::{Explain, Lease, Request};
use super::super::registry::{Claim, Peer, Supervisor};
use super::super::rules::Facts;
use super::{KEEP_DELAY, Office, parts};
use crate::mesh::Bind;
use crate::mesh::caller::{Grant, Refusal, Tier, Who};
use crate::store::desk::Origin;

/// How old a process may be that says for the first time which task it is.
const CLAIM_AGE_MAX: Duration = Duration::from_secs(15);
const CLAIM_AGE_MAX_OF_SUPERVISOR: Duration = Duration::from_secs(60);

impl Office {
    /// One request of the registration socket.
    pub(in crate::airflow) fn handle(office: &Rc<RefCell<Self>>, peer: Peer, request: Request) -> Value {
        let mut office = office.borrow_mut();
        match request {
            Request::Register(claim) => office.register(peer, &claim),
            // The end of the process is what counts: a task that only says so may still have connections to open.
            Request::Unregister => json!({ "ok": true }),
            Request::Whoami => office.whoami(peer),
            Request::Routes => office.routes(),
            Request::Explain(question) => office.explain(&question),
            Request::Lease(wanted) => office.lease(peer, &wanted),
        }
    }

    fn register(&mut self, peer: Peer, claim: &Claim) -> Value {
        if let Some(refusal) = self.too_late(peer, claim) {
            return refusal;
        }
        let parts = parts(&self.rules.components);
        let registered = match self.registry.register(&self.host, &parts, peer, claim, Instant::now()) {
            Ok(registered) => registered,
            Err(error) => return json!({ "ok": false, "error": error.to_string(), "remedy": error.remedy() }),
        };
        drop(parts);
        let registration = registered.registration;
        if let Some(notice) = &registered.notice {
            tracing::warn!(dag = &*registration.task.dag, task = &*registration.task.task, "{notice}");
        }
        let caller = self.judge(&registration);
        self.callers.insert(registration.process, Arc::clone(&caller));
        self.publish();
        if !registered.again {
            self.follow(Arc::clone(&registration));
        }
        let (identity, denied, remedy) = verdict(&caller.verdict);
        tracing::debug!(dag = &*registration.task.dag, task = &*registration.task.task, process = %registration.process, identity, rule = &**caller.rule(), "registered");
        json!({ "ok": true, "identity": identity, "rule": &**caller.rule(), "tier": registration.tier().as_str(), "denied": denied, "remedy": remedy })
    }

    /// A process registers before it runs any code of an author. One that lives for long without, whose first try was lost or
    /// prevented, may be running such code by now: it stays unidentified.
    fn too_late(&self, peer: Peer, claim: &Claim) -> Option<Value> {
        let process = self.host.process(peer.pid).ok()??;
        let age_max = match claim.supervisor {
            Supervisor::Task => CLAIM_AGE_MAX,
            // It imports all of Airflow first.
            Supervisor::Itself => CLAIM_AGE_MAX_OF_SUPERVISOR,
        };
        let age = self.host.age(process)?;
        if age <= age_max || self.registry.is_registered(process) {
            return None;
        }
        tracing::warn!(pid = peer.pid, uid = peer.uid, ?age, "a process registers too late to be believed");
        let error = format!("process {} is {} s old: a task registers at its start", peer.pid, age.as_secs());
        Some(
            json!({ "ok": false, "error": error, "remedy": "start the task again; the plugin's first try was lost, see the worker's log" }),
        )
    }

    /// An address of its own for a task that runs in a component's process.
    fn lease(&mut self, peer: Peer, wanted: &Lease) -> Value {
        let refused = |error: &str, remedy: &str| json!({ "ok": false, "error": error, "remedy": remedy });
        let Some(port) = self.lease_port else {
            return refused("there are no leases here", "add lease_port = 15006 to the rules, and restart ringfence");
        };
        let asking = self.attribute(Some(&Origin { uid: peer.uid, inode: 0, cgroup: 0, pid: Some(peer.pid) }));
        let Who::Component(name) = &asking.who else {
            return refused("only a component may lease", "name the triggerer in a [[component]] with leases = true");
        };
        if !self.rules.components.iter().any(|component| component.name == *name && component.leases) {
            return refused(&format!("component {name} may not lease"), "add leases = true to its [[component]]");
        }
        let task = match wanted.claim.check() {
            Ok(task) => Arc::new(task),
            Err(error) => return refused(&error.to_string(), error.remedy()),
        };
        let snapshot = self.viewer.current();
        let upstreams = snapshot.services.iter().flat_map(|service| &service.upstreams);
        let Some(upstream) = upstreams.map(|upstream| &upstream.name).find(|name| ***name == *wanted.upstream) else {
            return refused(&format!("there is no upstream {:?}", wanted.upstream), "`airflow mesh routes` lists them");
        };
        let Ok(Some(process)) = self.host.process(peer.pid) else { return refused("the asking process has ended", "none") };
        let caller = self.judge_as(Arc::clone(&task), peer.uid, Tier::Lease);
        let (identity, denied, remedy) = verdict(&caller.verdict);
        let is_new = !self.leases.has(process);
        let holder = Holder { process, uid: peer.uid, task, upstream: Arc::clone(upstream) };
        let Some(address) = self.leases.lease(holder, Arc::clone(&caller), Instant::now()) else {
            return refused("too many addresses are leased", "restart the triggerer, whose leases end with it");
        };
        self.leases_change();
        self.publish();
        if is_new {
            self.follow_lessee(process);
        }
        json!({ "ok": true, "address": address, "port": port, "identity": identity, "rule": &**caller.rule(), "denied": denied, "remedy": remedy })
    }

    /// Has them kept soon, for a process that comes after this one, however this one ends.
    fn leases_change(&mut self) {
        if std::mem::replace(&mut self.leases_changed, true) {
            return;
        }
        let office = self.myself.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(KEEP_DELAY).await;
            if let Some(open) = office.upgrade() {
                open.borrow_mut().keep_leases();
            }
        });
    }

    /// Takes the addresses back when the process ends.
    pub(super) fn follow_lessee(&self, process: Process) {
        let (office, host) = (self.myself.clone(), self.host.clone());
        tokio::task::spawn_local(async move {
            if let Ok(Some(watch)) = Watch::open(&host, process) {
                drop(watch.ended().await);
            }
            let Some(open) = office.upgrade() else { return };
            let mut open = open.borrow_mut();
            if open.leases.end(process) {
                open.leases_change();
                open.publish();
            }
        });
    }

    fn whoami(&mut self, peer: Peer) -> Value {
        let origin = Origin { uid: peer.uid, inode: 0, cgroup: 0, pid: Some(peer.pid) };
        let caller = self.attribute(Some(&origin));
        let (identity, denied, remedy) = verdict(&caller.verdict);
        let (who, component) = match &caller.who {
            Who::Task(_) => ("task", None),
            Who::Component(name) => ("component", Some(&**name)),
            Who::Stranger(_) => ("unidentified", None),
        };
        let task = caller.task();
        json!({ "ok": true, "caller": {
            "who": who,
            "dag": task.map(|task| &*task.dag),
            "task": task.map(|task| &*task.task),
            "run": task.map(|task| &*task.run),
            "try": task.map(|task| task.try_number),
            "map_index": task.map(|task| task.map_index),
            "component": component,
            "tier": caller.tier.as_str(),
            "identity": identity,
            "rule": &**caller.rule(),
            "denied": denied,
            "remedy": remedy,
        } })
    }

    /// Where each upstream listens on this host.
    fn routes(&self) -> Value {
        let snapshot = self.viewer.current();
        let upstreams = snapshot.services.iter().flat_map(|service| &service.upstreams);
        let routes: Vec<Value> = upstreams
            .map(|upstream| match &upstream.bind {
                Bind::Tcp(address) => json!({ "service": &*upstream.name, "address": address.ip(), "port": address.port() }),
                Bind::Unix { path, .. } => json!({ "service": &*upstream.name, "unix": path }),
            })
            .collect();
        json!({ "ok": true, "routes": routes, "admin": self.admin })
    }

    fn explain(&self, question: &Explain) -> Value {
        let facts = Facts {
            dag: &question.dag,
            task: &question.task,
            run: (!question.run.is_empty()).then_some(&*question.run),
            uid: None,
            queues: &self.rules.settings.queues,
            catalog: self.catalog.value.get(&question.dag),
        };
        let explanation = self.rules.rules.explain(&facts, &self.names);
        json!({ "ok": true, "explanation": explanation, "to": question.to, "rules": self.rules.path, "admin": self.admin })
    }
}

/// Identity, reason and remedy, for the wire.
fn verdict(verdict: &Result<Grant, Refusal>) -> (Option<&str>, Option<&str>, Option<&str>) {
    match verdict {
        Ok(grant) => (Some(grant.identity()), None, None),
        Err(refusal) => (None, Some(&refusal.why), Some(&refusal.remedy)),
    }
}
