//! Hand-driven mesh peers: TLS clients and servers with any certificate, in full control of their TCP stream.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, ServerConfig, ServerConnection, SignatureScheme, StreamOwned,
};

use super::mesh::Leaf;

pub type ClientStream = StreamOwned<ClientConnection, TcpStream>;
pub type ServerStream = StreamOwned<ServerConnection, TcpStream>;

fn chain(leaf: &Leaf) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(leaf.chain_pem.as_bytes()).collect::<Result<_, _>>().expect("certificates in PEM")
}

fn key(leaf: &Leaf) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes()).expect("a key in PEM")
}

fn crypto() -> Arc<CryptoProvider> {
    Arc::new(provider::default_provider())
}

/// Connects and finishes the handshake as this client; `None` presents no certificate.
pub fn client(address: SocketAddr, identity: Option<&Leaf>) -> io::Result<ClientStream> {
    client_with(address, &client_config(identity, rustls::ALL_VERSIONS))
}

/// A client that remembers sessions, for more than one connection.
pub fn client_config(identity: Option<&Leaf>, versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(crypto())
        .with_protocol_versions(versions)
        .expect("TLS versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let config = match identity {
        Some(leaf) => config.with_client_auth_cert(chain(leaf), key(leaf)).expect("client certificate"),
        None => config.with_no_client_auth(),
    };
    Arc::new(config)
}

/// Connects and finishes the handshake.
pub fn client_with(address: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<ClientStream> {
    let tcp = super::traffic::connect(address)?;
    let name = ServerName::try_from("mesh.invalid").expect("a server name");
    let mut stream = StreamOwned::new(ClientConnection::new(Arc::clone(config), name).expect("client"), tcp);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// What a server that presents `identity` needs; it takes any client.
pub fn server_config(identity: &Leaf) -> Arc<ServerConfig> {
    let config = ServerConfig::builder_with_provider(crypto())
        .with_safe_default_protocol_versions()
        .expect("TLS versions")
        .with_no_client_auth()
        .with_single_cert(chain(identity), key(identity))
        .expect("server certificate");
    Arc::new(config)
}

/// Finishes the handshake on an accepted stream.
pub fn accept(tcp: TcpStream, config: &Arc<ServerConfig>) -> io::Result<ServerStream> {
    tcp.set_read_timeout(Some(super::PATIENCE))?;
    let mut stream = StreamOwned::new(ServerConnection::new(Arc::clone(config)).expect("server"), tcp);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// A certificate for `uri` of a CA that nobody trusts, or of itself.
pub fn foreign_leaf(uri: &str, self_signed: bool) -> Leaf {
    let key = rcgen::KeyPair::generate().expect("key");
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().expect("a URI"))];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth, rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    let certificate = if self_signed {
        params.self_signed(&key).expect("a certificate")
    } else {
        let ca_key = rcgen::KeyPair::generate().expect("key");
        let mut ca = rcgen::CertificateParams::default();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.signed_by(&key, &rcgen::Issuer::new(ca, ca_key)).expect("a certificate")
    };
    Leaf { chain_pem: certificate.pem(), key_pem: key.serialize_pem(), uri: uri.to_owned(), serial: String::new() }
}

/// Takes any server: what these clients test is the far side.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
