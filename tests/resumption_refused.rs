//! No session is resumed on the public listener: a resumed one would skip the check of the certificate. A client that
//! remembers sessions gets a full handshake each time, in both versions.

mod support;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::{ClientConfig, HandshakeKind};
use support::{Banner, Custom, Mesh, Pair, tls};

const BANNER: &str = "hello from the app\n";

#[test]
fn a_client_that_remembers_gets_full_handshakes() {
    let app = Banner::start(BANNER.trim_end());
    let pair = Pair::local(app.address);
    let web = pair.mesh.leaf("web");
    let stock = stock_server(&pair.mesh.leaf("db"));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let remembering = tls::client_config(Some(&web), &[version]);
        let kinds = || [handshake(stock.address, &remembering), handshake(stock.address, &remembering)];
        assert_eq!(kinds()[1], HandshakeKind::Resumed, "{version:?}: a stock server resumes, or this test proves nothing");

        let remembering = tls::client_config(Some(&web), &[version]);
        for _ in 0..3 {
            assert_ne!(handshake(pair.public, &remembering), HandshakeKind::Resumed, "{version:?}");
        }
    }
    assert_eq!(pair.db.metrics().sum("ringfence_handshakes_resumed_total", &[]), 0);
    assert!(pair.db.metrics().sum("ringfence_handshakes_total", &[]) >= 6, "the handshakes were counted");
}

/// One connection up to the app's first line: by then tickets have arrived, if there are any.
fn handshake(address: SocketAddr, config: &Arc<ClientConfig>) -> HandshakeKind {
    let mut stream = tls::client_with(address, config).expect("a handshake");
    let mut line = [0; BANNER.len()];
    stream.read_exact(&mut line).expect("the app's line");
    assert_eq!(line, BANNER.as_bytes());
    stream.conn.handshake_kind().expect("the handshake is done")
}

fn stock_server(identity: &support::mesh::Leaf) -> Custom {
    let config = tls::server_config(identity);
    Custom::start(move |tcp| {
        if let Ok(mut stream) = tls::accept(tcp, &config) {
            let _ = stream.write_all(BANNER.as_bytes()).and_then(|()| stream.flush());
            // Until the client has gone.
            let _ = stream.read(&mut [0]);
        }
    })
}
