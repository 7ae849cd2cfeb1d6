//! bench-relay: the yardsticks. Relays that do as little as their engine allows, to tell what a sidecar adds.
//!
//! `uring` is the floor: plaintext, one thread, one system call a turn. `tokio-uring` and `tokio` are what an honest relay on those
//! runtimes takes, with and without TLS. None is a product: no policy, no timeouts, no metrics, no drain. A relay fails at its start,
//! or for one connection, which it then cuts.

mod on_tokio;
mod on_tokio_uring;
mod pair;
mod tls;
mod uring;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use tls::{Files, Role};

const EXAMPLES: &str = "\
A pair of sidecars with TLS between them:
  bench-relay --engine tokio --listen 127.0.0.1:21001 --to 127.0.0.1:21002 --tls dial \\
      --cert web.pem --key web.key --roots roots.pem --expect-uri spiffe://td/ns/default/dc/dc1/svc/api
  bench-relay --engine tokio --listen 127.0.0.1:21002 --to 127.0.0.1:21000 --tls accept \\
      --cert api.pem --key api.key --roots roots.pem --expect-uri spiffe://td/ns/default/dc/dc1/svc/web

The floor, without TLS (start two for a pair):
  bench-relay --engine uring --listen 127.0.0.1:21001 --to 127.0.0.1:21000

Prints `ready` once it listens and runs until SIGTERM.";

/// A minimal relay to measure sidecars against; one thread.
#[derive(Debug, Parser)]
#[command(name = "bench-relay", version, after_help = EXAMPLES)]
struct Cli {
    /// What moves the bytes
    #[arg(long, value_enum)]
    engine: Engine,
    /// Where to accept
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// Where to relay to
    #[arg(long, value_name = "ADDR")]
    to: SocketAddr,
    /// Which side speaks TLS; without it both are plain
    #[arg(long, value_enum, requires_all = ["cert", "key", "roots"])]
    tls: Option<Role>,
    /// Certificate chain, leaf first
    #[arg(long, value_name = "PEM", requires = "tls")]
    cert: Option<PathBuf>,
    /// Private key of the leaf
    #[arg(long, value_name = "PEM", requires = "tls")]
    key: Option<PathBuf>,
    /// Certificates that peers must chain to
    #[arg(long, value_name = "PEM", requires = "tls")]
    roots: Option<PathBuf>,
    /// The one URI SAN that the peer's leaf must have; `--tls dial` needs it
    #[arg(long, value_name = "SPIFFE_URI", requires = "tls")]
    expect_uri: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    /// The io-uring crate: plaintext only
    Uring,
    /// tokio-uring with rustls
    TokioUring,
    /// tokio with tokio-rustls
    Tokio,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-relay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    if cli.engine == Engine::Uring && cli.tls.is_some() {
        bail!("--tls does not go with --engine uring, which is the plaintext floor: choose --engine tokio-uring or tokio");
    }
    ringfence_bench::raise_descriptor_limit();
    let tls = cli.tls.map(|role| tls::load(role, files(cli)?)).transpose()?;
    let listener = ringfence_bench::listen(cli.listen)?;
    match cli.engine {
        Engine::Uring => uring::run(listener, cli.to),
        Engine::TokioUring => on_tokio_uring::run(listener, cli.to, tls),
        Engine::Tokio => on_tokio::run(listener, cli.to, tls),
    }
}

fn files(cli: &Cli) -> anyhow::Result<Files<'_>> {
    Ok(Files {
        cert: cli.cert.as_deref().context("--tls needs --cert")?,
        key: cli.key.as_deref().context("--tls needs --key")?,
        roots: cli.roots.as_deref().context("--tls needs --roots")?,
        expect_uri: cli.expect_uri.as_deref(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
