//! A gigabyte by curl in either direction arrives as it was sent, by its SHA-256.

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use support::{Blob, Pair, process, tool_on_path, wait_for};

const BYTES: u64 = 1 << 30;
const TRANSFER_MAX: Duration = Duration::from_secs(180);

#[test]
fn a_gigabyte_down_and_up() {
    let blob = Blob::start(BYTES);
    let pair = Pair::local(blob.server.address);
    let url = format!("http://{}/blob", pair.upstream);
    let curl = tool_on_path("curl");
    wait_for("the pair serves", support::PATIENCE, || {
        let head = Command::new(&curl).args(["-sf", "--noproxy", "*", "-T", "/dev/null", &url]).output().expect("curl runs");
        if head.status.success() { Ok(()) } else { Err(format!("{head:?}\n{}", pair.web.process.tail())) }
    });

    let folder = support::scratch();
    let file = folder.path().join("blob");
    let start = Instant::now();
    let mut down = Command::new(&curl);
    down.args(["-sSf", "--noproxy", "*", "-o"]).arg(&file).arg(&url);
    process::run(&mut down, TRANSFER_MAX);
    println!("down: {BYTES} bytes in {:?}", start.elapsed());
    assert_eq!(std::fs::metadata(&file).expect("the file").len(), BYTES);
    let sum = process::run(Command::new("sha256sum").arg(&file), TRANSFER_MAX);
    assert!(sum.starts_with(&blob.sha256), "down: {sum} instead of {}", blob.sha256);

    let start = Instant::now();
    let mut up = Command::new(&curl);
    up.args(["-sSf", "--noproxy", "*", "-H", "Expect:", "-T"]).arg(&file).arg(&url);
    let answer = process::run(&mut up, TRANSFER_MAX);
    println!("up: {BYTES} bytes in {:?}", start.elapsed());
    assert_eq!(answer.trim(), blob.sha256, "up");
    pair.db.wait_connection("the download", |line| line["bytes_to_mesh"].as_u64().is_some_and(|bytes| bytes > BYTES));
    pair.db.wait_connection("the upload", |line| line["bytes_from_mesh"].as_u64().is_some_and(|bytes| bytes > BYTES));
}
