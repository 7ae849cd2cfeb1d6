//! The resources of one kind: the newest of each that could be understood, and what was refused since.
//!
//! Invariant: a refused update leaves the one before it in its place.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};

use super::held::Kind;
use super::refusal::Refusal;
use super::shown::{Came, Shown as ShownResource};
use crate::control::dump::Refused;
use crate::telemetry::stats::Changes;

/// Resources of one kind; more is a mistake at the other end.
const RESOURCES_MAX: usize = 20_000;
/// Refused updates of one kind that are remembered, each under its resource's name.
const REFUSED_MAX: usize = 100;

/// The resources of one kind.
#[derive(Debug)]
pub(super) struct Shelf<T> {
    pub(super) entries: BTreeMap<String, Entry<T>>,
    /// Whether the server has answered for this kind at all.
    pub(super) answered: bool,
    /// By name, the newest update where that was refused, whether or not there is an older one in force.
    pub(super) refused: BTreeMap<String, Arc<Refused>>,
    /// What of both is shown, until it changes.
    shown: Option<Arc<[ShownResource]>>,
    /// Those of the bootstrap are not among it.
    pub(super) changes: Changes,
}

#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) value: Arc<T>,
    /// As the server sent it; none is from the bootstrap, and the server can neither change nor remove it.
    pub(super) came: Option<Arc<Came>>,
    /// A newer version of it was refused.
    pub(super) outdated: bool,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), answered: false, refused: BTreeMap::new(), shown: None, changes: Changes::default() }
    }
}

impl<T> Shelf<T> {
    pub(super) fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.entries.get(name).map(|entry| &entry.value)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.entries.values().map(|entry| &entry.value)
    }

    /// Those of which nothing newer was refused.
    pub(super) fn up_to_date(&self) -> impl Iterator<Item = &Arc<T>> {
        self.entries.values().filter(|entry| !entry.outdated).map(|entry| &entry.value)
    }

    pub(super) fn fix(&mut self, name: String, value: T) {
        self.entries.insert(name, Entry { value: Arc::new(value), came: None, outdated: false });
    }

    pub(super) fn versions(&self) -> impl Iterator<Item = (String, String)> {
        self.entries.iter().filter_map(|(name, entry)| Some((name.clone(), entry.came.as_ref()?.version.clone())))
    }

    /// Returns what was refused.
    pub(super) fn apply(
        &mut self,
        kind: Kind,
        response: &DeltaDiscoveryResponse,
        mut parse: impl FnMut(&Resource) -> Result<T, Refusal>,
    ) -> Vec<String> {
        let mut refused = Vec::new();
        let now = SystemTime::now();
        for resource in &response.resources {
            let Err(why) = self.take(resource, now, &mut parse) else {
                self.refused.remove(&resource.name);
                continue;
            };
            let why = format!("{} {}: {why}", kind.message(), resource.name);
            if self.refused.len() < REFUSED_MAX || self.refused.contains_key(&resource.name) {
                let told = Refused { at: now, details: why.clone(), version_info: resource.version.clone() };
                self.refused.insert(resource.name.clone(), Arc::new(told));
            }
            refused.push(why);
        }
        let removed: BTreeSet<&String> = response.removed_resources.iter().collect();
        let before = self.entries.len();
        self.entries.retain(|name, entry| entry.came.is_none() || !removed.contains(name));
        self.changes.removed += (before - self.entries.len()) as u64;
        self.refused.retain(|name, _| !removed.contains(name));
        self.answered = true;
        self.shown = None;
        refused
    }

    /// Puts one resource in the place of the one before it; otherwise says why not.
    fn take(
        &mut self,
        resource: &Resource,
        now: SystemTime,
        parse: impl FnOnce(&Resource) -> Result<T, Refusal>,
    ) -> Result<(), String> {
        match self.entries.get(&resource.name) {
            None if self.entries.len() >= RESOURCES_MAX => return Err(format!("more than {RESOURCES_MAX} resources")),
            Some(Entry { came: None, .. }) => return Err("the bootstrap has one of this name".to_owned()),
            _ => {}
        }
        let value = parse(resource).map_err(|why| {
            if let Some(entry) = self.entries.get_mut(&resource.name) {
                entry.outdated = true;
            }
            why.to_string()
        })?;
        let before = self.entries.get(&resource.name).and_then(|entry| entry.came.as_deref());
        let bytes = resource.resource.as_ref().map(|any| any.value.clone()).unwrap_or_default();
        let came = Came::new(&resource.version, bytes, now, before);
        match before {
            None => self.changes.added += 1,
            Some(before) => self.changes.modified += u64::from(!came.is_same_as(before)),
        }
        let entry = Entry { value: Arc::new(value), came: Some(Arc::new(came)), outdated: false };
        self.entries.insert(resource.name.clone(), entry);
        Ok(())
    }

    pub(super) fn keep_only(&mut self, names: &BTreeSet<String>) {
        let before = (self.entries.len(), self.refused.len());
        self.entries.retain(|name, _| names.contains(name));
        self.refused.retain(|name, _| names.contains(name));
        if (self.entries.len(), self.refused.len()) != before {
            self.shown = None;
        }
    }

    /// What the server has sent, in the order of names.
    pub(super) fn shown(&mut self) -> Arc<[ShownResource]> {
        let Self { entries, refused, shown, .. } = self;
        let make = || {
            let told = |name: &String| refused.get(name).map(Arc::clone);
            let held = entries.iter().filter_map(|(name, entry)| {
                let came = Arc::clone(entry.came.as_ref()?);
                Some(ShownResource { name: name.clone(), came: Some(came), refused: told(name) })
            });
            let never = refused.keys().filter(|name| entries.get(*name).is_none_or(|entry| entry.came.is_none()));
            let never = never.map(|name| ShownResource { name: name.clone(), came: None, refused: told(name) });
            held.chain(never).collect()
        };
        Arc::clone(shown.get_or_insert_with(make))
    }
}
