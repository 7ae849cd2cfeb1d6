//! `ringfence top`: which tasks and services talk, and how much.
//!
//! Invariant: it only reads the admin port. In a terminal it redraws until a signal ends it and leaves the screen as it was;
//! everywhere else it prints one table and ends. A sidecar that is away for a moment is a line on the screen, not the end.

mod sample;
mod screen;
mod table;

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::admin::Admin;
use super::{Exit, flags, values};
use sample::Sample;
use screen::Screen;

const EXAMPLES: &str = "\
Examples:
  ringfence top
  ringfence top -admin 127.0.0.1:19001 -interval 5s
  ringfence top -once
  ringfence top -json | jq '.tasks[0]'

Services are live: their open connections and bytes count at once. A task's connection counts with its bytes when it closes.
Rates are those of the last interval. Ctrl-C ends it.";

/// Flags of `top`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flags {
    /// The sidecar's admin port
    #[arg(long, value_name = "ADDR:PORT", default_value = "localhost:19000", value_parser = flags::admin_address)]
    admin: SocketAddr,
    /// Time between two looks
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = interval)]
    interval: Duration,
    /// Print one table and end; so it is without a terminal too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    once: bool,
    /// One JSON object a look
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", hide_possible_values = true, action = clap::ArgAction::Set)]
    json: bool,
}

pub(super) fn run(flags: &Flags) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    runtime.block_on(async {
        let admin = Admin::at(flags.admin)?;
        let first = look(&admin, None).await?;
        let live = std::io::stdout().is_terminal();
        match (flags.json, flags.once) {
            (true, true) => {
                super::print(&format!("{}\n", first.json()));
                Ok(())
            }
            (true, false) => stream(flags, &admin, first).await,
            (false, false) if live => redraw(flags, &admin, first).await,
            (false, _) => {
                super::print(&table::text(&first, &head(flags, &first), usize::MAX));
                Ok(())
            }
        }
    })?;
    Ok(Exit::Ok)
}

/// Asks once; rates are those since `before`.
async fn look(admin: &Admin, before: Option<&Sample>) -> anyhow::Result<Sample> {
    let answer = admin.json("/callers").await?;
    Ok(Sample::read(&answer, before, Instant::now()))
}

/// JSON lines until a signal comes or nobody reads them.
async fn stream(flags: &Flags, admin: &Admin, first: Sample) -> anyhow::Result<()> {
    let mut end = End::new()?;
    let mut sample = first;
    while say(&sample.json()).is_ok() && end.after(flags.interval).await {
        sample = look(admin, Some(&sample)).await?;
    }
    Ok(())
}

/// The table on the whole screen until a signal comes.
async fn redraw(flags: &Flags, admin: &Admin, first: Sample) -> anyhow::Result<()> {
    let mut end = End::new()?;
    let mut screen = Screen::open()?;
    let mut sample = first;
    let mut trouble = None;
    loop {
        let head = trouble.take().unwrap_or_else(|| head(flags, &sample));
        let rows = screen::rows().await;
        if screen.draw(&table::text(&sample, &head, rows)).is_err() || !end.after(flags.interval).await {
            return Ok(());
        }
        match look(admin, Some(&sample)).await {
            Ok(next) => sample = next,
            Err(error) => trouble = Some(format!("{error:#}")),
        }
    }
}

fn head(flags: &Flags, sample: &Sample) -> String {
    format!("ringfence top  {}  counting since {}  every {:?}", flags.admin, sample.since(), flags.interval)
}

fn say(line: &serde_json::Value) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// The two signals that end it.
struct End {
    interrupt: Signal,
    terminate: Signal,
}

impl End {
    fn new() -> anyhow::Result<Self> {
        let ear = |kind| signal(kind).context("signals cannot be received");
        Ok(Self { interrupt: ear(SignalKind::interrupt())?, terminate: ear(SignalKind::terminate())? })
    }

    /// Waits; false when a signal came meanwhile.
    async fn after(&mut self, interval: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(interval) => true,
            _ = self.interrupt.recv() => false,
            _ = self.terminate.recv() => false,
        }
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    const SHORTEST: Duration = Duration::from_millis(100);
    match values::duration(text)? {
        interval if interval < SHORTEST => Err(format!("`{text}` would keep the admin port busy; write 100ms or more")),
        interval => Ok(interval),
    }
}
