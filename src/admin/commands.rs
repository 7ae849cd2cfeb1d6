//! The admin port's commands as a table: `/help`, the list under a wrong path, and the index page for people.
//!
//! Invariant: what the router serves and what is listed is one table, in the order of the paths. The form of the list is
//! Envoy's, two spaces before a command and six before a parameter, because people grep it.

use std::fmt::Write;

/// One command.
pub(super) struct Command {
    /// Path, with axum's parameters.
    pub(super) path: &'static str,
    /// It changes something, so only POST will do.
    pub(super) changes: bool,
    help: &'static str,
    /// What may stand behind the `?`.
    parameters: &'static [(&'static str, &'static str)],
}

const fn shows(path: &'static str, help: &'static str) -> Command {
    Command { path, changes: false, help, parameters: &[] }
}

const fn changes(path: &'static str, help: &'static str) -> Command {
    Command { path, changes: true, help, parameters: &[] }
}

const fn with(command: Command, parameters: &'static [(&'static str, &'static str)]) -> Command {
    Command { parameters, ..command }
}

const ENABLE: &[(&str, &str)] = &[("enable", "y or n")];

/// Every command, sorted by path.
pub(super) const COMMANDS: &[Command] = &[
    shows("/", "this list as a page for people"),
    with(
        shows("/airflow", "page for people: who talks to whom"),
        &[("dag", "preset of the filter"), ("task", "preset of the filter"), ("run", "preset of the filter")],
    ),
    with(changes("/allocprofiler", "answered as by an Envoy without it"), ENABLE),
    with(shows("/callers", "tasks, components and services with their sums, as JSON"), &[("dag", "only this DAG")]),
    shows("/certs", "certificates in use and the roots they are used with, as JSON"),
    with(
        shows("/clusters", "the app, each upstream target and their endpoints"),
        &[("format", "text or json"), ("filter", "only clusters whose name this regular expression finds")],
    ),
    with(
        shows("/config_dump", "the configuration in force as Envoy's messages, without secrets"),
        &[
            ("resource", "one repeated field of the dump, such as dynamic_listeners"),
            ("mask", "the fields to keep, with a comma between; with resource, of each element"),
            ("name_regex", "only resources whose whole name matches"),
            ("include_eds", "endpoints too"),
        ],
    ),
    shows("/contention", "answered as by an Envoy that does not trace its locks"),
    with(changes("/cpuprofiler", "answered as by an Envoy that cannot start it"), ENABLE),
    with(shows("/denials", "the last denials and why, as JSON"), &[("dag", "only this DAG"), ("limit", "how many")]),
    shows("/denials/{id}", "one denial, as JSON"),
    with(
        changes("/drain_listeners", "stop accepting; open connections go on and the process stays"),
        &[
            ("graceful", "accept until the drain time is over"),
            ("inboundonly", "only the listeners that peers come in by"),
            ("skip_exit", "never stop accepting; connections are not closed by this command anyway"),
        ],
    ),
    changes("/healthcheck/fail", "answer /ready with 503 from now on; traffic goes on"),
    changes("/healthcheck/ok", "take that back"),
    shows("/healthz", "the process is alive; what is not well, as JSON"),
    shows("/heap_dump", "answered as by an Envoy without it"),
    with(changes("/heapprofiler", "answered as by an Envoy without it"), ENABLE),
    shows("/help", "this list"),
    shows("/hot_restart_version", "always disabled: sockets are handed over on SIGUSR2 instead"),
    with(shows("/init_dump", "what start-up still waits for, as JSON"), &[("mask", "accepted; what is missing is told whole")]),
    with(shows("/listeners", "names and addresses of listeners"), &[("format", "text or json")]),
    with(
        changes("/logging", "show or change log levels"),
        &[
            ("level", "for all loggers: trace, debug, info, warning, error, critical or off"),
            ("paths", "for some: NAME:LEVEL,NAME:LEVEL"),
            ("NAME", "for one: NAME=LEVEL"),
        ],
    ),
    shows("/memory", "memory of the process, as JSON"),
    shows("/memory/tcmalloc", "memory of the process as the kernel tells it"),
    shows("/metrics", "metrics in Prometheus' text format"),
    shows("/peak_heap_dump", "answered as by an Envoy without it"),
    changes("/quitquitquit", "exit"),
    with(shows("/reach", "would an identity be let in, as JSON"), &[("identity", "who asks"), ("to", "the upstream")]),
    shows("/ready", "200 LIVE when ready, otherwise 503 and the state"),
    changes("/reopen_logs", "open log files again"),
    changes("/reset_counters", "count what /stats shows from now on"),
    shows("/runtime", "always empty: there are no runtime layers"),
    changes("/runtime_modify", "answered as by an Envoy without an admin layer"),
    shows("/server_info", "version, state, uptime and options, as JSON"),
    shows("/snapshot", "what is being enforced, as JSON without secrets"),
    with(
        shows("/stats", "Envoy's stats"),
        &[
            ("filter", "only stats whose name this regular expression finds"),
            ("type", "Counters, Gauges, Histograms, TextReadouts or All"),
            ("usedonly", "only those that were ever touched"),
            ("format", "text, json or prometheus"),
            ("histogram_buckets", "how histograms are shown"),
        ],
    ),
    shows("/stats/prometheus", "the same with ringfence's own, in Prometheus' text format"),
    shows("/upgrade", "start the program's file anew and leave everything to it; GET tells how that went"),
];

/// The list of `/help` and of wrong paths.
pub(super) fn list() -> String {
    let mut text = String::new();
    for Command { path, changes, help, parameters } in COMMANDS {
        let how = if *changes { " (POST)" } else { "" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {path}{how}: {help}");
        for (name, help) in *parameters {
            let _ = writeln!(text, "      {name}: {help}");
        }
    }
    text
}

/// The index page. What changes something is shown as the command to type: the port refuses it from a browser.
pub(super) fn page() -> String {
    let mut rows = String::new();
    for Command { path, changes, help, parameters } in COMMANDS {
        let link = match (*changes, path.contains('{')) {
            (true, _) => format!("<code>curl -X POST $ADMIN{path}</code>"),
            (false, true) => format!("<code>{path}</code>"),
            (false, false) => format!("<a href=\"{path}\">{path}</a>"),
        };
        let _ = write!(rows, "<tr><td>{link}</td><td>{help}");
        for (name, help) in *parameters {
            let _ = write!(rows, "<br><code>?{name}</code> {help}");
        }
        rows.push_str("</td></tr>\n");
    }
    format!("{HEAD}{rows}</table>\n</body>\n</html>\n")
}

const HEAD: &str = "<!DOCTYPE html>
<html lang=\"en\">
<head>
<meta charset=\"utf-8\">
<title>ringfence admin</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
td { padding: .3em 1.5em .3em 0; vertical-align: top; border-top: 1px solid #ddd; }
code { background: #f3f3f3; }
</style>
</head>
<body>
<h1>ringfence</h1>
<p>The admin port. It has no password; whoever reaches it can stop the proxy.</p>
<table>
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_no_path_twice() {
        assert!(COMMANDS.windows(2).all(|pair| pair[0].path < pair[1].path));
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_posts_nothing() {
        let page = page();
        for foreign in ["http:", "https:", "src=", "<form", "<script", "@import", "url("] {
            assert!(!page.contains(foreign), "{foreign} in the page");
        }
        assert!(page.contains("<a href=\"/config_dump\">") && page.contains("curl -X POST $ADMIN/quitquitquit"), "{page}");
    }
}
