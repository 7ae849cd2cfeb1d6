//! A proxy in this process that an xDS server of its own tells the mesh.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a harness of tests"
)]

use std::net::SocketAddr;
use std::time::Duration;

use ringfence::app::Sidecar as InProcess;
use ringfence::config;
use ringfence::tls::fixtures::{Ca, Leaf, chain_pem, key_pem};
use zeroize::Zeroizing;

use crate::resources::Material;
use crate::support::{PATIENCE, wait_for};
use crate::xds::XdsServer;

/// A proxy with its own xDS server.
pub struct Proxy {
    pub server: XdsServer,
    pub sidecar: InProcess,
}

impl Proxy {
    pub fn start(service: &str, server: XdsServer, token: &str) -> Self {
        Self::with_servers(service, server, token, &[])
    }

    /// With other gRPC servers in static clusters of these names.
    pub fn with_servers(service: &str, server: XdsServer, token: &str, others: &[(&str, SocketAddr)]) -> Self {
        let grpc = |address: SocketAddr| config::envoy::GrpcServer {
            addresses: vec![config::envoy::GrpcAddress::Tcp(address.ip().to_string(), address.port())],
            tls: None,
            connect_timeout: Duration::from_secs(1),
        };
        let xds = config::envoy::Xds {
            node_id: format!("{service}-sidecar-proxy"),
            node_cluster: service.to_owned(),
            node_metadata: serde_json::Map::new(),
            server: Some(grpc(server.address)),
            initial_metadata: vec![("x-consul-token".to_owned(), Zeroizing::new(token.to_owned()))],
            static_listeners: Vec::new(),
            static_clusters: Vec::new(),
            grpc_servers: others.iter().map(|(name, address)| ((*name).to_owned(), grpc(*address))).collect(),
            http_as_tcp: false,
            bootstrap: serde_json::Value::Null,
        };
        let settings = config::Sidecar {
            xds: Some(xds),
            plane: config::DataPlane { workers: 1, pin: false, ..config::DataPlane::default() },
            admin: config::Admin { bind: SocketAddr::from(([127, 0, 0, 1], 0)), ..config::Admin::default() },
            connection_log: config::LogTarget::None,
            ..config::Sidecar::default()
        };
        Self { server, sidecar: InProcess::start(settings).expect("the sidecar starts") }
    }

    pub fn wait_ready(&self) {
        wait_for("the sidecar is ready", PATIENCE, || {
            if self.sidecar.is_ready() { Ok(()) } else { Err(format!("{:?}\n{:?}", self.sidecar.status(), self.server.seen())) }
        });
    }

    pub fn serial(&self) -> Option<String> {
        self.sidecar.status().services.first()?.leaf_serial.clone()
    }

    pub fn stop(self) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(self.sidecar.stop()).expect("the sidecar stops");
    }
}

pub fn material(ca: &Ca, leaf: &Leaf) -> Material {
    let svid = ca.issue(leaf);
    Material {
        chain_pem: chain_pem(&svid.chain),
        key_pem: key_pem(&svid.key),
        roots_pem: chain_pem(std::slice::from_ref(ca.certificate())),
    }
}
