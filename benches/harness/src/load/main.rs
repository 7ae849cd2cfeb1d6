//! bench-load: the load generator and its server, on tokio-uring, one thread each.
//!
//! It is the client and the application between which a pair of sidecars is measured, so it does little a byte: payloads are slices
//! of a fixed block, checked by comparison. It fails, with a code other than 0, only if a run cannot take place; what failed
//! in a run stands in its report.

mod cli;
mod client;
mod pace;
mod pattern;
mod record;
mod serve;
mod shapes;
mod wire;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use cli::{Cli, Command, Plan};

/// Submissions that fit before the queue is flushed: the largest shape begins 2000 operations at once.
const RING_ENTRIES: u32 = 4_096;
/// Completions that fit before the kernel must keep some aside.
const RING_COMPLETIONS: u32 = 32_768;

fn main() -> ExitCode {
    let cli = Cli::parse();
    ringfence_bench::raise_descriptor_limit();
    let mut uring = tokio_uring::uring_builder();
    uring.setup_cqsize(RING_COMPLETIONS);
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&uring);
    let outcome = match cli.command {
        Command::Serve { bind } => builder.start(serve::serve(&bind)),
        Command::Run(plan) => builder.start(run(*plan)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(plan: Plan) -> anyhow::Result<()> {
    for option in plan.ignored() {
        eprintln!("bench-load: {option} means nothing to shape {} and is ignored", plan.shape.name());
    }
    let file = plan.json.clone();
    let report = shapes::run(plan).await?;
    let text = serde_json::to_string(&report)?;
    match file {
        Some(path) => std::fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display())),
        None => writeln!(std::io::stdout(), "{text}").context("cannot write to standard output"),
    }
}
