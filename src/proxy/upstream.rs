//! Chooses an endpoint of an upstream, and remembers what this worker saw of each.
//!
//! Invariant: an endpoint that Consul calls unhealthy or that is ejected is not chosen but in panic, below the cluster's own
//! threshold; a target is used only when none before it has a usable endpoint. State lives per worker and survives snapshots by
//! address.
//!
//! Source of the semantics: Envoy's cluster load balancing and outlier detection as Consul configures them
//! (`agent/xds/config.go` ToOutlierDetection), and its panic (`recalculatePerPriorityPanic` of its load balancers).

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::limits::{DIALERS_MAX, EJECTION_MAX};
use crate::config::Keepalive;
use crate::mesh::{Balance, Endpoint, Identity, Outlier, Target, Upstream};
use crate::tls::Dialer;

/// Envoy's `overprovisioning_factor`: what a healthy endpoint can take for those that are not. Consul sends another one only
/// where the threshold is 0.
const OVERPROVISIONED_PERCENT: usize = 140;

/// One upstream as this worker knows it.
#[derive(Debug)]
pub(super) struct Balancer {
    upstream: Arc<Upstream>,
    seen: HashMap<SocketAddr, Seen>,
    /// Cheap pseudo-random state; quality does not matter here.
    random: u64,
}

/// What this worker saw of one endpoint.
#[derive(Debug, Default)]
struct Seen {
    active: u32,
    failures_in_a_row: u32,
    ejections: u32,
    ejected_until: Option<Instant>,
    /// Smooth weighted round robin's running weight.
    credit: i64,
    /// Made by the first connection under each identity in use; the last used one is the last.
    dialers: Vec<(Arc<Identity>, Dialer)>,
}

/// What was chosen.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    pub(super) target: Arc<Target>,
    pub(super) address: SocketAddr,
    /// Whether unhealthy ones were among those to choose from.
    pub(super) in_panic: bool,
}

/// How an endpoint is dialed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dial {
    /// Bound on all that it takes, TLS included.
    pub(super) timeout: Duration,
    /// Where that is not the process's own.
    pub(super) keepalive: Option<Keepalive>,
}

impl Dial {
    pub(super) fn to(upstream: &Upstream) -> Self {
        Self { timeout: upstream.connect_timeout, keepalive: upstream.keepalive }
    }
}

impl Balancer {
    pub(super) fn new(upstream: Arc<Upstream>, seed: u64) -> Self {
        Self { upstream, seen: HashMap::new(), random: seed | 1 }
    }

    pub(super) fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Takes over what a new snapshot says, if that is anything new.
    pub(super) fn adopt(&mut self, upstream: Arc<Upstream>) {
        if !Arc::ptr_eq(&self.upstream, &upstream) {
            self.update(upstream);
        }
    }

    /// Takes a new version over; what was seen of addresses that stay is kept.
    fn update(&mut self, upstream: Arc<Upstream>) {
        let addresses: std::collections::HashSet<SocketAddr> =
            upstream.targets.iter().flat_map(|target| target.endpoints.iter().map(|endpoint| endpoint.address)).collect();
        self.seen.retain(|address, seen| seen.active > 0 || addresses.contains(address));
        self.upstream = upstream;
    }

    /// An endpoint that is not in `tried`, or `None` when no target has one left.
    pub(super) fn choose(&mut self, client: Option<IpAddr>, tried: &[SocketAddr], now: Instant) -> Option<Choice> {
        let upstream = Arc::clone(&self.upstream);
        let mut any_is_usable = false;
        for target in &upstream.targets {
            let mut from: Vec<_> = self.usable(target, now).collect();
            if from.is_empty() {
                continue;
            }
            any_is_usable = true;
            let in_panic = self.is_in_panic(target, from.len(), now);
            if in_panic {
                from = everybody(target);
            }
            from.retain(|(address, _)| !tried.contains(address));
            if let Some(address) = self.pick(&from, client) {
                return Some(Choice { target: Arc::clone(target), address, in_panic });
            }
        }
        if any_is_usable || upstream.panic_percent == 0 {
            return None;
        }
        // Nobody is well anywhere: that may be the fault of who looks.
        let target = upstream.targets.iter().find(|target| !target.endpoints.is_empty())?;
        let mut from = everybody(target);
        from.retain(|(address, _)| !tried.contains(address));
        let address = self.pick(&from, client)?;
        Some(Choice { target: Arc::clone(target), address, in_panic: true })
    }

    fn usable<'a>(&'a self, target: &'a Target, now: Instant) -> impl Iterator<Item = (SocketAddr, u32)> + 'a {
        let usable = move |endpoint: &&Endpoint| endpoint.healthy && !self.is_ejected(endpoint.address, now);
        target.endpoints.iter().filter(usable).map(weighed)
    }

    /// Whether so few of a target are usable, and of all others with it, that each is as good as any.
    fn is_in_panic(&self, target: &Target, usable: usize, now: Instant) -> bool {
        let is_below = usable * 100 < target.endpoints.len() * self.upstream.panic_percent as usize;
        let share = |target: &Arc<Target>| match target.endpoints.len() {
            0 => 0,
            all => (self.usable(target, now).count() * OVERPROVISIONED_PERCENT / all).min(100),
        };
        is_below && self.upstream.targets.iter().map(share).sum::<usize>() < 100
    }

    /// Where a redirected connection wanted to go, of an upstream that leads there.
    pub(super) fn original(&self, wanted: SocketAddr) -> Option<Choice> {
        let target = self.upstream.targets.first()?;
        Some(Choice { target: Arc::clone(target), address: wanted, in_panic: false })
    }

    fn pick(&mut self, usable: &[(SocketAddr, u32)], client: Option<IpAddr>) -> Option<SocketAddr> {
        match (self.upstream.balance, client) {
            (Balance::RoundRobin, _) => self.round_robin(usable),
            (Balance::LeastRequest { choices }, _) => self.least_request(usable, choices),
            (Balance::Random, _) | (Balance::RingHash | Balance::Maglev, None) => self.weighted_random(usable),
            (Balance::RingHash | Balance::Maglev, Some(client)) => rendezvous(usable, client),
        }
    }

    fn round_robin(&mut self, usable: &[(SocketAddr, u32)]) -> Option<SocketAddr> {
        let total: i64 = usable.iter().map(|(_, weight)| i64::from(*weight)).sum();
        for (address, weight) in usable {
            self.seen.entry(*address).or_default().credit += i64::from(*weight);
        }
        let (address, _) = usable.iter().max_by_key(|(address, _)| self.seen.get(address).map_or(0, |seen| seen.credit))?;
        self.seen.entry(*address).or_default().credit -= total;
        Some(*address)
    }

    fn least_request(&mut self, usable: &[(SocketAddr, u32)], choices: u32) -> Option<SocketAddr> {
        let mut best: Option<(SocketAddr, u32)> = None;
        for _ in 0..choices.max(2) {
            let address = self.weighted_random(usable)?;
            let active = self.seen.get(&address).map_or(0, |seen| seen.active);
            if best.is_none_or(|(_, least)| active < least) {
                best = Some((address, active));
            }
        }
        best.map(|(address, _)| address)
    }

    fn weighted_random(&mut self, usable: &[(SocketAddr, u32)]) -> Option<SocketAddr> {
        let total: u64 = usable.iter().map(|(_, weight)| u64::from(*weight)).sum();
        if total == 0 {
            return None;
        }
        let mut at = self.next_random() % total;
        for (address, weight) in usable {
            match at.checked_sub(u64::from(*weight)) {
                Some(rest) => at = rest,
                None => return Some(*address),
            }
        }
        None
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64*: enough for spreading load.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// What `choice` is dialed with under `identity`, on worker `index`. Sessions of one identity are never another's: they
    /// are found by the identity itself, which is kept as long as they are.
    pub(super) fn dialer(&mut self, identity: &Arc<Identity>, index: usize, choice: &Choice) -> Option<&Dialer> {
        let Target { sni, expected, .. } = &*choice.target;
        let dialers = &mut self.seen.entry(choice.address).or_default().dialers;
        match dialers.iter().position(|(of, dialer)| Arc::ptr_eq(of, identity) && dialer.fits(sni, expected)) {
            Some(at) => dialers[at..].rotate_left(1),
            None => {
                let dialer = identity.tls.get(index)?.dialer(sni, expected);
                dialers.retain(|(of, _)| !Arc::ptr_eq(of, identity));
                if dialers.len() >= DIALERS_MAX {
                    dialers.remove(0);
                }
                dialers.push((Arc::clone(identity), dialer));
            }
        }
        dialers.last().map(|(_, dialer)| dialer)
    }

    /// Drops what belongs to identities that are no longer in use: their sessions are not used again, and their keys go with
    /// the last connections that they were used for.
    pub(super) fn keep_dialers(&mut self, in_use: impl Fn(&Arc<Identity>) -> bool) {
        for seen in self.seen.values_mut() {
            seen.dialers.retain(|(identity, _)| in_use(identity));
        }
    }

    /// A connection to `address` begins.
    pub(super) fn opened(&mut self, address: SocketAddr) {
        self.seen.entry(address).or_default().active += 1;
    }

    /// It ended, whatever came of it.
    pub(super) fn closed(&mut self, address: SocketAddr) {
        let Some(seen) = self.seen.get_mut(&address) else { return };
        seen.active = seen.active.saturating_sub(1);
        // Clients choose these addresses, and nobody ever says that one is gone.
        if self.upstream.original && seen.active == 0 {
            self.seen.remove(&address);
        }
    }

    /// Connect and handshake succeeded.
    pub(super) fn succeeded(&mut self, address: SocketAddr) {
        self.seen.entry(address).or_default().failures_in_a_row = 0;
    }

    /// Connect or handshake failed. Returns for how long the endpoint is ejected, if it now is.
    pub(super) fn failed(&mut self, address: SocketAddr, now: Instant) -> Option<Duration> {
        if self.upstream.original {
            return None;
        }
        let outlier = self.upstream.outlier;
        let roll = u32::try_from(self.next_random() % 100).unwrap_or(0);
        let may_eject = self.may_eject_one_more(outlier, now);
        let seen = self.seen.entry(address).or_default();
        seen.failures_in_a_row = seen.failures_in_a_row.saturating_add(1);
        if outlier.max_failures == 0
            || seen.failures_in_a_row < outlier.max_failures
            || !may_eject
            || roll >= outlier.enforcing_percent
        {
            return None;
        }
        seen.failures_in_a_row = 0;
        seen.ejections += 1;
        let duration = outlier.base_ejection.saturating_mul(seen.ejections).min(EJECTION_MAX.max(outlier.base_ejection));
        seen.ejected_until = Some(now + duration);
        Some(duration)
    }

    fn may_eject_one_more(&self, outlier: Outlier, now: Instant) -> bool {
        let all: usize = self.upstream.targets.iter().map(|target| target.endpoints.len()).sum();
        let ejected = self.seen.values().filter(|seen| seen.ejected_until.is_some_and(|until| until > now)).count();
        // At least one may always be ejected, as in Envoy.
        ejected == 0 || (ejected + 1) * 100 <= all * outlier.max_ejection_percent as usize
    }

    fn is_ejected(&self, address: SocketAddr, now: Instant) -> bool {
        self.seen.get(&address).and_then(|seen| seen.ejected_until).is_some_and(|until| until > now)
    }
}

fn weighed(endpoint: &Endpoint) -> (SocketAddr, u32) {
    (endpoint.address, endpoint.weight.max(1))
}

fn everybody(target: &Target) -> Vec<(SocketAddr, u32)> {
    target.endpoints.iter().map(weighed).collect()
}

/// Weighted highest-random-weight hashing. It serves both ring hash and Maglev: what users rely on is that a client keeps
/// its endpoint while the set stays and that few clients move when it changes; no table must be built on a worker.
fn rendezvous(usable: &[(SocketAddr, u32)], client: IpAddr) -> Option<SocketAddr> {
    let score = |address: &SocketAddr, weight: u32| {
        let mut hasher = DefaultHasher::new();
        (client, address).hash(&mut hasher);
        let unit = ((hasher.finish() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
        -f64::from(weight) / unit.ln()
    };
    usable
        .iter()
        .max_by(|(a, a_weight), (b, b_weight)| score(a, *a_weight).total_cmp(&score(b, *b_weight)))
        .map(|(address, _)| *address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::SpiffeId;
    use crate::mesh::Bind;

    fn endpoint(port: u16, weight: u32, healthy: bool) -> Endpoint {
        Endpoint { address: SocketAddr::from(([127, 0, 0, 1], port)), weight, healthy }
    }

    fn balancer(balance: Balance, targets: Vec<Vec<Endpoint>>) -> Balancer {
        let id = SpiffeId::service("t.consul", "", "", "dc1", "db").expect("valid");
        let target = |endpoints: Vec<Endpoint>| {
            let (expected, endpoints) = ([id.clone()].into(), endpoints.into());
            Arc::new(Target { id: "t".into(), sni: "s".into(), expected, endpoints, access: None })
        };
        let targets = targets.into_iter().map(target).collect();
        let bind = Bind::Tcp("127.0.0.1:9191".parse().expect("address"));
        let upstream = Upstream { balance, ..Upstream::new("db", bind, targets) };
        Balancer::new(Arc::new(upstream), 42)
    }

    fn ports(balancer: &mut Balancer, times: usize, client: Option<IpAddr>) -> Vec<u16> {
        let now = Instant::now();
        (0..times).filter_map(|_| balancer.choose(client, &[], now)).map(|choice| choice.address.port()).collect()
    }

    #[test]
    fn round_robin_honours_weights_and_health() {
        let mut balancer =
            balancer(Balance::RoundRobin, vec![vec![endpoint(1, 2, true), endpoint(2, 1, true), endpoint(3, 9, false)]]);
        let chosen = ports(&mut balancer, 300, None);
        assert_eq!(chosen.iter().filter(|&&port| port == 1).count(), 200);
        assert_eq!(chosen.iter().filter(|&&port| port == 2).count(), 100);
    }

    #[test]
    fn failover_is_used_only_when_the_first_target_has_none() {
        let mut first = balancer(Balance::Random, vec![vec![endpoint(1, 1, true)], vec![endpoint(2, 1, true)]]);
        assert!(ports(&mut first, 50, None).iter().all(|&port| port == 1));
        let mut second = balancer(Balance::Random, vec![vec![endpoint(1, 1, false)], vec![endpoint(2, 1, true)]]);
        assert!(ports(&mut second, 50, None).iter().all(|&port| port == 2));
        assert!(balancer(Balance::Random, vec![vec![endpoint(1, 1, false)]]).choose(None, &[], Instant::now()).is_none());
    }

    #[test]
    fn below_its_threshold_a_cluster_uses_everybody() {
        let with = |percent, targets| {
            let mut balancer = balancer(Balance::RoundRobin, targets);
            Arc::get_mut(&mut balancer.upstream).expect("nobody else has it").panic_percent = percent;
            balancer
        };
        let used = |balancer: &mut Balancer| -> Vec<u16> {
            let used: std::collections::BTreeSet<u16> = ports(balancer, 60, None).into_iter().collect();
            used.into_iter().collect()
        };
        let third = || vec![endpoint(1, 1, true), endpoint(2, 1, false), endpoint(3, 1, false)];
        assert_eq!(used(&mut with(0, vec![third()])), [1]);
        assert_eq!(used(&mut with(33, vec![third()])), [1], "a third is more than 33 %");
        assert_eq!(used(&mut with(34, vec![third()])), [1, 2, 3]);
        let nobody = || vec![endpoint(4, 1, false), endpoint(5, 1, false)];
        assert_eq!(used(&mut with(1, vec![Vec::new(), nobody()])), [4, 5], "nobody is well anywhere");
        assert!(used(&mut with(0, vec![nobody()])).is_empty());
        let well = vec![endpoint(6, 1, true)];
        assert_eq!(used(&mut with(50, vec![third(), well.clone()])), [1], "others can take what a target cannot");
        assert_eq!(used(&mut with(50, vec![nobody(), well])), [6]);
        let mut one_left = with(50, vec![third()]);
        let tried = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        assert_eq!(one_left.choose(None, &tried, Instant::now()).expect("one").address.port(), 3);
        let mut ejected = with(60, vec![vec![endpoint(1, 1, true), endpoint(2, 1, true)]]);
        assert_eq!((0..5).filter_map(|_| ejected.failed(tried[0], Instant::now())).count(), 1);
        assert_eq!(used(&mut ejected), [1, 2], "an ejected one is as unhealthy as any");
        let chosen = |balancer: &mut Balancer| balancer.choose(None, &[], Instant::now()).expect("one").in_panic;
        assert!(chosen(&mut with(50, vec![third()])) && !chosen(&mut with(33, vec![third()])));
    }

    #[test]
    fn a_tried_endpoint_is_not_chosen_again() {
        let mut balancer = balancer(Balance::RoundRobin, vec![vec![endpoint(1, 1, true), endpoint(2, 1, true)]]);
        let now = Instant::now();
        let first = balancer.choose(None, &[], now).expect("one").address;
        let second = balancer.choose(None, &[first], now).expect("other").address;
        assert_ne!(first, second);
        assert!(balancer.choose(None, &[first, second], now).is_none());
    }

    #[test]
    fn failures_eject_one_of_a_few_and_time_brings_it_back() {
        let mut balancer = balancer(Balance::RoundRobin, vec![vec![endpoint(1, 1, true), endpoint(2, 1, true)]]);
        let now = Instant::now();
        let bad = SocketAddr::from(([127, 0, 0, 1], 1));
        let other = SocketAddr::from(([127, 0, 0, 1], 2));
        let ejected = (0..5).filter_map(|_| balancer.failed(bad, now)).collect::<Vec<_>>();
        assert_eq!(ejected, [Duration::from_secs(30)]);
        assert!((0..10).all(|_| balancer.failed(other, now).is_none()), "10 % of two is one, and one is out");
        assert!(ports(&mut balancer, 10, None).iter().all(|&port| port == 2));
        let later = now + Duration::from_secs(31);
        assert!((0..10).filter_map(|_| balancer.choose(None, &[], later)).any(|choice| choice.address == bad));
    }

    #[test]
    fn hashing_keeps_a_client_where_it_is() {
        let endpoints: Vec<_> = (1..=10).map(|port| endpoint(port, 1, true)).collect();
        let mut ten = balancer(Balance::Maglev, vec![endpoints.clone()]);
        let mut nine = balancer(Balance::RingHash, vec![endpoints[..9].to_vec()]);
        let mut moved = 0;
        for last in 0..200_u8 {
            let client = Some(IpAddr::from([10, 0, 0, last]));
            let of_ten = ports(&mut ten, 3, client);
            assert!(of_ten.iter().all(|port| port == &of_ten[0]));
            if of_ten[0] != 10 && ports(&mut nine, 1, client)[0] != of_ten[0] {
                moved += 1;
            }
        }
        assert_eq!(moved, 0, "only clients of the endpoint that left may move");
    }

    #[test]
    fn least_request_prefers_the_idle_one() {
        let mut balancer = balancer(Balance::LeastRequest { choices: 2 }, vec![vec![endpoint(1, 1, true), endpoint(2, 1, true)]]);
        for _ in 0..100 {
            balancer.opened(SocketAddr::from(([127, 0, 0, 1], 1)));
        }
        let busy = ports(&mut balancer, 400, None).iter().filter(|&&port| port == 1).count();
        assert!(busy < 200, "{busy}");
    }
}
