//! Denials: the app is never touched, and a client that its sidecar can still tell is told in its own protocol, also when the
//! shared buffers are all out.

use super::*;
use crate::mesh::caller::{Caller, Callers, Refusal, Stranger, Tier, Who};
use crate::store::desk::{self, Answer, Question};

#[test]
fn a_denied_peer_never_reaches_the_app() {
    let mut mesh = Mesh::new(1, Faults::NONE);
    mesh.publish_server(DefaultPolicy::Deny);
    let app = mesh.network.listen(APP);
    mesh.turns(50);
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"SELECT 1");
    mesh.turns(2_000);
    assert!(mesh.network.accept(app).is_none(), "the app was dialed for a denied peer");
    assert!(client.read(100).is_err(), "the client must see a reset, not a clean end");
    drop(client);
    let (client, server) = mesh.finish();
    assert_eq!(server[0].reason, CloseReason::Denied);
    assert_eq!(client[0].reason, CloseReason::DeniedByPeer);
}

#[test]
fn a_denial_during_the_drain_still_cuts() {
    let mut mesh = Mesh::new(7, Faults::NONE);
    let app = mesh.network.listen(APP);
    let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
    client.write(b"hello");
    mesh.turns(500);
    let server = mesh.network.accept(app).expect("the app was dialed");
    mesh.server.orders.raise(Order::Drain);
    mesh.turns(50);
    mesh.publish_server(DefaultPolicy::Deny);
    mesh.turns(50);
    assert!(client.read(100).is_err(), "a revoked peer must not live through the drain");
    drop((client, server));
    let (_, server) = mesh.finish();
    assert_eq!(server[0].reason, CloseReason::Revoked);
}

#[test]
fn a_denied_caller_is_told_with_and_without_shared_buffers() {
    for no_buffers in [0.0, 1.0] {
        let (_callers, mut readers) = store::new(Callers::default(), 1);
        let (mut inquirers, mut desks) = desk::open(1);
        let attribution = Attribution { callers: readers.remove(0), inquirer: inquirers.remove(0) };
        let mut mesh = Mesh::telling_apart(11, Faults::NONE, Some(attribution));
        mesh.publish_client_replying(&[PUBLIC], true, DenyReply::Redis);
        mesh.turns(50);
        mesh.network.set_faults(Faults { no_buffers, ..Faults::NONE });
        let client = mesh.network.connect(LISTEN).expect("the sidecar listens");
        client.write(b"HELLO 3\r\n");
        mesh.turns(50);
        let Some(Question::Who { slot, generation, .. }) = desks[0].question() else { panic!("nobody asked who it is") };
        let refusal = Refusal { rule: "default".into(), why: "it is nobody known".into(), remedy: "none".into() };
        let who = Who::Stranger(Stranger::default());
        let caller = Arc::new(Caller { who, tier: Tier::Unidentified, verdict: Err(refusal) });
        desks[0].answer(Answer { slot, generation, caller });
        mesh.turns(200);
        let first = client.read(4_096);
        let text = String::from_utf8_lossy(first.as_ref().ok().and_then(Option::as_deref).unwrap_or_default()).into_owned();
        assert!(text.starts_with("-NOPERM mesh: "), "no_buffers {no_buffers}: {first:?}");
        // Redis clients introduce themselves before the command that matters.
        client.write(b"GET x\r\n");
        mesh.turns(200);
        assert!(matches!(client.read(4_096), Ok(Some(again)) if again.starts_with(b"-NOPERM")), "no_buffers {no_buffers}");
        drop(client);
        mesh.turns(50);
        let (client, _) = mesh.finish();
        assert_eq!(client[0].reason, CloseReason::CallerDenied, "no_buffers {no_buffers}");
    }
}
