//! Who may call whom: the intentions of a deployment, at least privilege.
//!
//! Invariant: an entry holds every part of the deployment that calls its service, and not only this host's: a config entry
//! replaces the one before it, so the files of all hosts must say the same. Nothing is allowed for tasks: which identity a task
//! has is decided by rules that the operator writes, and so is what it may call.

use std::collections::BTreeSet;

use super::file::File;
use super::plan::{Deployment, Plan};
use super::role::{Release, Role};
use super::wishes::LogHost;

/// The identity of the example rule in airflow.toml.
pub(super) const EXAMPLE_IDENTITY: &str = "airflow-payroll";
/// Every service that no other intention names.
const ANYBODY: &str = "*";

/// Which Consul is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConsulRelease {
    /// Before 1.9: intentions are records of their own.
    Records,
    /// From 1.9 on: config entries.
    Entries,
}

/// One intention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Intention {
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) is_allow: bool,
    pub(super) purpose: String,
}

impl ConsulRelease {
    /// The value of `-consul`, or the version that an agent tells.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.trim_start_matches('v').split('.').map(|part| part.parse::<u32>().ok());
        match (parts.next().flatten(), parts.next().flatten()) {
            (Some(1), Some(minor)) if minor < 9 => Ok(Self::Records),
            (Some(1..), Some(_)) => Ok(Self::Entries),
            _ => Err(format!("`{text}` is no version of Consul; write it as in 1.8 or 1.9")),
        }
    }
}

impl Intention {
    pub(super) fn action(&self) -> &'static str {
        if self.is_allow { "allow" } else { "deny" }
    }

    fn allow(source: String, destination: String, purpose: impl Into<String>) -> Self {
        Self { source, destination, is_allow: true, purpose: purpose.into() }
    }
}

/// Those that this host's services call by, or are called by: what `-apply` makes sure of.
pub(super) fn of_host(plan: &Plan) -> Vec<Intention> {
    let own: BTreeSet<&str> = plan.services.iter().map(|service| service.name.as_str()).collect();
    let is_ours = |intention: &Intention| own.contains(intention.source.as_str()) || own.contains(intention.destination.as_str());
    all(plan).into_iter().filter(is_ours).collect()
}

/// The files, one for each service that this host is or calls.
pub(super) fn files(plan: &Plan, consul: ConsulRelease) -> Vec<File> {
    let touched: BTreeSet<String> = of_host(plan).into_iter().map(|intention| intention.destination).collect();
    let all = all(plan);
    let of = |destination: &str| all.iter().filter(|intention| intention.destination == destination).collect::<Vec<_>>();
    match consul {
        ConsulRelease::Entries => {
            let entries = touched.iter().map(|name| entry(plan, name, &of(name)));
            entries.chain(plan.extras.iter().map(|extra| example(&extra.service))).collect()
        }
        ConsulRelease::Records => {
            let lines: String = touched.iter().flat_map(|name| of(name)).map(command).collect();
            vec![script(plan, &lines)]
        }
    }
}

/// The whole deployment's, as far as this host knows its hosts.
fn all(plan: &Plan) -> Vec<Intention> {
    let deployment = &plan.deployment;
    let mut all = Vec::new();
    for role in deployment.roles() {
        for need in role.needs(deployment.release, deployment.executor) {
            let (source, destination) = (deployment.service(role), deployment.target(need));
            match all.iter_mut().find(|old: &&mut Intention| old.source == source && old.destination == destination) {
                Some(old) => old.purpose = format!("{}, {}", old.purpose, need.words()),
                None => all.push(Intention::allow(source, destination, need.words())),
            }
        }
    }
    let reader = || deployment.service(Role::ApiServer);
    for role in deployment.roles().filter(|role| role.serves_logs()) {
        all.push(Intention::allow(reader(), deployment.service(role), "task logs"));
    }
    let logs = plan
        .services
        .iter()
        .map(|service| (&service.name, service.role))
        .filter(|(name, role)| **name != deployment.service(*role));
    all.extend(logs.map(|(name, _)| Intention::allow(reader(), name.clone(), "task logs")));
    let remote = plan.log_hosts.iter().map(|(log_host, _): &(LogHost, _)| deployment.logs_service(log_host));
    all.extend(remote.map(|name| Intention::allow(reader(), name, "task logs")));
    all.extend(denials(plan, deployment));
    all
}

/// Everything else, for the deployment's own services: under a default of allow, silence would let anybody in.
fn denials(plan: &Plan, deployment: &Deployment) -> Vec<Intention> {
    let roles = deployment.roles().map(|role| deployment.service(role));
    let logs = plan.log_hosts.iter().map(|(log_host, _)| deployment.logs_service(log_host));
    let names: BTreeSet<String> = roles.chain(plan.services.iter().map(|service| service.name.clone())).chain(logs).collect();
    let deny =
        |destination| Intention { source: ANYBODY.to_owned(), destination, is_allow: false, purpose: "nobody else".to_owned() };
    names.into_iter().map(deny).collect()
}

fn entry(plan: &Plan, destination: &str, intentions: &[&Intention]) -> File {
    let deployment = &plan.deployment;
    let path = format!("consul/intentions-{destination}.hcl");
    let is_ours = intentions.iter().any(|intention| intention.source == ANYBODY);
    let mut text = format!("# Who may call {destination}.\n# Load it with `consul config write {path}`.\n");
    if !is_ours {
        text += &format!(
            "# An entry is whole: if others than Airflow call {destination}, look at\n\
             # `consul config read -kind service-intentions -name {destination}` first and add them, or use\n\
             # `ringfence airflow init ... -apply`, which adds each source and leaves the others alone.\n"
        );
    }
    if deployment.release == Release::Two && destination == deployment.database {
        text += "# Tasks of Airflow 2 talk to the metadata database themselves: add the identity of each rule in airflow.toml, as in\n";
        text += &format!("#   {{ Name = \"{EXAMPLE_IDENTITY}\", Action = \"allow\" }},\n");
    }
    text += &format!("Kind = \"service-intentions\"\nName = {destination:?}\nSources = [\n");
    for Intention { source, purpose, .. } in intentions {
        let action = if source == ANYBODY { "deny" } else { "allow" };
        text += &format!("  # {purpose}\n  {{ Name = {source:?}, Action = \"{action}\" }},\n");
    }
    text += "]\n";
    File::new(path, text)
}

/// What allows one identity of tasks to call an upstream of theirs.
fn example(destination: &str) -> File {
    let path = format!("consul/intentions-{destination}.hcl.example");
    let text = format!(
        "# Who may call {destination}: identities of tasks, by their names in airflow.toml. No part of Airflow itself calls it.\n\
         # Write the real names, then load it with `consul config write`. An entry is whole: keep the sources that it has already.\n\
         Kind = \"service-intentions\"\nName = {destination:?}\nSources = [\n  {{ Name = \"{EXAMPLE_IDENTITY}\", Action = \"allow\" }},\n]\n"
    );
    File::new(path, text)
}

fn script(plan: &Plan, lines: &str) -> File {
    let mut text = format!(
        "#!/bin/sh\n# Who may call whom in the deployment {}, for Consul before 1.9. Safe to run again: what exists is left as it is.\n\
         set -eu\n\nensure() {{\n    consul intention get \"$2\" \"$3\" >/dev/null 2>&1 || consul intention create \"$1\" \"$2\" \"$3\"\n}}\n\n{lines}",
        plan.deployment.name
    );
    if plan.deployment.release == Release::Two {
        text +=
            "\n# Tasks of Airflow 2 talk to the metadata database themselves: allow the identity of each rule in airflow.toml.\n";
        text += &format!("# ensure -allow {EXAMPLE_IDENTITY} {}\n", plan.deployment.database);
    }
    for extra in &plan.extras {
        text += &format!(
            "\n# Identities of tasks, by their names in airflow.toml. No part of Airflow itself calls {0}.\n",
            extra.service
        );
        text += &format!("# ensure -allow {EXAMPLE_IDENTITY} {}\n", extra.service);
    }
    File::new("consul/intentions.sh", text)
}

fn command(intention: &Intention) -> String {
    format!("ensure -{} '{}' '{}'  # {}\n", intention.action(), intention.source, intention.destination, intention.purpose)
}

#[cfg(test)]
mod tests {
    use super::super::plan::{PORT_BASE, Wishes};
    use super::super::role::Executor;
    use super::super::wishes::Extra;
    use super::*;

    fn plan(roles: &[Role], release: Release) -> Plan {
        let deployment = Deployment {
            name: "airflow".into(),
            release,
            executor: Executor::Celery,
            database: "postgres".into(),
            broker: "redis".into(),
            result_backend: "results".into(),
        };
        let extras =
            if roles.contains(&Role::Worker) { vec![Extra::parse("warehouse:25435").expect("valid")] } else { Vec::new() };
        let wishes =
            Wishes { deployment, roles: roles.to_vec(), extras, log_hosts: Vec::new(), units: Vec::new(), port_base: PORT_BASE };
        Plan::new(wishes).expect("planned")
    }

    fn pairs(intentions: &[Intention]) -> Vec<String> {
        intentions.iter().map(|one| format!("{} {} {}", one.action(), one.source, one.destination)).collect()
    }

    #[test]
    fn a_worker_may_call_what_it_needs_and_nothing_else() {
        assert_eq!(
            pairs(&of_host(&plan(&[Role::Worker], Release::Three))),
            [
                "allow airflow-worker redis",
                "allow airflow-worker results",
                "allow airflow-worker airflow-api-server",
                "allow airflow-api-server airflow-worker",
                "deny * airflow-worker",
            ]
        );
    }

    #[test]
    fn every_host_writes_the_same_entry_of_a_service() {
        let of = |role| files(&plan(&[role], Release::Three), ConsulRelease::Entries);
        let (worker, api_server) = (of(Role::Worker), of(Role::ApiServer));
        let find = |files: &[File], path: &str| files.iter().find(|file| file.path == path).cloned().expect("written");
        let path = "consul/intentions-airflow-api-server.hcl";
        assert_eq!(find(&worker, path), find(&api_server, path));
        assert!(find(&worker, path).text.contains("{ Name = \"*\", Action = \"deny\" }"));
        let redis = find(&worker, "consul/intentions-redis.hcl").text;
        assert!(redis.contains("airflow-scheduler") && redis.contains("airflow-worker"), "{redis}");
        assert!(!redis.contains("\"*\""), "the broker is not Airflow's to close for others: {redis}");
    }

    #[test]
    fn nothing_is_allowed_for_tasks_unasked() {
        let worker = plan(&[Role::Worker], Release::Three);
        assert!(of_host(&worker).iter().all(|intention| intention.destination != "warehouse"));
        let files = files(&worker, ConsulRelease::Entries);
        assert!(files.iter().any(|file| file.path == "consul/intentions-warehouse.hcl.example"));
    }

    #[test]
    fn before_1_9_there_are_commands() {
        let files = files(&plan(&[Role::Worker], Release::Two), ConsulRelease::Records);
        let [script] = &files[..] else { panic!("{files:?}") };
        assert!(script.text.contains("ensure -allow 'airflow-worker' 'redis'"), "{}", script.text);
        assert!(script.text.contains("ensure -deny '*' 'airflow-worker'"), "{}", script.text);
        assert!(script.text.contains("# ensure -allow airflow-payroll postgres"), "{}", script.text);
        assert!(script.text.contains("# ensure -allow airflow-payroll warehouse"), "{}", script.text);
    }

    #[test]
    fn versions_are_read_as_agents_write_them() {
        for (text, wanted) in [
            ("1.8", ConsulRelease::Records),
            ("1.8.7+dfsg1", ConsulRelease::Records),
            ("v1.9.0", ConsulRelease::Entries),
            ("1.10.12", ConsulRelease::Entries),
            ("1.21.3+ent", ConsulRelease::Entries),
            ("2.0", ConsulRelease::Entries),
        ] {
            assert_eq!(ConsulRelease::parse(text), Ok(wanted), "{text}");
        }
        for text in ["", "1", "x.y", "0.9", "latest"] {
            assert!(ConsulRelease::parse(text).is_err(), "{text}");
        }
    }
}
