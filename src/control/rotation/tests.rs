//! Rotation decisions under an injected clock: what is taken up, what is kept, when to force a read and to raise an alarm.

use super::*;
use crate::tls::fixtures::{Ca, chain_pem, key_pem, now};

fn name(service: &str) -> Name {
    Name { service: service.into(), namespace: String::new(), partition: String::new() }
}

fn wire_leaf(svid: &Svid) -> wire::Leaf {
    wire::Leaf { cert_pem: chain_pem(&svid.chain), private_key_pem: wire::Private(zeroize::Zeroizing::new(key_pem(&svid.key))) }
}

fn wire_roots(active: &Ca, others: &[&Ca]) -> wire::Roots {
    let roots = std::iter::once(active).chain(others.iter().copied()).enumerate().map(|(index, ca)| wire::Root {
        id: index.to_string(),
        root_cert: chain_pem(std::slice::from_ref(ca.certificate())),
        signing_key_id: String::new(),
    });
    wire::Roots { active_root_id: "0".into(), trust_domain: "t.consul".into(), roots: roots.collect() }
}

fn life(start: SystemTime, seconds: u64, ca: &Ca) -> Svid {
    let mut leaf = ca.leaf("web");
    leaf.not_before = start;
    leaf.not_after = start + Duration::from_secs(seconds);
    ca.issue(&leaf)
}

#[test]
fn leaf_and_roots_may_come_in_either_order() {
    let ca = Ca::new("t.consul");
    let leaf = wire_leaf(&ca.svid("web"));
    let mut identities = Identities::new(2, true);
    assert!(!identities.offer_leaf(&name("web"), leaf.clone(), now()), "no roots yet");
    assert!(identities.current(&name("web")).is_none());
    assert_eq!(identities.offer_roots(&wire_roots(&ca, &[]), now()), Ok(true));
    let first = Arc::clone(identities.current(&name("web")).expect("in use"));
    assert_eq!(first.tls.len(), 2, "one configuration a worker");
    assert!(!identities.offer_leaf(&name("web"), leaf, now()), "the same leaf is no rotation");
    assert_eq!(identities.offer_roots(&wire_roots(&ca, &[]), now()), Ok(false), "the same roots are no change");
    assert!(Arc::ptr_eq(&first, identities.current(&name("web")).expect("in use")));
    assert_eq!(identities.rotations(&name("web")), 1);
}

#[test]
fn a_bad_leaf_never_replaces_a_good_one() {
    let ca = Ca::new("t.consul");
    let mut identities = Identities::new(1, true);
    identities.offer_roots(&wire_roots(&ca, &[]), now()).expect("roots");
    assert!(identities.offer_leaf(&name("web"), wire_leaf(&ca.svid("web")), now()));
    let good = Arc::clone(identities.current(&name("web")).expect("in use"));

    let other_key = wire::Leaf { private_key_pem: wire_leaf(&ca.svid("web")).private_key_pem, ..wire_leaf(&ca.svid("web")) };
    let expired = wire_leaf(&life(now() - Duration::from_secs(7_200), 3_600, &ca));
    let garbage = wire::Leaf { cert_pem: "hello".into(), ..wire_leaf(&ca.svid("web")) };
    let foreign = wire_leaf(&Ca::new("t.consul").svid("web"));
    for bad in [other_key, wire_leaf(&ca.svid("db")), expired, garbage, foreign] {
        assert!(!identities.offer_leaf(&name("web"), bad, now()));
        assert!(Arc::ptr_eq(&good, identities.current(&name("web")).expect("in use")));
        let problem = identities.problem(&name("web"), now()).expect("a problem");
        assert!(problem.contains("old certificate stays"), "{problem}");
        assert!(!problem.contains("PRIVATE"), "{problem}");
    }
    assert!(identities.offer_leaf(&name("web"), wire_leaf(&ca.svid("web")), now()), "a good one is taken again");
    assert_eq!(identities.problem(&name("web"), now()), None);
    assert_eq!(identities.rotations(&name("web")), 2);
}

#[test]
fn namespace_and_partition_must_be_ours() {
    let ca = Ca::new("t.consul");
    let mut identities = Identities::new(1, true);
    identities.offer_roots(&wire_roots(&ca, &[]), now()).expect("roots");
    let team = Name { namespace: "team".into(), ..name("web") };
    assert!(!identities.offer_leaf(&team, wire_leaf(&ca.svid("web")), now()), "the leaf is of namespace default");
    assert!(identities.problem(&team, now()).expect("a problem").contains("not service web"));
}

#[test]
fn old_and_new_roots_are_trusted_until_the_new_leaf_is_there() {
    let (old, new) = (Ca::new("t.consul"), Ca::new("t.consul"));
    let mut identities = Identities::new(1, true);
    identities.offer_roots(&wire_roots(&old, &[]), now()).expect("roots");
    identities.offer_leaf(&name("web"), wire_leaf(&old.svid("web")), now());

    assert_eq!(identities.offer_roots(&wire_roots(&new, &[&old]), now()), Ok(true));
    let both = identities.current(&name("web")).expect("in use").bundle.roots.len();
    assert_eq!(both, 2);
    // The old root is pruned before our leaf was renewed.
    assert_eq!(identities.offer_roots(&wire_roots(&new, &[]), now()), Ok(false), "the union stays");
    let current = identities.current(&name("web")).expect("in use");
    assert!(current.bundle.roots.contains(old.certificate()) && current.bundle.roots.contains(new.certificate()));

    assert!(identities.offer_leaf(&name("web"), wire_leaf(&new.svid("web")), now()));
    let current = identities.current(&name("web")).expect("in use");
    assert_eq!(current.bundle.roots, [new.certificate().clone()], "the old root is gone with the old leaf");
}

#[test]
fn unusable_roots_keep_the_old_ones() {
    let ca = Ca::new("t.consul");
    let mut identities = Identities::new(1, true);
    identities.offer_roots(&wire_roots(&ca, &[]), now()).expect("roots");
    identities.offer_leaf(&name("web"), wire_leaf(&ca.svid("web")), now());
    let mut garbage = wire_roots(&ca, &[]);
    garbage.roots[0].root_cert = "-----BEGIN NOTHING-----".into();
    assert!(identities.offer_roots(&garbage, now()).is_err());
    assert!(identities.offer_leaf(&name("web"), wire_leaf(&ca.svid("web")), now()), "the old roots still validate");
}

#[test]
fn the_clock_forces_reads_and_raises_alarms_once() {
    let ca = Ca::new("t.consul");
    let start = now() - Duration::from_secs(60);
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut identities = Identities::new(0, true);
    identities.offer_roots(&wire_roots(&ca, &[]), now()).expect("roots");
    identities.offer_leaf(&name("web"), wire_leaf(&life(start, 3_600, &ca)), now());

    assert_eq!(identities.tick(at(3_200)), Tick::default());
    assert_eq!(identities.tick(at(3_241)).force, [name("web")], "90 % of an hour");
    assert_eq!(identities.tick(at(3_250)), Tick::default(), "not again so soon");
    let near = identities.tick(at(3_425));
    assert_eq!((near.force, near.alarms), (vec![name("web")], vec![(name("web"), Alarm::Near)]));
    assert!(identities.problem(&name("web"), at(3_425)).expect("a problem").contains("ends in 175 s"));
    assert_eq!(identities.tick(at(3_426)).alarms, []);
    let expired = identities.tick(at(3_601));
    assert_eq!(expired.alarms, [(name("web"), Alarm::Expired)]);
    assert!(identities.current(&name("web")).is_some(), "live connections still have their identity");
    assert!(identities.problem(&name("web"), at(3_601)).expect("a problem").contains("expired"));
    assert_eq!(expired.force, [name("web")]);
    assert_eq!(identities.tick(at(3_604)).force, []);
    assert_eq!(identities.tick(at(3_607)).force, [name("web")], "every few seconds once it has expired");
}

#[test]
fn a_leaf_of_another_signer_is_asked_for_again() {
    let ca = Ca::new("t.consul");
    let mut identities = Identities::new(0, true);
    let mut roots = wire_roots(&ca, &[]);
    roots.roots[0].signing_key_id = "AA:BB".into();
    identities.offer_roots(&roots, now()).expect("roots");
    identities.offer_leaf(&name("web"), wire_leaf(&life(now() - Duration::from_secs(60), 86_400, &ca)), now());
    let Some(signer) = identities.slots[&name("web")].signer.clone() else {
        // The test CA writes no authority key id: then there is nothing to compare, and nothing may be forced.
        assert_eq!(identities.tick(now() + Duration::from_secs(100)).force, []);
        return;
    };
    assert_eq!(identities.tick(now()).force, []);
    assert_eq!(identities.tick(now() + SIGNER_GRACE).force, []);
    assert_eq!(identities.tick(now() + SIGNER_GRACE + Duration::from_secs(2)).force, [name("web")]);
    roots.roots[0].signing_key_id = signer.to_uppercase();
    identities.offer_roots(&roots, now()).expect("roots");
    assert_eq!(identities.tick(now() + Duration::from_secs(1_000)).force, [], "the same signer in capitals");
}

#[test]
fn other_tls_versions_make_new_configurations_of_the_same_leaf() {
    let ca = Ca::new("t.consul");
    let mut identities = Identities::new(1, true);
    identities.offer_roots(&wire_roots(&ca, &[]), now()).expect("roots");
    identities.offer_leaf(&name("web"), wire_leaf(&ca.svid("web")), now());
    let before = Arc::clone(identities.current(&name("web")).expect("in use"));
    assert!(!identities.set_params(TlsParams { tls12: true, tls13: true, ..TlsParams::DEFAULT }));
    assert!(identities.set_params(TlsParams { tls12: false, tls13: true, ..TlsParams::DEFAULT }));
    let after = identities.current(&name("web")).expect("in use");
    assert!(!Arc::ptr_eq(&before, after) && Arc::ptr_eq(&before.svid, &after.svid));
    assert_eq!(identities.rotations(&name("web")), 1);
}
