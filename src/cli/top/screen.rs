//! A terminal's whole screen, by the escape sequences that every terminal knows.
//!
//! Invariant: what was on the screen is there again when this is dropped, with cursor and line wrapping.

use std::io::{self, Write};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// A screen of its own, no cursor, long lines cut instead of wrapped.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// From the top; the rest of each line and of the screen cleared.
const HOME: &str = "\x1b[H";
const LINE_END: &str = "\x1b[K\r\n";
const CLEAR_BELOW: &str = "\x1b[J";
/// Rows of a terminal that does not tell.
const ROWS_DEFAULT: usize = 24;
const SIZE_TIMEOUT: Duration = Duration::from_millis(500);

/// The screen while it is ours.
#[derive(Debug)]
pub(super) struct Screen(());

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        write(ENTER)?;
        Ok(Self(()))
    }

    pub(super) fn draw(&mut self, text: &str) -> io::Result<()> {
        write(&format!("{HOME}{}{CLEAR_BELOW}", text.trim_end().replace('\n', LINE_END)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _ = write(LEAVE);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// How many rows the terminal has now. Asked of stty, because the system call needs `unsafe`, which is for `sys` alone.
pub(super) async fn rows() -> usize {
    let asked = async {
        let terminal = std::fs::File::open("/dev/tty").ok()?;
        let mut stty = Command::new("stty");
        stty.arg("size").stdin(Stdio::from(terminal)).stderr(Stdio::null()).kill_on_drop(true);
        let answer = tokio::time::timeout(SIZE_TIMEOUT, stty.output()).await.ok()?.ok()?;
        let text = String::from_utf8(answer.stdout).ok()?;
        text.split_whitespace().next()?.parse::<usize>().ok().filter(|rows| *rows > 0)
    };
    asked.await.unwrap_or(ROWS_DEFAULT)
}
