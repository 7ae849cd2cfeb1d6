//! `ringfence agent`: the embedded agent alone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Exit, values};
use crate::agent::{Agent, AgentSettings, DefaultPolicy};
use crate::app::{self, AppError};
use crate::config;

const EXAMPLES: &str = "\
Examples:
  ringfence agent -config-file dev.hcl
  ringfence agent -bind 127.0.0.1:8500 -default-policy deny
  consul intention create -deny web db          (with CONSUL_HTTP_ADDR of this agent)
  curl -X PUT http://127.0.0.1:8500/v1/connect/ca/rotate

The file holds services, config entries and intentions in Consul's own HCL or JSON; it is read again when it changes.
This is a tool for development: it has no access control, keeps everything in memory and listens on loopback only.";

/// Flags of `agent`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    /// Services and intentions, HCL or JSON
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Where the HTTP API listens; loopback only
    #[arg(long, value_name = "ADDR:PORT", default_value_t = config::EMBEDDED_AGENT_BIND, value_parser = loopback)]
    bind: SocketAddr,
    /// Name of the datacenter
    #[arg(long, value_name = "NAME", default_value = config::DATACENTER)]
    datacenter: String,
    /// How long leaf certificates live
    #[arg(long, value_name = "DURATION", default_value = "72h", value_parser = leaf_ttl)]
    leaf_ttl: Duration,
    /// What holds when no intention matches: allow or deny
    #[arg(long, value_name = "POLICY", default_value = "allow", value_parser = default_policy)]
    default_policy: DefaultPolicy,
    /// trace, debug, info, warn or error
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = super::flags::log_level)]
    log_level: config::LogLevel,
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Exit> {
    app::init_logs(&config::Logging { level: flags.log_level, json: false });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(serve(flags))
}

async fn serve(flags: &Flags) -> anyhow::Result<Exit> {
    let mut terminate = signal(SignalKind::terminate()).context("signals cannot be received")?;
    let settings = AgentSettings {
        bind: flags.bind,
        file: flags.config_file.clone(),
        datacenter: flags.datacenter.clone(),
        leaf_ttl: flags.leaf_ttl,
        default_policy: flags.default_policy,
        ..AgentSettings::default()
    };
    let agent = Agent::start(settings).await.map_err(|error| AppError::Config(format!("embedded agent: {error}")))?;
    super::print(&banner(flags, agent.address()));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    agent.stop().await;
    Ok(Exit::Ok)
}

fn banner(flags: &Flags, address: SocketAddr) -> String {
    let file = flags.config_file.as_ref().map_or_else(
        || "none; register services over HTTP or with `consul services register`".to_owned(),
        |path| format!("{}, read again when it changes", path.display()),
    );
    format!(
        "embedded Consul-compatible agent (development only, no access control)\n\
         \x20 HTTP API     http://{address}  (export CONSUL_HTTP_ADDR={address})\n\
         \x20 datacenter   {}\n\
         \x20 file         {file}\n\
         \x20 default      {} when no intention matches\n\
         \x20 sidecar      ringfence connect -sidecar-for SERVICE_ID -http-addr {address}\n\
         \x20 end          Ctrl-C\n",
        flags.datacenter,
        if flags.default_policy == DefaultPolicy::Allow { "allow" } else { "deny" },
    )
}

/// An address that only this host can reach; port 0 lets the system choose.
pub(super) fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address = values::socket_address(text, IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err(format!("`{text}` is no loopback address; the embedded agent has no access control, write 127.0.0.1:PORT"))
}

fn leaf_ttl(text: &str) -> Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_secs(10);
    match values::duration(text)? {
        ttl if ttl < SHORTEST => Err(format!("`{text}` is too short for a certificate to be of use; write 10s or more")),
        ttl => Ok(ttl),
    }
}

fn default_policy(text: &str) -> Result<DefaultPolicy, String> {
    match text {
        "allow" => Ok(DefaultPolicy::Allow),
        "deny" => Ok(DefaultPolicy::Deny),
        _ => Err(format!("`{text}` is no policy; write allow or deny")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_served() {
        for text in ["127.0.0.1:8500", "127.0.0.2:0", "localhost:8500", "[::1]:8500", ":8500"] {
            assert!(loopback(text).is_ok(), "{text}");
        }
        for text in ["0.0.0.0:8500", "[::]:8500", "192.0.2.1:8500", "8500"] {
            assert!(loopback(text).is_err(), "{text}");
        }
    }

    #[test]
    fn policies_and_lifetimes_are_checked() {
        assert_eq!(default_policy("deny"), Ok(DefaultPolicy::Deny));
        assert!(default_policy("maybe").is_err());
        assert_eq!(leaf_ttl("1h"), Ok(Duration::from_secs(3_600)));
        assert!(leaf_ttl("1s").is_err());
    }
}
