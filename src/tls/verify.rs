//! SPIFFE verification for both roles.
