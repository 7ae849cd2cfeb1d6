//! Leaf certificates as an agent hands them out: cached per service, renewed while somebody waits, reissued after a rotation.
//!
//! Invariant: a leaf handed to a query without an index is valid and signed by the active root (or within the rotation jitter);
//! a new leaf always has a new key and a higher index. Keys stay in memory and are wiped when replaced.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rand::Rng;
use serde_json::{Value, json};

use super::AgentError;
use super::ca::Leaf;
use super::state::{State, Topic};
use super::view::stamp;

/// Most services with a leaf at once.
pub(super) const LEAVES_MAX: usize = 4_096;
/// Beyond this share of its life a leaf is renewed at once.
const RENEW_AT_ONCE: f64 = 0.9;

/// The leaves issued so far.
#[derive(Debug, Default)]
pub(super) struct Leaves {
    by_service: BTreeMap<String, Issued>,
}

/// A leaf in the cache.
#[derive(Debug)]
struct Issued {
    leaf: Leaf,
    index: u64,
    /// When a waiting query renews it.
    renew_at: SystemTime,
    /// When it is reissued because the root changed; set when the change is first seen.
    reissue_at: Option<SystemTime>,
}

/// What a leaf query finds: the index and document, and when to look again.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) index: u64,
    pub(super) document: Value,
    /// How long a waiting query sleeps at most before this leaf is due.
    pub(super) due_in: Duration,
}

/// The leaf of `service`: the cached one, or a new one when it is missing or due.
pub(super) fn current(state: &mut State, service: &str, now: SystemTime) -> Result<Found, AgentError> {
    let active_key = state.authority.active().signing_key_id.clone();
    let jitter = state.settings.rotation_jitter;
    let due = match state.leaves.by_service.get_mut(service) {
        None => true,
        Some(issued) => issued.due(&active_key, jitter, now),
    };
    if due {
        issue(state, service, now)?;
    }
    let issued = state.leaves.by_service.get(service).ok_or(AgentError::Full { what: "leaf certificates", most: LEAVES_MAX })?;
    let next = issued.reissue_at.map_or(issued.renew_at, |at| at.min(issued.renew_at));
    Ok(Found { index: issued.index, document: issued.to_json(service), due_in: next.duration_since(now).unwrap_or_default() })
}

fn issue(state: &mut State, service: &str, now: SystemTime) -> Result<(), AgentError> {
    if state.leaves.by_service.len() >= LEAVES_MAX && !state.leaves.by_service.contains_key(service) {
        // Expired leaves belong to services that nobody asks for any more.
        state.leaves.by_service.retain(|_, issued| issued.leaf.valid_before > now);
        if state.leaves.by_service.len() >= LEAVES_MAX {
            return Err(AgentError::Full { what: "leaf certificates", most: LEAVES_MAX });
        }
    }
    let leaf = state.authority.issue(service, &state.settings.datacenter.clone(), state.settings.leaf_ttl, now)?;
    let life = leaf.valid_before.duration_since(leaf.valid_after).unwrap_or_default();
    let window = state.settings.renewal_window;
    let share = if window.0 < window.1 { rand::rng().random_range(window.0..window.1) } else { window.0 };
    let renew_at = leaf.valid_after + life.mul_f64(share.clamp(0.0, RENEW_AT_ONCE));
    // A leaf so short-lived that its window lies in the past must not be reissued in a loop.
    let renew_at = renew_at.max(now + Duration::from_millis(100));
    let index = state.bump(std::iter::empty::<Topic>());
    tracing::debug!(service, serial = %leaf.serial, "leaf certificate issued");
    state.leaves.by_service.insert(service.to_owned(), Issued { leaf, index, renew_at, reissue_at: None });
    Ok(())
}

impl Issued {
    fn due(&mut self, active_key: &str, jitter: Duration, now: SystemTime) -> bool {
        if self.leaf.signing_key_id != active_key {
            let spread = jitter.mul_f64(rand::rng().random_range(0.0..1.0));
            let at = *self.reissue_at.get_or_insert(now + spread);
            if at <= now {
                return true;
            }
        }
        now >= self.renew_at || now >= self.leaf.valid_before
    }

    fn to_json(&self, service: &str) -> Value {
        json!({
            "SerialNumber": self.leaf.serial,
            "CertPEM": self.leaf.chain_pem,
            "PrivateKeyPEM": self.leaf.key_pem.as_str(),
            "Service": service,
            "ServiceURI": self.leaf.uri,
            "ValidAfter": stamp(self.leaf.valid_after),
            "ValidBefore": stamp(self.leaf.valid_before),
            "CreateIndex": self.index,
            "ModifyIndex": self.index,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::AgentSettings;

    fn state(change: impl FnOnce(&mut AgentSettings)) -> State {
        let mut settings = AgentSettings { leaf_ttl: Duration::from_secs(3_600), ..AgentSettings::default() };
        change(&mut settings);
        State::new(settings, SystemTime::now()).expect("a state")
    }

    #[test]
    fn a_leaf_is_cached_until_its_window_and_then_renewed() {
        let (mut state, now) = (state(|_| {}), SystemTime::now());
        let first = current(&mut state, "web", now).expect("issued");
        assert_eq!(current(&mut state, "web", now).expect("cached").index, first.index);
        let due = first.due_in;
        assert!((2_100 - 61..=3_240 - 59).contains(&due.as_secs()), "{due:?}");
        let later = now + due + Duration::from_secs(1);
        let second = current(&mut state, "web", later).expect("renewed");
        assert!(second.index > first.index);
        assert_ne!(second.document["PrivateKeyPEM"], first.document["PrivateKeyPEM"]);
    }

    #[test]
    fn a_rotation_makes_leaves_due_at_once_or_after_the_jitter() {
        let now = SystemTime::now();
        let mut at_once = state(|_| {});
        let first = current(&mut at_once, "web", now).expect("issued").index;
        at_once.authority.rotate(None, 9, now).expect("rotated");
        assert!(current(&mut at_once, "web", now).expect("reissued").index > first);

        let mut jittered = state(|settings| settings.rotation_jitter = Duration::from_secs(30));
        let first = current(&mut jittered, "web", now).expect("issued").index;
        jittered.authority.rotate(None, 9, now).expect("rotated");
        let waiting = current(&mut jittered, "web", now).expect("still the old one");
        assert!(waiting.due_in <= Duration::from_secs(30));
        let after = current(&mut jittered, "web", now + Duration::from_secs(31)).expect("reissued");
        assert!(waiting.index == first && after.index > first);
    }
}
