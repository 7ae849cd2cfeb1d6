//! Who is let through and who is not, in both roles, and what the control plane may publish.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rcgen::{ExtendedKeyUsagePurpose, KeyUsagePurpose};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs1KeyDer, PrivateSec1KeyDer};

use super::*;
use crate::identity::Svid;
use crate::tls::fixtures::{Ca, KeyKind, Leaf, chain_pem, key_pem, now};
use crate::tls::provider::algorithms;

const HOUR: Duration = Duration::from_secs(3_600);

fn trust(bundle: &TrustBundle) -> Trust {
    Trust::new(bundle, algorithms()).expect("a bundle")
}

fn unix(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970"))
}

fn check(trust: &Trust, svid: &Svid, role: Role) -> Result<SpiffeId, VerifyError> {
    check_at(trust, svid, role, now())
}

fn check_at(trust: &Trust, svid: &Svid, role: Role, at: SystemTime) -> Result<SpiffeId, VerifyError> {
    trust.peer(&svid.chain[0], &svid.chain[1..], role, unix(at))
}

#[test]
fn regular_svids_pass_in_both_roles_with_every_kind_of_key_and_ca() {
    for ca in [Ca::new("t.consul"), Ca::rsa("t.consul"), Ca::new("t.consul").intermediate(), Ca::rsa("t.consul").intermediate()] {
        let trust = trust(&ca.bundle());
        for key in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa] {
            let svid = ca.issue(&Leaf { key, ..ca.leaf("web") });
            for role in [Role::Client, Role::Server] {
                assert_eq!(check(&trust, &svid, role).expect("trusted"), ca.id("web"), "{key:?} {role:?}");
            }
        }
    }
}

#[test]
fn cross_signing_works_with_the_old_root_the_new_root_and_both() {
    let (old, new) = (Ca::new("t.consul"), Ca::new("t.consul"));
    let mut svid = new.svid("web");
    assert!(check(&trust(&old.bundle()), &svid, Role::Server).is_err(), "trusted without the cross-signed certificate");
    svid.chain.push(new.cross_signed_by(&old));
    for bundle in [old.bundle(), new.bundle(), old.bundle_with(&[&new])] {
        for role in [Role::Client, Role::Server] {
            assert_eq!(check(&trust(&bundle), &svid, role).expect("trusted"), new.id("web"));
        }
    }
}

#[test]
fn a_duplicated_intermediate_and_a_presented_root_are_tolerated() {
    let root = Ca::new("t.consul");
    let ca = root.intermediate();
    let mut svid = ca.svid("web");
    svid.chain.push(svid.chain[1].clone());
    svid.chain.push(root.certificate().clone());
    assert!(check(&trust(&root.bundle()), &svid, Role::Server).is_ok());
    svid.chain.remove(1);
    svid.chain.remove(1);
    assert!(check(&trust(&root.bundle()), &svid, Role::Server).is_err(), "trusted without its intermediate");
}

#[test]
fn a_chain_that_is_too_long_is_refused_before_any_work() {
    let ca = Ca::new("t.consul").intermediate();
    let mut svid = ca.svid("web");
    svid.chain.resize(CHAIN_CERTIFICATES_MAX + 1, svid.chain[1].clone());
    assert!(matches!(check(&trust(&ca.bundle()), &svid, Role::Server), Err(VerifyError::ChainTooLong(11))));
    svid.chain.pop();
    assert!(check(&trust(&ca.bundle()), &svid, Role::Server).is_ok());
}

#[test]
fn roles_have_their_extended_key_usage() {
    let ca = Ca::new("t.consul");
    let trust = trust(&ca.bundle());
    let with = |usages: Vec<ExtendedKeyUsagePurpose>| ca.issue(&Leaf { usages, ..ca.leaf("web") });
    let (client, server) = (vec![ExtendedKeyUsagePurpose::ClientAuth], vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert!(check(&trust, &with(client.clone()), Role::Server).is_ok());
    assert!(check(&trust, &with(client), Role::Client).is_err());
    assert!(check(&trust, &with(server.clone()), Role::Client).is_ok());
    assert!(check(&trust, &with(server), Role::Server).is_err());
    assert!(check(&trust, &with(vec![ExtendedKeyUsagePurpose::CodeSigning]), Role::Server).is_err());
    // No extension at all leaves the usage open, as with Envoy.
    assert!(check(&trust, &with(Vec::new()), Role::Server).is_ok());
}

#[test]
fn a_gateway_may_answer_where_it_is_expected_but_never_call() {
    let ca = Ca::new("t.consul");
    let trust = trust(&ca.bundle());
    let gateway = ca.issue(&Leaf { uris: vec!["spiffe://t.consul/gateway/mesh/dc/dc1".into()], ..ca.leaf("web") });
    assert!(matches!(check(&trust, &gateway, Role::Server), Err(VerifyError::NotService(_))));
    let expected: Arc<[_]> = Arc::from([SpiffeId::parse("spiffe://t.consul/gateway/mesh/dc/dc1").expect("valid")]);
    assert!(trust.expected_peer(&gateway.chain[0], &[], &expected, unix(now())).is_ok());
}

#[test]
fn identities_are_exact() {
    let ca = Ca::new("t.consul");
    let trust = trust(&ca.bundle());
    let with = |uris: &[&str]| ca.issue(&Leaf { uris: uris.iter().map(|uri| (*uri).to_owned()).collect(), ..ca.leaf("web") });
    let web = "spiffe://t.consul/ns/default/dc/dc1/svc/web";
    for role in [Role::Client, Role::Server] {
        assert!(matches!(check(&trust, &with(&[]), role), Err(VerifyError::Uris(0))));
        assert!(matches!(check(&trust, &with(&[web, web]), role), Err(VerifyError::Uris(2))));
        assert!(matches!(check(&trust, &with(&["spiffe://T.consul/x"]), role), Err(VerifyError::NotSpiffe(_))));
        let foreign = with(&["spiffe://t.consul.evil/ns/default/dc/dc1/svc/web"]);
        assert!(matches!(check(&trust, &foreign, role), Err(VerifyError::TrustDomain { .. })));
    }
    let svid = ca.svid("web");
    let meets = |expected: &[SpiffeId]| trust.expected_peer(&svid.chain[0], &[], &Arc::from(expected), unix(now()));
    assert!(meets(&[ca.id("db"), ca.id("web")]).is_ok());
    for other in ["spiffe://t.consul/ns/default/dc/dc2/svc/web", "spiffe://t.consul/ns/other/dc/dc1/svc/web"] {
        let refused = meets(&[SpiffeId::parse(other).expect("valid")]).expect_err("another identity").to_string();
        assert!(refused.contains(web) && refused.contains(other), "{refused}");
    }
}

#[test]
fn issuers_must_be_allowed_to_sign_and_leaves_must_not() {
    let root = Ca::new("t.consul");
    let weak = root.intermediate_with(|params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    assert!(check(&trust(&root.bundle()), &weak.svid("web"), Role::Server).is_err());
    let below = root.intermediate().intermediate();
    assert!(check(&trust(&root.bundle()), &below.svid("web"), Role::Server).is_err(), "path length 0 was ignored");
    let ca_leaf = root.issue(&Leaf { is_ca: true, ..root.leaf("web") });
    assert!(check(&trust(&root.bundle()), &ca_leaf, Role::Server).is_err());
    let leaf = root.svid("web");
    let as_root = TrustBundle { trust_domain: "t.consul".into(), roots: vec![leaf.chain[0].clone()], peers: Vec::new() };
    assert!(matches!(Trust::new(&as_root, algorithms()), Err(BundleError::Root { index: 0, .. })));
}

#[test]
fn validity_counts_for_leaf_intermediate_and_root_even_from_the_cache() {
    let root = Ca::new("t.consul");
    let ca = root.intermediate_with(|params| params.not_after = (now() + HOUR).into());
    let trust = trust(&root.bundle());
    let svid = ca.svid("web");
    assert!(check(&trust, &svid, Role::Server).is_ok());
    assert!(check_at(&trust, &svid, Role::Server, now() + HOUR - Duration::from_secs(1)).is_ok());
    assert!(check_at(&trust, &svid, Role::Server, now() + 2 * HOUR).is_err(), "the intermediate has expired");
    assert!(check_at(&trust, &svid, Role::Server, now() - 2 * HOUR).is_err(), "nothing is valid yet");
    let direct = root.issue(&Leaf { not_after: now() + Duration::from_secs(20 * 365 * 86_400), ..root.leaf("web") });
    assert!(check(&trust, &direct, Role::Server).is_ok());
    assert!(check_at(&trust, &direct, Role::Server, now() + 11 * 365 * 24 * HOUR).is_err(), "the root has expired");
}

#[test]
fn a_cached_chain_does_not_outlive_its_root_or_its_role() {
    let (ca, other) = (Ca::new("t.consul"), Ca::new("t.consul"));
    let client_only = ca.issue(&Leaf { usages: vec![ExtendedKeyUsagePurpose::ClientAuth], ..ca.leaf("web") });
    assert!(check(&trust(&ca.bundle()), &client_only, Role::Server).is_ok());
    assert!(check(&trust(&ca.bundle()), &client_only, Role::Client).is_err(), "the other role's entry was used");
    assert!(check(&trust(&other.bundle()), &client_only, Role::Server).is_err(), "the other bundle's entry was used");
    let renamed = TrustBundle { trust_domain: "u.consul".into(), roots: ca.bundle().roots.clone(), peers: Vec::new() };
    assert!(check(&trust(&renamed), &client_only, Role::Server).is_err(), "the other trust domain's entry was used");
}

#[test]
fn a_peers_roots_vouch_for_its_own_domain_and_no_other() {
    let (ours, theirs, stranger) = (Ca::new("t.consul"), Ca::new("p.consul"), Ca::new("p.consul"));
    let with = |peer: &Ca, calls| TrustBundle { peers: vec![peer.as_peer(calls)], ..(*ours.bundle()).clone() };
    let (calling, answering) = (trust(&with(&theirs, true)), trust(&with(&theirs, false)));
    let (web, forged) = (theirs.svid("web"), theirs.issue(&ours.leaf("web")));
    assert_eq!(check(&calling, &web, Role::Server).expect("may call"), theirs.id("web"));
    assert_eq!(check(&calling, &web, Role::Client).expect("may answer"), theirs.id("web"));
    assert!(check(&answering, &web, Role::Server).is_err(), "it was only to answer, or the other bundle's entry was used");
    assert_eq!(check(&answering, &web, Role::Client).expect("may answer"), theirs.id("web"));
    for role in [Role::Client, Role::Server] {
        assert!(check(&calling, &forged, role).is_err(), "the peer's CA vouched for our domain");
        assert!(check(&calling, &ours.issue(&theirs.leaf("web")), role).is_err(), "our CA vouched for the peer's domain");
        assert!(check(&calling, &stranger.svid("web"), role).is_err(), "another CA of the same name");
        assert_eq!(check(&calling, &ours.svid("web"), role).expect("ours"), ours.id("web"));
    }
    assert!(check(&trust(&with(&stranger, true)), &web, Role::Server).is_err(), "the other peer's entry was used");
}

fn load(svid: &Svid, service: &str, bundle: &TrustBundle) -> Result<Svid, SvidError> {
    super::svid(&chain_pem(&svid.chain), &key_pem(&svid.key), service, bundle, now())
}

#[test]
fn a_good_leaf_loads_with_its_facts() {
    for ca in [Ca::new("t.consul"), Ca::rsa("t.consul").intermediate()] {
        let leaf = Leaf { serial: vec![0x9a, 0x0b], ..ca.leaf("web") };
        let issued = ca.issue(&leaf);
        let loaded = load(&issued, "web", &ca.bundle()).expect("loads");
        assert_eq!((&loaded.id, &loaded.chain, loaded.serial.as_str()), (&issued.id, &issued.chain, "9a0b"));
        assert_eq!((loaded.not_before, loaded.not_after), (issued.not_before, issued.not_after));
    }
}

/// The key within a PKCS#8 envelope (RFC 5208): what follows the octet string's header and begins with `start`.
fn unwrapped(pkcs8: &[u8], start: fn(&[u8]) -> bool) -> Vec<u8> {
    let at = (0..pkcs8.len()).find(|at| start(&pkcs8[*at..])).expect("an octet string with a key");
    pkcs8[at + pkcs8[at..].iter().position(|byte| *byte == 0x30).expect("a sequence")..].to_vec()
}

#[test]
fn all_three_forms_of_key_load() {
    let ca = Ca::new("t.consul");
    let mut svid = ca.svid("web");
    load(&svid, "web", &ca.bundle()).expect("PKCS#8 loads");
    let sec1 = unwrapped(svid.key.secret_der(), |der| matches!(der, [0x04, _, 0x30, _, 0x02, 0x01, 0x01, ..]));
    svid.key = PrivateKeyDer::Sec1(PrivateSec1KeyDer::from(sec1));
    assert!(key_pem(&svid.key).contains("BEGIN EC PRIVATE KEY"));
    load(&svid, "web", &ca.bundle()).expect("SEC1 loads");

    let mut svid = ca.issue(&Leaf { key: KeyKind::Rsa, ..ca.leaf("web") });
    load(&svid, "web", &ca.bundle()).expect("PKCS#8 RSA loads");
    let pkcs1 = unwrapped(svid.key.secret_der(), |der| matches!(der, [0x04, 0x82, _, _, 0x30, 0x82, ..]));
    svid.key = PrivateKeyDer::Pkcs1(PrivatePkcs1KeyDer::from(pkcs1));
    assert!(key_pem(&svid.key).contains("BEGIN RSA PRIVATE KEY"));
    load(&svid, "web", &ca.bundle()).expect("PKCS#1 loads");
}

#[test]
fn a_bad_leaf_is_refused_with_what_helps() {
    let (ca, other) = (Ca::new("t.consul"), Ca::new("t.consul"));
    let bundle = ca.bundle();
    let web = ca.svid("web");

    let mut mixed = ca.svid("web");
    mixed.key = web.key.clone_key();
    assert!(matches!(load(&mixed, "web", &bundle), Err(SvidError::KeyMismatch { .. })));
    assert!(matches!(load(&web, "db", &bundle), Err(SvidError::OtherService { .. })));
    assert!(matches!(load(&web, "web", &other.bundle()), Err(SvidError::Untrusted { .. })));
    let renamed = TrustBundle { trust_domain: "u.consul".into(), roots: bundle.roots.clone(), peers: Vec::new() };
    assert!(matches!(load(&web, "web", &renamed), Err(SvidError::OtherService { .. })));

    let expired = ca.issue(&Leaf { not_before: now() - 2 * HOUR, not_after: now() - HOUR, ..ca.leaf("web") });
    let text = load(&expired, "web", &bundle).expect_err("expired").to_string();
    assert!(text.contains("clock") && text.contains("svc/web"), "{text}");
    let early = ca.issue(&Leaf { not_before: now() + HOUR, ..ca.leaf("web") });
    assert!(matches!(load(&early, "web", &bundle), Err(SvidError::NotValidNow { .. })));
    let one_role = ca.issue(&Leaf { usages: vec![ExtendedKeyUsagePurpose::ClientAuth], ..ca.leaf("web") });
    assert!(matches!(load(&one_role, "web", &bundle), Err(SvidError::Untrusted { .. })));

    let pem = chain_pem(&web.chain);
    let key = key_pem(&web.key);
    let refused = |chain: &str, key: &str| svid(chain, key, "web", &bundle, now()).expect_err("refused");
    assert!(matches!(refused("", &key), SvidError::ChainPem { .. }));
    assert!(matches!(refused(&pem, ""), SvidError::KeyPem));
    assert!(matches!(refused(&pem, &pem), SvidError::KeyPem));
    assert!(matches!(refused(&pem.repeat(11), &key), SvidError::ChainTooLong(11)));
    for error in [refused(&key, &key), refused(&pem, &key.replace("PRIVATE KEY", "EC PRIVATE KEY"))] {
        let text = format!("{error} {error:?}");
        let secret = key.lines().nth(1).expect("a line");
        assert!(!text.contains(&secret[..16]), "key material in an error: {text}");
    }
}

#[test]
fn bundles_load_whole_or_not_at_all() {
    let (ca, other) = (Ca::new("t.consul"), Ca::rsa("t.consul"));
    let pem = |ca: &Ca| chain_pem(std::slice::from_ref(ca.certificate()));
    let loaded = bundle("T.Consul", &[pem(&ca), pem(&other), pem(&ca)]).expect("loads");
    assert_eq!((&*loaded.trust_domain, loaded.roots.len()), ("t.consul", 2));
    assert_eq!(bundle("t.consul", &[pem(&ca) + &pem(&other)]).expect("loads").roots, loaded.roots);
    assert!(matches!(bundle("t.consul", &[] as &[&str]), Err(BundleError::Empty { .. })));
    assert!(matches!(bundle("t.consul", &["junk"]), Err(BundleError::Root { index: 0, .. })));
    assert!(matches!(bundle("bad domain", &[pem(&ca)]), Err(BundleError::TrustDomain(_))));
    let leaf = chain_pem(&ca.svid("web").chain);
    assert!(matches!(bundle("t.consul", &[pem(&ca), leaf]), Err(BundleError::Root { index: 1, .. })));
}

proptest! {
    #[test]
    fn hostile_certificates_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in any::<prop::sample::Index>(), bit in 0_u8..8) {
        thread_local! {
            static FIXTURE: (Trust, Svid) = {
                let ca = Ca::new("t.consul").intermediate();
                (trust(&ca.bundle()), ca.svid("web"))
            };
        }
        FIXTURE.with(|(trust, svid)| {
            let junk = CertificateDer::from(bytes.clone());
            let now = unix(now());
            prop_assert!(trust.peer(&junk, &svid.chain, Role::Server, now).is_err());
            // Junk among the intermediates must not make a good chain fail nor a bad one pass.
            prop_assert!(trust.peer(&svid.chain[0], &[junk.clone(), svid.chain[1].clone()], Role::Server, now).is_ok());
            let mut changed = svid.chain[0].to_vec();
            let at = cut.index(changed.len());
            changed[at] ^= 1 << bit;
            prop_assert!(trust.peer(&CertificateDer::from(changed), &svid.chain[1..], Role::Server, now).is_err());
            let short = CertificateDer::from(svid.chain[0][..at].to_vec());
            prop_assert!(trust.peer(&short, &svid.chain[1..], Role::Server, now).is_err());
            Ok(())
        })?;
    }

    #[test]
    fn hostile_pem_never_panics(text in "\\PC{0,200}") {
        let ca = TrustBundle { trust_domain: "t.consul".into(), roots: Vec::new(), peers: Vec::new() };
        let wrapped = format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
        for pem in [&text, &wrapped] {
            prop_assert!(svid(pem, pem, "web", &ca, SystemTime::UNIX_EPOCH).is_err());
            prop_assert!(bundle("t.consul", &[pem]).is_err());
        }
    }
}
