//! Which cipher suites of TLS 1.2 are spoken. Those of TLS 1.3 cannot be chosen, as with Envoy's BoringSSL.

use rustls::SupportedCipherSuite;

use super::backend::provider::cipher_suite as ours;

/// AES-128-GCM first, as BoringSSL orders them: the cheapest per byte on machines with AES instructions, and ample.
const TLS13: [SupportedCipherSuite; 3] =
    [ours::TLS13_AES_128_GCM_SHA256, ours::TLS13_AES_256_GCM_SHA384, ours::TLS13_CHACHA20_POLY1305_SHA256];
/// The same, with the names that Consul (IANA's) and Envoy (OpenSSL's) have for them.
const TLS12: [(SupportedCipherSuite, &str, &str); 6] = [
    (ours::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256"),
    (ours::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256"),
    (ours::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    (ours::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "ECDHE-RSA-AES256-GCM-SHA384"),
    (
        ours::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    ),
    (
        ours::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        "ECDHE-RSA-CHACHA20-POLY1305",
    ),
];

/// A set of suites of TLS 1.2, all with forward secrecy and AEAD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suites(u8);

impl Suites {
    /// All that are spoken.
    pub const ALL: Self = Self((1 << TLS12.len()) - 1);

    /// Those of `names` that are spoken, by IANA's or OpenSSL's names; `[A|B]` groups are Envoy's. No name at all is no wish.
    pub fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut names =
            names.into_iter().flat_map(|text| text.split(['[', ']', '|', ':'])).filter(|name| !name.is_empty()).peekable();
        if names.peek().is_none() {
            return Self::ALL;
        }
        let place = |name: &str| TLS12.iter().position(|(_, iana, openssl)| [iana, openssl].iter().any(|known| **known == name));
        Self(names.filter_map(place).fold(0, |set, place| set | 1 << place))
    }

    /// What is in both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether TLS 1.2 cannot be spoken with it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The OpenSSL names of all that are spoken, for errors.
    pub fn known() -> String {
        TLS12.map(|(_, _, openssl)| openssl).join(", ")
    }

    /// Those of TLS 1.3 and of the set.
    pub(super) fn with_tls13(self) -> Vec<SupportedCipherSuite> {
        let of_tls12 = TLS12.iter().enumerate().filter(|(place, _)| self.0 & 1 << place != 0).map(|(_, (suite, ..))| *suite);
        TLS13.into_iter().chain(of_tls12).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_known_by_both_names() {
        for (place, (suite, iana, openssl)) in TLS12.iter().enumerate() {
            assert_eq!(format!("{:?}", suite.suite()), **iana);
            assert_eq!((Suites::named([*iana]), Suites::named([*openssl])), (Suites(1 << place), Suites(1 << place)));
        }
        assert_eq!(Suites::ALL.with_tls13().len(), 9);
    }

    #[test]
    fn a_wish_for_others_leaves_none_and_no_wish_all() {
        assert_eq!(Suites::named([]), Suites::ALL);
        assert!(Suites::named(["AES128-SHA", "-ALL"]).is_empty());
        let two = Suites::named(["[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]", "AES128-SHA"]);
        assert_eq!(two.with_tls13().len(), 5);
        assert_eq!(two.and(Suites::named(["ECDHE-ECDSA-AES128-GCM-SHA256"])).with_tls13().len(), 4);
    }
}
