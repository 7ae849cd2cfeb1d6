//! An upstream in another datacenter is reached: directly by its WAN address, or through a mesh gateway that routes by SNI
//! and ends no TLS. Who answers is checked end to end, and the intentions of the primary hold in the secondary.

mod support;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::Acceptor;
use serde_json::{Value, json};
use support::servers::{Reports, reports};
use support::{Custom, Datacenter, Definition, Echo, Federation, Mesh, PATIENCE, Sidecar, ports, traffic, wait_for};

/// Sent once the way is known to be open: the log line of that connection is the one with this many bytes.
const PAYLOAD_BYTES: usize = 100_000;
/// A ClientHello of ours takes well under 1 kB.
const HELLO_BYTES_MAX: usize = 16_384;

/// web in one datacenter has an upstream db in the other.
struct Way<'a> {
    web_in: &'a Datacenter,
    db_in: &'a Datacenter,
}

#[test]
fn directly_by_the_wan_address() {
    let federation = Federation::start();
    let (dc1, dc2) = (&federation.primary, &federation.secondary);
    let way = Way { web_in: dc1, db_in: dc2 };
    let (_app, public) = way.register_db(Wan::Listening);
    let upstream = way.register_web("none");
    let (web, db) = way.start_sidecars();
    assert_the_intermediate_comes_twice(dc2, "db");

    dc1.deny("web", "db");
    wait_for("db refuses web, as the primary's intention says", PATIENCE * 2, || {
        let _ = traffic::round_trip(upstream, b"denied, or not yet denied");
        if db.closed("denied") > 0 { Ok(()) } else { Err(format!("{}\n{}", web.process.tail(), db.process.tail())) }
    });
    dc1.allow("web", "db");
    way.assert_open(upstream, &web, &db, public);
}

/// Here it is the client that presents the intermediate twice.
#[test]
fn from_the_secondary_into_the_primary() {
    let federation = Federation::start();
    let way = Way { web_in: &federation.secondary, db_in: &federation.primary };
    let (_app, public) = way.register_db(Wan::Listening);
    let upstream = way.register_web("none");
    federation.primary.allow("web", "db");
    let (web, db) = way.start_sidecars();
    assert_the_intermediate_comes_twice(&federation.secondary, "web");
    way.assert_open(upstream, &web, &db, public);
}

#[test]
fn through_a_mesh_gateway_of_our_own_datacenter() {
    through_a_gateway("local");
}

#[test]
fn through_a_mesh_gateway_of_the_other_datacenter() {
    through_a_gateway("remote");
}

/// Neither address that db is registered with leads anywhere, so what arrives has come through the gateway.
fn through_a_gateway(mode: &str) {
    let federation = Federation::start();
    let (dc1, dc2) = (&federation.primary, &federation.secondary);
    let way = Way { web_in: dc1, db_in: dc2 };
    let (_app, public) = way.register_db(Wan::Dead);
    let sni = format!("db.default.dc2.internal.{}", dc1.trust_domain());
    let (gateway, seen) = start_gateway(sni.clone(), public);
    // Only the address that this mode must use is the gateway's.
    match mode {
        "local" => register_gateway(dc1, gateway.address, ports::free_address()),
        _ => register_gateway(dc2, ports::free_address(), gateway.address),
    }
    dc1.allow("web", "db");
    let upstream = way.register_web(mode);
    let (web, db) = way.start_sidecars();
    way.assert_open(upstream, &web, &db, gateway.address);
    assert_eq!(seen.next(), Some(sni), "the SNI that the gateway routed by");
}

impl Way<'_> {
    /// Registers db, whose LAN address leads nowhere; gives its app and where its sidecar listens.
    fn register_db(&self, wan: Wan) -> (Custom, SocketAddr) {
        let (app, public) = (Echo::start(), ports::free_address());
        let definition = Definition::new("db").app(app.address).public(public).config("bind_port", public.port());
        let mut body = definition.json();
        let sidecar = &mut body["Connect"]["SidecarService"];
        sidecar["Port"] = ports::free().into();
        let wan = if wan == Wan::Listening { public } else { ports::free_address() };
        sidecar["TaggedAddresses"] = json!({"wan": tagged(wan)});
        self.db_in.client().put("/v1/agent/service/register", &body).ok("registration of db");
        (app, public)
    }

    /// Registers web; gives where its app reaches db.
    fn register_web(&self, gateway_mode: &str) -> SocketAddr {
        let upstream = ports::free_address();
        self.web_in.register(&Definition::new("web").raw_upstream(json!({
            "DestinationName": "db", "Datacenter": self.db_in.name, "MeshGateway": {"Mode": gateway_mode},
            "LocalBindAddress": upstream.ip().to_string(), "LocalBindPort": upstream.port(),
        })));
        upstream
    }

    /// The sidecars of web and db, each beside the agent of its own datacenter.
    fn start_sidecars(&self) -> (Sidecar, Sidecar) {
        let db = Sidecar::start(self.db_in, "db");
        let web = Sidecar::start(self.web_in, "web");
        web.wait_endpoint();
        (web, db)
    }

    /// Echoes through the upstream; both logs name either side with its own datacenter, and web's tells what it dialed.
    fn assert_open(&self, upstream: SocketAddr, web: &Sidecar, db: &Sidecar, dialed: SocketAddr) {
        wait_for("the first echo from the other datacenter", PATIENCE * 2, || {
            let tails = |error| format!("{error}\n{}\n{}", web.process.tail(), db.process.tail());
            traffic::echo(upstream, b"first").map_err(tails)
        });
        traffic::echo(upstream, &support::bytes(2, PAYLOAD_BYTES)).expect("an echo of 100 kB");

        let id = |datacenter: &Datacenter, service: &str| {
            format!("spiffe://{}/ns/default/dc/{}/svc/{service}", datacenter.trust_domain(), datacenter.name)
        };
        let (web_id, db_id) = (id(self.web_in, "web"), id(self.db_in, "db"));
        let outbound = web.wait_connection("the 100 kB, outbound", |line| line["bytes_to_mesh"] == PAYLOAD_BYTES);
        assert_eq!(outbound["upstream"], format!("db?dc={}", self.db_in.name), "{outbound}");
        assert_eq!(outbound["source"], web_id, "{outbound}");
        assert_eq!(outbound["destination"], db_id, "{outbound}");
        assert_eq!(outbound["endpoint"], dialed.to_string(), "{outbound}");
        assert_eq!(outbound["bytes_from_mesh"], PAYLOAD_BYTES, "{outbound}");
        assert_eq!(outbound["reason"], "complete", "{outbound}");
        let inbound = db.wait_connection("the same, inbound", |line| line["bytes_from_mesh"] == PAYLOAD_BYTES);
        assert_eq!(inbound["source"], web_id, "{inbound}");
        assert_eq!(inbound["destination"], db_id, "{inbound}");
        assert_eq!(inbound["decision"], "allowed", "{inbound}");
    }
}

/// Whether db's sidecar listens on the WAN address that it is registered with.
#[derive(PartialEq, Eq)]
enum Wan {
    Listening,
    Dead,
}

/// A leaf of a secondary comes with the datacenter's intermediate twice; the traffic of the test shows that this is no harm.
fn assert_the_intermediate_comes_twice(secondary: &Datacenter, service: &str) {
    let leaf = secondary.leaf(service);
    let chain = CertificateDer::pem_slice_iter(leaf.chain_pem.as_bytes()).collect::<Result<Vec<_>, _>>().expect("PEM");
    println!("the chain of {service} in {} has {} certificates", secondary.name, chain.len());
    assert_eq!(chain.len(), 3, "leaf and intermediates:\n{}", leaf.chain_pem);
    assert_eq!(chain[1], chain[2], "the same intermediate twice");
    assert_ne!(chain[0], chain[1], "the leaf is no intermediate");
}

fn register_gateway(datacenter: &Datacenter, lan: SocketAddr, wan: SocketAddr) {
    let body = json!({
        "Kind": "mesh-gateway", "Name": "mesh-gateway", "Address": lan.ip().to_string(), "Port": lan.port(),
        "TaggedAddresses": {"lan": tagged(lan), "wan": tagged(wan)},
    });
    datacenter.client().put("/v1/agent/service/register", &body).ok("registration of a mesh gateway");
}

fn tagged(address: SocketAddr) -> Value {
    json!({"Address": address.ip().to_string(), "Port": address.port()})
}

/// A gateway that holds no certificate: it reads the ClientHello, reports its SNI and, if that is `sni`, forwards every byte
/// to `target`.
fn start_gateway(sni: String, target: SocketAddr) -> (Custom, Reports<Option<String>>) {
    let (reporter, seen) = reports();
    let gateway = Custom::start(move |mut client| {
        let Ok((hello, name)) = read_hello(&mut client) else { return };
        let known = name.as_ref() == Some(&sni);
        reporter.send(name);
        if known {
            // Either side may go away at any time; the test sees that as an echo that does not come.
            let _ = forward(client, &hello, target);
        }
    });
    (gateway, seen)
}

/// The bytes of a ClientHello and the SNI in it.
fn read_hello(client: &mut TcpStream) -> io::Result<(Vec<u8>, Option<String>)> {
    let (mut hello, mut acceptor, mut piece) = (Vec::new(), Acceptor::default(), [0; 4_096]);
    client.set_read_timeout(Some(PATIENCE))?;
    while hello.len() < HELLO_BYTES_MAX {
        let length = client.read(&mut piece)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hello.extend_from_slice(&piece[..length]);
        acceptor.read_tls(&mut &piece[..length])?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok((hello, accepted.client_hello().server_name().map(str::to_owned))),
            Ok(None) => {}
            Err((error, _)) => return Err(io::Error::other(error)),
        }
    }
    Err(io::Error::other("no ClientHello ends here"))
}

/// Relays until both directions have ended.
fn forward(client: TcpStream, hello: &[u8], target: SocketAddr) -> io::Result<()> {
    client.set_read_timeout(None)?;
    let mut server = traffic::connect(target)?;
    server.set_read_timeout(None)?;
    server.write_all(hello)?;
    let pump = |mut from: &TcpStream, mut to: &TcpStream| -> io::Result<()> {
        io::copy(&mut from, &mut to)?;
        to.shutdown(Shutdown::Write)
    };
    std::thread::scope(|scope| {
        let back = scope.spawn(|| pump(&server, &client));
        let forth = pump(&client, &server);
        back.join().expect("the way back").and(forth)
    })
}
