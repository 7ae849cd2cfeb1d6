//! The same command lines to Envoy 1.40 and to ringfence under the name `envoy`: the same exit codes, the same streams, and
//! where scripts read them the same words.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Both {
    envoy: PathBuf,
    ours: PathBuf,
    folder: tempfile::TempDir,
}

impl Both {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ours = folder.path().join("envoy");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ringfence"), &ours).expect("a link");
        for (name, text) in [
            ("ok.json", r#"{"admin":{"address":{"socket_address":{"address":"127.0.0.1","port_value":0}}}}"#),
            ("ok.yaml", "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n"),
            ("plain", r#"{"node":{"id":"web"}}"#),
            ("unknown.json", r#"{"static_resources":{"clusters":[{"name":"a","hosts":[]}]}}"#),
            ("value.json", r#"{"admin":{"address":{"socket_address":{"address":"127.0.0.1","port_value":"x"}}}}"#),
            ("broken.json", r#"{"admin":"#),
        ] {
            std::fs::write(folder.path().join(name), text).expect("it can be written");
        }
        Self { envoy: support::tool(support::cache().join("envoy-1.40/envoy")), ours, folder }
    }

    /// What Envoy and we answer.
    fn run(&self, line: &str) -> (Output, Output) {
        let one = |program: &Path| {
            let mut command = Command::new(program);
            command.args(line.split_whitespace()).current_dir(self.folder.path());
            for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RINGFENCE_")) {
                command.env_remove(name);
            }
            command.output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
        };
        (one(&self.envoy), one(&self.ours))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn exit_codes_and_streams_are_envoys() {
    let both = Both::new();
    for line in [
        "--version",
        "--version --foo",
        "--help",
        "-h",
        "--hot-restart-version",
        "",
        "foo",
        "--foo",
        "--foo --version",
        "-c",
        "-cok.json",
        "-l loud -c ok.json",
        "--mode fast -c ok.json",
        "--concurrency x -c ok.json",
        "-c ok.json -c ok.json",
        "-c nowhere.json",
        "-c ok.json --mode validate",
        "-c ok.json --mode validate -l error --concurrency 1 --disable-hot-restart --base-id 3 --drain-time-s 5",
        "-c ok.json --mode validate --stats-tag a:b --stats-tag c:d --log-format %v --file-flush-interval-msec 5",
        "-c ok.json --mode validate --stats-tag ab",
        "-c ok.json --mode validate --component-log-level upstream:debug,config:trace",
        "-c ok.json --mode validate --component-log-level foo",
        "-c ok.json --mode validate --component-log-level config:trace,nosuch:debug",
        "-c ok.json --mode validate --use-dynamic-base-id --restart-epoch 1",
        "-c ok.json --mode validate -- anything --at all",
        "-c ok.yaml --mode validate",
        "-c plain --mode validate",
        "-c ok.json --config-yaml node:{} --mode validate",
        "-c unknown.json --mode validate",
        "-c unknown.json --mode validate --allow-unknown-static-fields",
        "-c unknown.json",
        "-c value.json --mode validate",
        "-c broken.json --mode validate",
    ] {
        let (envoy, ours) = both.run(line);
        let shown = || {
            format!(
                "envoy {line}\nEnvoy: {}{}\nours: {}{}",
                text(&envoy.stdout),
                text(&envoy.stderr),
                text(&ours.stdout),
                text(&ours.stderr)
            )
        };
        assert_eq!(ours.status.code(), envoy.status.code(), "{}", shown());
        assert_eq!(ours.stdout.is_empty(), envoy.stdout.is_empty(), "{}", shown());
        assert!(ours.status.success() || !ours.stderr.is_empty(), "{}", shown());
    }
}

#[test]
fn what_scripts_read_is_worded_as_envoys() {
    let both = Both::new();
    // Validation's answer whole; of errors the lines that say what is wrong.
    let (envoy, ours) = both.run("-c ok.json --mode validate");
    assert_eq!(text(&ours.stdout), text(&envoy.stdout));
    for (line, lines) in
        [("--foo", 2), ("-c", 2), ("--concurrency x", 2), ("--mode a --mode b", 2), ("-l loud", 1), ("--mode fast", 1)]
    {
        let (envoy, ours) = both.run(line);
        let first = |output: &Output| text(&output.stderr).lines().take(lines).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(first(&ours), first(&envoy), "envoy {line}");
    }
    for (line, wanted) in [
        (
            "-c unknown.json --mode validate",
            vec!["error initializing configuration 'unknown.json': ", "no such field: 'hosts'", "static_resources.clusters[0]"],
        ),
        ("-c value.json --mode validate", vec!["admin.address.socket_address.port_value"]),
        ("-c nowhere.json", vec!["Invalid path: nowhere.json"]),
        ("", vec!["At least one of --config-path or --config-yaml"]),
    ] {
        let (envoy, ours) = both.run(line);
        for words in wanted {
            // Envoy breaks its lines where it likes.
            let squeezed = |output: &Output| text(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(squeezed(&envoy).contains(words.trim()), "Envoy, {line}: {}", squeezed(&envoy));
            assert!(squeezed(&ours).contains(words.trim()), "ours, {line}: {}", squeezed(&ours));
        }
    }
}

#[test]
fn every_flag_of_envoys_help_is_taken() {
    let both = Both::new();
    let (envoy, ours) = both.run("--help");
    let names = |output: &Output| {
        let pattern = regex::Regex::new(r"(?m)^   (?:-\w[^,]*,  )?--([a-z_-]+)").expect("a pattern");
        let text = text(&output.stdout);
        pattern.captures_iter(&text).map(|found| found[1].to_owned()).collect::<std::collections::BTreeSet<_>>()
    };
    assert!(names(&envoy).len() > 40, "{:?}", names(&envoy));
    assert_eq!(names(&envoy).difference(&names(&ours)).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn the_version_passes_consuls_window() {
    let both = Both::new();
    let (envoy, ours) = both.run("--version");
    let number = regex::Regex::new(r"\d+\.\d+\.\d+").expect("a pattern");
    let first = |output: &Output| number.find(&text(&output.stdout)).expect("a version").as_str().to_owned();
    assert_eq!(first(&ours), first(&envoy));
    // Under its own name too: Consul asks whatever -envoy-binary is, and the claim can be set.
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    let output = command.arg("--version").env("RINGFENCE_ENVOY_VERSION", "1.27.3").output().expect("it runs");
    assert_eq!(first(&output), "1.27.3");
}

#[test]
fn the_bootstrap_is_read_from_a_fifo_once_and_from_a_descriptor() {
    let both = Both::new();
    let fifo = both.folder.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs").success());
    let writer = {
        let fifo = fifo.clone();
        std::thread::spawn(move || std::fs::write(fifo, r#"{"node": {"id": "web"}}"#))
    };
    let output = Command::new(&both.ours).arg("-c").arg(&fifo).args(["--mode", "validate"]).output().expect("it runs");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("configuration '{}' OK\n", fifo.display()));
    writer.join().expect("the writer ends").expect("it wrote");

    let script = "exec \"$0\" -c /dev/fd/7 --mode validate 7<ok.yaml";
    let output = Command::new("bash").args(["-c", script]).arg(&both.ours).current_dir(both.folder.path()).output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{}", text(&output.stderr));
}
