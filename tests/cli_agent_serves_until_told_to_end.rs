//! `ringfence agent` says where it serves, serves there, and ends with 0 on SIGTERM; a file or address that cannot work
//! ends it with a sentence that names it. Runs the built program.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long starting and ending may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A running agent, killed if a test fails in the middle.
struct Agent {
    child: Child,
    /// `127.0.0.1:PORT`
    address: String,
    banner: String,
}

impl Agent {
    fn start(arguments: &[&str]) -> Self {
        let mut child = command(arguments).stdout(Stdio::piped()).spawn().expect("the program runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut banner = String::new();
        while !banner.contains("Ctrl-C") {
            banner.push_str(&lines.next().expect("the banner is whole").expect("UTF-8"));
            banner.push('\n');
        }
        let after = banner.split("http://").nth(1).expect("an address");
        let address = after.split_whitespace().next().expect("an address").to_owned();
        Self { child, address, banner }
    }

    fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("connect");
        stream.set_read_timeout(Some(TIMEOUT)).expect("timeout");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address).expect("write");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answer");
        answer
    }

    fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the agent did not end within {TIMEOUT:?}");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Has no effect on one that ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfence"));
    command.arg("agent").args(arguments).env_clear();
    command
}

fn file(folder: &Path, text: &str) -> String {
    let path = folder.join("dev.hcl");
    std::fs::write(&path, text).expect("write");
    path.display().to_string()
}

#[test]
fn it_says_where_it_serves_and_serves_there() {
    let folder = tempfile::tempdir().expect("folder");
    let path = file(folder.path(), "service {\n  name = \"web\"\n  port = 8080\n}\n");
    let mut agent = Agent::start(&["-bind", "127.0.0.1:0", "-config-file", &path, "-datacenter=dc9", "-log-level=error"]);
    for part in ["dc9", path.as_str(), "CONSUL_HTTP_ADDR=", "no access control"] {
        assert!(agent.banner.contains(part), "no `{part}` in:\n{}", agent.banner);
    }
    let services = agent.get("/v1/agent/services");
    assert!(services.starts_with("HTTP/1.1 200") && services.contains("\"web\""), "{services}");
    let leaf = agent.get("/v1/agent/connect/ca/leaf/web");
    assert!(leaf.contains("/ns/default/dc/dc9/svc/web"), "{leaf}");
    assert_eq!(agent.terminate(), Some(0));
}

#[test]
fn a_file_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let path = file(folder.path(), "service {\n  name = \n}\n");
    let output = command(&["-bind", "127.0.0.1:0", "-config-file", &path]).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("ringfence: ") && text.contains(&path), "{text}");
}

#[test]
fn a_port_in_use_is_named() {
    let held = std::net::TcpListener::bind("127.0.0.1:0").expect("free port");
    let address = held.local_addr().expect("bound").to_string();
    let output = command(&["-bind", &address]).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains(&address), "{text}");
}
