//! Airflow's own settings on a host: every connection of its parts goes to a local listener.
//!
//! Invariant: no secret. Users and passwords are names of variables that Airflow puts in (it expands `${...}` in the values of
//! its variables; systemd does not), and the file that gives them values is written empty, for the owner alone to read.

use super::file::{File, commented};
use super::plan::Plan;
use super::role::{Executor, Need, Release, Role};

/// Names of the files.
pub(super) const SETTINGS: &str = "airflow.env";
pub(super) const SECRETS: &str = "airflow-secrets.env";
/// The provider package's secrets backend.
const BACKEND: &str = "airflow_ringfence.secrets.RingfenceSecretsBackend";
/// The database inside the servers.
const DATABASE_NAME: &str = "airflow";

/// One line, and what it says.
struct Setting {
    comment: &'static str,
    line: String,
}

/// The settings, the example of the secrets, and what else the host must know of names.
pub(super) fn files(plan: &Plan, folder: &str) -> Vec<File> {
    let mut files = vec![File::new(SETTINGS, text(plan, folder))];
    let secrets = secrets(plan);
    files.push(File { path: format!("{SECRETS}.example"), text: secrets_text(plan, &secrets, folder), is_private: true });
    if !plan.log_hosts.is_empty() {
        files.push(File::new("hosts.fragment", hosts(plan)));
    }
    files
}

fn text(plan: &Plan, folder: &str) -> String {
    let deployment = &plan.deployment;
    let roles: Vec<&str> = plan.roles.iter().map(|role| role.component(deployment.release)).collect();
    let mut text = commented(
        &format!(
            "Settings of Airflow {} on a host with: {}.\n\
             The drop-ins beside this file load it into the units. Every address is a listener of ringfence on this host, which speaks\n\
             mutual TLS with the other side. Airflow itself puts in ${{...}} from {folder}/{SECRETS}, which only root\n\
             should read. Characters of a password that mean something in a URL are written there as %40 and the like.",
            deployment.release.digit(),
            roles.join(", ")
        ),
        "#",
    );
    for Setting { comment, line } in connections(plan).into_iter().chain(listeners(plan)).chain(routing(plan)) {
        text += &format!("\n{}{line}\n", commented(comment, "#"));
    }
    text
}

/// What the parts call.
fn connections(plan: &Plan) -> Vec<Setting> {
    let celery = plan.deployment.executor == Executor::Celery;
    let mut settings = vec![Setting {
        comment: "What runs the tasks.",
        line: format!("AIRFLOW__CORE__EXECUTOR={}", if celery { "CeleryExecutor" } else { "LocalExecutor" }),
    }];
    let mut add = |comment, line: String| settings.push(Setting { comment, line });
    if plan.deployment.release == Release::Two && plan.has(Role::DagProcessor) {
        add(
            "DAG files are parsed by the dag-processor alone. The scheduler's host needs this line too.",
            "AIRFLOW__SCHEDULER__STANDALONE_DAG_PROCESSOR=True".to_owned(),
        );
    }
    for (need, port) in &plan.ports {
        let user = user_of(plan, *need);
        let database = format!("postgresql+psycopg2://${{{user}_USER}}:${{{user}_PASSWORD}}@127.0.0.1:{port}/{DATABASE_NAME}");
        match need {
            Need::Database => add(
                "The metadata database. The mesh encrypts and authenticates; sslmode=require works only if the server speaks TLS\nitself.",
                format!("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN={database}"),
            ),
            Need::Broker => add(
                "The broker.",
                format!("AIRFLOW__CELERY__BROKER_URL=redis://:${{AIRFLOW_BROKER_PASSWORD}}@127.0.0.1:{port}/0"),
            ),
            Need::ResultBackend => add(
                "Where workers leave results. With a server of its own (-result-backend) a worker of Airflow 3 has no way to the database.",
                format!("AIRFLOW__CELERY__RESULT_BACKEND=db+{}", database.replace("+psycopg2", "")),
            ),
            Need::ExecutionApi => add(
                "Where the supervisors of tasks report: the api-server, through the mesh.",
                format!("AIRFLOW__CORE__EXECUTION_API_SERVER_URL=http://127.0.0.1:{port}/execution/"),
            ),
        }
    }
    settings
}

/// Where the parts listen.
fn listeners(plan: &Plan) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |comment, line: String| settings.push(Setting { comment, line });
    for (role, port) in plan.roles.iter().filter_map(|role| Some((role, role.app_port()?))) {
        match (role, plan.deployment.release) {
            (Role::ApiServer, release) => {
                let (host, at) = match release {
                    Release::Three => ("AIRFLOW__API__HOST", "AIRFLOW__API__PORT"),
                    Release::Two => ("AIRFLOW__WEBSERVER__WEB_SERVER_HOST", "AIRFLOW__WEBSERVER__WEB_SERVER_PORT"),
                };
                add(
                    "On loopback: the mesh comes in through the sidecar, people through a reverse proxy on this host.",
                    format!("{host}=127.0.0.1\n{at}={port}"),
                );
            }
            (Role::Worker, _) => add(
                "The server of task logs. It binds every address whatever is set: nftables/airflow-log-server.nft closes it to the network.",
                format!("AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT={port}"),
            ),
            (Role::Triggerer, _) => add(
                "The server of the triggerer's logs. It binds every address as well.",
                format!("AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT={port}"),
            ),
            (Role::Scheduler | Role::DagProcessor, _) => {}
        }
    }
    settings
}

/// How the connections of DAGs find the mesh.
fn routing(plan: &Plan) -> Vec<Setting> {
    if !plan.hosts_dag_code() {
        return Vec::new();
    }
    let name = match plan.deployment.release {
        Release::Three => "AIRFLOW__WORKERS__SECRETS_BACKEND",
        Release::Two => "AIRFLOW__SECRETS__BACKEND",
    };
    vec![Setting {
        comment: "Connections whose host is SERVICE.virtual.consul lead to the listener of that service; no DAG changes.\n\
                  The deployment's own backend goes inside this one. Needs airflow-provider-ringfence in Airflow's Python.",
        line: format!(
            "{name}={BACKEND}\n#{name}_KWARGS='{{\"inner_backend\": \"airflow.providers.hashicorp.secrets.vault.VaultBackend\", \"inner_kwargs\": {{}}}}'"
        ),
    }]
}

/// The prefix of a database's two variables.
fn user_of(plan: &Plan, need: Need) -> &'static str {
    let is_shared = plan.deployment.result_backend == plan.deployment.database;
    if need == Need::ResultBackend && !is_shared { "AIRFLOW_RESULTS" } else { "AIRFLOW_DATABASE" }
}

/// The variables that the settings name.
fn secrets(plan: &Plan) -> Vec<String> {
    let mut names = Vec::new();
    for need in plan.ports.keys() {
        let user = user_of(plan, *need);
        match need {
            Need::Database | Need::ResultBackend => names.extend([format!("{user}_USER"), format!("{user}_PASSWORD")]),
            Need::Broker => names.push("AIRFLOW_BROKER_PASSWORD".to_owned()),
            Need::ExecutionApi => {}
        }
    }
    names.dedup();
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

fn secrets_text(plan: &Plan, names: &[String], folder: &str) -> String {
    let mut text = format!(
        "# Copy to {folder}/{SECRETS}, mode 0600, owner root, and write the values; keep it out of version control.\n\
         # systemd reads it before the unit gives up root's rights.\n"
    );
    text.extend(names.iter().map(|name| format!("{name}=\n")));
    text += "# The same on every host of the deployment:\n#AIRFLOW__CORE__FERNET_KEY=\n";
    if plan.deployment.release == Release::Three {
        text += "#AIRFLOW__API_AUTH__JWT_SECRET=\n";
    } else {
        text += "#AIRFLOW__WEBSERVER__SECRET_KEY=\n";
    }
    text
}

fn hosts(plan: &Plan) -> String {
    let mut text = "# For /etc/hosts of this host alone: Airflow fetches the logs of a task from http://HOST:PORT of where it ran.\n\
         # These addresses are listeners of ringfence which lead there. Whatever else uses the names on this host ends there too.\n"
        .to_owned();
    text.extend(plan.log_hosts.iter().map(|(log_host, address)| format!("{address} {}\n", log_host.host)));
    text
}
