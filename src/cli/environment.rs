//! The environment variables that steer a sidecar, taken once at start.
//!
//! Invariant: an empty variable is an unset one, as in Consul. Values may be secrets and are never printed.

use std::collections::BTreeMap;

use zeroize::Zeroizing;

/// A copy of the variables that Consul's tools read, and of our own; tests make their own.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, Zeroizing<String>>);

impl Environment {
    /// What this process was started with.
    pub fn of_process() -> Self {
        let ours = |name: &str| ["CONSUL_", "CONNECT_", "RINGFENCE_"].iter().any(|prefix| name.starts_with(prefix));
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ours(name))
            .collect()
    }

    /// The value, if it is set and not empty.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|value| value.as_str()).filter(|value| !value.is_empty())
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name, Zeroizing::new(value))).collect())
    }
}

impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
