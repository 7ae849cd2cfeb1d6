//! The program `nft`: loads, lists, and tells how it would list what is not loaded.
//!
//! Invariant: only the table of [`TABLE`] is changed, each time in one transaction. Every call has a bound on time.

use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::table::TABLE;
use crate::app::AppError;

/// nft asks the kernel only; a host with tens of thousands of rules takes a second.
const PATIENCE: Duration = Duration::from_secs(20);
/// Without counters and names of users: what stays the same while traffic flows.
const LIST: &str = "nft --stateless --guid list table inet ringfence";

/// Runs `text` as one transaction.
pub(super) fn load(text: &str) -> anyhow::Result<()> {
    ask("nft", &["-f", "-"], text).map(|_| ())
}

/// The table as nft lists it, if it is there.
pub(super) fn loaded() -> anyhow::Result<Option<String>> {
    let tables = ask("nft", &["list", "tables", "inet"], "")?;
    if !tables.lines().any(|line| line.trim() == format!("table {TABLE}")) {
        return Ok(None);
    }
    ask("sh", &["-c", LIST], "").map(Some)
}

/// `text` as nft would list it, once loaded. It is loaded for that into a network namespace of its own, which ends with the call.
pub(super) fn as_listed(text: &str) -> anyhow::Result<String> {
    let script = format!("nft -f - && {LIST}");
    ask("unshare", &["--net", "--", "sh", "-c", &script], text)
}

/// What `program` prints for `input`.
fn ask(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime cannot start")?;
    let output = runtime.block_on(async {
        match tokio::time::timeout(PATIENCE, run(program, arguments, input)).await {
            Ok(output) => output.map_err(|error| absent(program, &error)),
            Err(_) => Err(AppError::Unavailable(format!("{program} did not end within {PATIENCE:?}; is the host overloaded?"))),
        }
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(refused(&String::from_utf8_lossy(&output.stderr)).into())
}

async fn run(program: &str, arguments: &[&str], input: &str) -> std::io::Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn()?;
    let stdin = child.stdin.take();
    let write = async {
        if let Some(mut stdin) = stdin {
            // A program that ends before it has read all says why by itself.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), write);
    output
}

fn absent(program: &str, error: &std::io::Error) -> AppError {
    let package = if program == "nft" { "nftables" } else { "util-linux" };
    let remedy = match error.kind() {
        std::io::ErrorKind::NotFound => {
            format!("it is not on PATH; apt install {package} (Debian's package), or add /usr/sbin to PATH")
        }
        _ => format!("{error}; Debian's package {package} brings it"),
    };
    AppError::Unavailable(format!("{program} cannot run: {remedy}"))
}

fn refused(complaint: &str) -> AppError {
    let hint = if complaint.contains("Operation not permitted") {
        "; it needs CAP_NET_ADMIN in this network namespace, which containers take from root"
    } else if complaint.contains("not supported") || complaint.contains("No such file") {
        "; the kernel needs nf_tables with nat, reject and, for -cgroup, socket (Linux 5.13), and nft 1.0 for -cgroup"
    } else {
        ""
    };
    AppError::Unavailable(format!("nft refuses: {}{hint}", complaint.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = ask("nft-that-is-not-there", &[], "").expect_err("absent").to_string();
        assert!(error.contains("not on PATH"), "{error}");
        let error = absent("nft", &std::io::ErrorKind::NotFound.into()).to_string();
        assert!(error.contains("apt install nftables"), "{error}");
    }

    #[test]
    fn a_refusal_is_told_in_its_own_words_and_long_input_does_not_hang() {
        let error = ask("sh", &["-c", "echo 'Error: Operation not permitted' >&2; exit 1"], &"x".repeat(1 << 20));
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("Error: Operation not permitted") && error.contains("CAP_NET_ADMIN"), "{error}");
        assert_eq!(ask("cat", &[], &"y".repeat(1 << 20)).expect("echoed").len(), 1 << 20);
    }
}
