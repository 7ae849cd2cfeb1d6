//! The files of every kind of host, looked at as their readers will: rules, settings, secrets, units.

use std::collections::BTreeSet;

use clap::FromArgMatches;

use super::*;
use crate::airflow;

/// Flags as clap reads them.
fn flags(line: &str) -> Flags {
    let command = Flags::augment_args(clap::Command::new("init"));
    let matches = command.try_get_matches_from(["init"].into_iter().chain(line.split_whitespace())).expect(line);
    Flags::from_arg_matches(&matches).expect(line)
}

fn files_of(line: &str) -> Vec<File> {
    let flags = flags(line);
    files(&flags.plan().expect(line), flags.consul, &flags.config_folder)
}

fn text<'f>(files: &'f [File], path: &str) -> &'f str {
    let paths: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    &files.iter().find(|file| file.path == path).unwrap_or_else(|| panic!("no {path} among {paths:?}")).text
}

/// Every kind of host.
const HOSTS: [&str; 9] = [
    "--role scheduler",
    "--role api-server --log-host worker-1.example.com --log-host t1:triggerer",
    "--role worker --upstream warehouse:25435:postgres --upstream lake:25436",
    "--role worker --log-host worker-1 --result-backend results --consul 1.8",
    "--role triggerer --upstream warehouse:25435:http",
    "--role dag-processor",
    "--role scheduler --executor local --airflow 2 --upstream warehouse:25435:postgres --consul 1.8",
    "--role webserver --role worker --airflow 2.11 --upstream warehouse:25435:mysql",
    "--role scheduler --role api-server --role worker --role triggerer --role dag-processor --deployment etl --port-base 23000",
];

#[test]
fn the_rules_are_valid_with_the_example_and_without() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("airflow.toml");
    for host in HOSTS {
        let written = files_of(host);
        let plain = text(&written, "airflow.toml");
        let keys = ["#[[rule]]", "#name =", "#dag =", "#identity ="];
        let example: String = plain
            .lines()
            .map(|line| if keys.iter().any(|key| line.starts_with(key)) { &line[1..] } else { line })
            .fold(String::new(), |text, line| text + line + "\n");
        assert_eq!(example != plain, flags(host).plan().expect(host).needs_rules(), "an example where tasks run: {host}");
        for rules in [plain, &example] {
            std::fs::write(&path, rules).expect("written");
            let settings = airflow::Settings::load(&path).unwrap_or_else(|error| panic!("{host}: {error}\n{rules}"));
            assert_eq!(settings.lease_port(), flags(host).plan().expect(host).lease_port, "{host}");
        }
    }
}

#[test]
fn the_triggerer_alone_may_lease_and_runs_no_tasks() {
    let all = "--role scheduler --role worker --role triggerer";
    for host in ["--role triggerer", all] {
        let written = files_of(host);
        let rules = text(&written, "airflow.toml");
        let component = "name = \"airflow-triggerer\"\nunit = \"airflow-triggerer.service\"\nruns_tasks = false\nleases = true\n";
        assert!(rules.contains(component) && rules.contains("\nlease_port = 22015\n"), "{rules}");
        assert_eq!(rules.matches("leases = true").count(), 1, "{rules}");
        assert!(rules.contains("#[[rule]]"), "its triggers need rules: {rules}");
        assert!(text(&written, "INSTALL.txt").contains("  127.*:22015 "), "{}", text(&written, "INSTALL.txt"));
    }
    for host in ["--role worker", "--role triggerer --airflow 2"] {
        assert!(!text(&files_of(host), "airflow.toml").contains("lease"), "{host}");
    }
}

#[test]
fn no_file_holds_a_secret_and_every_secret_has_its_place() {
    for host in HOSTS {
        let written = files_of(host);
        let secrets = text(&written, "airflow-secrets.env.example");
        let names: BTreeSet<&str> =
            secrets.lines().filter_map(|line| line.strip_suffix('=')).filter(|name| !name.starts_with('#')).collect();
        let settings = text(&written, "airflow.env");
        let mut used = BTreeSet::new();
        for line in settings.lines().filter(|line| !line.starts_with('#')) {
            used.extend(line.split("${").skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name));
        }
        assert_eq!(names, used, "{host}\n{settings}\n{secrets}");
        for line in secrets.lines() {
            assert!(line.starts_with("# ") || line.ends_with('='), "{host}: {line}");
        }
        assert!(written.iter().all(|file| file.is_private == (file.path == "airflow-secrets.env.example")), "{host}");
    }
}

#[test]
fn every_address_in_the_settings_is_a_listener_of_the_host() {
    for host in HOSTS {
        let plan = flags(host).plan().expect(host);
        let upstreams: BTreeSet<u16> =
            plan.services.iter().flat_map(|service| &service.upstreams).map(|up| up.bind.port()).collect();
        let written = files_of(host);
        for line in text(&written, "airflow.env").lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("{host}: {line}"));
            assert!(
                name.starts_with("AIRFLOW__") && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'),
                "{line}"
            );
            if let Some((_, rest)) = value.split_once("127.0.0.1:") {
                let port = rest.split('/').next().and_then(|port| port.parse().ok()).unwrap_or_else(|| panic!("{host}: {line}"));
                assert!(upstreams.contains(&port), "{host}: {line}, but {upstreams:?}");
            }
        }
    }
}

#[test]
fn a_worker_of_airflow_3_gets_what_it_needs_and_no_database() {
    let written = files_of("--role worker --result-backend results");
    let settings = text(&written, "airflow.env");
    for line in [
        "AIRFLOW__CELERY__BROKER_URL=redis://:${AIRFLOW_BROKER_PASSWORD}@127.0.0.1:22011/0",
        "AIRFLOW__CELERY__RESULT_BACKEND=db+postgresql://${AIRFLOW_RESULTS_USER}:${AIRFLOW_RESULTS_PASSWORD}@127.0.0.1:22012/airflow",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL=http://127.0.0.1:22013/execution/",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT=8793",
        "AIRFLOW__WORKERS__SECRETS_BACKEND=airflow_ringfence.secrets.RingfenceSecretsBackend",
    ] {
        assert!(settings.lines().any(|have| have == line), "no {line} in\n{settings}");
    }
    assert!(!settings.contains("SQL_ALCHEMY_CONN"), "{settings}");
    assert!(text(&written, "nftables/airflow-log-server.nft").contains("tcp dport { 8793 } counter drop"));
    let two = files_of("--role worker --airflow 2");
    let settings = text(&two, "airflow.env");
    assert!(settings.contains("SQL_ALCHEMY_CONN=postgresql+psycopg2://${AIRFLOW_DATABASE_USER}"), "{settings}");
    assert!(
        settings.contains("AIRFLOW__SECRETS__BACKEND=airflow_ringfence") && !settings.contains("EXECUTION_API"),
        "{settings}"
    );
}

#[test]
fn units_are_ordered_around_each_other() {
    let written = files_of("--role scheduler --role worker --unit worker=celery@1.service --config-folder /srv/ringfence/");
    let unit = text(&written, "systemd/ringfence-airflow.service");
    for part in [
        "Before=airflow-scheduler.service celery@1.service\n",
        "ExecStart=/usr/bin/ringfence connect -sidecar-for airflow-scheduler -sidecar-for airflow-worker -airflow /srv/ringfence/airflow.toml ",
        "CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH\n",
        "Type=notify\n",
        "Delegate=yes\n",
        "RuntimeDirectory=ringfence\n",
        "LimitNOFILE=",
    ] {
        assert!(unit.contains(part), "no {part} in\n{unit}");
    }
    let airflow = text(&written, "systemd/celery@1.service.d/ringfence.conf");
    for part in
        ["After=ringfence-airflow.service\n", "Wants=ringfence-airflow.service\n", "EnvironmentFile=/srv/ringfence/airflow.env\n"]
    {
        assert!(airflow.contains(part), "no {part} in\n{airflow}");
    }
    assert!(!airflow.lines().any(|line| line.starts_with("Requires=")), "{airflow}");
}

#[test]
fn every_file_is_whole_and_named_once() {
    for host in HOSTS {
        let written = files_of(host);
        assert_eq!(written[0].path, "INSTALL.txt");
        let paths: BTreeSet<&str> = written.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths.len(), written.len(), "{host}");
        for file in &written {
            assert!(!file.text.contains("{{") && file.text.ends_with('\n'), "{host}: {}\n{}", file.path, file.text);
            let long = file.text.lines().find(|line| line.starts_with("# ") && line.chars().count() > 132);
            assert_eq!(long, None, "{host}: {}", file.path);
        }
    }
}

#[test]
fn values_that_would_break_a_file_are_refused() {
    for value in ["x y", "a\"b", "$HOME", "", "-x"] {
        assert!(service_name(value).is_err(), "{value}");
    }
    for value in ["etc", "/etc/a b", "/etc/%i", "/etc/$x", "/etc/a\nb", "/"] {
        assert!(config_folder(value).is_err(), "{value}");
    }
    for value in
        ["worker", "worker=", "worker=x", "worker=.service", "boss=x.service", "worker=a b.service", "worker=../x.service"]
    {
        assert!(unit(value).is_err(), "{value}");
    }
    assert_eq!(unit("worker=celery@1.service"), Ok((Role::Worker, "celery@1.service".to_owned())));
}
