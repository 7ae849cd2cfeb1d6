//! The lines of the report.

use std::io::Write;

use crate::cli::Exit;

/// How a thing was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// Prints each line as it is found and counts.
#[derive(Debug)]
pub(super) struct Report {
    json: bool,
    failures: usize,
    warnings: usize,
    lines: usize,
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { json, failures: 0, warnings: 0, lines: 0 }
    }

    pub(super) fn ok(&mut self, what: &str, detail: impl AsRef<str>) {
        self.line(Verdict::Ok, what, detail.as_ref(), "");
    }

    pub(super) fn warn(&mut self, what: &str, detail: impl AsRef<str>, remedy: impl AsRef<str>) {
        self.line(Verdict::Warn, what, detail.as_ref(), remedy.as_ref());
    }

    pub(super) fn fail(&mut self, what: &str, detail: impl AsRef<str>, remedy: impl AsRef<str>) {
        self.line(Verdict::Fail, what, detail.as_ref(), remedy.as_ref());
    }

    /// Prints the sum and gives the exit code.
    pub(super) fn finish(self) -> Exit {
        if !self.json {
            self.print(&format!("{} checks, {} warnings, {} failures", self.lines, self.warnings, self.failures));
        }
        if self.failures == 0 { Exit::Ok } else { Exit::Failed }
    }

    fn line(&mut self, verdict: Verdict, what: &str, detail: &str, remedy: &str) {
        self.lines += 1;
        self.warnings += usize::from(verdict == Verdict::Warn);
        self.failures += usize::from(verdict == Verdict::Fail);
        self.print(&if self.json { json(verdict, what, detail, remedy) } else { text(verdict, what, detail, remedy) });
    }

    fn print(&self, line: &str) {
        // A reader that went away (`| head`) still wants the exit code.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

fn text(verdict: Verdict, what: &str, detail: &str, remedy: &str) -> String {
    let verdict = match verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let remedy = if remedy.is_empty() { String::new() } else { format!(" — {remedy}") };
    // An agent's error text may have line breaks; a line of the report has none.
    format!("{verdict:<4}  {what:<28}  {}{remedy}", detail.replace(['\n', '\r'], " "))
}

fn json(verdict: Verdict, what: &str, detail: &str, remedy: &str) -> String {
    let verdict = match verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    serde_json::json!({ "verdict": verdict, "what": what, "detail": detail, "remedy": remedy }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_each_with_the_remedy() {
        assert_eq!(text(Verdict::Ok, "leaf", "valid", ""), format!("ok    leaf{}  valid", " ".repeat(24)));
        let line = text(Verdict::Fail, "agent", "a\nb", "start it");
        assert!(line.starts_with("FAIL  agent") && line.ends_with("a b — start it"), "{line}");
        let value: serde_json::Value = serde_json::from_str(&json(Verdict::Warn, "w", "d", "r")).expect("JSON");
        assert_eq!((value["verdict"].as_str(), value["remedy"].as_str()), (Some("warn"), Some("r")));
    }

    #[test]
    fn only_failures_fail() {
        let mut report = Report::new(true);
        report.ok("a", "");
        report.warn("b", "", "");
        assert_eq!(report.finish(), Exit::Ok);
        let mut report = Report::new(true);
        report.fail("c", "", "");
        assert_eq!(report.finish(), Exit::Failed);
    }
}
