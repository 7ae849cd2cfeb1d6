//! `ringfence demo`: two services talk through two sidecars, and the story is told as it happens.
//!
//! Everything is real but small: the embedded agent, two whole sidecars in this process, a database, sockets on loopback.
//! Each step of the story is checked with a deadline; the first that does not hold ends the demo with its name and reason.

mod acts;
mod database;
mod journal;
mod load;
mod scene;
mod story;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Exit;
use crate::app;
use crate::config::{self, LogLevel};
use scene::Scene;
use story::Story;

const EXAMPLES: &str = "\
Examples:
  ringfence demo
  ringfence demo -once
  ringfence demo -once -json
  ringfence demo -agent-bind 127.0.0.1:8500

Needs no Consul and no rights; everything listens on loopback and nothing is left behind.";

/// Flags of `demo`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    /// End after the last step: exit code 0 only if every step held
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    once: bool,
    /// One JSON object an event instead of text
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
    /// Where the embedded agent listens; port 0 lets the system choose
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0", value_parser = super::agent::loopback)]
    agent_bind: SocketAddr,
    /// Where the first sidecar's admin port listens; port 0 lets the system choose. The second one is always chosen
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0", value_parser = super::agent::loopback)]
    admin_bind: SocketAddr,
    /// Worker threads of each sidecar
    #[arg(long, value_name = "N", default_value = "1", value_parser = super::values::workers)]
    workers: usize,
    /// Log level of the sidecars, to standard error
    #[arg(long, value_name = "LEVEL", default_value = "error", value_parser = super::flags::log_level)]
    log_level: LogLevel,
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Exit> {
    app::init_logs(&config::Logging { level: flags.log_level, json: flags.json });
    app::prepare_process()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(play(flags))
}

async fn play(flags: &Flags) -> anyhow::Result<Exit> {
    let mut terminate = signal(SignalKind::terminate()).context("signals cannot be received")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals cannot be received")?;
    let mut story = Story::new(flags.json);
    let folder = Folder::new()?;
    let mut scene: Option<Scene> = None;
    let ended = tokio::select! {
        ended = perform(flags, &mut story, &folder, &mut scene) => ended,
        _ = terminate.recv() => interrupted(flags),
        _ = interrupt.recv() => interrupted(flags),
    };
    let stopped = match scene {
        Some(scene) => scene.close().await,
        None => Ok(()),
    };
    if let Err(error) = ended.and(stopped) {
        story.tell("failed", &format!("\nFAILED  {error:#}"), serde_json::json!({ "reason": format!("{error:#}") }));
        return Ok(Exit::Failed);
    }
    Ok(Exit::Ok)
}

/// A signal is the normal end of a demo that stays up. One that was to end by itself has not shown every step.
fn interrupted(flags: &Flags) -> anyhow::Result<()> {
    if flags.once { Err(anyhow::anyhow!("a signal ended it before the last step")) } else { Ok(()) }
}

/// The whole story. `scene` belongs to the caller so that it is closed however this ends.
async fn perform(flags: &Flags, story: &mut Story, folder: &Folder, scene: &mut Option<Scene>) -> anyhow::Result<()> {
    story.tell(
        "begin",
        "ringfence demo: an Airflow worker and its warehouse talk over mutual TLS on io_uring, no Consul installed",
        serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "workers": flags.workers }),
    );
    let scene = scene.insert(Scene::open(flags, folder.0.clone(), story).await?);
    acts::identities(scene, story).await.context("step `identities` did not hold")?;
    acts::traffic(scene, story).await.context("step `traffic` did not hold")?;
    acts::intention(scene, story).await.context("step `intention` did not hold")?;
    let figures = acts::rotation(scene, story).await.context("step `rotation` did not hold")?;
    acts::figures(scene, story, &figures);
    if !flags.once {
        acts::stay(scene, story).await?;
    }
    Ok(())
}

/// Where the connection logs of this run lie; gone with it.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("ringfence-demo-{}", uuid::Uuid::new_v4()));
        // Only this user: logs name who talks to whom.
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("folder {} cannot be made; set TMPDIR to a writable one", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed lies in the temporary folder, which the system empties.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
