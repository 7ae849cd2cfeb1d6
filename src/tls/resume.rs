//! Resumption that cannot skip a decision: what a server seals into tickets, and what a client remembers of its sessions.
//!
//! Invariant: a ticket opens only under the identity that sealed it, or at an ingress gateway the settings: each new leaf or trust
//! bundle has a new key, and the old one goes with the old identity. A session is remembered for one endpoint by one thread and used with the very
//! configuration that made it; what is remembered goes with that configuration, at the latest when its last connection ends. Resumption replaces signatures only: the peer's chain, its validity and its SPIFFE ID are
//! checked after a resumed handshake as after a full one (`handshake::Handshake::establish`), and the intention is decided
//! on every connection.
//!
//! Fails by doing a full handshake: a ticket that is old, foreign or forged is no error.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::server::ProducesTickets;
use zeroize::Zeroizing;

use super::backend::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use super::backend::rand::{SecureRandom, SystemRandom};

/// How old a ticket may be: BoringSSL's session lifetime, which Envoy keeps.
const TICKET_LIFETIME: Duration = Duration::from_secs(2 * 3_600);
const TIME_BYTES: usize = 8;
const KEY_BYTES: usize = 32;
/// Most TLS 1.3 tickets remembered for one endpoint: each serves one connection, and so many may begin at once.
const TICKETS_MAX: usize = 64;
/// Tickets that a thread remembers before an endpoint's next one only replaces its oldest. A ticket takes about 4 KiB.
const TICKETS_OF_THREAD_MAX: usize = 1_024;

/// The key of one identity's tickets, the same on all its workers: a client may come back to another one.
pub(super) struct TicketKey(Zeroizing<[u8; KEY_BYTES]>);

impl TicketKey {
    /// A new random one, or `None` when the system has no randomness to give.
    pub(super) fn random() -> Option<Self> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        SystemRandom::new().fill(&mut *key).ok()?;
        Some(Self(key))
    }

    /// What one worker's server configuration seals and opens with.
    pub(super) fn tickets(&self) -> Option<Tickets> {
        let key = UnboundKey::new(&AES_256_GCM, &*self.0).ok()?;
        Some(Tickets { key: LessSafeKey::new(key), random: SystemRandom::new() })
    }
}

/// Seals session state into tickets: `nonce | AES-256-GCM(time of issue | state)`.
pub(super) struct Tickets {
    key: LessSafeKey,
    random: SystemRandom,
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(TICKET_LIFETIME.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut ticket = Vec::with_capacity(NONCE_LEN + TIME_BYTES + plain.len() + AES_256_GCM.tag_len());
        ticket.extend_from_slice(&nonce);
        ticket.extend_from_slice(&now_s().to_be_bytes());
        ticket.extend_from_slice(plain);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut ticket[NONCE_LEN..]).ok()?;
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = ticket.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut sealed = sealed.to_vec();
        let plain = self.key.open_in_place(nonce, Aad::empty(), &mut sealed).ok()?;
        let (issued, state) = plain.split_at_checked(TIME_BYTES)?;
        let age_s = now_s().checked_sub(u64::from_be_bytes(issued.try_into().ok()?))?;
        (age_s <= TICKET_LIFETIME.as_secs()).then(|| state.to_vec())
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets { key: [redacted] }")
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What is remembered of one endpoint's sessions. rustls wants a store that threads could share; this one is a name for a
/// place in the memory of the thread that asks, so nothing is locked and workers share nothing.
#[derive(Debug)]
pub(super) struct Sessions(u64);

#[derive(Default)]
struct Remembered {
    group: Option<NamedGroup>,
    tls12: Option<Tls12ClientSessionValue>,
    tls13: VecDeque<Tls13ClientSessionValue>,
}

#[derive(Default)]
struct Memory {
    endpoints: HashMap<u64, Remembered>,
    /// TLS 1.3 tickets of all of them.
    tickets: usize,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

impl Memory {
    /// Keeps a ticket; what it displaces is returned, to be dropped where nothing is borrowed.
    fn insert(&mut self, id: u64, ticket: Tls13ClientSessionValue) -> Option<Tls13ClientSessionValue> {
        let queue = &mut self.endpoints.entry(id).or_default().tls13;
        let full = queue.len() >= TICKETS_MAX || self.tickets >= TICKETS_OF_THREAD_MAX;
        let displaced = if full { queue.pop_front() } else { None };
        queue.push_back(ticket);
        self.tickets += usize::from(displaced.is_none());
        displaced
    }

    /// The newest ticket, which has the longest to live.
    fn take(&mut self, id: u64) -> Option<Tls13ClientSessionValue> {
        let ticket = self.endpoints.get_mut(&id)?.tls13.pop_back()?;
        self.tickets -= 1;
        Some(ticket)
    }

    fn forget(&mut self, id: u64) -> Option<Remembered> {
        let gone = self.endpoints.remove(&id)?;
        self.tickets -= gone.tls13.len();
        Some(gone)
    }
}

impl Sessions {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Remembered) -> T) -> T {
        MEMORY.with_borrow_mut(|memory| act(memory.endpoints.entry(self.0).or_default()))
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        // A thread that ends has forgotten everything already. Taken out first: what it holds is dropped outside the borrow.
        let gone = MEMORY.try_with(|memory| memory.try_borrow_mut().ok().and_then(|mut memory| memory.forget(self.0)));
        drop(gone);
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.with(|remembered| remembered.group = Some(group));
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.with(|remembered| remembered.group)
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        let old = self.with(|remembered| remembered.tls12.replace(value));
        drop(old);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.with(|remembered| remembered.tls12.clone())
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        let old = self.with(|remembered| remembered.tls12.take());
        drop(old);
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        let displaced = MEMORY.with_borrow_mut(|memory| memory.insert(self.0, value));
        drop(displaced);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        MEMORY.with_borrow_mut(|memory| memory.take(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tickets() -> Tickets {
        TicketKey::random().expect("randomness").tickets().expect("a key")
    }

    #[test]
    fn a_ticket_opens_under_its_own_key_on_any_worker_and_under_no_other() {
        let key = TicketKey::random().expect("randomness");
        let (one, two) = (key.tickets().expect("a key"), key.tickets().expect("a key"));
        let ticket = one.encrypt(b"state").expect("sealed");
        assert_eq!(two.decrypt(&ticket).as_deref(), Some(&b"state"[..]));
        assert_ne!(one.encrypt(b"state").expect("sealed"), ticket, "a nonce of its own each time");
        assert_eq!(tickets().decrypt(&ticket), None);
    }

    #[test]
    fn an_old_ticket_and_one_from_the_future_are_refused() {
        let tickets = tickets();
        let sealed_at = |issued: u64| {
            let mut ticket = vec![7; NONCE_LEN];
            ticket.extend_from_slice(&issued.to_be_bytes());
            ticket.extend_from_slice(b"state");
            let nonce = Nonce::assume_unique_for_key([7; NONCE_LEN]);
            let tag = tickets.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut ticket[NONCE_LEN..]).expect("sealed");
            ticket.extend_from_slice(tag.as_ref());
            tickets.decrypt(&ticket)
        };
        assert!(sealed_at(now_s() - 60).is_some());
        assert_eq!(sealed_at(now_s() - TICKET_LIFETIME.as_secs() - 60), None);
        assert_eq!(sealed_at(now_s() + 60), None);
    }

    proptest! {
        #[test]
        fn forged_tickets_are_refused(forged in prop::collection::vec(any::<u8>(), 0..200), flip in any::<prop::sample::Index>()) {
            let tickets = tickets();
            prop_assert_eq!(tickets.decrypt(&forged), None);
            let mut ticket = tickets.encrypt(b"state").expect("sealed");
            let at = flip.index(ticket.len());
            ticket[at] ^= 1;
            prop_assert_eq!(tickets.decrypt(&ticket), None);
        }
    }
}
