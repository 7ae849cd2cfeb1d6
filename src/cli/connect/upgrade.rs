//! `ringfence connect -upgrade`: has the running process put the program's file, as it is on disk now, in its own place.
//!
//! Invariant: it asks at the admin port, so it needs no right to signal the process and no guess which one it is. It says
//! "upgraded" only when another process has said that it serves; whatever else happens, the old one goes on.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use serde_json::json;

use super::super::admin::Admin;
use super::super::{Exit, complain, print};
use crate::admin::UpgradeAnswer;
use crate::app::AppError;
use crate::config;

const PATH: &str = "/upgrade";
/// How often it is asked how far it is.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Beyond the time that a new process may take: for the old one to say that it took too long.
const GRACE: Duration = Duration::from_secs(5);

/// One of the two processes.
#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    version: String,
}

/// How it went.
#[derive(Debug)]
enum Outcome {
    Upgraded(Process),
    Failed(String),
}

pub(super) fn run(address: std::net::SocketAddr, as_json: bool) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let began = Instant::now();
    let (old, outcome) = runtime.block_on(upgrade(&Admin::at(address)?))?;
    let seconds = began.elapsed().as_secs_f64();
    match &outcome {
        Outcome::Upgraded(new) if as_json => {
            print(&format!("{}\n", json!({ "upgraded": true, "old": old, "new": new, "seconds": seconds })));
        }
        Outcome::Upgraded(new) => print(&format!(
            "upgraded: process {} (ringfence {}) serves since {seconds:.1} s after the wish; process {} (ringfence {}) ends with its last connection\n",
            new.pid, new.version, old.pid, old.version
        )),
        Outcome::Failed(why) if as_json => {
            print(&format!("{}\n", json!({ "upgraded": false, "old": old, "error": why, "seconds": seconds })));
        }
        Outcome::Failed(why) => complain(&format!("not upgraded, process {} goes on: {why}", old.pid)),
    }
    Ok(if matches!(outcome, Outcome::Upgraded(_)) { Exit::Ok } else { Exit::Failed })
}

async fn upgrade(admin: &Admin) -> anyhow::Result<(Process, Outcome)> {
    let before = parse(admin.json(PATH).await?)?;
    let old = Process { pid: before.pid, version: before.version };
    admin.post(PATH).await?;
    let deadline = Instant::now() + config::HANDOVER_TIMEOUT + GRACE;
    while Instant::now() < deadline {
        tokio::time::sleep(POLL_INTERVAL).await;
        // The old process closes its port in the moment of the hand-over: a question may be lost with it.
        let Ok(answer) = admin.json(PATH).await else { continue };
        let now = parse(answer)?;
        if now.pid != old.pid && now.serving {
            return Ok((old, Outcome::Upgraded(Process { pid: now.pid, version: now.version })));
        }
        let decided = now.pid == old.pid && now.upgrade.wishes > before.upgrade.wishes;
        if let Some(why) = now.upgrade.error.filter(|_| decided) {
            return Ok((old, Outcome::Failed(why)));
        }
    }
    Ok((old, Outcome::Failed("nothing was heard of it in time; look at the log".to_owned())))
}

fn parse(answer: serde_json::Value) -> anyhow::Result<UpgradeAnswer> {
    serde_json::from_value(answer)
        .map_err(|error| AppError::Unavailable(format!("the admin port's answer to {PATH} cannot be read: {error}")).into())
}
