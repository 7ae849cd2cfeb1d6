//! A server with a good certificate of another service, or with a foreign one, gets no byte of the client's.

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use support::mesh::Leaf;
use support::{Agent, Custom, Definition, Mesh, Sidecar, ports, tls, traffic};

#[test]
fn a_good_certificate_of_another_service() {
    let agent = Agent::start();
    agent.register(&Definition::new("other"));
    let other = agent.leaf("other");
    assert_eq!(refusal(&agent, &other), "identity_mismatch");
}

#[test]
fn the_right_name_of_a_foreign_ca() {
    let agent = Agent::start();
    let uri = format!("spiffe://{}/ns/default/dc/dc1/svc/db", agent.trust_domain());
    assert_eq!(refusal(&agent, &tls::foreign_leaf(&uri, false)), "handshake_failed");
}

/// Runs a server with `identity` in the place of db's sidecar; gives the reason that web logs.
fn refusal(agent: &Agent, identity: &Leaf) -> String {
    let config = tls::server_config(identity);
    let stolen = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&stolen);
    let impostor = Custom::start(move |tcp| {
        if let Ok(mut stream) = tls::accept(tcp, &config) {
            let mut bytes = Vec::new();
            // However the stream ends: what counts is what was read before.
            let _ = stream.read_to_end(&mut bytes);
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    });
    let upstream = ports::free_address();
    agent.register(&Definition::new("db").public(impostor.address));
    agent.register(&Definition::new("web").upstream("db", upstream));
    agent.allow("web", "db");
    let mut web = Sidecar::start(agent, "web");
    web.wait_endpoint();
    let mut client = traffic::connect(upstream).expect("web's upstream listens");
    // The refusal may come before the write.
    let _ = client.write_all(b"a password");
    let (received, _) = traffic::read_to_end(&client);
    assert!(received.is_empty());
    let line = web.wait_connection("the refused connection", |line| line["direction"] == "outbound");
    assert_eq!(stolen.load(Ordering::Relaxed), 0, "the impostor read payload");
    assert!(impostor.accepted() > 0, "the impostor was never dialed: {line}");
    web.assert_healthy();
    line["reason"].as_str().expect("a reason").to_owned()
}
