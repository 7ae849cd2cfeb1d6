//! Checks inside the state: registration, results, aliases, maintenance, pins and expiry.
//!
//! Invariant: after each change here every alias agrees with what it aliases, and the index moved exactly when somebody
//! outside could see a difference. No I/O: probes report through [`State::set_health`].

use std::collections::BTreeMap;

use super::{CHECKS_MAX, State, Topic, topics};
use crate::agent::AgentError;
use crate::agent::check::{Check, Health};
use crate::agent::definition::{CheckDefinition, Definition};

/// Chains of aliases followed when health changes.
const ALIAS_DEPTH_MAX: usize = 8;

impl State {
    /// Replaces the checks that came with the service's definition; those with an equal definition keep their health.
    pub(super) fn put_checks(&mut self, definition: &Definition) {
        let single = definition.checks.len() == 1;
        let wanted: BTreeMap<String, &CheckDefinition> = definition
            .checks
            .iter()
            .enumerate()
            .map(|(at, check)| {
                let made =
                    if single { format!("service:{}", definition.id) } else { format!("service:{}:{}", definition.id, at + 1) };
                (check.given_id().map_or(made, str::to_owned), check)
            })
            .collect();
        self.checks.retain(|id, check| {
            check.service_id != definition.id
                || !check.with_service
                || wanted.get(id).is_some_and(|new| check.definition == **new)
        });
        for (id, check) in wanted {
            if !self.checks.contains_key(&id) {
                let mut check = Check::new(id.clone(), check.clone(), true);
                check.service_id.clone_from(&definition.id);
                check.service_name.clone_from(&definition.name);
                check.modify_index = self.bump(topics(definition));
                check.create_index = check.modify_index;
                self.checks.insert(id, check);
            }
        }
    }

    /// Registers a check by itself.
    pub(in crate::agent) fn register_check(&mut self, definition: CheckDefinition) -> Result<(), AgentError> {
        if self.checks.len() >= CHECKS_MAX {
            return Err(AgentError::Full { what: "checks", most: CHECKS_MAX });
        }
        let id = definition.given_id().unwrap_or(&definition.name).to_owned();
        let service_id = definition.service_id.clone();
        let service_name = match self.services.get(&service_id) {
            Some(service) => service.definition.name.clone(),
            None if service_id.is_empty() => String::new(),
            None => return Err(AgentError::Refused(format!("ServiceID {service_id:?} does not exist"))),
        };
        if self.checks.get(&id).is_some_and(|check| check.definition == definition) {
            return Ok(());
        }
        let mut check = Check::new(id.clone(), definition, false);
        (check.service_id, check.service_name) = (service_id, service_name);
        let topics = self.check_topics(&check);
        check.modify_index = self.bump(topics);
        check.create_index = check.modify_index;
        self.checks.insert(id, check);
        self.settle_aliases();
        Ok(())
    }

    /// Removes a check; one that is not there is no error, as in Consul.
    pub(in crate::agent) fn deregister_check(&mut self, id: &str) {
        if let Some(check) = self.checks.remove(id) {
            let topics = self.check_topics(&check);
            self.bump(topics);
            self.settle_aliases();
        }
    }

    /// Puts a service into maintenance or out of it; tells whether the service exists.
    pub(in crate::agent) fn maintain(&mut self, id: &str, enable: bool, reason: &str) -> bool {
        let Some(service) = self.services.get(id) else {
            return false;
        };
        let check_id = format!("_service_maintenance:{id}");
        if !enable {
            self.deregister_check(&check_id);
        } else if !self.checks.contains_key(&check_id) {
            let name = service.definition.name.clone();
            let reason = if reason.is_empty() {
                "Maintenance mode is enabled for this service, but no reason was provided. This is a default message."
            } else {
                reason
            };
            let mut check = Check::maintenance(check_id.clone(), reason);
            (check.service_id, check.service_name) = (id.to_owned(), name);
            let topics = self.check_topics(&check);
            check.modify_index = self.bump(topics);
            check.create_index = check.modify_index;
            self.checks.insert(check_id, check);
            self.settle_aliases();
        }
        true
    }

    /// Records a check's result.
    pub(in crate::agent) fn set_health(&mut self, check_id: &str, health: Health, output: String) {
        let Some(check) = self.checks.get_mut(check_id) else {
            return;
        };
        let changed = check.set(health, output);
        if changed {
            self.touch(check_id);
            self.settle_aliases();
        }
    }

    /// Makes every check of `service_id` report `health`, whatever is observed; `None` goes back to what is observed.
    pub(in crate::agent) fn pin(&mut self, service_id: &str, health: Option<Health>) -> Result<(), AgentError> {
        let Some(service) = self.services.get(service_id) else {
            return Err(AgentError::Refused(format!("unknown service ID {service_id:?}: register it first")));
        };
        let name = service.definition.name.clone();
        match health {
            Some(health) => self.pins.insert(service_id.to_owned(), health),
            None => self.pins.remove(service_id),
        };
        if self.checks.values().all(|check| check.service_id != service_id) {
            let mut check = Check::pinned(format!("service:{service_id}"));
            (check.service_id, check.service_name) = (service_id.to_owned(), name);
            self.checks.insert(check.id.clone(), check);
        }
        let ids: Vec<_> = self.checks_of(service_id).map(|check| check.id.clone()).collect();
        ids.iter().for_each(|id| self.touch(id));
        self.settle_aliases();
        Ok(())
    }

    /// What `check` reports to the outside.
    pub(in crate::agent) fn health(&self, check: &Check) -> Health {
        self.pins.get(&check.service_id).copied().unwrap_or(check.observed)
    }

    /// The checks of a service.
    pub(in crate::agent) fn checks_of<'a>(&'a self, service_id: &'a str) -> impl Iterator<Item = &'a Check> {
        self.checks.values().filter(move |check| check.service_id == service_id)
    }

    /// The worst health of a service's checks.
    pub(in crate::agent) fn service_health(&self, service_id: &str) -> Health {
        self.checks_of(service_id).map(|check| self.health(check)).max().unwrap_or(Health::Passing)
    }

    /// When the housekeeping has something to do next.
    pub(in crate::agent) fn next_deadline(&self) -> Option<std::time::Instant> {
        self.checks.values().filter_map(Check::next_deadline).min()
    }

    /// Expires TTL checks and removes services that were critical for too long.
    pub(in crate::agent) fn expire(&mut self, now: std::time::Instant) {
        let expired: Vec<_> = self.checks.values().filter(|check| check.expired(now)).map(|check| check.id.clone()).collect();
        for id in expired {
            if let Some(check) = self.checks.get_mut(&id) {
                check.ttl_deadline = None;
            }
            self.set_health(&id, Health::Critical, "TTL expired".to_owned());
        }
        let doomed: Vec<_> =
            self.checks.values().filter(|check| check.reapable(now)).map(|check| check.service_id.clone()).collect();
        for id in doomed.iter().filter(|id| !id.is_empty()) {
            tracing::info!(service = %id, "service deregistered: a check was critical for longer than deregister_critical_service_after");
            self.deregister(id);
        }
    }

    /// Aliases follow what they alias; a chain of aliases settles in a bounded number of rounds.
    pub(super) fn settle_aliases(&mut self) {
        for _ in 0..ALIAS_DEPTH_MAX {
            let updates: Vec<_> = self.checks.values().filter_map(|check| self.alias_update(check)).collect();
            if updates.is_empty() {
                return;
            }
            for (id, health, output) in updates {
                if self.checks.get_mut(&id).is_some_and(|check| check.set(health, output)) {
                    self.touch(&id);
                }
            }
        }
    }

    fn alias_update(&self, check: &Check) -> Option<(String, Health, String)> {
        let target = Some(check.definition.alias_service.as_str()).filter(|id| !id.is_empty())?;
        let worst = self.checks_of(target).filter(|other| other.id != check.id).max_by_key(|other| self.health(other));
        let (health, output) = match worst {
            _ if !self.services.contains_key(target) => {
                (Health::Critical, format!("Aliased service {target:?} is not registered"))
            }
            None => (Health::Passing, "No checks found.".to_owned()),
            Some(other) => match self.health(other) {
                Health::Passing => (Health::Passing, "All checks passing.".to_owned()),
                health => (health, format!("Aliased check {:?} failing: {}", other.name, other.output)),
            },
        };
        (check.observed != health || check.output != output).then(|| (check.id.clone(), health, output))
    }

    /// Stamps a new index on a check that changed.
    fn touch(&mut self, check_id: &str) {
        let Some(topics) = self.checks.get(check_id).map(|check| self.check_topics(check)) else {
            return;
        };
        let index = self.bump(topics);
        if let Some(check) = self.checks.get_mut(check_id) {
            check.modify_index = index;
        }
    }

    fn check_topics(&self, check: &Check) -> Vec<Topic> {
        self.services.get(&check.service_id).map_or_else(|| vec![Topic::Catalog], |service| topics(&service.definition))
    }
}
