//! Which library does the cryptography of handshakes and records: ring, or aws-lc-rs with the feature of that name.
//!
//! Both have one interface, so nothing else of this room depends on which it is. Digests are ring's in both, and a leaf must
//! have a key
//! that ring can use too, so that one build accepts what the other does.

#[cfg(feature = "aws-lc-rs")]
pub(super) use aws_lc_rs::{aead, rand};
#[cfg(not(feature = "aws-lc-rs"))]
pub(super) use ring::{aead, rand};
#[cfg(feature = "aws-lc-rs")]
pub(super) use rustls::crypto::aws_lc_rs as provider;
#[cfg(not(feature = "aws-lc-rs"))]
pub(super) use rustls::crypto::ring as provider;
