//! A network of the test's own, with an outside world: nothing that is done in it reaches the host's.
//!
//! Invariant: a test that calls [`entered`] first runs its body in a new network and mount namespace alone, in a process of
//! its own; both namespaces end with it. Inside, [`Outside`] is another host behind a cable.

use std::fs;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::{PATIENCE, Process, wait_for};

/// Set inside.
const INSIDE: &str = "RINGFENCE_TEST_NAMESPACE";
/// Addresses of the outside world, of which the first is a host; the test's own host is `.1` and `::1` of the same.
const HOST_V4: &str = "198.51.100.7";
const HOST_V6: &str = "2001:db8::7";
/// Answers "outside" to every message, by TCP and UDP, on these ports.
const PORTS: &str = "[53, 443, 5432, 5433, 9000]";
const SERVER: &str = r#"
import socket, sys, threading
def tcp(stream):
    while stream.recv(65536):
        stream.sendall(b"outside")
def listen(port):
    server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        threading.Thread(target=tcp, args=(server.accept()[0],), daemon=True).start()
def udp(port):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("", port))
    while True:
        server.sendto(b"outside", server.recvfrom(65536)[1])
for port in eval(sys.argv[1]):
    threading.Thread(target=listen, args=(port,), daemon=True).start()
    threading.Thread(target=udp, args=(port,), daemon=True).start()
threading.Event().wait()
"#;
/// What comes back for a message by this protocol; an error's name if none does.
const CLIENT: &str = r#"
import socket, sys
host, port, protocol = sys.argv[1], int(sys.argv[2]), sys.argv[3]
try:
    if protocol == "udp":
        stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        stream.settimeout(1)
        stream.connect((host, port))
    else:
        stream = socket.create_connection((host, port), timeout=5)
    stream.sendall(b"message")
    print(stream.recv(100).decode() or "closed")
except OSError as error:
    print(type(error).__name__)
"#;

/// Whether this is the inside. Outside it runs the test `name` of this file inside, and fails with it.
pub fn entered(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        build();
        return true;
    }
    let this = std::env::current_exe().expect("the test's program");
    let mut command = Command::new(super::tool_on_path("unshare"));
    command.args(["--net", "--mount", "--"]).arg(this).args([name, "--exact", "--nocapture", "--test-threads=1"]);
    let output = command.env(INSIDE, "1").output().expect("unshare runs");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} in a namespace (needs root):\n{said}\n{complained}");
    assert!(said.contains("1 passed"), "{name} is no test of this file:\n{said}");
    false
}

fn build() {
    assert_ne!(fs::read_link("/proc/self/ns/net").ok(), fs::read_link("/proc/1/ns/net").ok(), "this is the host's network");
    run("ip", "link set lo up");
    // nft looks for cgroups at /sys/fs/cgroup; a machine with the old hierarchies has the new one elsewhere.
    if !fs::exists("/sys/fs/cgroup/cgroup.controllers").expect("readable") {
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        for place in mounts.lines().filter(|line| line.contains(" - cgroup2 ")).filter_map(|line| line.split(' ').nth(4)) {
            run("umount", place);
        }
        run("mount", "-t cgroup2 none /sys/fs/cgroup");
    }
}

/// A host behind a cable.
pub struct Outside(Process);

impl Outside {
    pub fn start() -> Self {
        let mut command = Command::new(super::tool_on_path("unshare"));
        command.args(["--net", "--", "/usr/bin/python3", "-c", SERVER, PORTS]);
        let server = Process::start("the outside world", &command);
        let of = |id: &str| fs::read_link(format!("/proc/{id}/ns/net")).ok();
        let id = server.id().to_string();
        wait_for("a namespace of its own", PATIENCE, || match of(&id) {
            Some(namespace) if Some(&namespace) != of("self").as_ref() => Ok(()),
            other => Err(format!("{other:?}")),
        });
        run("ip", "link add cable type veth peer name far");
        run("ip", &format!("link set far netns {id}"));
        run("ip", "address add 198.51.100.1/24 dev cable");
        run("ip", "address add 2001:db8::1/32 dev cable nodad");
        run("ip", "link set cable up");
        for line in ["link set lo up", "address add 198.51.100.7/24 dev far", "address add 2001:db8::7/32 dev far nodad"] {
            run("nsenter", &format!("-t {id} -n ip {line}"));
        }
        run("nsenter", &format!("-t {id} -n ip link set far up"));
        let outside = Self(server);
        for host in [outside.v4(), outside.v6()] {
            wait_for("the outside world answers", PATIENCE, || match call(None, host, 9_000, "tcp").as_str() {
                "outside" => Ok(()),
                other => Err(format!("{other}\n{}", outside.0.tail())),
            });
        }
        outside
    }

    pub fn v4(&self) -> IpAddr {
        HOST_V4.parse().expect("an address")
    }

    pub fn v6(&self) -> IpAddr {
        HOST_V6.parse().expect("an address")
    }
}

/// What a plain client of this user gets for a message. It knows nothing but the address.
pub fn call(uid: Option<u32>, host: IpAddr, port: u16, protocol: &str) -> String {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", CLIENT, &host.to_string(), &port.to_string(), protocol]);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(super::tool_on_path(program)).args(arguments.split(' ')).output().expect("runs");
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
