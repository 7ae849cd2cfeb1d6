//! Neither tokens nor private keys reach a log, the admin port or the connection log, even at trace level.

mod support;

use support::traffic::round_trip;
use support::{Agent, Echo, Mesh, Pair};

#[test]
fn tokens_and_keys_stay_inside() {
    let app = Echo::start();
    let (web_token, db_token) = (uuid::Uuid::new_v4().to_string(), uuid::Uuid::new_v4().to_string());
    let folder = support::scratch();
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, &db_token).expect("token file");
    let path = token_file.to_str().expect("a path").to_owned();
    let mut pair = Pair::tuned(
        Agent::start(),
        app.address,
        |web| web.token(Some(&web_token)).arguments(&["-log-level", "trace"]),
        |db| db.token(None).arguments(&["-token-file", &path, "-log-level", "trace"]),
        |define| define,
    )
    .wait_open();
    pair.mesh.rotate_ca();
    pair.mesh.deny("web", "db");
    support::wait_until("a denial", support::PATIENCE, || round_trip(pair.upstream, b"payload-that-is-private").is_err());
    pair.mesh.allow("web", "db");
    support::wait_until("allowed again", support::PATIENCE, || round_trip(pair.upstream, b"payload-that-is-private").is_ok());
    pair.db.process.signal("HUP");
    pair.assert_healthy();

    for sidecar in [&pair.web, &pair.db] {
        let mut said = vec![("output", sidecar.process.output()), ("connection log", sidecar.connection_log_text())];
        for path in ["/snapshot", "/metrics", "/ready", "/healthz", "/", "/help"] {
            said.push((path, sidecar.client().get(path).body));
        }
        assert!(said[0].1.len() > 1_000, "trace level says more than {} bytes", said[0].1.len());
        let mut secrets =
            vec![web_token.clone(), db_token.clone(), "PRIVATE KEY".to_owned(), "payload-that-is-private".to_owned()];
        // Every SEC1 or PKCS#8 key of P-256 starts with one of these in base64.
        secrets.extend(["MHcCAQEE", "MIGHAgEA"].map(str::to_owned));
        for service in ["web", "db"] {
            let key = pair.mesh.leaf(service).key_pem;
            secrets.extend(key.lines().filter(|line| !line.starts_with("---") && line.len() > 16).map(str::to_owned));
        }
        for (place, text) in &said {
            for secret in &secrets {
                assert!(!text.contains(secret.as_str()), "{place} holds a secret that starts with {:.8}", secret);
            }
        }
    }
}
