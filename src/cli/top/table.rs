//! The two tables as text.

use std::fmt::Write;

use super::super::terminal::{padded, plain, size};
use super::sample::{Row, Sample};

/// Lines that hold no row: head, two headings, two blank lines, two that say what is left out, the note.
const LINES_BESIDE: usize = 8;
/// At least so many rows of each table, however low the terminal is.
const ROWS_MIN: usize = 3;
const WHO_WIDTH: usize = 34;
const IDENTITY_WIDTH: usize = 22;
const TO_WIDTH: usize = 18;
const NOTE: &str = "A task's connection counts when it closes; open ones and bytes of services are live.";

/// Head, services and tasks, in at most about `rows` lines.
pub(super) fn text(sample: &Sample, head: &str, rows: usize) -> String {
    let room = rows.saturating_sub(LINES_BESIDE).max(2 * ROWS_MIN);
    // Services are few and tasks are many: a third is theirs, and what they leave is the tasks'.
    let services = sample.services.len().min((room / 3).max(ROWS_MIN));
    let tasks = room - services;
    let mut out = format!("{}\n\n", plain(head));
    table(&mut out, "SERVICE", "OPEN", &sample.services, services);
    out.push('\n');
    table(&mut out, "TASK", "", &sample.tasks, tasks);
    out.push_str(NOTE);
    out.push('\n');
    out
}

fn table(out: &mut String, title: &str, open: &str, rows: &[Row], rows_max: usize) {
    let heading = |who: &str, identity: &str, to: &str| {
        format!("{} {} {}", padded(who, WHO_WIDTH), padded(identity, IDENTITY_WIDTH), padded(to, TO_WIDTH))
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{} {open:>6} {:>8} {:>7} {:>7} {:>11} {:>11} {:>11} {:>11}",
        heading(title, "IDENTITY", "TO"),
        "CONNS",
        "/s",
        "DENIED",
        "RECEIVED",
        "/s",
        "SENT",
        "/s"
    );
    for row in rows.iter().take(rows_max) {
        let identity = plain(row.name.identity.as_deref().unwrap_or("-"));
        let to = if row.name.to.is_empty() { "(comes in)".to_owned() } else { plain(&row.name.to) };
        let active = row.active.map_or_else(String::new, |active| active.to_string());
        let rate = |of: Option<f64>, show: fn(f64) -> String| of.map_or_else(|| "-".to_owned(), show);
        let rates = row.rates.as_ref();
        let _ = writeln!(
            out,
            "{} {active:>6} {:>8} {:>7} {:>7} {:>11} {:>11} {:>11} {:>11}",
            heading(&plain(&row.name.who), &identity, &to),
            row.counts.connections,
            rate(rates.map(|rates| rates.connections), |value| format!("{value:.1}")),
            row.counts.denied,
            size(row.counts.from_mesh as f64),
            rate(rates.map(|rates| rates.from_mesh), size),
            size(row.counts.to_mesh as f64),
            rate(rates.map(|rates| rates.to_mesh), size),
        );
    }
    if rows.len() > rows_max {
        let _ = writeln!(out, "... and {} more", rows.len() - rows_max);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::{Value, json};

    use super::*;

    fn sample(tasks: usize) -> Sample {
        let row = |number: usize| {
            json!({"dag": format!("dag{number}\u{1b}[2J"), "task": "load", "identity": null, "upstream": "db", "connections": number,
                "denied": 1, "bytes_from_mesh": 2048, "bytes_to_mesh": 0, "last_seen": "x"})
        };
        let tries: Vec<Value> = (0..tasks).map(row).collect();
        let services = [json!({"service": "db", "upstream": null, "active": 3, "connections": 4, "denied": 0})];
        Sample::read(&json!({"since": "s", "services": services, "tries": tries, "totals": []}), None, Instant::now())
    }

    #[test]
    fn the_table_fits_the_terminal_and_says_what_is_left_out() {
        let shown = text(&sample(100), "head", 24);
        assert!(shown.lines().count() <= 24, "{shown}");
        assert!(shown.contains("... and 85 more"), "{shown}");
        assert_eq!(text(&sample(100), "head", usize::MAX).lines().count(), 107);
    }

    #[test]
    fn a_row_shows_its_sums_and_no_escape() {
        let shown = text(&sample(1), "head", 24);
        assert!(!shown.contains('\u{1b}'), "{shown}");
        let line = shown.lines().find(|line| line.starts_with("dag0")).expect("a row");
        assert!(line.starts_with("dag0\\u{1b}[2J / load") && line.contains("2.0 KiB"), "{line}");
        assert!(
            shown.lines().any(|line| line.starts_with("db ") && line.contains("(comes in)") && line.contains(" 3 ")),
            "{shown}"
        );
    }
}
