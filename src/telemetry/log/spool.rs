//! Lines on their way to stdout, stderr or a file, written by a thread of their own.
//!
//! Invariant: [`Spool::push`] and [`Spool::flush`] never block, however slow the sink is. At most [`BATCHES_MAX`] batches
//! of [`BATCH_BYTES_MAX`] bytes wait; what does not fit is dropped and counted. A line is written whole or, when the sink
//! failed in the middle of it, closed by a line break before the next one.
//!
//! The writer is no tokio task: a blocked pipe must not hold a runtime's shutdown, nor the admin thread's requests.
//! Knows nothing of what the lines say. A sink that fails is said once an interval and tried again with each batch.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::LogError;
use crate::config::LogTarget;
use crate::telemetry::limiter::Limiter;

/// Bytes gathered before a batch is handed over; also the longest line.
pub const BATCH_BYTES_MAX: usize = 64 << 10;
/// Batches that may wait for the sink: with the one being filled, 4 MiB.
pub const BATCHES_MAX: usize = 63;
/// How long a closing spool waits for the sink to take what is left.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(1);
/// How often a failing sink is complained of.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(30);
/// A log names peers: nobody but the owner and the group may read it.
const FILE_MODE: u32 = 0o640;

/// Where lines go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Destination {
    /// Nowhere.
    #[default]
    None,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Appended to a file, which is made with mode 0640 if it is missing.
    File(PathBuf),
}

impl From<&str> for Destination {
    /// `none`, `stdout`, `stderr`, or a path. The device paths count as the streams they name, because systemd connects
    /// those to sockets, which cannot be opened by path.
    fn from(text: &str) -> Self {
        match text {
            "" | "none" | "/dev/null" => Self::None,
            "-" | "stdout" | "/dev/stdout" | "/dev/fd/1" => Self::Stdout,
            "stderr" | "/dev/stderr" | "/dev/fd/2" => Self::Stderr,
            path => Self::File(path.into()),
        }
    }
}

impl From<&LogTarget> for Destination {
    fn from(target: &LogTarget) -> Self {
        match target {
            LogTarget::None => Self::None,
            LogTarget::Stdout => Self::Stdout,
            LogTarget::Stderr => Self::Stderr,
            LogTarget::File(path) => Self::File(path.clone()),
        }
    }
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Stdout => f.write_str("stdout"),
            Self::Stderr => f.write_str("stderr"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Tells every spool made with it to open its file again (SIGHUP, log rotation). Clone it freely.
#[derive(Debug, Clone, Default)]
pub struct Reopener(Arc<AtomicU64>);

impl Reopener {
    /// Asks for it. Each writer does it before its next batch, at the latest with the admin thread's next tick.
    pub fn reopen(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn epoch(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What became of the lines so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Written out.
    pub written: u64,
    /// Dropped: the sink was too slow, or refused them.
    pub dropped: u64,
    /// Writes and reopens that failed.
    pub errors: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { written: self.written + other.written, dropped: self.dropped + other.dropped, errors: self.errors + other.errors }
    }
}

#[derive(Debug, Default)]
struct Counters {
    written: AtomicU64,
    dropped: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    fn counts(&self) -> Counts {
        Counts {
            written: self.written.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}

/// The side that lines are pushed into.
#[derive(Debug)]
pub struct Spool {
    pending: Batch,
    writer: Option<Writer>,
    counters: Arc<Counters>,
    reopener: Reopener,
    epoch_sent: u64,
}

#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    lines: u64,
}

#[derive(Debug)]
struct Writer {
    /// Gone when the writer was told to end.
    batches: Option<mpsc::Sender<Batch>>,
    thread: JoinHandle<()>,
}

impl Spool {
    /// Opens the sink and starts its writer.
    pub fn open(destination: &Destination, reopener: &Reopener) -> Result<Self, LogError> {
        let sink: Box<dyn Sink> = match destination {
            Destination::None => return Ok(Self::with_writer(None, reopener, Arc::default())),
            Destination::Stdout => Box::new(Stream(io::stdout())),
            Destination::Stderr => Box::new(Stream(io::stderr())),
            Destination::File(path) => Box::new(LogFile {
                file: open_file(path).map_err(|source| LogError::Open { path: path.clone(), source })?,
                path: path.clone(),
            }),
        };
        Self::start(sink, destination.to_string(), reopener)
    }

    fn start(sink: Box<dyn Sink>, name: String, reopener: &Reopener) -> Result<Self, LogError> {
        let (batches, receiver) = mpsc::channel(BATCHES_MAX);
        let counters = Arc::<Counters>::default();
        let drain = Drain {
            sink,
            name,
            counters: Arc::clone(&counters),
            epoch: reopener.epoch(),
            reopener: reopener.clone(),
            torn: false,
            complaints: Limiter::new(COMPLAINT_INTERVAL),
        };
        let thread =
            std::thread::Builder::new().name("log".into()).spawn(move || drain.run(receiver)).map_err(LogError::Thread)?;
        Ok(Self::with_writer(Some(Writer { batches: Some(batches), thread }), reopener, counters))
    }

    fn with_writer(writer: Option<Writer>, reopener: &Reopener, counters: Arc<Counters>) -> Self {
        Self { pending: Batch::default(), writer, counters, epoch_sent: reopener.epoch(), reopener: reopener.clone() }
    }

    /// Whether lines go anywhere; if not, making them is a waste.
    pub fn is_on(&self) -> bool {
        self.writer.is_some()
    }

    /// Takes one line, without its line break.
    pub fn push(&mut self, line: &[u8]) {
        if !self.is_on() {
            return;
        }
        let len = line.len() + 1;
        if self.pending.bytes.len() + len > BATCH_BYTES_MAX {
            self.flush();
        }
        if self.pending.bytes.len() + len > BATCH_BYTES_MAX {
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.pending.bytes.extend_from_slice(line);
        self.pending.bytes.push(b'\n');
        self.pending.lines += 1;
    }

    /// Hands what was gathered to the writer. When its queue is full the lines stay here for the next call.
    pub fn flush(&mut self) {
        let Some(batches) = self.writer.as_ref().and_then(|writer| writer.batches.as_ref()) else { return };
        let epoch = self.reopener.epoch();
        // An empty batch makes an idle writer look at the epoch.
        if self.pending.lines == 0 && epoch == self.epoch_sent {
            return;
        }
        match batches.try_send(std::mem::take(&mut self.pending)) {
            Ok(()) => self.epoch_sent = epoch,
            Err(TrySendError::Full(batch)) => self.pending = batch,
            Err(TrySendError::Closed(batch)) => {
                self.counters.dropped.fetch_add(batch.lines, Ordering::Relaxed);
            }
        }
    }

    /// Ends the writer once it has what was gathered, without waiting for it; true when it has written all and ended.
    /// Takes no line any more.
    pub fn retire(&mut self) -> bool {
        self.flush();
        let Some(writer) = &mut self.writer else { return true };
        if self.pending.lines == 0 {
            writer.batches = None;
        }
        writer.thread.is_finished()
    }

    /// Ends it as dropping does, and tells what became of all its lines.
    pub fn close(self) -> Counts {
        let counters = Arc::clone(&self.counters);
        drop(self);
        counters.counts()
    }

    /// What became of the lines so far.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }
}

impl Drop for Spool {
    /// Writes out what is left, for `CLOSE_WAIT_MAX` at most: a stuck reader does not keep the process alive.
    fn drop(&mut self) {
        self.flush();
        let Some(Writer { batches, thread }) = self.writer.take() else { return };
        drop(batches);
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

/// What the writer thread owns.
struct Drain {
    sink: Box<dyn Sink>,
    name: String,
    counters: Arc<Counters>,
    reopener: Reopener,
    epoch: u64,
    torn: bool,
    complaints: Limiter<&'static str>,
}

impl Drain {
    fn run(mut self, mut batches: mpsc::Receiver<Batch>) {
        while let Some(batch) = batches.blocking_recv() {
            self.reopen_if_asked();
            if batch.lines > 0 {
                self.write(&batch);
            }
        }
    }

    fn write(&mut self, batch: &Batch) {
        let line_break: &[u8] = if self.torn { b"\n" } else { b"" };
        let result =
            self.sink.write_all(line_break).and_then(|()| self.sink.write_all(&batch.bytes)).and_then(|()| self.sink.flush());
        self.torn = result.is_err();
        match result {
            Ok(()) => {
                self.counters.written.fetch_add(batch.lines, Ordering::Relaxed);
            }
            Err(error) => {
                self.counters.dropped.fetch_add(batch.lines, Ordering::Relaxed);
                self.complain("written", &error, "check the reader or the disk; lines are dropped and counted meanwhile");
            }
        }
    }

    fn reopen_if_asked(&mut self) {
        let epoch = self.reopener.epoch();
        if epoch == self.epoch {
            return;
        }
        self.epoch = epoch;
        match self.sink.reopen() {
            Ok(()) => self.torn = false,
            Err(error) => self.complain("reopened", &error, "check the folder and its rights; the old file is used meanwhile"),
        }
    }

    fn complain(&mut self, what: &'static str, error: &io::Error, remedy: &str) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        if let Some(suppressed) = self.complaints.ask(what, Instant::now()) {
            tracing::error!(log = %self.name, %error, remedy, suppressed, "the log cannot be {what}");
        }
    }
}

trait Sink: Write + Send {
    fn reopen(&mut self) -> io::Result<()>;
}

/// A standard stream: there is nothing to reopen.
struct Stream<W>(W);

impl<W: Write> Write for Stream<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write + Send> Sink for Stream<W> {
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct LogFile {
    file: File,
    path: PathBuf,
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for LogFile {
    fn reopen(&mut self) -> io::Result<()> {
        self.file = open_file(&self.path)?;
        Ok(())
    }
}

fn open_file(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path)
}

#[cfg(test)]
mod tests;
