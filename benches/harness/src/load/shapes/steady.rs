//! Shapes that keep their connections: request, bulk, slow-reader, fairness.
//!
//! Invariant: connections are open and have answered before the measured time begins. A connection that fails is opened again, and
//! the message that met the failure is not repeated.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{Run, join, open_all};
use crate::cli::Direction;
use crate::client::{Client, Sizes};
use crate::pace::{Schedule, Window};
use crate::wire::{Failure, PAYLOAD_BYTES_MAX};

/// A `select` of 200 000 rows as Airflow's tasks do it, and a COPY of as many.
const BULK_DOWN: Sizes = Sizes { request_bytes: 82, response_bytes: 22_000_000 };
const BULK_UP: Sizes = Sizes { request_bytes: 19_500_000, response_bytes: 465 };
const FAIR_DOWN: Sizes = Sizes { request_bytes: 100, response_bytes: 16_000_000 };
const FAIR_UP: Sizes = Sizes { request_bytes: 16_000_000, response_bytes: 100 };
/// The answer that the slow reader never finishes.
const SLOW: Sizes = Sizes { request_bytes: 100, response_bytes: PAYLOAD_BYTES_MAX };
/// Reads a second of the slow reader.
const SLOW_READS_PER_S: u32 = 16;

pub(super) async fn request(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let clients = open_all(run, run.plan.connections()).await?;
    let window = run.window();
    all_small(run, window, clients).await?;
    Ok(window.start)
}

pub(super) async fn bulk(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let turns = match run.plan.direction {
        Direction::Down => [BULK_DOWN, BULK_DOWN],
        Direction::Up => [BULK_UP, BULK_UP],
        Direction::Both => [BULK_DOWN, BULK_UP],
    };
    let clients = open_all(run, run.plan.connections()).await?;
    let window = run.window();
    join(clients.into_iter().enumerate().map(|(task, client)| large(Rc::clone(run), window, task, client, turns, true))).await?;
    Ok(window.start)
}

pub(super) async fn fairness(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let mut clients = open_all(run, run.plan.connections() + run.plan.bulk as usize).await?;
    let large_clients = clients.split_off(run.plan.connections());
    let window = run.window();
    let on_large = Rc::clone(run);
    let large = tokio_uring::spawn(join(
        large_clients
            .into_iter()
            .enumerate()
            .map(move |(task, client)| large(Rc::clone(&on_large), window, task, client, [FAIR_DOWN, FAIR_UP], false)),
    ));
    all_small(run, window, clients).await?;
    large.await??;
    Ok(window.start)
}

pub(super) async fn slow_reader(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let mut clients = open_all(run, run.plan.connections() + 1).await?;
    let slow_client = clients.pop().flatten();
    let window = run.window();
    let slow = tokio_uring::spawn(slow(Rc::clone(run), window, slow_client));
    all_small(run, window, clients).await?;
    slow.await?;
    Ok(window.start)
}

async fn all_small(run: &Rc<Run>, window: Window, clients: Vec<Option<Client>>) -> anyhow::Result<()> {
    let tasks = clients.len();
    join(clients.into_iter().enumerate().map(|(task, client)| {
        let schedule = Schedule::new(window, run.plan.rate_per_s(), task, tasks);
        small(Rc::clone(run), schedule, task, client)
    }))
    .await
    .map(drop)
}

async fn small(run: Rc<Run>, mut schedule: Schedule, task: usize, mut client: Option<Client>) {
    let sizes = run.sizes();
    while let Some((at, _)) = run.due(&mut schedule).await {
        if client.is_none() {
            client = run.connect(task, Instant::now()).await;
        }
        let Some(open) = &mut client else {
            run.pause_after_failure().await;
            continue;
        };
        if run.exchange(open, sizes).await.is_some() {
            run.recorder.latency.record(at.elapsed());
        } else {
            client = None;
        }
    }
}

/// Moves large messages until the end; a message that was begun is finished.
async fn large(run: Rc<Run>, window: Window, task: usize, mut client: Option<Client>, turns: [Sizes; 2], is_measured: bool) {
    run.timer.until(window.start).await;
    // Every other connection begins with the other direction.
    let mut turn = task;
    while Instant::now() < window.end {
        if client.is_none() {
            client = run.connect(task, Instant::now()).await;
        }
        let Some(open) = &mut client else {
            run.pause_after_failure().await;
            continue;
        };
        let begun = Instant::now();
        if run.exchange(open, turns[turn % 2]).await.is_none() {
            client = None;
        } else if is_measured {
            run.recorder.latency.record(begun.elapsed());
        }
        turn += 1;
    }
}

/// Reads at most `--slow-bytes-per-s` till the end and leaves the rest.
async fn slow(run: Rc<Run>, window: Window, client: Option<Client>) {
    // That it did not open is counted.
    let Some(mut client) = client else { return };
    run.timer.until(window.start).await;
    while Instant::now() < window.end {
        if let Err(failure) = read_slowly(&run, window, &mut client).await {
            run.recorder.failure(&failure);
            return;
        }
    }
}

async fn read_slowly(run: &Run, window: Window, client: &mut Client) -> Result<(), Failure> {
    let bytes_per_s = run.plan.slow_bytes_per_s;
    let read_bytes_max = bytes_per_s.div_ceil(SLOW_READS_PER_S) as usize;
    let answer = client.ask(SLOW).await?;
    let begun = Instant::now();
    let len = SLOW.response_bytes as usize;
    let mut offset = 0;
    while offset < len {
        offset += client.check_some(answer, offset, read_bytes_max.min(len - offset)).await?;
        let next_at = begun + Duration::from_secs_f64(offset as f64 / f64::from(bytes_per_s));
        run.timer.until(next_at.min(window.end)).await;
        if Instant::now() >= window.end {
            return Ok(());
        }
    }
    run.recorder.message();
    Ok(())
}
