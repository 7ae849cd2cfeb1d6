//! Tokens change while the sidecar runs: a file that is rewritten, and logins that are renewed before they end.

mod support;

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::KeyPair;
use serde_json::{Value, json};
use support::traffic::{Live, Load, round_trip};
use support::{Consul, Definition, Echo, Mesh, PATIENCE, Sidecar, ports, wait_for, wait_until};

#[test]
fn a_rewritten_token_file_is_read_again() {
    let app = Echo::start();
    let consul = Consul::start();
    let folder = support::scratch();
    let file = folder.path().join("token");
    let identity = json!({"ServiceIdentities": [{"ServiceName": "db"}]});
    let (accessor, secret) = consul.make_token(&identity);
    std::fs::write(&file, format!("{secret}\n")).expect("token file");
    let (_web, mut db, upstream) = start(&consul, app.address, &["-token-file", file.to_str().expect("a path")]);
    let mut live = Live::open(upstream);

    // The order that operators follow: new token, new file, old token away.
    let load = Load::start(upstream, 20);
    let (_, next) = consul.make_token(&identity);
    std::fs::write(&file, format!("{next}\n")).expect("token file");
    consul.delete_token(&accessor);
    support::pause(Duration::from_secs(3));
    load.stop().assert_flawless(30);

    // Only a valid token can learn of this change.
    consul.deny("web", "db");
    live.wait_cut(Duration::from_secs(40));
    assert!(!db.process.output().contains(&next), "the token is in the log");
    db.assert_healthy();
}

#[test]
fn a_login_is_renewed_before_it_ends_and_logged_out_at_the_end() {
    let app = Echo::start();
    let consul = Consul::start();
    let folder = support::scratch();
    let bearer = folder.path().join("jwt");
    std::fs::write(&bearer, make_auth_method(&consul)).expect("bearer token file");
    let arguments =
        ["-login-method", "hosts", "-login-bearer-token-file", bearer.to_str().expect("a path"), "-login-meta", "host=test"];
    let (_web, mut db, upstream) = start(&consul, app.address, &arguments);
    let first = login_tokens(&consul);
    assert_eq!(first.len(), 1, "one login: {first:?}");

    // The token lives for 60 s, so the next login is due after 40.
    wait_until("a second login, the first logged out", Duration::from_secs(75), || {
        let tokens = login_tokens(&consul);
        tokens.len() == 1 && tokens != first
    });
    round_trip(upstream, b"after the renewal").expect("traffic after the renewal");
    let mut live = Live::open(upstream);
    consul.deny("web", "db");
    live.wait_cut(Duration::from_secs(40));

    db.process.signal("TERM");
    assert!(db.process.wait_exit(PATIENCE).success(), "{}", db.process.tail());
    wait_until("the last token is logged out", PATIENCE, || login_tokens(&consul).is_empty());
}

/// web with a token of the mesh, db with `arguments` for its own.
fn start(consul: &Consul, app: std::net::SocketAddr, arguments: &[&str]) -> (Sidecar, Sidecar, std::net::SocketAddr) {
    let upstream = ports::free_address();
    consul.register(&Definition::new("db").app(app));
    consul.register(&Definition::new("web").upstream("db", upstream));
    consul.allow("web", "db");
    let db = Sidecar::of("db").token(None).arguments(arguments).arguments(&["-drain-time", "1s"]).start(consul);
    let web = Sidecar::start(consul, "web");
    wait_for("the first echo", PATIENCE, || {
        round_trip(upstream, b"first").map_err(|error| format!("{error}\n{}", db.process.tail()))
    });
    (web, db, upstream)
}

/// Accessors of the tokens that logins made.
fn login_tokens(consul: &Consul) -> Vec<String> {
    let tokens = consul.client().get("/v1/acl/tokens?authmethod=hosts").ok("list of tokens").json();
    tokens.as_array().expect("a list").iter().map(|token| token["AccessorID"].to_string()).collect()
}

/// An auth method that trusts a key made here, and a JWT signed with it that becomes `db`.
fn make_auth_method(consul: &Consul) -> String {
    let random = ring::rand::SystemRandom::new();
    let algorithm = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
    let pkcs8 = ring::signature::EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("a signing key");
    let key = ring::signature::EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).expect("a signing key");
    // What stands before an uncompressed P-256 point in a SubjectPublicKeyInfo.
    const SPKI_PREFIX: &str = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE";
    let standard = base64::engine::general_purpose::STANDARD;
    let mut spki = standard.decode(SPKI_PREFIX).expect("base64");
    spki.extend_from_slice(&key.public_key().as_ref()[1..]);
    let public_pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", standard.encode(spki));
    let method = json!({"Name": "hosts", "Type": "jwt", "MaxTokenTTL": "60s", "Config": {
        "BoundAudiences": ["mesh"], "JWTValidationPubKeys": [public_pem], "JWTSupportedAlgs": ["ES256"],
        "ClaimMappings": {"service": "service"}}});
    consul.client().put("/v1/acl/auth-method", &method).ok("auth method");
    let rule = json!({"AuthMethod": "hosts", "BindType": "service", "BindName": "${value.service}"});
    consul.client().put("/v1/acl/binding-rule", &rule).ok("binding rule");

    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let claims = json!({"aud": "mesh", "iss": "test", "service": "db", "iat": now - 60, "nbf": now - 60, "exp": now + 3_600});
    let signed = format!("{}.{}", part(json!({"alg": "ES256", "typ": "JWT"})), part(claims));
    let signature = key.sign(&random, signed.as_bytes()).expect("a signature");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
}

/// The auth method and the JWT are ones that real Consul takes: proves the test's own cryptography.
#[test]
fn consul_takes_the_login_that_these_tests_make() {
    let consul = Consul::start();
    let jwt = make_auth_method(&consul);
    let login = consul.client().post("/v1/acl/login", &json!({"AuthMethod": "hosts", "BearerToken": jwt})).ok("login").json();
    assert_eq!(login["ServiceIdentities"][0]["ServiceName"], "db");
    assert_eq!(login_tokens(&consul).len(), 1);
}

/// The agent may refuse one question of a cold start: here it does not know a token that is a moment old. That must heal.
#[test]
fn a_token_that_the_agent_learns_a_moment_late_is_enough() {
    let consul = Consul::start_with_client_agent();
    consul.register(&Definition::new("db").app(ports::free_address()));
    consul.allow("web", "db");
    let (_, secret) = consul.make_token(&json!({"ServiceIdentities": [{"ServiceName": "db"}]}));
    Sidecar::of("db").token(Some(&secret)).start(&consul);
}
