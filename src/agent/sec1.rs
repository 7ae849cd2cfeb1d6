//! EC P-256 private keys between PKCS#8, which the crypto library makes, and SEC1 (`EC PRIVATE KEY`), which Consul hands out.
//!
//! Only the two exact DER layouts of P-256 with a public key are known; anything else is a [`KeyError`]. Pure, wipes what it copies.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use zeroize::Zeroizing;

/// `PrivateKeyInfo { 0, { ecPublicKey, prime256v1 }, ECPrivateKey { 1, [32 bytes…`.
const PKCS8_HEAD: [u8; 36] = [
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d, 0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20,
];
/// `ECPrivateKey { 1, [32 bytes…`.
const SEC1_HEAD: [u8; 7] = [0x30, 0x77, 0x02, 0x01, 0x01, 0x04, 0x20];
/// `[0] prime256v1`.
const CURVE: [u8; 12] = [0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// `[1] BIT STRING` of 65 bytes.
const PUBLIC_HEAD: [u8; 5] = [0xa1, 0x44, 0x03, 0x42, 0x00];
const SCALAR_BYTES: usize = 32;
const POINT_BYTES: usize = 65;

/// Why a key was refused. Never holds a byte of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum KeyError {
    /// Not one of the two layouts.
    #[error("the private key is not an EC P-256 key in PEM (EC PRIVATE KEY or PRIVATE KEY, with its public key)")]
    Layout,
}

/// PKCS#8 DER to SEC1 PEM.
pub(super) fn pem_from_pkcs8(der: &[u8]) -> Result<Zeroizing<String>, KeyError> {
    let body = der.strip_prefix(&PKCS8_HEAD).ok_or(KeyError::Layout)?;
    let (scalar, rest) = body.split_at_checked(SCALAR_BYTES).ok_or(KeyError::Layout)?;
    let point = rest.strip_prefix(&PUBLIC_HEAD).filter(|point| point.len() == POINT_BYTES).ok_or(KeyError::Layout)?;
    let sec1 = Zeroizing::new([&SEC1_HEAD[..], scalar, &CURVE, &PUBLIC_HEAD, point].concat());
    let text = Zeroizing::new(STANDARD.encode(&*sec1));
    let mut pem = Zeroizing::new(String::with_capacity(text.len() + 96));
    pem.push_str("-----BEGIN EC PRIVATE KEY-----\n");
    for (at, letter) in text.chars().enumerate() {
        if at > 0 && at % 64 == 0 {
            pem.push('\n');
        }
        pem.push(letter);
    }
    pem.push_str("\n-----END EC PRIVATE KEY-----\n");
    Ok(pem)
}

/// Reads a key that somebody brings for a new root.
pub(super) fn key_pair(pem: &str) -> Result<KeyPair, KeyError> {
    let pkcs8 = if pem.contains("BEGIN EC PRIVATE KEY") {
        pkcs8_from_sec1(&base64_body(pem, "EC PRIVATE KEY")?)?
    } else {
        base64_body(pem, "PRIVATE KEY")?
    };
    let der = rustls::pki_types::PrivatePkcs8KeyDer::from(pkcs8.as_slice());
    KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).map_err(|_| KeyError::Layout)
}

fn pkcs8_from_sec1(der: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let body = der.strip_prefix(&SEC1_HEAD).ok_or(KeyError::Layout)?;
    let (scalar, rest) = body.split_at_checked(SCALAR_BYTES).ok_or(KeyError::Layout)?;
    let rest = rest.strip_prefix(&CURVE).ok_or(KeyError::Layout)?;
    let point = rest.strip_prefix(&PUBLIC_HEAD).filter(|point| point.len() == POINT_BYTES).ok_or(KeyError::Layout)?;
    Ok(Zeroizing::new([&PKCS8_HEAD[..], scalar, &PUBLIC_HEAD, point].concat()))
}

fn base64_body(pem: &str, label: &str) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let body = pem.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end)).ok_or(KeyError::Layout)?.0;
    let text = Zeroizing::new(body.chars().filter(|c| !c.is_whitespace()).collect::<String>());
    STANDARD.decode(&*text).map(Zeroizing::new).map_err(|_| KeyError::Layout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::PublicKeyData;

    #[test]
    fn a_key_survives_the_round_trip() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let pem = pem_from_pkcs8(&key.serialize_der()).expect("converts");
        assert!(pem.lines().all(|line| line.len() <= 64));
        assert_eq!(key_pair(&pem).expect("reads").der_bytes(), key.der_bytes());
        assert_eq!(key_pair(&key.serialize_pem()).expect("reads PKCS#8").der_bytes(), key.der_bytes());
    }

    #[test]
    fn other_keys_are_refused() {
        for bad in
            ["", "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----\n!\n"]
        {
            assert_eq!(key_pair(bad).map(|_| ()), Err(KeyError::Layout));
        }
        assert_eq!(pem_from_pkcs8(&[0x30; 138]).map(|_| ()), Err(KeyError::Layout));
    }
}
