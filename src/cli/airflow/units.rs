//! What runs and guards it: the unit, the drop-ins for Airflow's units, the rules file, the firewall, the token's policy, and
//! the page that says where each goes.
//!
//! Invariant: only names that [`plan`](super::plan) checked stand in what is written.

use super::file::{File, fill};
use super::intentions::{ConsulRelease, EXAMPLE_IDENTITY};
use super::plan::Plan;
use super::role::Release;
use super::settings::{SECRETS, SETTINGS};

/// The unit of the sidecar.
const UNIT: &str = "ringfence-airflow.service";

/// Everything that is no registration, intention or setting.
pub(super) fn files(plan: &Plan, folder: &str, consul: ConsulRelease) -> Vec<File> {
    let mut files = vec![File::new("INSTALL.txt", install(plan, folder, consul)), File::new("airflow.toml", rules(plan, folder))];
    files.push(File::new(format!("systemd/{UNIT}"), unit(plan, folder)));
    for airflow in plan.units.values() {
        let values = [("airflow", airflow.as_str()), ("unit", UNIT), ("folder", folder)];
        let text = fill(include_str!("templates/airflow-unit.conf"), &values);
        files.push(File::new(format!("systemd/{airflow}.d/ringfence.conf"), text));
    }
    let ports = log_ports(plan);
    if !ports.is_empty() {
        let text = fill(include_str!("templates/airflow-log-server.nft"), &[("ports", &ports.join(", "))]);
        files.push(File::new("nftables/airflow-log-server.nft", text));
    }
    files.push(File::new("consul/token-policy.hcl", policy(plan)));
    files
}

fn unit(plan: &Plan, folder: &str) -> String {
    fill(
        include_str!("templates/ringfence-airflow.service"),
        &[
            ("deployment", &plan.deployment.name),
            ("roles", &roles(plan)),
            ("unit", UNIT),
            ("units", &units(plan)),
            ("folder", folder),
            ("sidecars", &sidecars(plan)),
        ],
    )
}

fn rules(plan: &Plan, folder: &str) -> String {
    let titles = match plan.deployment.release {
        Release::Three => "",
        Release::Two => {
            "# Trust the titles of Airflow 2's supervisors where the plugin is missing. Weak: code of DAGs runs in them.\naccept_titles = false\n"
        }
    };
    let leases = plan.lease_port.map_or_else(String::new, |port| {
        format!("# Where triggers reach mesh services as their own tasks, each at a loopback address that it leases.\nlease_port = {port}\n")
    });
    let first_unit = plan.units.values().next().map_or("", String::as_str);
    let text = fill(
        include_str!("templates/airflow.toml"),
        &[
            ("deployment", plan.deployment.name.as_str()),
            ("roles", &roles(plan)),
            ("first_unit", first_unit),
            ("folder", folder),
            ("titles", titles),
            ("leases", &leases),
            ("components", &components(plan)),
            ("rule", &rule(plan)),
        ],
    );
    text.trim_end().to_owned() + "\n"
}

fn components(plan: &Plan) -> String {
    let mut text = String::new();
    for role in &plan.roles {
        let runs_tasks = role.runs_tasks(plan.deployment.executor);
        let (comment, leases) = match (runs_tasks, plan.leases(*role)) {
            (true, _) => ("\n# The parent of tasks: only its children may register as one.", ""),
            (false, true) => (
                "\n# Runs the triggers of many tasks in one process, and leases an address for each. What shares a process can use the\n\
                 # others' addresses: this keeps honest code apart, no more.",
                "leases = true\n",
            ),
            (false, false) => ("", ""),
        };
        text += &format!(
            "{comment}\n[[component]]\nname = {:?}\nunit = {:?}\nruns_tasks = {runs_tasks}\n{leases}",
            plan.deployment.service(*role),
            plan.units[role]
        );
    }
    text
}

/// The example rule, where tasks run, or their triggers.
fn rule(plan: &Plan) -> String {
    if !plan.needs_rules() {
        return "\n# No tasks run on this host, so it needs no rules.\n".to_owned();
    }
    let mut upstreams = String::new();
    for extra in &plan.extras {
        let name = &extra.service;
        upstreams += &format!(
            "\n# To reach {name} at 127.0.0.1:{}, the identity needs an intention: allow it to call {name}.",
            extra.port
        );
    }
    if plan.deployment.release == Release::Two {
        upstreams += &format!(
            "\n# Tasks of Airflow 2 talk to the metadata database: each identity needs an intention for {} too.",
            plan.deployment.database
        );
    }
    format!("\n{}", fill(include_str!("templates/rule.toml"), &[("upstreams", &upstreams), ("identity", EXAMPLE_IDENTITY)]))
}

fn policy(plan: &Plan) -> String {
    let names = plan.services.iter().flat_map(|service| [service.name.clone(), service.sidecar_id()]);
    let services: String = names.map(|name| format!("service {name:?} {{\n  policy = \"write\"\n}}\n")).collect();
    let values = [("deployment", plan.deployment.name.as_str()), ("services", &services), ("identity", EXAMPLE_IDENTITY)];
    fill(include_str!("templates/token-policy.hcl"), &values)
}

fn install(plan: &Plan, folder: &str, consul: ConsulRelease) -> String {
    let intentions = match consul {
        ConsulRelease::Records => "                       Before Consul 1.9: sh consul/intentions.sh\n",
        ConsulRelease::Entries => "",
    };
    let mut more = String::new();
    if !log_ports(plan).is_empty() {
        more += "    nftables/           -> load it: the server of task logs listens on every address\n";
    }
    if !plan.log_hosts.is_empty() {
        more += "    hosts.fragment      -> append it to /etc/hosts\n";
    }
    debug_assert!(SETTINGS == "airflow.env" && SECRETS == "airflow-secrets.env", "the templates name them");
    fill(
        include_str!("templates/INSTALL.txt"),
        &[
            ("deployment", plan.deployment.name.as_str()),
            ("release", plan.deployment.release.digit()),
            ("roles", &roles(plan)),
            ("intentions", intentions),
            ("folder", folder),
            ("more", &more),
            ("sidecars", &sidecars(plan)),
            ("unit", UNIT),
            ("units", &units(plan)),
            ("ports", &ports(plan)),
        ],
    )
}

fn ports(plan: &Plan) -> String {
    let mut text = String::new();
    for service in &plan.services {
        text += &format!("  {:<21} {}: public listener, for peers\n", format!("0.0.0.0:{}", service.public_port), service.name);
        for upstream in &service.upstreams {
            text += &format!("  {:<21} -> {} ({})\n", upstream.bind.to_string(), upstream.service, upstream.purpose);
        }
    }
    if let Some(port) = plan.lease_port {
        text += &format!("  {:<21} addresses leased to triggers (lease_port)\n", format!("127.*:{port}"));
    }
    text
}

fn roles(plan: &Plan) -> String {
    plan.roles.iter().map(|role| role.component(plan.deployment.release)).collect::<Vec<_>>().join(", ")
}

fn units(plan: &Plan) -> String {
    plan.units.values().map(String::as_str).collect::<Vec<_>>().join(" ")
}

fn sidecars(plan: &Plan) -> String {
    plan.services.iter().map(|service| format!(" -sidecar-for {}", service.name)).collect()
}

fn log_ports(plan: &Plan) -> Vec<String> {
    plan.roles.iter().filter(|role| role.serves_logs()).filter_map(|role| Some(role.app_port()?.to_string())).collect()
}
