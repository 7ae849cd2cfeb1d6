//! `ringfence check` prints one line for each thing that it looked at, with the remedy of each failure, and ends with 1 if
//! anything failed. Runs the built program; the agent is absent, or a few canned answers on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};

fn check(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringfence"))
        .arg("check")
        .args(line.split_whitespace())
        .env_clear()
        .output()
        .expect("the program runs")
}

fn lines(output: &Output) -> Vec<serde_json::Value> {
    let text = String::from_utf8(output.stdout.clone()).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

fn find<'a>(lines: &'a [serde_json::Value], what: &str) -> &'a serde_json::Value {
    lines.iter().find(|line| line["what"] == what).unwrap_or_else(|| panic!("no line about {what}: {lines:#?}"))
}

/// An address where nobody listens.
fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    listener.local_addr().expect("bound")
}

/// An agent that gives its roots to everybody and refuses everything else, as one does that does not know the token.
fn refusing_agent() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    address
}

fn answer(stream: TcpStream) {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    while reader.read_line(&mut first).is_ok_and(|read| read > 0) {
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap_or(0) == 0 || header == "\r\n" {
                break;
            }
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let (status, text) = if first.contains("/v1/agent/connect/ca/roots") {
            ("200 OK", r#"{"TrustDomain":"11111111-2222-3333-4444-555555555555.consul","Roots":[]}"#)
        } else {
            ("403 Forbidden", "ACL not found")
        };
        let answer =
            format!("HTTP/1.1 {status}\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        if reader.get_mut().write_all(answer.as_bytes()).is_err() {
            return;
        }
        first.clear();
    }
}

#[test]
fn an_absent_agent_is_a_failure_with_a_remedy() {
    let output = check(&format!("-sidecar-for web -http-addr {} -admin-bind 127.0.0.1:0 -json", nobody()));
    assert_eq!(output.status.code(), Some(1));
    let lines = lines(&output);
    let agent = find(&lines, "agent");
    assert_eq!(agent["verdict"], "fail");
    assert!(agent["remedy"].as_str().expect("text").contains("start the Consul agent"), "{agent}");
    for what in ["io_uring", "file descriptors", "locked memory", "core dumps", "admin port"] {
        find(&lines, what);
    }
}

#[test]
fn the_text_has_the_verdict_first_and_a_sum_last() {
    let output = check(&format!("-sidecar-for web -http-addr {} -admin-bind 127.0.0.1:0", nobody()));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let all: Vec<&str> = text.lines().collect();
    let (last, findings) = all.split_last().expect("lines");
    assert!(findings.iter().all(|line| ["ok    ", "warn  ", "FAIL  "].iter().any(|start| line.starts_with(start))), "{text}");
    assert!(last.starts_with(&format!("{} checks, ", findings.len())) && last.contains("failures"), "{last}");
}

#[test]
fn a_wrong_clock_and_an_unknown_token_are_told_apart() {
    let folder = tempfile::tempdir().expect("folder");
    let token = folder.path().join("token");
    std::fs::write(&token, "0123-not-to-be-seen\n").expect("write");
    let output = check(&format!(
        "-service web -upstream db:19999 -http-addr {} -token-file {} -admin-bind 127.0.0.1:0 -json",
        refusing_agent(),
        token.display()
    ));
    assert_eq!(output.status.code(), Some(1));
    let lines = lines(&output);
    assert_eq!(find(&lines, "clock")["verdict"], "fail");
    assert_eq!(find(&lines, "roots")["verdict"], "ok");
    assert_eq!(find(&lines, "token file")["verdict"], "warn", "everybody can read it");
    for what in ["right: leaf web", "right: intentions web", "right: chain db", "right: health db"] {
        let line = find(&lines, what);
        assert_eq!(line["verdict"], "fail", "{what}");
        assert!(line["remedy"].as_str().expect("text").contains("unknown to Consul"), "{line}");
    }
    assert!(!String::from_utf8_lossy(&output.stdout).contains("not-to-be-seen"));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("not-to-be-seen"));
}

#[test]
fn upstreams_that_share_a_destination_are_checked_once() {
    let output = check(&format!(
        "-service web -upstream db:19996 -upstream db:19997 -upstream cache:19998 -http-addr {} -admin-bind 127.0.0.1:0 -json",
        refusing_agent()
    ));
    let lines = lines(&output);
    for what in ["right: chain db", "right: health db", "right: chain cache", "right: health cache"] {
        assert_eq!(lines.iter().filter(|line| line["what"] == what).count(), 1, "{what}: {lines:#?}");
    }
}

#[test]
fn flags_for_envoy_are_named_in_one_line() {
    let output = check(&format!(
        "-sidecar-for web -http-addr {} -envoy-binary /usr/bin/envoy -grpc-addr x:1 -admin-bind 127.0.0.1:0 -json -- -l debug",
        nobody()
    ));
    let lines = lines(&output);
    let named: Vec<_> = lines.iter().filter(|line| line["what"] == "flags").collect();
    let [one] = named.as_slice() else { panic!("{lines:#?}") };
    assert_eq!(one["verdict"], "warn");
    assert!(one["detail"].as_str().expect("text").ends_with("-envoy-binary -grpc-addr -- -l debug"), "{one}");
}
