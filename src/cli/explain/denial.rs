//! One denial, for a person.

use std::fmt::Write;

use serde_json::Value;

use super::super::admin::Admin;
use super::super::terminal::plain;
use super::super::{Exit, print};

/// Where the second column begins.
const WIDTH: usize = 11;

pub(super) async fn explain(id: &str, admin: &Admin, json: bool) -> anyhow::Result<Exit> {
    let answer = admin.get(&format!("/denials/{id}")).await?;
    if !answer.is_ok() {
        super::super::complain(&format!("denial {id}: {}", answer.text().trim_start_matches("HTTP 404: ")));
        return Ok(Exit::Failed);
    }
    let line = answer.json();
    print(&if json { format!("{line}\n") } else { text(&line) });
    Ok(Exit::Ok)
}

/// The lines that a person reads. Keys that the sidecar left out have no line.
pub(super) fn text(line: &Value) -> String {
    let of = |key: &str| line[key].as_str();
    let caller = &line["caller"];
    let mut page = Page::default();
    page.line("denied", of("time"));
    page.line("id", of("denial"));
    page.line("who", Some(&who(caller, of("source"))));
    page.line("known by", caller["tier"].as_str());
    page.line("rule", caller["rule"].as_str());
    page.line("identity", caller["identity"].as_str().or_else(|| of("source").filter(|_| caller.is_null())));
    page.line("to", of("upstream").or_else(|| of("service")));
    page.line("via", of("upstream").and_then(|_| of("service")).map(|service| format!("the sidecar of {service}")).as_deref());
    page.line("decided by", of("by"));
    page.line("why", of("why").or_else(|| of("by")));
    page.line("would allow", of("remedy"));
    page.0
}

/// The task with its try, the component, or what is known of a stranger.
fn who(caller: &Value, source: Option<&str>) -> String {
    let of = |key: &str| caller[key].as_str();
    if let (Some(dag), Some(task)) = (of("dag"), of("task")) {
        let mut text = format!("task {task} of DAG {dag}, run {}, try {}", of("run").unwrap_or("?"), caller["try"]);
        if let Some(index) = caller["map_index"].as_i64().filter(|index| *index >= 0) {
            // Writing to a String cannot fail.
            let _ = write!(text, ", map index {index}");
        }
        return text;
    }
    if let Some(component) = of("component") {
        return format!("component {component} of Airflow");
    }
    if caller.is_null() {
        return format!("a peer, {}", source.unwrap_or("of unknown identity"));
    }
    let mut text = "an unidentified process".to_owned();
    for (key, word) in [("pid", "pid"), ("uid", "uid")] {
        if let Some(number) = caller[key].as_u64() {
            let _ = write!(text, ", {word} {number}");
        }
    }
    for (key, word) in [("command", "command"), ("ancestry", "parents")] {
        if let Some(value) = of(key) {
            let _ = write!(text, ", {word} `{value}`");
        }
    }
    text
}

/// Lines of a name and a value.
#[derive(Debug, Default)]
pub(super) struct Page(pub(super) String);

impl Page {
    pub(super) fn line(&mut self, name: &str, value: Option<&str>) {
        let Some(value) = value.filter(|value| !value.is_empty()) else { return };
        let _ = writeln!(self.0, "{name:<WIDTH$}  {}", plain(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_denied_task_reads_like_this() {
        let line = json!({"time": "2026-11-24T10:00:00.000Z", "service": "airflow-worker", "upstream": "warehouse",
            "source": "spiffe://t/ns/default/dc/dc1/svc/airflow-payroll", "by": "intention airflow-payroll -> warehouse deny (precedence 9)",
            "caller": {"dag": "payroll", "task": "load", "run": "r1", "try": 2, "map_index": 3, "identity": "airflow-payroll",
                "tier": "cgroup", "rule": "payroll"},
            "denial": "5f3a9c0100000007", "why": "identity \"airflow-payroll\" may not call \"warehouse\"",
            "remedy": "consul intention create -replace -allow airflow-payroll warehouse", "reason": "caller_denied"});
        assert_eq!(
            text(&line),
            "denied       2026-11-24T10:00:00.000Z\n\
             id           5f3a9c0100000007\n\
             who          task load of DAG payroll, run r1, try 2, map index 3\n\
             known by     cgroup\n\
             rule         payroll\n\
             identity     airflow-payroll\n\
             to           warehouse\n\
             via          the sidecar of airflow-worker\n\
             decided by   intention airflow-payroll -> warehouse deny (precedence 9)\n\
             why          identity \"airflow-payroll\" may not call \"warehouse\"\n\
             would allow  consul intention create -replace -allow airflow-payroll warehouse\n"
        );
    }

    #[test]
    fn peers_components_and_strangers_are_named_as_what_they_are() {
        let peer = json!({"denial": "1", "service": "db", "source": "spiffe://t/ns/default/dc/dc1/svc/web", "by": "default policy deny"});
        let shown = text(&peer);
        assert!(
            shown.contains("who          a peer, spiffe://t/ns/default/dc/dc1/svc/web\n") && shown.contains("to           db\n"),
            "{shown}"
        );
        assert!(!shown.contains("via"), "{shown}");
        let component = json!({"caller": {"component": "airflow-scheduler", "tier": "component", "rule": "r"}});
        assert!(text(&component).contains("component airflow-scheduler of Airflow"));
        let stranger =
            json!({"caller": {"uid": 1000, "pid": 7, "command": "\u{1b}[2Jpsql", "tier": "unidentified", "rule": "default"}});
        let shown = text(&stranger);
        assert!(shown.contains("an unidentified process, pid 7, uid 1000, command `\\u{1b}[2Jpsql`"), "{shown}");
    }
}
