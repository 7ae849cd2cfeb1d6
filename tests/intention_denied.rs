//! Without an allowing intention nothing reaches the app, not even its banner, and the log says who, why and what to change.

mod support;

use support::{Banner, Consul, Definition, Mesh, Sidecar, ports, traffic, wait_until};

#[test]
fn the_app_sees_nothing_and_the_log_says_why() {
    let app = Banner::start("secret banner");
    let consul = Consul::start();
    let upstream = ports::free_address();
    consul.register(&Definition::new("db").app(app.address));
    consul.register(&Definition::new("web").upstream("db", upstream));
    let db = Sidecar::start(&consul, "db");
    let web = Sidecar::start(&consul, "web");

    // Denied by default: no intention at all.
    wait_until("a denial by default", support::PATIENCE, || {
        let (received, _) = traffic::read_all(upstream);
        assert!(received.is_empty(), "a denied client read {:?}", String::from_utf8_lossy(&received));
        db.closed("denied") > 0
    });
    let line = db.wait_closed("denied");
    let web_id = format!("spiffe://{}/ns/default/dc/dc1/svc/web", consul.trust_domain());
    assert_eq!(line["source"], web_id);
    assert_eq!(line["decision"], "denied");
    assert!(line["by"].to_string().contains("default"), "by: {}", line["by"]);
    let remedy = line["remedy"].as_str().expect("a remedy");
    assert!(remedy.contains("web") && remedy.contains("db"), "the remedy names both sides: {remedy}");

    // Denied by an intention: the log names it, though a wildcard allows everybody else.
    consul.allow("*", "db");
    consul.deny("web", "db");
    wait_until("the log names the intention", support::PATIENCE, || {
        let (received, _) = traffic::read_all(upstream);
        // The wildcard may hold alone for a moment; what counts is the state that settles.
        received.is_empty() && db.connections().last().is_some_and(|line| line["by"].to_string().contains("web"))
    });
    let line = db
        .wait_connection("a denial by intention", |line| line["decision"] == "denied" && line["by"].to_string().contains("web"));
    assert!(line["by"].to_string().to_lowercase().contains("deny"), "by: {}", line["by"]);

    // And once allowed, the banner comes.
    consul.allow("web", "db");
    let accepted = app.accepted();
    wait_until("the banner", support::PATIENCE, || {
        let mut stream = traffic::connect(upstream).expect("web's upstream listens");
        let mut banner = [0; 14];
        std::io::Read::read_exact(&mut stream, &mut banner).is_ok() && banner == *b"secret banner\n"
    });
    assert!(app.accepted() > accepted);
    drop(web);
}
