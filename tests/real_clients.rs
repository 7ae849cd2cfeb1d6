//! Real clients and servers through the pair: Redis and PostgreSQL beside a real Consul with ACLs, iperf3 beside the embedded
//! agent; none of them knows that it is proxied.

mod support;

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::process::run;
use support::{PATIENCE, Pair, Process, ports, tool_on_path, wait_for};

const RUN_MAX: Duration = Duration::from_secs(90);

#[test]
fn redis_benchmark() {
    let (_folder, _server, app) = redis();
    let pair = Pair::consul(app);
    let port = pair.upstream.port().to_string();
    wait_for("redis answers through the pair", PATIENCE, || {
        let ping =
            Command::new(tool_on_path("redis-cli")).args(["-p", &port, "ping"]).output().map_err(|error| error.to_string())?;
        if ping.stdout.starts_with(b"PONG") { Ok(()) } else { Err(format!("{ping:?}\n{}", pair.web.process.tail())) }
    });
    for arguments in [&["-c", "50", "-n", "20000", "-d", "100"][..], &["-c", "20", "-n", "5000", "-P", "16", "-d", "20000"]] {
        let mut benchmark = Command::new(tool_on_path("redis-benchmark"));
        benchmark.args(["-p", &port, "-t", "set,get", "--csv"]).args(arguments);
        let output = run(&mut benchmark, RUN_MAX);
        assert!(output.contains("\"GET\"") && !output.to_lowercase().contains("error"), "{output}");
        println!("{output}");
    }
}

#[test]
fn psql_and_pgbench() {
    let postgres = Postgres::start();
    let mut pair = Pair::consul(postgres.address);
    wait_for("psql through the pair", PATIENCE, || {
        let mut psql = postgres.command("psql", pair.upstream);
        let output = psql.args(["-Atc", "select 6 * 7"]).output().map_err(|error| error.to_string())?;
        if output.stdout == b"42\n" { Ok(()) } else { Err(format!("{output:?}\n{}", pair.web.process.tail())) }
    });
    // A result of a few megabytes, checked by its hash on both sides.
    let query = "select md5(string_agg(repeat(i::text, 50), '')) from generate_series(1, 20000) i; select repeat(i::text, 50) from generate_series(1, 20000) i";
    let direct = run(postgres.command("psql", postgres.address).args(["-Atc", query]), RUN_MAX);
    let proxied = run(postgres.command("psql", pair.upstream).args(["-Atc", query]), RUN_MAX);
    assert!(direct.len() > 1_000_000 && direct == proxied, "{} and {} bytes", direct.len(), proxied.len());
    run(postgres.command("pgbench", pair.upstream).args(["-i", "-q", "-s", "1", "postgres"]), RUN_MAX);
    let report =
        run(postgres.command("pgbench", pair.upstream).args(["-c", "8", "-j", "2", "-T", "4", "-C", "postgres"]), RUN_MAX);
    assert!(report.contains("number of failed transactions: 0 (0.000%)"), "{report}");
    println!("{report}");
    pair.web.assert_healthy();
}

#[test]
fn iperf3_in_both_directions() {
    let app = ports::free_address();
    let mut command = Command::new(tool_on_path("iperf3"));
    command.args(["-s", "-p", &app.port().to_string()]);
    let _server = listening(Process::start("iperf3", &command), app);
    let pair = Pair::local(app);
    for direction in [&[][..], &["-R"], &["-P", "4"]] {
        let mut report = serde_json::Value::Null;
        wait_for("an iperf3 run", PATIENCE, || {
            let mut client = Command::new(tool_on_path("iperf3"));
            client.args(["-c", "127.0.0.1", "-t", "2", "-J", "-p", &pair.upstream.port().to_string()]).args(direction);
            let output = client.output().map_err(|error| error.to_string())?;
            report = serde_json::from_slice(&output.stdout).map_err(|error| format!("no JSON ({error}): {output:?}"))?;
            // With -J it ends with 0 even when it could not connect.
            let failed = !output.status.success() || !report["error"].is_null();
            if failed { Err(format!("{report}\n{}", pair.web.process.tail())) } else { Ok(()) }
        });
        let received = report["end"]["sum_received"]["bytes"].as_f64().unwrap_or_else(|| panic!("bytes received: {report}"));
        assert!(received > 10e6, "{direction:?}: only {received} bytes in 2 s");
        println!("iperf3 {direction:?}: {:.0} MB/s", received / 2e6);
    }
}

/// The three servers start and answer without a proxy: proves the harness.
#[test]
fn the_servers_answer_by_themselves() {
    let (_folder, _server, redis) = redis();
    let pong = run(Command::new(tool_on_path("redis-cli")).args(["-p", &redis.port().to_string(), "ping"]), PATIENCE);
    assert_eq!(pong.trim(), "PONG");
    let postgres = Postgres::start();
    assert_eq!(run(postgres.command("psql", postgres.address).args(["-Atc", "select 1"]), PATIENCE).trim(), "1");
    run(postgres.command("pgbench", postgres.address).args(["-i", "-q", "postgres"]), PATIENCE);
}

fn redis() -> (tempfile::TempDir, Process, SocketAddr) {
    let (folder, address) = (support::scratch(), ports::free_address());
    let mut command = Command::new(tool_on_path("redis-server"));
    command.args(["--port", &address.port().to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"]);
    command.arg(folder.path());
    let server = listening(Process::start("redis-server", &command), address);
    (folder, server, address)
}

fn listening(mut server: Process, address: SocketAddr) -> Process {
    wait_for("the server listens", PATIENCE, || {
        server.assert_running();
        TcpStream::connect(address).map_err(|error| format!("{error}\n{}", server.tail()))
    });
    server
}

/// A cluster of its own, which PostgreSQL refuses to run as root.
struct Postgres {
    address: SocketAddr,
    programs: PathBuf,
    server: Process,
    _folder: tempfile::TempDir,
}

impl Postgres {
    fn start() -> Self {
        let programs = Self::programs();
        let (folder, address) = (support::scratch(), ports::free_address());
        let as_root = run(Command::new("id").arg("-u"), PATIENCE).trim() == "0";
        if as_root {
            run(Command::new("chown").arg("postgres:").arg(folder.path()), PATIENCE);
        }
        let command = |program: &str| {
            let program = programs.join(program);
            if !as_root {
                return Command::new(program);
            }
            let mut command = Command::new(tool_on_path("setpriv"));
            command
                .args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--pdeathsig", "KILL", "--"])
                .arg(program);
            command
        };
        let data = folder.path().join("data");
        let mut init = command("initdb");
        init.args(["-A", "trust", "-U", "postgres", "--no-sync", "-D"]).arg(&data).current_dir(folder.path());
        run(&mut init, RUN_MAX);
        let mut server = command("postgres");
        server.args(["-D"]).arg(&data).args(["-p", &address.port().to_string(), "-h", "127.0.0.1", "-F", "-k", ""]);
        server.current_dir(folder.path());
        let server = listening(Process::start("postgres", &server), address);
        let postgres = Self { address, programs, server, _folder: folder };
        // It listens before it answers.
        wait_for("PostgreSQL answers", PATIENCE, || {
            let output =
                postgres.command("psql", address).args(["-Atc", "select 1"]).output().map_err(|error| error.to_string())?;
            if output.status.success() { Ok(()) } else { Err(format!("{output:?}\n{}", postgres.server.tail())) }
        });
        postgres
    }

    /// A client program with the address to connect to.
    fn command(&self, program: &str, address: SocketAddr) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &address.port().to_string()]).env("PGCONNECT_TIMEOUT", "5");
        // The pair carries TLS itself; the default would ask for it once more.
        command.env("PGSSLMODE", "disable");
        command
    }

    /// Debian keeps each version's programs in a folder of its own.
    fn programs() -> PathBuf {
        let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let mut folders = versions.map(|version| version.path().join("bin")).filter(|bin| has_all(bin)).collect::<Vec<_>>();
        folders.sort();
        folders.pop().expect("PostgreSQL with pgbench is missing under /usr/lib/postgresql: run scripts/setup")
    }
}

fn has_all(folder: &Path) -> bool {
    ["initdb", "postgres", "psql", "pgbench"].iter().all(|program| folder.join(program).exists())
}
