//! Reads a sidecar's connection log as it grows, the way an operator would.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How often the file is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes read at one look; the rest comes with the next.
const READ_BYTES_MAX: u64 = 1 << 20;

/// One connection log, read from where it was left.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    offset: u64,
    /// The start of a line whose end is not written yet.
    partial: Vec<u8>,
}

impl Journal {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, partial: Vec::new() }
    }

    /// The lines written since the last call.
    pub(super) fn read(&mut self) -> std::io::Result<Vec<Value>> {
        let mut file = match std::fs::File::open(&self.path) {
            Ok(file) => file,
            // The writer makes it with the first line.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.take(READ_BYTES_MAX).read_to_end(&mut self.partial)? as u64;
        let whole = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = self.partial.drain(..whole).collect();
        Ok(lines.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }

    /// The first new line that `wanted` likes, or `None` when `timeout` is over.
    pub(super) async fn wait_for(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> std::io::Result<Option<Value>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(line) = self.read()?.into_iter().find(|line| wanted(line)) {
                return Ok(Some(line));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}

/// A text field of a line, or a dash.
pub(super) fn field<'a>(line: &'a Value, name: &str) -> &'a str {
    line[name].as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn lines_are_read_once_and_only_when_whole() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("log");
        let mut journal = Journal::new(path.clone());
        assert_eq!(journal.read().expect("absent"), Vec::<Value>::new());
        let mut file = std::fs::File::create(&path).expect("file");
        file.write_all(b"{\"reason\":\"complete\"}\n{\"reason\":\"den").expect("write");
        assert_eq!(journal.read().expect("one").len(), 1);
        assert_eq!(journal.read().expect("none").len(), 0);
        file.write_all(b"ied\"}\n").expect("write");
        let line = journal.wait_for(Duration::from_secs(1), |line| field(line, "reason") == "denied").await.expect("read");
        assert_eq!(field(&line.expect("found"), "by"), "-");
        assert_eq!(journal.wait_for(Duration::ZERO, |_| true).await.expect("read"), None);
    }
}
