//! Verified chains of this thread.
//!
//! Invariant: an entry is only ever found for the same bytes, bundle and role, and only while every certificate of its path
//! is valid. Bounded by two halves of [`ENTRIES_MAX`] that take turns, so a full cache forgets its older half at once and
//! nothing is searched. Refusals are not kept: a stranger cannot push out what works.

use std::cell::RefCell;
use std::collections::HashMap;

use ring::digest;
use rustls::pki_types::CertificateDer;

use super::{Role, Validity};
use crate::identity::SpiffeId;

/// Most entries in a half; a thread keeps at most twice as many. An entry costs about 200 bytes.
const ENTRIES_MAX: usize = 512;

pub(super) type Key = [u8; 32];

#[derive(Default)]
struct Cache {
    young: HashMap<Key, (SpiffeId, Validity)>,
    old: HashMap<Key, (SpiffeId, Validity)>,
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// The name of a presented chain under a bundle and role.
pub(super) fn key(bundle: &[u8; 32], role: Role, leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Key {
    let role: &[u8] = match role {
        Role::Client => b"client",
        Role::Server => b"server",
    };
    let chain = std::iter::once(leaf).chain(intermediates).map(AsRef::as_ref);
    digest(bundle, std::iter::once(role).chain(chain))
}

/// SHA-256 over parts, each with its length in front so that two splits of the same bytes differ.
pub(super) fn digest<'a>(first: &'a [u8], parts: impl Iterator<Item = &'a [u8]>) -> Key {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in std::iter::once(first).chain(parts) {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}

pub(super) fn get(key: &Key, now: u64) -> Option<SpiffeId> {
    CACHE.with_borrow_mut(|cache| {
        if let Some((id, validity)) = cache.young.get(key) {
            return validity.contains(now).then(|| id.clone());
        }
        let (id, validity) = cache.old.remove(key)?;
        let found = validity.contains(now).then(|| id.clone());
        cache.insert(*key, id, validity);
        found
    })
}

pub(super) fn put(key: Key, id: SpiffeId, validity: Validity) {
    CACHE.with_borrow_mut(|cache| cache.insert(key, id, validity));
}

impl Cache {
    fn insert(&mut self, key: Key, id: SpiffeId, validity: Validity) {
        if self.young.len() >= ENTRIES_MAX {
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(key, (id, validity));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> SpiffeId {
        SpiffeId::parse("spiffe://t.consul/ns/default/dc/dc1/svc/web").expect("valid")
    }

    fn numbered(n: usize) -> Key {
        digest(&n.to_be_bytes(), std::iter::empty())
    }

    #[test]
    fn an_entry_counts_only_within_its_validity() {
        put(numbered(1), id(), Validity { not_before: 10, not_after: 20 });
        assert_eq!([9, 10, 20, 21].map(|now| get(&numbered(1), now).is_some()), [false, true, true, false]);
        assert_eq!(get(&numbered(2), 15), None);
    }

    #[test]
    fn it_is_bounded_and_keeps_what_is_used() {
        let always = Validity { not_before: 0, not_after: u64::MAX };
        for n in 0..10 * ENTRIES_MAX {
            put(numbered(n), id(), always);
            assert!(get(&numbered(0), 1).is_some(), "the entry in use was forgotten after {n}");
        }
        let kept = CACHE.with_borrow(|cache| cache.young.len() + cache.old.len());
        assert!(kept <= 2 * ENTRIES_MAX, "{kept} entries");
    }

    #[test]
    fn parts_do_not_run_together() {
        let of = |parts: &[&'static [u8]]| digest(b"x", parts.iter().copied());
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]));
    }
}
