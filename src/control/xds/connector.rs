//! Opens connections to the xDS server: TCP, TLS or a unix socket, the addresses in turn.
//!
//! Invariant: with TLS, a server is believed only by the CA of the bootstrap.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpStream, UnixStream};

use crate::config::envoy::{GrpcAddress, GrpcServer, GrpcTls};
use crate::control::ControlError;
use crate::control::consul::connector::Stream;

/// gRPC's protocol in TLS.
const ALPN: &[u8] = b"h2";

/// Makes connections to one server.
#[derive(Clone)]
pub(super) struct Connector {
    inner: Arc<Inner>,
}

struct Inner {
    addresses: Vec<GrpcAddress>,
    tls: Option<(Arc<ClientConfig>, Option<ServerName<'static>>)>,
    timeout: Duration,
}

impl Connector {
    pub(super) fn new(server: &GrpcServer) -> Result<Self, ControlError> {
        if server.addresses.is_empty() {
            return Err(ControlError::Config("the xDS server's cluster has no address".to_owned()));
        }
        let tls = server.tls.as_ref().map(|tls| Ok::<_, ControlError>((Arc::new(client_config(tls)?), server_name(tls)?)));
        let inner = Inner { addresses: server.addresses.clone(), tls: tls.transpose()?, timeout: server.connect_timeout };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The addresses, for a person.
    pub(super) fn describe(&self) -> String {
        let texts = self.inner.addresses.iter().map(|address| match address {
            GrpcAddress::Tcp(host, port) => format!("{host}:{port}"),
            GrpcAddress::Unix(path) => format!("unix://{}", path.display()),
        });
        texts.collect::<Vec<_>>().join(", ")
    }

    async fn connect(self) -> std::io::Result<TokioIo<Box<dyn Stream>>> {
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in &self.inner.addresses {
            let attempt = tokio::time::timeout(self.inner.timeout, self.dial(address)).await;
            match attempt.unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "connecting took too long"))) {
                Ok(stream) => return Ok(TokioIo::new(stream)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial(&self, address: &GrpcAddress) -> std::io::Result<Box<dyn Stream>> {
        match address {
            GrpcAddress::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            GrpcAddress::Tcp(host, port) => {
                let tcp = TcpStream::connect((host.as_str(), *port)).await?;
                tcp.set_nodelay(true)?;
                let Some((config, name)) = &self.inner.tls else { return Ok(Box::new(tcp)) };
                let name = match name {
                    Some(name) => name.clone(),
                    None => ServerName::try_from(host.clone()).map_err(std::io::Error::other)?,
                };
                Ok(Box::new(tokio_rustls::TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?))
            }
        }
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

fn server_name(tls: &GrpcTls) -> Result<Option<ServerName<'static>>, ControlError> {
    let parse = |name: &String| {
        ServerName::try_from(name.clone()).map_err(|_| {
            ControlError::Config(format!("`{name}` cannot be the xDS server's TLS name; check sni in the bootstrap"))
        })
    };
    tls.server_name.as_ref().map(parse).transpose()
}

fn client_config(tls: &GrpcTls) -> Result<ClientConfig, ControlError> {
    let refused =
        |what: &str, why: &dyn std::fmt::Display| ControlError::Config(format!("TLS towards the xDS server: {what}: {why}"));
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_slice_iter(tls.ca_pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    roots.add_parsable_certificates(certificates.map_err(|error| refused("trusted_ca", &error))?);
    if roots.is_empty() {
        return Err(refused("trusted_ca", &"no CA certificate in it"));
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| refused("versions", &error))?
        .with_root_certificates(roots);
    let mut config = match &tls.client {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>();
            let chain = chain.map_err(|error| refused("certificate_chain", &error))?;
            let key =
                PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| refused("private_key", &"no PEM private key in it"))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| refused("certificate_chain with private_key", &error))?
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}
