//! The nftables table of a plan.
//!
//! Invariant: it is one table of its own and touches no other. Loading it again replaces it whole, in one transaction. Only
//! the packet that opens a connection (a SYN without ACK) is redirected or refused, so that connections which stand already
//! go on, whether the kernel tracks them or not.
//!
//! Two hooks, both on what leaves a local socket: `outgoing` redirects, `egress` locks, after it. What was redirected has a
//! loopback address by then. `egress` must not ask for the device alone: a redirected packet still shows its old one.

use std::fmt::Write;

use super::network::Allow;
use super::plan::{Plan, Redirection, Selection};

/// The table's family and name.
pub(super) const TABLE: &str = "inet ringfence";
/// Anything but the first packet of a TCP connection.
const NOT_OPENING: &str = "tcp flags & (fin | syn | rst | ack) != syn return";
const LOOPBACK: &str = "ip daddr 127.0.0.0/8 return\n\t\tip6 daddr ::1 return";
const DNS_PORT: u16 = 53;

/// What takes the table away, whether it is there or not.
pub(super) fn removal() -> String {
    format!("table {TABLE}\ndelete table {TABLE}\n")
}

/// What puts the table of `plan` in place of whatever table of that name there is.
pub(super) fn replacement(plan: &Plan) -> String {
    let mut text = removal();
    let _ = write!(text, "table {TABLE} {{\n{}", outgoing(&plan.selection));
    let to_mesh: Vec<_> = plan.redirections.iter().map(to_mesh).collect();
    chain(&mut text, "to_mesh", &to_mesh);
    if let Some(allowed) = &plan.lock {
        text += "\n";
        text += &egress(&plan.selection);
        let mut rules = vec![NOT_OPENING.to_owned(), "meta l4proto != tcp ct state established,related return".to_owned()];
        rules.extend(allowed.iter().flat_map(exceptions));
        rules.push("meta l4proto tcp counter reject with tcp reset".to_owned());
        rules.push("counter drop".to_owned());
        chain(&mut text, "locked", &rules);
    }
    text += "}\n";
    text
}

fn outgoing(selection: &Selection) -> String {
    let mut rules = vec!["type nat hook output priority -100; policy accept;".to_owned(), NOT_OPENING.to_owned()];
    rules.push(LOOPBACK.to_owned());
    rules.extend(selection.jumps("to_mesh"));
    let mut text = String::new();
    chain(&mut text, "outgoing", &rules);
    text + "\n"
}

fn egress(selection: &Selection) -> String {
    let mut rules = vec!["type filter hook output priority 0; policy accept;".to_owned(), "oif \"lo\" return".to_owned()];
    rules.push(LOOPBACK.to_owned());
    rules.extend(selection.jumps("locked"));
    let mut text = String::new();
    chain(&mut text, "egress", &rules);
    text + "\n"
}

fn chain(text: &mut String, name: &str, rules: &[String]) {
    let _ = writeln!(text, "\tchain {name} {{");
    for rule in rules {
        let _ = writeln!(text, "\t\t{rule}");
    }
    *text += "\t}\n";
}

impl Selection {
    /// The rules that send this traffic to `chain`.
    fn jumps(&self, chain: &str) -> Vec<String> {
        let mut rules = Vec::new();
        if !self.users.is_empty() {
            let users: Vec<_> = self.users.iter().map(u32::to_string).collect();
            rules.push(format!("meta skuid {{ {} }} jump {chain}", users.join(", ")));
        }
        let of_cgroup = self.cgroups.iter();
        rules.extend(of_cgroup.map(|cgroup| format!("socket cgroupv2 level {} \"{cgroup}\" jump {chain}", cgroup.level())));
        rules
    }
}

fn to_mesh(redirection: &Redirection) -> String {
    let Redirection { network, port, listener, upstream } = redirection;
    let family = if listener.is_ipv4() { "ip" } else { "ip6" };
    // nftables knows no escapes: a name that would need some goes without.
    let plain = upstream.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    let comment = if plain { format!(" comment \"{upstream:.64}\"") } else { String::new() };
    format!("{} {} counter dnat {family} to {listener}{comment}", network.destination(), tcp(*port))
}

/// The rules of one exception: TCP, and UDP for DNS if the port does not speak against it.
fn exceptions(allow: &Allow) -> Vec<String> {
    let to = allow.network.destination();
    let mut rules = vec![format!("{to} {} counter return", tcp(allow.port))];
    if allow.port.is_none_or(|port| port == DNS_PORT) {
        rules.push(format!("{to} udp dport {DNS_PORT} counter return"));
    }
    rules
}

fn tcp(port: Option<u16>) -> String {
    port.map_or_else(|| "meta l4proto tcp".to_owned(), |port| format!("tcp dport {port}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::super::cgroup::Cgroup;
    use super::*;
    use crate::mesh::caller::Route;

    const GOLDEN: &str = "\
table inet ringfence
delete table inet ringfence
table inet ringfence {
\tchain outgoing {
\t\ttype nat hook output priority -100; policy accept;
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\tip daddr 127.0.0.0/8 return
\t\tip6 daddr ::1 return
\t\tmeta skuid { 1001, 54321 } jump to_mesh
\t}

\tchain to_mesh {
\t\tip daddr 198.51.100.7 tcp dport 5432 counter dnat ip to 127.0.0.1:15001 comment \"warehouse\"
\t\tip6 daddr 2001:db8::/32 meta l4proto tcp counter dnat ip6 to [::1]:15001
\t}

\tchain egress {
\t\ttype filter hook output priority 0; policy accept;
\t\toif \"lo\" return
\t\tip daddr 127.0.0.0/8 return
\t\tip6 daddr ::1 return
\t\tmeta skuid { 1001, 54321 } jump locked
\t}

\tchain locked {
\t\ttcp flags & (fin | syn | rst | ack) != syn return
\t\tmeta l4proto != tcp ct state established,related return
\t\tip daddr 10.0.0.0/8 meta l4proto tcp counter return
\t\tip daddr 10.0.0.0/8 udp dport 53 counter return
\t\tip daddr 203.0.113.9 tcp dport 443 counter return
\t\tmeta l4proto tcp counter reject with tcp reset
\t\tcounter drop
\t}
}
";

    fn plan(users: &[u32], cgroups: &[&str], lock: Option<&[&str]>) -> Plan {
        let route = |network: &str, prefix, port, upstream: &str| Route {
            network: network.parse().expect("an address"),
            prefix,
            port,
            upstream: upstream.into(),
        };
        let routes = [route("198.51.100.7", 32, Some(5_432), "warehouse"), route("2001:db8::", 32, None, "a \"lake\"")];
        let listeners = ["127.0.0.1:15001", "[::1]:15001"].map(|text| text.parse().expect("an address"));
        let cgroups = cgroups.iter().map(|text| Cgroup::parse(text).expect("a cgroup")).collect();
        let lock = lock.map(|allowed| allowed.iter().map(|text| Allow::parse(text).expect("an exception")).collect());
        Plan::new("a.toml", &listeners, &routes, Selection { users: users.to_vec(), cgroups }, lock).expect("a plan")
    }

    #[test]
    fn the_table_of_a_locked_host_is_this() {
        assert_eq!(replacement(&plan(&[1_001, 54_321], &[], Some(&["10.0.0.0/8", "203.0.113.9:443"]))), GOLDEN);
    }

    #[test]
    fn without_a_lock_nothing_is_filtered_and_a_cgroup_stands_for_all_users_in_it() {
        let text = replacement(&plan(&[], &["system.slice/airflow-worker.service"], None));
        assert!(text.contains("\t\tsocket cgroupv2 level 2 \"system.slice/airflow-worker.service\" jump to_mesh\n"), "{text}");
        for absent in ["skuid", "locked", "reject", "drop", "type filter"] {
            assert!(!text.contains(absent), "{absent} in {text}");
        }
    }

    #[test]
    fn nft_takes_the_table() {
        let whole = plan(&[1_001], &[], Some(&["0.0.0.0/0:443", "[2001:db8::/32]:53", "::/0"]));
        for text in [GOLDEN.to_owned(), replacement(&whole), removal()] {
            // Checking changes nothing, but reads the kernel's state, which needs a network namespace that we may read.
            let mut nft = Command::new("unshare");
            nft.args(["--user", "--map-root-user", "--net", "nft", "-c", "-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
            let mut child = nft.spawn().expect("unshare and nft: run scripts/setup");
            child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
            let output = child.wait_with_output().expect("nft ends");
            assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
