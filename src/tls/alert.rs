//! TLS alerts by name (RFC 8446 section 6, RFC 5246 section 7.2): what this proxy sends, and the text that logs show.
//!
//! Invariant: every code has a text, so a log line never shows a bare number. Knows no connection.

/// The peer will send no more.
pub const CLOSE_NOTIFY: u8 = 0;
/// A message that has no place here.
pub const UNEXPECTED_MESSAGE: u8 = 10;
/// A record failed authentication.
pub const BAD_RECORD_MAC: u8 = 20;
/// A record is longer than the standard allows.
pub const RECORD_OVERFLOW: u8 = 22;
/// No common parameters.
pub const HANDSHAKE_FAILURE: u8 = 40;
/// A certificate was unacceptable for an unnamed reason.
pub const CERTIFICATE_UNKNOWN: u8 = 46;
/// A field has a value that it must not have.
pub const ILLEGAL_PARAMETER: u8 = 47;
/// A valid certificate, but the policy says no.
pub const ACCESS_DENIED: u8 = 49;
/// A message could not be decoded.
pub const DECODE_ERROR: u8 = 50;
/// The version is not spoken here.
pub const PROTOCOL_VERSION: u8 = 70;
/// Something failed on this side that is not the peer's fault.
pub const INTERNAL_ERROR: u8 = 80;
/// The peer gave up for a reason unrelated to the protocol; close_notify follows.
pub const USER_CANCELED: u8 = 90;
/// Renegotiation is refused (TLS 1.2).
pub const NO_RENEGOTIATION: u8 = 100;

/// The standard's name of an alert.
pub fn name(code: u8) -> &'static str {
    match code {
        CLOSE_NOTIFY => "close_notify",
        UNEXPECTED_MESSAGE => "unexpected_message",
        BAD_RECORD_MAC => "bad_record_mac",
        21 => "decryption_failed",
        RECORD_OVERFLOW => "record_overflow",
        30 => "decompression_failure",
        HANDSHAKE_FAILURE => "handshake_failure",
        41 => "no_certificate",
        42 => "bad_certificate",
        43 => "unsupported_certificate",
        44 => "certificate_revoked",
        45 => "certificate_expired",
        CERTIFICATE_UNKNOWN => "certificate_unknown",
        ILLEGAL_PARAMETER => "illegal_parameter",
        48 => "unknown_ca",
        ACCESS_DENIED => "access_denied",
        DECODE_ERROR => "decode_error",
        51 => "decrypt_error",
        60 => "export_restriction",
        PROTOCOL_VERSION => "protocol_version",
        71 => "insufficient_security",
        INTERNAL_ERROR => "internal_error",
        86 => "inappropriate_fallback",
        USER_CANCELED => "user_canceled",
        NO_RENEGOTIATION => "no_renegotiation",
        109 => "missing_extension",
        110 => "unsupported_extension",
        111 => "certificate_unobtainable",
        112 => "unrecognized_name",
        113 => "bad_certificate_status_response",
        114 => "bad_certificate_hash_value",
        115 => "unknown_psk_identity",
        116 => "certificate_required",
        120 => "no_application_protocol",
        121 => "encrypted_client_hello_required",
        _ => "unknown alert",
    }
}

/// What an alert that a *peer* sent usually means in a mesh, for the person who reads the log; empty when it says enough itself.
pub fn meaning(code: u8) -> &'static str {
    match code {
        42 | CERTIFICATE_UNKNOWN => "it refused our certificate: check that both sides are in the same mesh",
        43 => "it refused the kind or the usage of our certificate",
        45 => "our certificate has expired in its view: check both clocks and that rotation works",
        48 => "it does not trust our CA: check that its roots are up to date",
        ACCESS_DENIED => "its policy denies us: check the intentions of the destination",
        PROTOCOL_VERSION => "it speaks none of our TLS versions: check tls min and max version in the mesh config entry",
        HANDSHAKE_FAILURE => "it found no cipher suite, group or signature scheme in common",
        116 => "it wants a client certificate and got none",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_registry() {
        assert_eq!(
            [CLOSE_NOTIFY, ACCESS_DENIED, 48, NO_RENEGOTIATION, 116].map(name),
            ["close_notify", "access_denied", "unknown_ca", "no_renegotiation", "certificate_required"]
        );
        // The code that rustls puts on the wire for the same name is ours.
        for code in (0..=u8::MAX).filter(|code| name(*code) != "unknown alert") {
            let theirs = format!("{:?}", rustls::AlertDescription::from(code)).to_lowercase();
            let theirs = theirs.replace("recognised", "recognized");
            let ours = name(code).replace('_', "");
            assert!(theirs == ours || theirs.starts_with("unknown("), "code {code}: {ours} here, {theirs} there");
        }
    }
}
