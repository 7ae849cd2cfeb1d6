//! A throw-away CA and the leaves `api` and `web`, as PEM files.

use std::path::Path;

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use tempfile::TempDir;

pub(crate) struct Identities {
    folder: TempDir,
}

impl Identities {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(folder.path().join("roots.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(ca, ca_key);
        for service in ["api", "web"] {
            write_leaf(folder.path(), &issuer, service);
        }
        Self { folder }
    }

    /// Options of the accepting relay, which is `api` and lets only `caller` in.
    pub(crate) fn accept(&self, caller: &str) -> Vec<String> {
        self.options("accept", "api", caller)
    }

    /// Options of the dialing relay, which is `web` and wants to reach `service`.
    pub(crate) fn dial(&self, service: &str) -> Vec<String> {
        self.options("dial", "web", service)
    }

    fn options(&self, role: &str, own: &str, peer: &str) -> Vec<String> {
        let file = |name: String| self.folder.path().join(name).display().to_string();
        let pairs = [
            ("--tls", role.to_owned()),
            ("--cert", file(format!("{own}.pem"))),
            ("--key", file(format!("{own}.key"))),
            ("--roots", file("roots.pem".to_owned())),
            ("--expect-uri", uri(peer)),
        ];
        pairs.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
    }
}

fn write_leaf(folder: &Path, issuer: &Issuer<'_, KeyPair>, service: &str) {
    let key = KeyPair::generate().unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri(service)).unwrap())];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    std::fs::write(folder.join(format!("{service}.pem")), leaf.signed_by(&key, issuer).unwrap().pem()).unwrap();
    std::fs::write(folder.join(format!("{service}.key")), key.serialize_pem()).unwrap();
}

fn uri(service: &str) -> String {
    format!("spiffe://bench.test/ns/default/dc/dc1/svc/{service}")
}
