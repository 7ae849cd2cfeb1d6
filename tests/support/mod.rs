//! The harness of the promise tests: real programs as children, real sockets, deadlines instead of sleeps.
//!
//! Invariant: everything a test starts ends with the test (each child also dies with the thread that started it), no
//! port is fixed, and a failure shows the last log lines of the program that failed.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    reason = "each test uses its own part"
)]
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "the bans keep worker threads free; these are tests")]

pub mod agent;
pub mod airflow;
pub mod consul;
pub mod http;
pub mod mesh;
pub mod namespace;
pub mod openssl;
pub mod pair;
pub mod ports;
pub mod process;
pub mod servers;
pub mod sidecar;
pub mod systemd;
pub mod tls;
pub mod traffic;

pub use agent::Agent;
pub use consul::{Consul, Datacenter, Federation};
pub use mesh::{Definition, Mesh};
pub use pair::{Kind, Pair};
pub use process::Process;
pub use servers::{Banner, Blob, Custom, Echo};
pub use sidecar::Sidecar;

use std::time::{Duration, Instant};

/// What any single step may take on a loaded two-core machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks `probe` until it gives something; fails with `what` and the probe's last complaint after `limit`.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => panic!("{what}: not within {limit:?}; last: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// [`wait_for`] with a plain condition.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, limit, || if condition() { Ok(()) } else { Err("not yet".to_owned()) });
}

/// Lets a span of time pass: for states that must last, never for ones that must come.
pub fn pause(span: Duration) {
    std::thread::sleep(span);
}

/// A folder that other users may enter (PostgreSQL runs as its own user) and that goes with the test.
pub fn scratch() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::Builder::new().prefix("ringfence-test-").tempdir().expect("scratch folder");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("scratch folder's mode");
    folder
}

/// The program at `path`, or a failure that says how to get it.
pub fn tool(path: impl Into<std::path::PathBuf>) -> std::path::PathBuf {
    let path = path.into();
    assert!(path.exists(), "{} is missing: run scripts/setup", path.display());
    path
}

/// A program on PATH, or a failure that says how to get it.
pub fn tool_on_path(name: &str) -> std::path::PathBuf {
    let path = std::env::var_os("PATH").expect("PATH is set");
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.exists())
        .unwrap_or_else(|| panic!("{name} is not on PATH: run scripts/setup"))
}

/// Where scripts/setup keeps Consul and Envoy.
pub fn cache() -> std::path::PathBuf {
    std::env::var_os("RINGFENCE_CACHE").map_or_else(|| "/var/cache/ringfence".into(), Into::into)
}

/// `len` bytes that differ from one `seed` to the next and never repeat in a pattern that a lost block could hide in.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut bytes = vec![0; len];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// SHA-256 as hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every value under a key that contains `part`, however deep.
pub fn find_all<'a>(value: &'a serde_json::Value, part: &str, found: &mut Vec<&'a serde_json::Value>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                if key.contains(part) {
                    found.push(value);
                }
                find_all(value, part, found);
            }
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| find_all(value, part, found)),
        _ => {}
    }
}
