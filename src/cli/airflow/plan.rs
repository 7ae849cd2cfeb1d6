//! One host's part of a deployment: which services it registers, on which ports, and what each leads to.
//!
//! Invariant: every name is safe to stand in HCL, TOML, a unit file and a shell line, and no two listeners of the host share
//! an address. A listener leads to one service for the whole host: the caller's own identity decides who speaks, not the
//! listener's owner, so a second one for the next role would only be a second port to configure.
//!
//! Pure. What cannot be planned is a [`UsageError`] that says which flag to change.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::role::{Executor, Need, Release, Role};
use super::wishes::{EPHEMERAL_FIRST, Extra, LogHost, UNPRIVILEGED_FIRST, check_name};
use crate::cli::UsageError;

/// Where the host's listeners begin. Consul hands out 21000 to 21255 and 21500 to 21755 by itself.
pub(super) const PORT_BASE: u16 = 22_000;
/// Offsets from the base: public listeners of roles, of log servers under their host's name, then local listeners, and where
/// leased addresses are reached.
const PUBLIC_OFFSET: u16 = 0;
const LOGS_OFFSET: u16 = 5;
const LOCAL_OFFSET: u16 = 10;
const LEASE_OFFSET: u16 = 15;
/// Ports from the base on that are ours.
const PORTS_TAKEN: u16 = 20;
/// Ports that Consul gives to sidecars and exposed paths.
const OF_CONSUL: std::ops::RangeInclusive<u16> = 21_000..=21_755;
/// Where nothing listens: a part of Airflow that has an identity and no server.
pub(super) const NO_APP_PORT: u16 = 1;
/// Loopback addresses that stand for hosts with a log server, one each: 127.0.87.1 and so on.
const LOG_NETWORK: [u8; 3] = [127, 0, 87];
/// Most of those hosts.
const LOG_HOSTS_MAX: usize = 200;

/// A whole deployment, the same on all of its hosts.
#[derive(Debug, Clone)]
pub(super) struct Deployment {
    /// What the names of its services begin with.
    pub(super) name: String,
    pub(super) release: Release,
    pub(super) executor: Executor,
    /// Consul services.
    pub(super) database: String,
    pub(super) broker: String,
    pub(super) result_backend: String,
}

/// What the flags ask for.
#[derive(Debug)]
pub(super) struct Wishes {
    pub(super) deployment: Deployment,
    pub(super) roles: Vec<Role>,
    pub(super) extras: Vec<Extra>,
    pub(super) log_hosts: Vec<LogHost>,
    pub(super) units: Vec<(Role, String)>,
    pub(super) port_base: u16,
}

/// What is registered and written.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) deployment: Deployment,
    /// In the order of [`Role::ALL`].
    pub(super) roles: Vec<Role>,
    pub(super) units: BTreeMap<Role, String>,
    pub(super) services: Vec<Service>,
    /// The local port of each need.
    pub(super) ports: BTreeMap<Need, u16>,
    pub(super) extras: Vec<Extra>,
    /// Hosts whose task logs are fetched through the mesh, with the addresses that stand for them.
    pub(super) log_hosts: Vec<(LogHost, Ipv4Addr)>,
    /// Where triggers reach the addresses that are leased to their tasks: any of 127.0.0.0/8 with this port.
    pub(super) lease_port: Option<u16>,
}

/// A service of this host, with its sidecar.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Service {
    /// Also its id.
    pub(super) name: String,
    pub(super) role: Role,
    /// Where it listens on this host, if it does.
    pub(super) app_port: Option<u16>,
    pub(super) public_port: u16,
    pub(super) upstreams: Vec<Upstream>,
}

/// A local listener of a sidecar.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Upstream {
    pub(super) service: String,
    pub(super) bind: SocketAddrV4,
    pub(super) deny_reply: &'static str,
    /// What it is for.
    pub(super) purpose: String,
}

impl Deployment {
    /// The Consul service of a role.
    pub(super) fn service(&self, role: Role) -> String {
        format!("{}-{}", self.name, role.component(self.release))
    }

    /// The Consul service of the log server on one host: task logs lie where the task ran, so any worker will not do.
    pub(super) fn logs_service(&self, log_host: &LogHost) -> String {
        let host = log_host.host.to_ascii_lowercase().replace('.', "-");
        format!("{}-{}-logs-{host}", self.name, log_host.role.component(self.release))
    }

    /// The Consul service behind a need.
    pub(super) fn target(&self, need: Need) -> String {
        match need {
            Need::Database => self.database.clone(),
            Need::Broker => self.broker.clone(),
            Need::ResultBackend => self.result_backend.clone(),
            Need::ExecutionApi => self.service(Role::ApiServer),
        }
    }

    /// The roles that such a deployment has.
    pub(super) fn roles(&self) -> impl Iterator<Item = Role> {
        let celery = self.executor == Executor::Celery;
        Role::ALL.into_iter().filter(move |role| celery || *role != Role::Worker)
    }
}

impl Plan {
    pub(super) fn new(wishes: Wishes) -> Result<Self, UsageError> {
        let Wishes { deployment, mut roles, extras, log_hosts, units, port_base } = wishes;
        roles.sort_unstable();
        roles.dedup();
        check_roles(&deployment, &roles)?;
        check_base(port_base)?;
        let mut plan = Self {
            units: units_of(&deployment, &roles, units)?,
            services: Vec::new(),
            ports: BTreeMap::new(),
            log_hosts: Vec::new(),
            lease_port: None,
            extras,
            deployment,
            roles,
        };
        let leases = plan.roles.iter().any(|role| plan.leases(*role));
        plan.lease_port = leases.then_some(port_base + LEASE_OFFSET);
        plan.add_services(port_base);
        plan.add_needs(port_base);
        plan.add_extras()?;
        plan.add_log_hosts(&log_hosts, port_base)?;
        plan.check()?;
        Ok(plan)
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    pub(super) fn runs_tasks(&self) -> bool {
        self.roles.iter().any(|role| role.runs_tasks(self.deployment.executor))
    }

    /// Whether tasks of Airflow get identities by this host's rules.
    pub(super) fn needs_rules(&self) -> bool {
        self.runs_tasks() || self.lease_port.is_some()
    }

    pub(super) fn leases(&self, role: Role) -> bool {
        role.leases(self.deployment.release)
    }

    pub(super) fn hosts_dag_code(&self) -> bool {
        self.roles.iter().any(|role| role.hosts_dag_code(self.deployment.executor))
    }

    fn add_services(&mut self, base: u16) {
        for role in self.roles.clone() {
            self.services.push(Service {
                name: self.deployment.service(role),
                role,
                app_port: role.app_port(),
                public_port: base + PUBLIC_OFFSET + position(role),
                upstreams: Vec::new(),
            });
        }
    }

    /// The first role that needs a thing carries the listener.
    fn add_needs(&mut self, base: u16) {
        let Deployment { release, executor, .. } = self.deployment;
        for (at, role) in self.roles.clone().into_iter().enumerate() {
            for need in role.needs(release, executor) {
                if self.ports.contains_key(&need) {
                    continue;
                }
                let target = self.deployment.target(need);
                // The result backend often is the metadata database's own server: one service, one port, on every host.
                let first = Need::ALL.into_iter().find(|other| self.deployment.target(*other) == target).unwrap_or(need);
                let port = base + LOCAL_OFFSET + first as u16;
                let is_new = !self.ports.values().any(|other| *other == port);
                self.ports.insert(need, port);
                if !is_new {
                    let carriers = self.services.iter_mut().flat_map(|service| &mut service.upstreams);
                    let shared = carriers.filter(|upstream| upstream.bind.port() == port);
                    shared.for_each(|upstream| upstream.purpose = format!("{}, {}", upstream.purpose, need.words()));
                    continue;
                }
                self.services[at].upstreams.push(Upstream {
                    service: target,
                    bind: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
                    deny_reply: need.deny_reply(),
                    purpose: need.words().to_owned(),
                });
            }
        }
    }

    fn add_extras(&mut self) -> Result<(), UsageError> {
        let executor = self.deployment.executor;
        let Some(first) = self.extras.first() else { return Ok(()) };
        let Some(at) = self.roles.iter().position(|role| role.hosts_dag_code(executor)) else {
            return Err(UsageError(format!(
                "-upstream {}: no role of this host runs code of DAGs, so nothing here would call it; leave it out, or add the role",
                first.service
            )));
        };
        self.services[at].upstreams.extend(self.extras.iter().map(|extra| Upstream {
            service: extra.service.clone(),
            bind: SocketAddrV4::new(Ipv4Addr::LOCALHOST, extra.port),
            deny_reply: extra.deny_reply,
            purpose: "for tasks, by the rules of airflow.toml".to_owned(),
        }));
        Ok(())
    }

    /// On the log server's host a service under the host's name; on the api-server's a listener for each.
    fn add_log_hosts(&mut self, log_hosts: &[LogHost], base: u16) -> Result<(), UsageError> {
        if log_hosts.len() > LOG_HOSTS_MAX {
            return Err(UsageError(format!(
                "{} -log-host flags are more than {LOG_HOSTS_MAX}: fetch logs remotely",
                log_hosts.len()
            )));
        }
        let reader = self.roles.iter().position(|role| *role == Role::ApiServer);
        for (number, log_host) in (1..).zip(log_hosts) {
            let name = self.deployment.logs_service(log_host);
            check_name(&name).map_err(|why| UsageError(format!("-log-host {}: the service `{name}` {why}", log_host.host)))?;
            let port = log_host.role.app_port().unwrap_or(NO_APP_PORT);
            match (self.has(log_host.role), reader) {
                (true, Some(_)) => return Err(log_host.refused_beside_its_reader()),
                (true, None) => self.services.push(Service {
                    name,
                    role: log_host.role,
                    app_port: Some(port),
                    public_port: base + LOGS_OFFSET + position(log_host.role) - position(Role::Worker),
                    upstreams: Vec::new(),
                }),
                (false, Some(at)) => {
                    let address = Ipv4Addr::new(LOG_NETWORK[0], LOG_NETWORK[1], LOG_NETWORK[2], number);
                    self.services[at].upstreams.push(Upstream {
                        service: name,
                        bind: SocketAddrV4::new(address, port),
                        deny_reply: "http",
                        purpose: format!("task logs of {}", log_host.host),
                    });
                    self.log_hosts.push((log_host.clone(), address));
                }
                (false, None) => return Err(log_host.refused_without_use()),
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), UsageError> {
        let mut seen: BTreeMap<SocketAddrV4, String> = BTreeMap::new();
        let mut take = |address: SocketAddrV4, who: String| match seen.insert(address, who.clone()) {
            Some(other) => Err(UsageError(format!(
                "{who} and {other} both want to listen on {address}: change the port of -upstream, or -port-base"
            ))),
            None => Ok(()),
        };
        let local = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        for (role, port) in self.roles.iter().filter_map(|role| Some((role, role.app_port()?))) {
            take(local(port), format!("the {}", role.component(self.deployment.release)))?;
        }
        if let Some(port) = self.lease_port {
            take(local(port), "the leased addresses of triggers".to_owned())?;
        }
        for service in &self.services {
            take(local(service.public_port), format!("the sidecar of {}", service.name))?;
            for upstream in &service.upstreams {
                take(upstream.bind, format!("the upstream {}", upstream.service))?;
            }
        }
        Ok(())
    }
}

fn position(role: Role) -> u16 {
    role as u16
}

fn check_roles(deployment: &Deployment, roles: &[Role]) -> Result<(), UsageError> {
    if roles.is_empty() {
        return Err(UsageError("which role? write -role scheduler, api-server, worker, triggerer or dag-processor".to_owned()));
    }
    if deployment.executor == Executor::Local && roles.contains(&Role::Worker) {
        return Err(UsageError(
            "-role worker: with -executor local the scheduler runs the tasks; leave one of them out".to_owned(),
        ));
    }
    for role in deployment.roles() {
        let name = deployment.service(role);
        check_name(&name).map_err(|why| UsageError(format!("-deployment {}: the service `{name}` {why}", deployment.name)))?;
    }
    Ok(())
}

fn check_base(base: u16) -> Result<(), UsageError> {
    let last = base.saturating_add(PORTS_TAKEN - 1);
    let remedy = format!("{PORT_BASE} is the default");
    if base < UNPRIVILEGED_FIRST || last >= EPHEMERAL_FIRST {
        return Err(UsageError(format!(
            "-port-base {base}: ports {base} to {last} must lie between {UNPRIVILEGED_FIRST} and {}: above, the kernel gives them to \
             clients; {remedy}",
            EPHEMERAL_FIRST - 1
        )));
    }
    if let Some(port) = Role::ALL.into_iter().filter_map(Role::app_port).find(|port| (base..=last).contains(port)) {
        return Err(UsageError(format!(
            "-port-base {base}: Airflow itself listens on {port}, within {base} to {last}; {remedy}"
        )));
    }
    if base <= *OF_CONSUL.end() && last >= *OF_CONSUL.start() {
        let (first, end) = OF_CONSUL.into_inner();
        return Err(UsageError(format!(
            "-port-base {base}: Consul gives ports {first} to {end} to sidecars by itself and might meet {base} to {last}; {remedy}"
        )));
    }
    Ok(())
}

fn units_of(deployment: &Deployment, roles: &[Role], given: Vec<(Role, String)>) -> Result<BTreeMap<Role, String>, UsageError> {
    let name = |role: &Role| format!("airflow-{}.service", role.component(deployment.release));
    let mut units: BTreeMap<Role, String> = roles.iter().map(|role| (*role, name(role))).collect();
    for (role, unit) in given {
        if units.insert(role, unit.clone()).is_none() {
            return Err(UsageError(format!("-unit {}={unit}: this host does not have that role; add -role {0}", role.word())));
        }
    }
    Ok(units)
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
