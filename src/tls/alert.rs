//! The few TLS alerts that this proxy sends or tells apart (RFC 8446 section 6).
