//! What a task's connection would meet: the rules first, then the upstream.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::super::admin::Admin;
use super::super::http::encode;
use super::super::terminal::{padded, plain, span};
use super::super::{Exit, print};
use super::Flags;
use super::denial::Page;
use super::door::Door;
use crate::config;

/// Width of the columns of rule names and of what they give.
const NAME_WIDTH: usize = 24;
/// Denials looked through for the last one of this task.
const DENIALS_SEEN: usize = 200;

/// All that was found out.
#[derive(Debug)]
struct Forecast {
    explanation: Value,
    /// The file that the rules come from.
    rules: Value,
    /// What `/reach` says; `null` without an identity or an upstream to ask for.
    reach: Value,
    /// The last denial of this task on the way there; `null` when none is kept.
    last_denial: Value,
}

/// Whether it would be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Denied,
    /// The called side decides, or nobody was asked for.
    Unknown,
}

pub(super) async fn explain(flags: &Flags, dag: &str, task: &str) -> anyhow::Result<Exit> {
    let mut door = Door::open(&flags.socket).await?;
    let question = json!({"version": 1, "op": "explain", "dag": dag, "task": task, "run": flags.run.as_deref().unwrap_or_default(), "to": flags.to});
    let mut answer = door.ask(&question).await?;
    let (explanation, rules) = (answer["explanation"].take(), answer["rules"].take());
    let mut forecast = Forecast { explanation, rules, reach: Value::Null, last_denial: Value::Null };
    if let Some(to) = &flags.to {
        let admin = Admin::at(admin_of(flags, &mut door).await)?;
        forecast.ask(&admin, dag, task, to).await?;
    }
    let verdict = forecast.verdict();
    print(&if flags.json { forecast.json(verdict) } else { forecast.text(flags.to.as_deref(), verdict, SystemTime::now()) });
    Ok(if verdict == Verdict::Denied { Exit::Failed } else { Exit::Ok })
}

/// Where the admin port is: as the user says, or the sidecar, or the default.
async fn admin_of(flags: &Flags, door: &mut Door) -> SocketAddr {
    if let Some(address) = flags.admin {
        return address;
    }
    let routes = door.ask(&json!({"version": 1, "op": "routes"})).await.unwrap_or_default();
    routes["admin"].as_str().and_then(|text| text.parse().ok()).unwrap_or(config::ADMIN_BIND)
}

impl Forecast {
    async fn ask(&mut self, admin: &Admin, dag: &str, task: &str, to: &str) -> anyhow::Result<()> {
        if let Some(identity) = self.explanation["identity"].as_str() {
            self.reach = admin.json(&format!("/reach?identity={}&to={}", encode(identity), encode(to))).await?;
        }
        let denials = admin.json(&format!("/denials?limit={DENIALS_SEEN}&dag={}", encode(dag))).await?;
        let same = |line: &&Value| {
            line["caller"]["task"] == task && (line["upstream"] == to || line["upstream"] == self.reach["upstream"])
        };
        let last = denials["denials"].as_array().into_iter().flatten().find(same).cloned();
        self.last_denial = last.unwrap_or_default();
        Ok(())
    }

    fn verdict(&self) -> Verdict {
        if self.explanation["identity"].is_null() {
            return Verdict::Denied;
        }
        match self.reach["decision"].as_str() {
            Some("denied") => Verdict::Denied,
            Some("allowed") => Verdict::Allowed,
            _ => Verdict::Unknown,
        }
    }

    fn json(&self, verdict: Verdict) -> String {
        let verdict = match verdict {
            Verdict::Allowed => "allowed",
            Verdict::Denied => "denied",
            Verdict::Unknown => "unknown",
        };
        let Self { explanation, reach, last_denial, rules: _ } = self;
        format!("{}\n", json!({"verdict": verdict, "explanation": explanation, "reach": reach, "last_denial": last_denial}))
    }

    fn text(&self, to: Option<&str>, verdict: Verdict, now: SystemTime) -> String {
        let mut page = Page::default();
        page.line("task", self.explanation["task"].as_str());
        page.line("DAG", self.explanation["dag"].as_str());
        page.line("to", to);
        let file = self.rules.as_str().map(|file| format!(" of {}", plain(file))).unwrap_or_default();
        let _ = writeln!(page.0, "\nThe rules{file} in their order; the first that matches decides:");
        rules(&mut page.0, &self.explanation);
        page.0.push('\n');
        page.line("identity", Some(self.explanation["identity"].as_str().unwrap_or("none")));
        page.line("why", self.explanation["denied"].as_str());
        page.line("would allow", self.explanation["remedy"].as_str());
        if !self.reach.is_null() {
            self.reach_lines(&mut page, now);
        }
        if let Some(time) = self.last_denial["time"].as_str() {
            let of = |key: &str| self.last_denial[key].as_str().unwrap_or_default();
            page.line("last denial", Some(&format!("{time}, id {}: {}", of("denial"), of("why"))));
        }
        page.line("verdict", Some(&self.sentence(to, verdict)));
        page.0
    }

    fn reach_lines(&self, page: &mut Page, now: SystemTime) {
        let reach = &self.reach;
        page.line("SPIFFE ID", reach["spiffe_id"].as_str());
        page.line("leaf", Some(&leaf(&reach["leaf"], now)));
        let decision = reach["decision"].as_str().unwrap_or("unknown");
        page.line("access", Some(&format!("{decision}: {}", reach["by"].as_str().unwrap_or_default())));
        page.line("would allow", reach["remedy"].as_str());
        let endpoints = reach["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
        if endpoints.is_empty() {
            page.line("endpoints", Some("none: no instance is registered, or none was learned yet"));
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            let name = if index == 0 { "endpoints" } else { "" };
            page.line(name, Some(&endpoint_line(endpoint)));
        }
        for (index, failure) in reach["failures"].as_array().into_iter().flatten().enumerate() {
            let name = if index == 0 { "failures" } else { "" };
            page.line(name, Some(&failure_line(failure)));
        }
    }

    fn sentence(&self, to: Option<&str>, verdict: Verdict) -> String {
        let Some(to) = to else {
            let given = self.explanation["identity"].as_str();
            return given.map_or_else(
                || "it has no mesh identity: every connection of it is denied".to_owned(),
                |identity| format!("it speaks as {identity}; add -to SERVICE to see what an upstream says to that"),
            );
        };
        match verdict {
            Verdict::Denied => format!("a connection to {to} would be denied"),
            Verdict::Unknown => format!("nothing known here denies a connection to {to}; the called side decides"),
            Verdict::Allowed if !self.has_healthy() => format!("{to} would let it in, but no endpoint of it is healthy"),
            Verdict::Allowed => format!("a connection to {to} would be let in, as far as this host knows"),
        }
    }

    fn has_healthy(&self) -> bool {
        let mut endpoints = self.reach["endpoints"].as_array().into_iter().flatten();
        endpoints.any(|endpoint| endpoint["healthy"] == true && endpoint["ejected"] != true)
    }
}

/// One row a rule: whether it matches, what it gives, and whose word it rests on or why it does not match.
fn rules(out: &mut String, explanation: &Value) {
    let rules = explanation["rules"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |value: &Value, key: &str| plain(value[key].as_str().unwrap_or_default());
    let winner = explanation["winner"].as_str().unwrap_or_default();
    for rule in rules {
        let (matched, decides) = (rule["matched"] == true, rule["rule"] == winner);
        let mark = match (decides, matched) {
            (true, _) => "=>",
            (false, true) => "yes",
            (false, false) => "no",
        };
        let ground = match (&rule["failed"], &rule["fail_closed"]) {
            (Value::Null, Value::Null) => match rule["trust"].as_str() {
                Some(trust) => format!("rests on {trust} facts"),
                None => "has no condition".to_owned(),
            },
            (Value::Null, lacked) => format!("denies for want of {}: {}", of(lacked, "key"), of(lacked, "had")),
            (failed, _) => format!(
                "{} wants {}, has {} ({})",
                of(failed, "key"),
                of(failed, "wanted"),
                of(failed, "had"),
                of(failed, "trust")
            ),
        };
        let (name, effect) = (padded(&of(rule, "rule"), NAME_WIDTH), padded(&of(rule, "effect"), NAME_WIDTH));
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  {mark:<3}  {name}  {effect}  {ground}");
    }
    if winner == "default" {
        let _ = writeln!(
            out,
            "  =>   {}  {}",
            padded("default", NAME_WIDTH),
            if explanation["identity"].is_null() { "deny" } else { "gives an identity" }
        );
    }
}

fn leaf(leaf: &Value, now: SystemTime) -> String {
    let Some(end) = leaf["not_after"].as_str() else {
        return "not here yet: it is fetched with the first connection".to_owned();
    };
    let serial = leaf["serial"].as_str().unwrap_or_default();
    let left = moment(end).map(|end| match end.duration_since(now) {
        Ok(left) => format!(", {} left", span(left)),
        Err(_) => ", EXPIRED".to_owned(),
    });
    format!("serial {serial}, ends {end}{}", left.unwrap_or_default())
}

/// An RFC 3339 moment in UTC, as the admin port writes it.
fn moment(text: &str) -> Option<SystemTime> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u16>().ok();
    let small = |range| number(range).and_then(|number| u8::try_from(number).ok());
    let date = time::Date::from_calendar_date(i32::from(number(0..4)?), small(5..7)?.try_into().ok()?, small(8..10)?).ok()?;
    let clock = time::Time::from_hms(small(11..13)?, small(14..16)?, small(17..19)?).ok()?;
    let at = time::PrimitiveDateTime::new(date, clock).assume_utc().unix_timestamp();
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(at).ok()?))
}

fn endpoint_line(endpoint: &Value) -> String {
    let of = |key: &str| endpoint[key].as_str().unwrap_or("?");
    let state = match (endpoint["healthy"] == true, endpoint["ejected"] == true) {
        (false, _) => "unhealthy in Consul: not dialed",
        (true, true) => "kept out for a while: connections to it failed",
        (true, false) => "healthy",
    };
    format!("{}  {state}  ({})", of("address"), of("target"))
}

fn failure_line(failure: &Value) -> String {
    let of = |key: &str| failure[key].as_str();
    let to = of("endpoint").map(|endpoint| format!(" at {endpoint}")).unwrap_or_default();
    let detail = of("detail").map(|detail| format!(": {detail}")).unwrap_or_default();
    format!("{}  {}{to}{detail}", of("time").unwrap_or("?"), of("reason").unwrap_or("?"))
}

#[cfg(test)]
mod tests;
