//! The public listener takes mutual TLS of the mesh and nothing else; the app never learns of the rest.

mod support;

use support::openssl::s_client;
use support::{Banner, Mesh, Pair, tls, wait_until};

#[test]
fn only_a_mesh_certificate_gets_in() {
    let app = Banner::start("hello from the app");
    let mut pair = Pair::local(app.address);
    let web = pair.mesh.leaf("web");
    let trust_domain = pair.mesh.trust_domain();
    let uri = format!("spiffe://{trust_domain}/ns/default/dc/dc1/svc/web");

    let wrong_ca = tls::foreign_leaf(&uri, false);
    let self_signed = tls::foreign_leaf(&uri, true);
    let refused = [
        ("no certificate, TLS 1.3", None, &["-tls1_3"][..]),
        ("no certificate, TLS 1.2", None, &["-tls1_2"][..]),
        ("another CA's certificate", Some(&wrong_ca), &["-tls1_3"][..]),
        ("another CA's certificate, TLS 1.2", Some(&wrong_ca), &["-tls1_2"][..]),
        ("a self-signed certificate", Some(&self_signed), &["-tls1_3"][..]),
        ("TLS 1.1", Some(&web), &["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"][..]),
    ];
    for (case, identity, arguments) in refused {
        let before = pair.db.closed("handshake_failed");
        let session = s_client(pair.public, identity, arguments, "let me in");
        assert!(session.received.is_empty(), "{case}: the app's answer came through: {session:?}");
        assert!(session.said.contains("alert") || session.said.contains("error"), "{case}: {session:?}");
        wait_until(&format!("{case}: counted"), support::PATIENCE, || pair.db.closed("handshake_failed") > before);
    }
    assert_eq!(app.accepted(), 0, "the app saw a connection");

    // The mesh's own certificate works in both versions, whatever ALPN and SNI the client sends.
    for arguments in
        [&["-tls1_3"][..], &["-tls1_2"], &["-alpn", "h2,consul~tcp"], &["-noservername"], &["-servername", "other.example"]]
    {
        let session = s_client(pair.public, Some(&web), arguments, "hello");
        assert!(session.received.starts_with("hello from the app\n"), "{arguments:?}: {session:?}\n{}", pair.db.process.tail());
    }
    pair.db.assert_healthy();
}
