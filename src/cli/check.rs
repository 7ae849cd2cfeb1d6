//! placeholder
use super::{Environment, Exit, flags};
use clap::Args;
/// Flags of `check`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:")]
pub(super) struct Flags {
    #[command(flatten)]
    sidecar: flags::Sidecar,
}
pub(super) fn run(_flags: &Flags, _environment: &Environment, _ignored: &[String]) -> anyhow::Result<Exit> {
    Ok(Exit::Ok)
}
