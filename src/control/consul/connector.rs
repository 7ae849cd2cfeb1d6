//! Opens connections to the agent: TCP, TLS or a unix socket.
//!
//! Invariant: with TLS, an agent is believed only by the configured roots, unless verification was switched off, which is
//! said loudly. The files are read at start and again by [`Connector::reload`]; a bad file then keeps the old state.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use hyper::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::config::{AgentAddress, AgentTls};
use crate::control::ControlError;

/// Bound on name resolution, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where distributions keep the system's roots; the first that exists is used, as Go does.
const SYSTEM_ROOTS: [&str; 4] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];

/// The byte stream under HTTP.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection for Box<dyn Stream> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Makes connections to one agent.
#[derive(Clone)]
pub(crate) struct Connector {
    inner: Arc<Inner>,
}

struct Inner {
    address: AgentAddress,
    tls: AgentTls,
    server_name: Option<ServerName<'static>>,
    client: ArcSwapOption<ClientConfig>,
}

impl Connector {
    /// Reads the TLS files if the address wants TLS.
    pub(crate) fn new(address: &AgentAddress, tls: &AgentTls) -> Result<Self, ControlError> {
        let (server_name, client) = match address {
            AgentAddress::Http { host, tls: true, .. } => {
                let name = tls.server_name.as_ref().unwrap_or(host).clone();
                let parsed = ServerName::try_from(name.clone())
                    .map_err(|_| ControlError::Config(format!("`{name}` cannot be a TLS server name; set -tls-server-name")))?;
                if tls.skip_verify {
                    tracing::warn!(
                        "CONSUL_HTTP_SSL_VERIFY=false: whoever answers at {host} is believed to be the Consul agent and \
                         receives the ACL token; use CONSUL_CACERT instead"
                    );
                }
                (Some(parsed), Some(Arc::new(client_config(tls)?)))
            }
            _ => (None, None),
        };
        let client = ArcSwapOption::from(client);
        Ok(Self { inner: Arc::new(Inner { address: address.clone(), tls: tls.clone(), server_name, client }) })
    }

    /// Reads the files again. On error the old configuration stays in use.
    pub(crate) fn reload(&self) -> Result<(), ControlError> {
        if self.inner.server_name.is_some() {
            self.inner.client.store(Some(Arc::new(client_config(&self.inner.tls)?)));
        }
        Ok(())
    }

    async fn connect(self) -> std::io::Result<TokioIo<Box<dyn Stream>>> {
        let stream: Box<dyn Stream> = match &self.inner.address {
            AgentAddress::Unix(path) => Box::new(UnixStream::connect(path).await?),
            AgentAddress::Http { host, port, .. } => {
                let tcp = TcpStream::connect((host.as_str(), *port)).await?;
                tcp.set_nodelay(true)?;
                match (&self.inner.server_name, self.inner.client.load_full()) {
                    (Some(name), Some(config)) => {
                        Box::new(tokio_rustls::TlsConnector::from(config).connect(name.clone(), tcp).await?)
                    }
                    _ => Box::new(tcp),
                }
            }
        };
        Ok(TokioIo::new(stream))
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
        let connect = self.clone().connect();
        Box::pin(async move {
            tokio::time::timeout(CONNECT_TIMEOUT, connect)
                .await
                .unwrap_or_else(|_| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "connecting took too long")))
        })
    }
}

fn client_config(tls: &AgentTls) -> Result<ClientConfig, ControlError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| ControlError::Config(format!("TLS towards the agent: {error}")))?;
    let builder = if tls.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(BelieveAnybody(provider)))
    } else {
        builder.with_root_certificates(roots(tls)?)
    };
    match (&tls.client_cert, &tls.client_key) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(cert), Some(key)) => {
            let chain = certificates(cert)?;
            let bytes = zeroize::Zeroizing::new(read(key)?);
            let key_der = PrivateKeyDer::from_pem_slice(&bytes)
                .map_err(|_| ControlError::Config(format!("-client-key {}: no PEM private key in it", key.display())))?;
            builder
                .with_client_auth_cert(chain, key_der)
                .map_err(|error| ControlError::Config(format!("-client-cert {} with its key: {error}", cert.display())))
        }
        _ => Err(ControlError::Config("-client-cert and -client-key must be given together".into())),
    }
}

fn roots(tls: &AgentTls) -> Result<rustls::RootCertStore, ControlError> {
    let mut files: Vec<PathBuf> = tls.ca_file.iter().cloned().collect();
    if let Some(folder) = &tls.ca_path {
        let entries =
            std::fs::read_dir(folder).map_err(|error| ControlError::Config(format!("-ca-path {}: {error}", folder.display())))?;
        files.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).filter(|path| path.is_file()));
    }
    if tls.ca_file.is_none() && tls.ca_path.is_none() {
        files.extend(SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()));
    }
    let mut store = rustls::RootCertStore::empty();
    for file in &files {
        store.add_parsable_certificates(certificates(file)?);
    }
    if store.is_empty() {
        return Err(ControlError::Config("no CA certificate to check the agent with; set -ca-file or CONSUL_CACERT".into()));
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ControlError> {
    CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|_| ControlError::Config(format!("{}: malformed PEM", path.display())))
}

fn read(path: &Path) -> Result<Vec<u8>, ControlError> {
    std::fs::read(path).map_err(|error| ControlError::Config(format!("{}: {error}", path.display())))
}

/// CONSUL_HTTP_SSL_VERIFY=false.
#[derive(Debug)]
struct BelieveAnybody(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for BelieveAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use crate::config::{Consul, TokenSource};
    use crate::control::consul::budget::{BLOCKING_QUERIES_MAX, Class};
    use crate::control::consul::client::{Client, Request};
    use crate::control::consul::error::{AgentError, Endpoint};
    use crate::control::consul::token::Token;

    fn client(address: AgentAddress, tls: AgentTls) -> Result<Client, ControlError> {
        let basic_auth = Some(zeroize::Zeroizing::new("user:pass".to_owned()));
        Client::new(&Consul { address, tls, basic_auth, ..Consul::default() }, Token::new(&TokenSource::None))
    }

    /// Reads one request and answers it with `ok`; returns what was asked.
    async fn answer_once(mut stream: impl Stream) -> String {
        let mut request = vec![0; 4_096];
        let length = stream.read(&mut request).await.expect("a request");
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Consul-Index: 7\r\n\r\ntrue").await.expect("answered");
        stream.shutdown().await.expect("ended");
        String::from_utf8_lossy(&request[..length]).into_owned()
    }

    fn self_signed(name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        (params.self_signed(&key).expect("a certificate"), key)
    }

    fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("written");
        path
    }

    /// An https agent until the handle is aborted.
    async fn serve(config: rustls::ServerConfig) -> (AgentAddress, tokio::task::JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("an address").port();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let server = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.expect("accepted");
                if let Ok(stream) = acceptor.accept(tcp).await {
                    answer_once(stream).await;
                }
            }
        });
        (AgentAddress::Http { host: "127.0.0.1".into(), port, tls: true, prefix: "/consul".into() }, server)
    }

    /// An agent with `verify_incoming_https`, which speaks `version` only.
    fn demanding(
        version: &'static rustls::SupportedProtocolVersion,
        server: &(rcgen::Certificate, rcgen::KeyPair),
        client_ca: &rcgen::Certificate,
    ) -> rustls::ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(client_ca.der().clone()).expect("a root");
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .expect("a verifier");
        let key = PrivateKeyDer::try_from(server.1.serialize_der()).expect("a key");
        rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![server.0.der().clone()], key)
            .expect("a server")
    }

    #[tokio::test]
    async fn an_agent_that_wants_a_client_certificate_is_told_from_one_that_restarts() {
        let folder = tempfile::tempdir().expect("folder");
        let (server_pair, ours, strange) = (self_signed("server.dc1.consul"), self_signed("client"), self_signed("strange"));
        let plain = AgentTls {
            ca_file: Some(write(folder.path(), "ca.pem", &server_pair.0.pem())),
            server_name: Some("server.dc1.consul".into()),
            ..AgentTls::default()
        };
        let with = |name: &str, (certificate, key): &(rcgen::Certificate, rcgen::KeyPair)| AgentTls {
            client_cert: Some(write(folder.path(), &format!("{name}.pem"), &certificate.pem())),
            client_key: Some(write(folder.path(), &format!("{name}-key.pem"), &key.serialize_pem())),
            ..plain.clone()
        };
        let (right, wrong) = (with("ours", &ours), with("strange", &strange));
        let request = Request::get(Endpoint::Roots, &["x"]);
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let (address, server) = serve(demanding(version, &server_pair, &ours.0)).await;
            for tls in [&plain, &wrong] {
                let refused = client(address.clone(), tls.clone()).expect("a client");
                let error = refused.call(&request).await.expect_err("refused");
                assert!(matches!(error, AgentError::ClientCertificate { .. }), "{version:?}: {error:?}");
                for name in ["-client-cert", "-client-key", "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"] {
                    assert!(error.to_string().contains(name), "{error}");
                }
                assert!(!error.congestion() && !error.answered() && !refused.reachable(), "{error}");
                let places: Vec<_> = std::iter::from_fn(|| refused.budget().enter(Class::Leaf)).take(1_000).collect();
                assert_eq!(places.len(), BLOCKING_QUERIES_MAX, "the budget is not to blame");
            }
            let made = client(address, right.clone()).expect("a client");
            assert_eq!(made.call(&request).await.expect("an answer").index, Some(7));
            server.abort();
        }
    }

    #[tokio::test]
    async fn a_unix_socket_works_and_basic_authentication_is_sent() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("agent.sock");
        let listener = tokio::net::UnixListener::bind(&path).expect("bound");
        let server = tokio::spawn(async move { answer_once(listener.accept().await.expect("accepted").0).await });
        let client = client(AgentAddress::Unix(path), AgentTls::default()).expect("a client");
        let response = client.call(&Request::get(Endpoint::Roots, &["a b", "é/"]).with("x", "1&2")).await.expect("an answer");
        assert_eq!(response.index, Some(7));
        let asked = server.await.expect("served");
        assert!(asked.starts_with("GET /v1/a%20b/%C3%A9%2F?x=1%262 HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains("authorization: Basic dXNlcjpwYXNz"), "{asked}");
    }

    #[tokio::test]
    async fn https_believes_only_the_given_ca_and_name() {
        let folder = tempfile::tempdir().expect("folder");
        let (certificate, key) = self_signed("server.dc1.consul");
        let ca_file = write(folder.path(), "ca.pem", &certificate.pem());
        let server_key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], server_key))
            .expect("a server");
        let (address, server) = serve(config).await;
        let right =
            AgentTls { ca_file: Some(ca_file.clone()), server_name: Some("server.dc1.consul".into()), ..AgentTls::default() };
        let request = Request::get(Endpoint::Roots, &["x"]);
        let made = client(address.clone(), right.clone()).expect("a client");
        assert_eq!(made.call(&request).await.expect("an answer").index, Some(7));
        let wrong_name = AgentTls { server_name: None, ..right.clone() };
        let error = client(address.clone(), wrong_name).expect("a client").call(&request).await.expect_err("refused");
        assert!(matches!(&error, AgentError::Unreachable { detail, .. } if detail.contains("certificate")), "{error}");
        let careless = AgentTls { ca_file: None, skip_verify: true, ..AgentTls::default() };
        assert!(client(address.clone(), careless).expect("a client").call(&request).await.is_ok());
        let half = AgentTls { client_cert: Some(ca_file), ..right };
        assert!(client(address, half).expect_err("refused").to_string().contains("together"));
        server.abort();
    }
}
