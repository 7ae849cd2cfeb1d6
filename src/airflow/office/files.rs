//! The files that the office works by: taken over when they change, whole or not at all.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::super::catalog::Catalog;
use super::super::rules::{self, Component, Rules};
use super::Office;

/// The rules file as it was last accepted.
pub(super) struct InForce {
    pub(super) path: PathBuf,
    pub(super) stamp: Option<Stamp>,
    pub(super) settings: rules::Settings,
    pub(super) components: Vec<Component>,
    pub(super) rules: Rules,
}

/// A file that may be absent, as it was last accepted.
pub(super) struct Loaded<T> {
    pub(super) path: Option<PathBuf>,
    pub(super) stamp: Option<Stamp>,
    pub(super) value: T,
}

/// What changes when a file does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: SystemTime,
    length: u64,
    inode: u64,
}

impl Stamp {
    pub(super) fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self { modified: metadata.modified().ok()?, length: metadata.len(), inode: metadata.ino() })
    }
}

impl Office {
    /// Takes a changed rules file over, if it is right. Says whether it did.
    pub(super) fn reload_rules(&mut self) -> bool {
        let stamp = Stamp::of(&self.rules.path);
        if stamp.is_none() || stamp == self.rules.stamp {
            return false;
        }
        self.rules.stamp = stamp;
        let file = match Rules::load(&self.rules.path) {
            Ok(file) => file,
            Err(error) => {
                tracing::error!(%error, "the rules are not taken over; those before stay in force");
                return false;
            }
        };
        for warning in &file.warnings {
            tracing::warn!(rules = %self.rules.path.display(), "{warning}");
        }
        let (old, new) = (&self.rules.settings, &file.settings);
        let fixed = |settings: &rules::Settings| {
            (
                settings.socket.clone(),
                settings.cgroup.clone(),
                settings.identities_max,
                settings.redirects.clone(),
                settings.lease_port,
            )
        };
        if fixed(old) != fixed(new) {
            tracing::warn!(
                "`socket`, `cgroup`, `identities_max`, `redirect` and `lease_port` take effect with the next start of ringfence"
            );
        }
        if old.catalog != file.settings.catalog {
            self.catalog = Loaded { path: file.settings.catalog.clone(), stamp: None, value: Catalog::default() };
        }
        tracing::info!(rules = %self.rules.path.display(), "new rules in force");
        self.rules.settings = file.settings;
        self.rules.components = file.components;
        self.rules.rules = file.rules;
        // What was reserved and believed was so by the rules before.
        self.look_up();
        self.registry.forget_roots();
        self.attributor.forget_roots();
        true
    }

    pub(super) fn reload_catalog(&mut self) -> bool {
        let Some(path) = &self.catalog.path else { return false };
        let stamp = Stamp::of(path);
        if stamp.is_none() || stamp == self.catalog.stamp {
            return false;
        }
        self.catalog.stamp = stamp;
        match Catalog::load(path) {
            Ok(catalog) => {
                tracing::info!(catalog = %path.display(), dags = catalog.len(), "new catalog in force");
                self.catalog.value = catalog;
                true
            }
            Err(error) => {
                tracing::error!(%error, "the catalog is not taken over; the one before stays in force");
                false
            }
        }
    }
}
