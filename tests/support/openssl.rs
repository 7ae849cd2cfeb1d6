//! `openssl s_client`: a TLS implementation that is not ours, as a client of a public listener.

use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use super::mesh::Leaf;

/// What a session gave.
#[derive(Debug)]
pub struct Session {
    /// What the far side's app sent.
    pub received: String,
    /// What openssl said of the session and its errors.
    pub said: String,
}

/// Connects with these arguments and certificate, sends `line` and ends after at most 10 s.
pub fn s_client(address: SocketAddr, identity: Option<&Leaf>, arguments: &[&str], line: &str) -> Session {
    let folder = super::scratch();
    let mut command = Command::new("timeout");
    command.arg("10").arg(super::tool_on_path("openssl")).args(["s_client", "-connect", &address.to_string()]);
    if let Some(leaf) = identity {
        let (chain, key) = (folder.path().join("chain.pem"), folder.path().join("key.pem"));
        std::fs::write(&chain, &leaf.chain_pem).expect("chain");
        std::fs::write(&key, &leaf.key_pem).expect("key");
        command.arg("-cert").arg(&chain).arg("-cert_chain").arg(&chain).arg("-key").arg(&key);
    }
    command.args(["-quiet", "-no_ign_eof"]).args(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("openssl starts");
    let mut input = child.stdin.take().expect("openssl's input");
    // A refused session has closed its input already.
    let _ = writeln!(input, "{line}");
    // The end of the input ends openssl, so it is held until an answer had time to come.
    let waiter = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        drop(input);
    });
    let output = child.wait_with_output().expect("openssl ends");
    waiter.join().expect("waiting thread");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Session { received: text(&output.stdout), said: text(&output.stderr) }
}
