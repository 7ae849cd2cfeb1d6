//! Shapes that open connections all the time: connect, meta-churn, exec-api, sql-small, storm.
//!
//! Invariant: connections belong to slots, so no more are open at a time than there are slots; in an open loop a slot that is held
//! up makes its next connection late, and the latency counts from when that was due.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{HEARTBEAT_S, Run, TINY, join};
use crate::client::{Client, Sizes};
use crate::pace::{Schedule, Window};
use crate::pattern::Random;
use crate::wire::Failure;

/// 15 round trips: 1305 B up and 1605 B down with the headers, as a task's connection to the metadata database.
const META: [Sizes; 15] = [Sizes { request_bytes: 71, response_bytes: 91 }; 15];
/// 171 B up and 520 B down with the headers.
const SQL: [Sizes; 3] = [
    Sizes { request_bytes: 41, response_bytes: 157 },
    Sizes { request_bytes: 41, response_bytes: 157 },
    Sizes { request_bytes: 41, response_bytes: 158 },
];
const STORM: [Sizes; 3] = [Sizes { request_bytes: 100, response_bytes: 100 }; 3];
/// 0.7 KB up and 0.3 KB down with the headers.
const EXEC: Sizes = Sizes { request_bytes: 684, response_bytes: 284 };
/// The same with an XCom of 1 MB.
const EXEC_XCOM: Sizes = Sizes { request_bytes: 1_000_000, response_bytes: 284 };
const EXEC_REQUESTS: usize = 6;
const EXEC_XCOM_ONE_IN: usize = 20;
/// In which all tasks of a storm start.
const STORM_SPREAD_MS: u64 = 2_000;
/// Every so manieth task of a storm goes where it is denied.
const STORM_DENIED_ONE_IN: usize = 10;

/// What counts as the latency of a connection.
#[derive(Debug, Clone, Copy)]
enum Measure {
    EachRound,
    FirstByte,
}

pub(super) async fn connect(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let round = [run.sizes()];
    conversations(run, move || round, Measure::FirstByte).await
}

pub(super) async fn meta_churn(run: &Rc<Run>) -> anyhow::Result<Instant> {
    conversations(run, || META, Measure::EachRound).await
}

pub(super) async fn sql_small(run: &Rc<Run>) -> anyhow::Result<Instant> {
    conversations(run, || SQL, Measure::EachRound).await
}

async fn conversations<const N: usize>(
    run: &Rc<Run>,
    rounds: impl Fn() -> [Sizes; N],
    measure: Measure,
) -> anyhow::Result<Instant> {
    let slots = run.plan.connections();
    let window = run.window();
    join((0..slots).map(|slot| {
        let (run, rounds) = (Rc::clone(run), rounds());
        let mut schedule = Schedule::new(window, run.plan.rate_per_s(), slot, slots);
        async move {
            run.timer.until(window.start).await;
            while let Some((at, beat)) = run.due(&mut schedule).await {
                if converse(&run, beat as usize, at, &rounds, measure).await.is_none() {
                    run.pause_after_failure().await;
                }
            }
        }
    }))
    .await?;
    Ok(window.start)
}

/// Connects and exchanges every round; none if anything failed. Who needs the connection no longer drops it.
async fn converse(run: &Run, index: usize, at: Instant, rounds: &[Sizes], measure: Measure) -> Option<Client> {
    let mut client = run.connect(index, at).await?;
    let mut begun = at;
    for (round, sizes) in rounds.iter().enumerate() {
        let first_byte_at = run.exchange(&mut client, *sizes).await?;
        let to_first_byte = first_byte_at.saturating_duration_since(at);
        if round == 0 {
            run.recorder.first_answer.record(to_first_byte);
        }
        match measure {
            Measure::EachRound => run.recorder.latency.record(begun.elapsed()),
            Measure::FirstByte if round == 0 => run.recorder.latency.record(to_first_byte),
            Measure::FirstByte => {}
        }
        begun = Instant::now();
    }
    Some(client)
}

pub(super) async fn exec_api(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let slots = run.plan.connections();
    let window = run.window();
    join((0..slots).map(|slot| {
        let run = Rc::clone(run);
        let mut schedule = Schedule::new(window, run.plan.rate_per_s(), slot, slots);
        async move {
            let mut random = Random::new(run.plan.seed.wrapping_add(slot as u64));
            let period = Duration::from_secs_f64(run.plan.rate_per_s().map_or(HEARTBEAT_S, |rate| slots as f64 / rate));
            while let Some((at, beat)) = run.due(&mut schedule).await {
                if task_of_exec_api(&run, window, beat as usize, (at, at + period), &mut random).await.is_none() {
                    run.pause_after_failure().await;
                }
            }
        }
    }))
    .await?;
    Ok(window.start)
}

/// One connection: its requests, then heartbeats until `until`, the last of them at the latest when the run ends.
async fn task_of_exec_api(
    run: &Run,
    window: Window,
    index: usize,
    (at, until): (Instant, Instant),
    random: &mut Random,
) -> Option<()> {
    let requests: [Sizes; EXEC_REQUESTS] =
        std::array::from_fn(|_| if random.below(EXEC_XCOM_ONE_IN) == 0 { EXEC_XCOM } else { EXEC });
    let mut client = converse(run, index, at, &requests, Measure::EachRound).await?;
    let until = until.min(window.end);
    let mut heartbeat_at = at;
    while heartbeat_at < until {
        heartbeat_at = (heartbeat_at + Duration::from_secs_f64(HEARTBEAT_S)).min(until);
        run.timer.until(heartbeat_at).await;
        let begun = Instant::now();
        run.exchange(&mut client, TINY).await?;
        run.recorder.latency.record(begun.elapsed());
    }
    Some(())
}

pub(super) async fn storm(run: &Rc<Run>) -> anyhow::Result<Instant> {
    let tasks = run.plan.connections();
    let start = run.window().start;
    join((0..tasks).map(|task| {
        let run = Rc::clone(run);
        let at = start + Duration::from_millis(STORM_SPREAD_MS).mul_f64(task as f64 / tasks as f64);
        async move {
            run.timer.until(at).await;
            if !run.plan.denied.is_empty() && task % STORM_DENIED_ONE_IN == STORM_DENIED_ONE_IN - 1 {
                must_be_denied(&run, task / STORM_DENIED_ONE_IN).await;
            } else {
                converse(&run, task, at, &STORM, Measure::FirstByte).await;
            }
        }
    }))
    .await?;
    Ok(start)
}

/// Any end before the first byte of an answer is right: a refusal, a reset or the end of the stream.
async fn must_be_denied(run: &Run, index: usize) {
    let to = run.plan.denied[index % run.plan.denied.len()];
    let connected = Client::connect(to, index as u32, run.timeout(), &run.recorder.traffic).await;
    let (outcome, was_answered) = match connected {
        Ok(mut client) => (client.exchange(TINY).await.map(drop), client.was_answered()),
        Err(failure) => (Err(failure), false),
    };
    match outcome {
        Err(Failure::Timeout) => run.recorder.failure(&Failure::Timeout),
        Err(_) if !was_answered => run.recorder.denied_ok(),
        _ => run.recorder.denied_answered(),
    }
}
