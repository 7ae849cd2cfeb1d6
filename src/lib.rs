//! ringfence: an L4 mutual-TLS sidecar for Consul Connect on io_uring.

pub mod admin;
pub mod agent;
pub mod app;
pub mod buffer;
pub mod cli;
pub mod config;
pub mod control;
pub mod identity;
pub mod mesh;
pub mod policy;
pub mod proxy;
pub mod ring;
pub mod store;
pub mod sys;
pub mod telemetry;
pub mod tls;
