//! The two programs as children of a test, ended when it is.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use serde_json::Value;

/// Ports of these tests: below the ephemeral range, so that no client takes one meanwhile.
const PORTS: std::ops::Range<u16> = 27_000..31_000;

static PORTS_TRIED: AtomicU16 = AtomicU16::new(0);

/// A listening program.
pub(crate) struct Program {
    pub(crate) address: SocketAddr,
    child: Child,
    // Open as long as the program, which else could not write.
    _stdout: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn serve() -> Self {
        let address = free_address();
        Self::start(Command::new(env!("CARGO_BIN_EXE_bench-load")).args(["serve", "--bind", &address.to_string()]), address)
    }

    pub(crate) fn relay(engine: &str, to: SocketAddr, tls: &[String]) -> Self {
        let address = free_address();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bench-relay"));
        command.args(["--engine", engine, "--listen", &address.to_string(), "--to", &to.to_string()]).args(tls);
        Self::start(&mut command, address)
    }

    fn start(command: &mut Command, address: SocketAddr) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{command:?}");
        Self { address, child, _stdout: stdout }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// An address that nobody listens on.
pub(crate) fn free_address() -> SocketAddr {
    for _ in PORTS {
        let tried = PORTS_TRIED.fetch_add(1, Ordering::Relaxed);
        // Another run of these tests begins elsewhere.
        let offset = (std::process::id() as u16).wrapping_mul(61).wrapping_add(tried) % (PORTS.end - PORTS.start);
        let address = SocketAddr::from(([127, 0, 0, 1], PORTS.start + offset));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no free port in {PORTS:?}");
}

/// Runs a shape for a second against one address.
pub(crate) fn run_to(shape: &str, to: SocketAddr) -> Value {
    run(&format!("{shape} --seconds 1 --to {to}"))
}

/// Runs a command line and parses what it printed last.
pub(crate) fn run(words: &str) -> Value {
    let output = run_silently(words);
    serde_json::from_str(output.lines().last().unwrap()).unwrap()
}

/// Runs a command line, which must succeed.
pub(crate) fn run_silently(words: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench-load"));
    let output = command.arg("run").args(words.split(' ')).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
