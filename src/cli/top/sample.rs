//! One look at `/callers`, as rows with rates.
//!
//! Invariant: a rate is the difference of two looks at the same process; after its restart there is none until the next look.
//! An answer of any shape gives rows or none, never a panic.

use std::collections::HashMap;
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::telemetry::log::Rfc3339;

/// What is counted of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) connections: u64,
    pub(super) denied: u64,
    pub(super) from_mesh: u64,
    pub(super) to_mesh: u64,
}

/// The same a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) connections: f64,
    pub(super) from_mesh: f64,
    pub(super) to_mesh: f64,
}

/// One line of a table.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) name: Name,
    /// Open now; services only.
    pub(super) active: Option<u64>,
    pub(super) counts: Counts,
    pub(super) rates: Option<Rates>,
    /// When its last connection closed, as text; the empty one is the oldest.
    last_seen: String,
}

/// What a row is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Name {
    /// A service, `dag / task`, a component, or `unidentified`.
    pub(super) who: String,
    pub(super) identity: Option<String>,
    /// The upstream; empty for what comes in.
    pub(super) to: String,
}

/// One look.
#[derive(Debug)]
pub(super) struct Sample {
    at: Instant,
    since: String,
    interval_s: Option<f64>,
    pub(super) services: Vec<Row>,
    pub(super) tasks: Vec<Row>,
}

impl Sample {
    /// Reads an answer; rates are those since `before`.
    pub(super) fn read(answer: &Value, before: Option<&Self>, at: Instant) -> Self {
        let since = answer["since"].as_str().unwrap_or_default().to_owned();
        let before = before.filter(|before| before.since == since);
        let interval_s = before.map(|before| at.duration_since(before.at).as_secs_f64()).filter(|seconds| *seconds > 0.0);
        let rows = |rows: Vec<Row>, old: Option<&Vec<Row>>| rated(rows, old.zip(interval_s));
        Self {
            at,
            interval_s,
            services: rows(services(answer), before.map(|before| &before.services)),
            tasks: rows(tasks(answer), before.map(|before| &before.tasks)),
            since,
        }
    }

    pub(super) fn since(&self) -> &str {
        &self.since
    }

    pub(super) fn json(&self) -> Value {
        let rows = |rows: &[Row]| rows.iter().map(Row::json).collect::<Vec<_>>();
        json!({
            "time": Rfc3339(SystemTime::now()).to_string(), "since": self.since, "interval_s": self.interval_s,
            "services": rows(&self.services), "tasks": rows(&self.tasks),
        })
    }
}

fn services(answer: &Value) -> Vec<Row> {
    let list = answer["services"].as_array().into_iter().flatten();
    let row = |service: &Value| Row {
        name: Name { who: text(service, "service"), identity: None, to: text(service, "upstream") },
        active: service["active"].as_u64(),
        counts: Counts::of(service),
        rates: None,
        last_seen: String::new(),
    };
    list.map(row).collect()
}

/// Tries of one task under one identity to one upstream are one row; whoever is no task has a row of their own.
fn tasks(answer: &Value) -> Vec<Row> {
    let mut rows: HashMap<Name, Row> = HashMap::new();
    let mut add = |name: Name, value: &Value| {
        let row = rows.entry(name.clone()).or_insert_with(|| Row {
            name,
            active: None,
            counts: Counts::default(),
            rates: None,
            last_seen: String::new(),
        });
        row.counts.add(&Counts::of(value));
        row.last_seen = text(value, "last_seen").max(std::mem::take(&mut row.last_seen));
    };
    for one in answer["tries"].as_array().into_iter().flatten() {
        let who = format!("{} / {}", text(one, "dag"), text(one, "task"));
        add(Name { who, identity: one["identity"].as_str().map(str::to_owned), to: text(one, "upstream") }, one);
    }
    for total in answer["totals"].as_array().into_iter().flatten().filter(|total| total["who"] != "dag") {
        let component = total["component"].as_str().map(str::to_owned);
        let who = component.clone().unwrap_or_else(|| text(total, "who"));
        add(Name { who, identity: component, to: text(total, "upstream") }, total);
    }
    rows.into_values().collect()
}

/// With rates, the busiest first.
fn rated(mut rows: Vec<Row>, before: Option<(&Vec<Row>, f64)>) -> Vec<Row> {
    if let Some((old, seconds)) = before {
        let old: HashMap<&Name, Counts> = old.iter().map(|row| (&row.name, row.counts)).collect();
        for row in &mut rows {
            let earlier = old.get(&row.name).copied().unwrap_or_default();
            // Tries that made room for others take their sums with them: a sum may fall.
            let rate = |now: u64, earlier: u64| now.saturating_sub(earlier) as f64 / seconds;
            row.rates = Some(Rates {
                connections: rate(row.counts.connections, earlier.connections),
                from_mesh: rate(row.counts.from_mesh, earlier.from_mesh),
                to_mesh: rate(row.counts.to_mesh, earlier.to_mesh),
            });
        }
    }
    rows.sort_by(|a, b| {
        let busy = b.bytes_rate().total_cmp(&a.bytes_rate()).then(b.connections_rate().total_cmp(&a.connections_rate()));
        let much = || b.active.cmp(&a.active).then_with(|| b.last_seen.cmp(&a.last_seen));
        busy.then_with(much).then_with(|| b.counts.connections.cmp(&a.counts.connections)).then_with(|| a.name.cmp(&b.name))
    });
    rows
}

impl Counts {
    fn of(value: &Value) -> Self {
        let number = |key: &str| value[key].as_u64().unwrap_or_default();
        Self {
            connections: number("connections"),
            denied: number("denied"),
            from_mesh: number("bytes_from_mesh"),
            to_mesh: number("bytes_to_mesh"),
        }
    }

    fn add(&mut self, other: &Self) {
        let add = |sum: &mut u64, number: u64| *sum = sum.saturating_add(number);
        add(&mut self.connections, other.connections);
        add(&mut self.denied, other.denied);
        add(&mut self.from_mesh, other.from_mesh);
        add(&mut self.to_mesh, other.to_mesh);
    }
}

impl Row {
    fn bytes_rate(&self) -> f64 {
        self.rates.map_or(0.0, |rates| rates.from_mesh + rates.to_mesh)
    }

    fn connections_rate(&self) -> f64 {
        self.rates.map_or(0.0, |rates| rates.connections)
    }

    fn json(&self) -> Value {
        let rate = |of: fn(&Rates) -> f64| self.rates.as_ref().map(of);
        json!({
            "name": self.name.who, "identity": self.name.identity, "to": self.name.to, "active": self.active,
            "connections": self.counts.connections, "denied": self.counts.denied,
            "bytes_from_mesh": self.counts.from_mesh, "bytes_to_mesh": self.counts.to_mesh,
            "connections_per_s": rate(|rates| rates.connections), "bytes_from_mesh_per_s": rate(|rates| rates.from_mesh),
            "bytes_to_mesh_per_s": rate(|rates| rates.to_mesh),
        })
    }
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn answer(since: &str, load: u64, copy: u64) -> Value {
        let row = |task: &str, run: &str, connections: u64| {
            json!({"dag": "payroll", "task": task, "run": run, "try": 1, "map_index": -1, "identity": "airflow-payroll", "upstream": "db",
                "connections": connections, "denied": 1, "bytes_from_mesh": connections * 100, "bytes_to_mesh": 0, "last_seen": run})
        };
        json!({"since": since,
            "services": [{"direction": "outbound", "service": "airflow-worker", "upstream": "db", "active": 2, "connections": 9}],
            "totals": [{"who": "dag", "dag": "payroll", "upstream": "db", "connections": 99},
                {"who": "component", "component": "airflow-scheduler", "upstream": "db", "connections": 1},
                {"who": "unidentified", "upstream": "db", "connections": 1, "denied": 1}],
            "tries": [row("load", "r1", load), row("load", "r2", 1), row("copy", "r1", copy)]})
    }

    #[test]
    fn tries_of_a_task_are_one_row_and_the_busiest_is_first() {
        let start = Instant::now();
        let first = Sample::read(&answer("s", 10, 10), None, start);
        assert!(first.tasks.iter().chain(&first.services).all(|row| row.rates.is_none()));
        let names: Vec<&str> = first.tasks.iter().map(|row| &*row.name.who).collect();
        assert_eq!(names, ["payroll / load", "payroll / copy", "airflow-scheduler", "unidentified"], "the one seen last first");
        let load = &first.tasks[0];
        assert_eq!(
            (load.counts.connections, load.counts.denied, load.name.identity.as_deref()),
            (11, 2, Some("airflow-payroll"))
        );

        let second = Sample::read(&answer("s", 10, 30), Some(&first), start + Duration::from_secs(2));
        assert_eq!(second.tasks[0].name.who, "payroll / copy");
        assert_eq!(second.tasks[0].rates, Some(Rates { connections: 10.0, from_mesh: 1_000.0, to_mesh: 0.0 }));
        assert_eq!(second.json()["tasks"][0]["connections_per_s"], 10.0);
        assert_eq!(second.json()["interval_s"], 2.0);
    }

    #[test]
    fn sums_that_fall_and_a_restart_make_no_rate() {
        let start = Instant::now();
        let first = Sample::read(&answer("s", 10, 10), None, start);
        let fallen = Sample::read(&answer("s", 1, 1), Some(&first), start + Duration::from_secs(1));
        assert!(fallen.tasks.iter().all(|row| row.rates == Some(Rates::default())));
        let restarted = Sample::read(&answer("later", 99, 99), Some(&first), start + Duration::from_secs(1));
        assert!(restarted.tasks.iter().all(|row| row.rates.is_none()));
    }

    #[test]
    fn answers_of_any_shape_panic_nothing() {
        for value in
            [json!(null), json!([]), json!({"tries": 7, "services": {}}), json!({"tries": [null, "x", {"connections": -1}]})]
        {
            let _ = Sample::read(&value, None, Instant::now()).json();
        }
    }
}
