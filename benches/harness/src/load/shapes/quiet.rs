//! Shapes whose connections are mostly silent: idle-haul, hold.
//!
//! Invariant: every connection that was opened must answer at the end, unless its failure was counted on the way.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{IDLE_BUSY_ONE_IN, Run, TINY, join, open_all};
use crate::client::Client;
use crate::pace::Schedule;
use crate::pattern::Random;

/// In which the answers at the end are asked for.
const FINAL_SPREAD_MS: u64 = 1_000;

pub(super) async fn idle_haul(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let mut silent = open_all(run, run.plan.connections()).await?;
    let mut random = Random::new(run.plan.seed);
    let busy_count = silent.len().div_ceil(IDLE_BUSY_ONE_IN);
    let busy: Vec<_> = (0..busy_count).map(|_| silent.swap_remove(random.below(silent.len()))).collect();
    let window = run.window();
    let mut clients = join(busy.into_iter().enumerate().map(|(task, client)| {
        let schedule = Schedule::new(window, run.plan.rate_per_s(), task, busy_count);
        now_and_then(Rc::clone(run), schedule, client)
    }))
    .await?;
    run.timer.until(window.end).await;
    clients.append(&mut silent);
    all_must_answer(run, clients).await?;
    Ok(window.start)
}

/// Sends a tiny message whenever one is due, and hands the connection back. One that fails is not opened again: that it did not
/// survive is the result.
async fn now_and_then(run: Rc<Run>, mut schedule: Schedule, mut client: Option<Client>) -> Option<Client> {
    while let Some(open) = &mut client
        && let Some((at, _)) = run.due(&mut schedule).await
    {
        if run.exchange(open, TINY).await.is_some() {
            run.recorder.latency.record(at.elapsed());
        } else {
            client = None;
        }
    }
    client
}

pub(super) async fn hold(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let start = Instant::now();
    let clients = open_all(run, run.plan.connections()).await?;
    println!("ready");
    let line = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await;
    // The end of standard input is as good as a line.
    line.context("the reader of standard input panicked")?.context("cannot read standard input: give it a pipe or a terminal")?;
    all_must_answer(run, clients).await?;
    Ok(start)
}

async fn all_must_answer(run: &Rc<Run>, clients: Vec<Option<Client>>) -> anyhow::Result<()> {
    let start = Instant::now();
    let count = clients.len();
    join(clients.into_iter().enumerate().filter_map(|(index, client)| {
        let mut client = client?;
        let run = Rc::clone(run);
        let at = start + Duration::from_millis(FINAL_SPREAD_MS).mul_f64(index as f64 / count as f64);
        Some(async move {
            run.timer.until(at).await;
            if run.exchange(&mut client, TINY).await.is_some() {
                run.recorder.latency.record(at.elapsed());
            }
        })
    }))
    .await
    .map(drop)
}
