//! The spool against files, a stuck sink and a broken one.

use super::*;
use std::os::unix::fs::PermissionsExt;

/// Polls for what a thread does on its own, for 5 s at most.
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

#[test]
fn a_file_is_appended_to_with_mode_0640() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("c.log");
    for line in ["one", "two"] {
        let mut spool = Spool::open(&Destination::File(path.clone()), &Reopener::default()).expect("opens");
        spool.push(line.as_bytes());
        drop(spool);
    }
    assert_eq!(std::fs::read_to_string(&path).expect("written"), "one\ntwo\n");
    let mode = std::fs::metadata(&path).expect("file").permissions().mode() & 0o777;
    assert_eq!(mode & !0o640, 0, "mode {mode:o} gives more than 0640");
}

#[test]
fn a_reopened_file_takes_the_next_line_even_when_idle() {
    let folder = tempfile::tempdir().expect("folder");
    let (path, moved) = (folder.path().join("c.log"), folder.path().join("c.log.1"));
    let reopener = Reopener::default();
    let mut spool = Spool::open(&Destination::File(path.clone()), &reopener).expect("opens");
    spool.push(b"old");
    spool.flush();
    eventually("the first write", || spool.counts().written == 1);
    std::fs::rename(&path, &moved).expect("rotated");
    reopener.reopen();
    spool.flush();
    eventually("the new file", || path.exists());
    spool.push(b"new");
    drop(spool);
    assert_eq!(std::fs::read_to_string(&moved).expect("old file"), "old\n");
    assert_eq!(std::fs::read_to_string(&path).expect("new file"), "new\n");
}

#[test]
fn a_path_that_cannot_be_opened_names_itself_and_the_remedy() {
    let missing = PathBuf::from("/nonexistent/folder/c.log");
    let error = Spool::open(&Destination::File(missing), &Reopener::default()).expect_err("no such folder").to_string();
    assert!(error.contains("/nonexistent/folder/c.log") && error.contains("folder must exist"), "{error}");
}

#[test]
fn device_paths_are_streams() {
    assert_eq!(Destination::from("/dev/stdout"), Destination::Stdout);
    assert_eq!(Destination::from("/dev/null"), Destination::None);
    assert_eq!(Destination::from("logs/a"), Destination::File("logs/a".into()));
}

/// Blocks in `write` until the test lets it go.
struct Stuck(std::os::unix::net::UnixStream);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Read::read_exact(&mut self.0, &mut [0])?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Stuck {
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_sink_costs_lines_but_no_time_and_bounded_memory() {
    let (hold, gate) = std::os::unix::net::UnixStream::pair().expect("pair");
    let mut spool = Spool::start(Box::new(Stuck(gate)), "stuck".into(), &Reopener::default()).expect("starts");
    let line = vec![b'x'; 1_023];
    let pushed = 10_000;
    let start = Instant::now();
    for _ in 0..pushed {
        spool.push(&line);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "push blocked for {:?}", start.elapsed());
    let room = ((BATCHES_MAX + 2) * (BATCH_BYTES_MAX / 1_024)) as u64;
    let dropped = spool.counts().dropped;
    assert!(dropped >= pushed - room, "kept {} lines, room is for {room}", pushed - dropped);
    assert!(dropped < pushed, "a bounded number is kept");
    // The gate's end: every write of the sink now fails, and each line is accounted for.
    drop(hold);
    eventually("the failure", || {
        spool.flush();
        let counts = spool.counts();
        counts.errors > 0 && counts.dropped == pushed
    });
}

#[test]
fn closing_does_not_wait_for_ever() {
    let (_hold, gate) = std::os::unix::net::UnixStream::pair().expect("pair");
    let mut spool = Spool::start(Box::new(Stuck(gate)), "stuck".into(), &Reopener::default()).expect("starts");
    spool.push(b"line");
    let start = Instant::now();
    drop(spool);
    assert!(start.elapsed() < CLOSE_WAIT_MAX * 3);
}

#[test]
fn a_line_longer_than_a_batch_is_dropped_and_counted() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("c.log");
    let mut spool = Spool::open(&Destination::File(path), &Reopener::default()).expect("opens");
    spool.push(&vec![b'x'; BATCH_BYTES_MAX]);
    assert_eq!(spool.counts(), Counts { written: 0, dropped: 1, errors: 0 });
}
