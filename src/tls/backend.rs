//! Which library does the cryptography of handshakes and records: ring, or aws-lc-rs with the feature of that name.
//!
//! Both have one interface, so nothing else of this room knows which it is.

#[cfg(feature = "aws-lc-rs")]
pub(super) use aws_lc_rs::{aead, rand};
#[cfg(not(feature = "aws-lc-rs"))]
pub(super) use ring::{aead, rand};
#[cfg(feature = "aws-lc-rs")]
pub(super) use rustls::crypto::aws_lc_rs as provider;
#[cfg(not(feature = "aws-lc-rs"))]
pub(super) use rustls::crypto::ring as provider;
