//! A service with its sidecar, as Consul takes it: HCL to review and to load, JSON for the agent's API.
//!
//! Invariant: both say the same. A test registers the file with Consul's own command line and finds nothing to change
//! afterwards.

use serde_json::{Value, json};

use super::file::File;
use super::plan::{Deployment, NO_APP_PORT, Service, Upstream};
use super::role::Executor;

/// Meta keys that tell whose a service is.
pub(super) const META_ROLE: &str = "airflow-role";
pub(super) const META_DEPLOYMENT: &str = "airflow-deployment";
const META_VERSION: &str = "airflow-version";
/// How often the agent looks whether Airflow listens.
const CHECK_INTERVAL: &str = "10s";
const CHECK_TIMEOUT: &str = "2s";
/// What a client of a denied connection gets when the upstream does not say: nothing but its end.
const REPLY_DEFAULT: &str = "close";

impl Service {
    /// The port that its sidecar passes inbound connections on to.
    fn port(&self) -> u16 {
        self.app_port.unwrap_or(NO_APP_PORT)
    }

    fn tags(&self, deployment: &Deployment) -> [String; 2] {
        ["airflow".to_owned(), self.role.component(deployment.release).to_owned()]
    }

    fn meta(&self, deployment: &Deployment) -> [(&'static str, String); 3] {
        [
            (META_ROLE, self.role.component(deployment.release).to_owned()),
            (META_DEPLOYMENT, deployment.name.clone()),
            (META_VERSION, deployment.release.digit().to_owned()),
        ]
    }

    /// What `PUT /v1/agent/service/register` takes.
    pub(super) fn registration(&self, deployment: &Deployment) -> Value {
        let mut service = json!({
            "ID": self.name, "Name": self.name, "Port": self.port(), "Tags": self.tags(deployment),
            "Meta": json_object(self.meta(deployment)),
            "Connect": {"SidecarService": {"Port": self.public_port, "Proxy": {"Upstreams": self.json_upstreams()}}},
        });
        if let Some(port) = self.app_port {
            let name = format!("{} listens", self.name);
            let target = format!("127.0.0.1:{port}");
            service["Checks"] = json!([{"Name": name, "TCP": target, "Interval": CHECK_INTERVAL, "Timeout": CHECK_TIMEOUT}]);
        }
        service
    }

    /// What `GET /v1/agent/service/ID` must hold of the service itself.
    pub(super) fn expected(&self, deployment: &Deployment) -> Value {
        json!({"Service": self.name, "Port": self.port(), "Tags": self.tags(deployment), "Meta": json_object(self.meta(deployment))})
    }

    /// The same of its sidecar.
    pub(super) fn expected_sidecar(&self) -> Value {
        json!({
            "Kind": "connect-proxy", "Port": self.public_port,
            "Proxy": {
                "DestinationServiceName": self.name, "LocalServicePort": self.port(), "Upstreams": self.json_upstreams(),
            },
        })
    }

    pub(super) fn sidecar_id(&self) -> String {
        format!("{}-sidecar-proxy", self.name)
    }

    fn json_upstreams(&self) -> Vec<Value> {
        self.upstreams.iter().map(Upstream::json).collect()
    }

    /// The file for `consul services register`, or for the folder of the agent's configuration.
    pub(super) fn file(&self, deployment: &Deployment) -> File {
        let lines =
            |indent: &str, lines: Vec<String>| lines.into_iter().map(|line| format!("{indent}{line}\n")).collect::<String>();
        let tags = self.tags(deployment).map(|tag| format!("{tag:?}")).join(", ");
        let meta = self.meta(deployment).into_iter().map(|(key, value)| format!("{key:?} = {value:?}"));
        let mut text = format!(
            "# {}: its identity in the mesh, and the sidecar that carries its connections.\n\
             # Put it into the agent's configuration folder, or load it with\n\
             # `consul services register {}`.\n\
             service {{\n  id   = {:?}\n  name = {:?}\n  tags = [{tags}]\n{}  meta {{\n{}  }}\n",
            self.name,
            self.path(),
            self.name,
            self.name,
            self.port_lines(deployment),
            lines("    ", meta.collect()),
        );
        if let Some(port) = self.app_port {
            text += &format!(
                "  checks = [\n    {{ name = \"{} listens\", tcp = \"127.0.0.1:{port}\", interval = \"{CHECK_INTERVAL}\", \
                 timeout = \"{CHECK_TIMEOUT}\" }},\n  ]\n",
                self.name
            );
        }
        text += &format!(
            "  connect {{\n    sidecar_service {{\n      # Where peers come in, over mutual TLS. Other hosts of the mesh must reach it.\n      \
             port = {}\n",
            self.public_port
        );
        if !self.upstreams.is_empty() {
            text += "      proxy {\n        upstreams = [\n";
            text += &self.upstreams.iter().map(Upstream::hcl).collect::<String>();
            text += "        ]\n      }\n";
        }
        text += "    }\n  }\n}\n";
        File::new(self.path(), text)
    }

    fn path(&self) -> String {
        format!("consul/{}.hcl", self.name)
    }

    fn port_lines(&self, deployment: &Deployment) -> String {
        match self.app_port {
            Some(port) if self.role.serves_logs() => format!("  # The server of task logs.\n  port = {port}\n"),
            Some(port) => format!("  port = {port}\n"),
            None => {
                let who = self.role.component(deployment.release);
                let tasks = if self.role.runs_tasks(Executor::Local) && deployment.executor == Executor::Local {
                    ", tasks included"
                } else {
                    ""
                };
                format!(
                    "  # The {who} serves nobody: it only calls{tasks}. Consul wants a port for a sidecar, and nothing listens on this one.\n  \
                     port = {NO_APP_PORT}\n"
                )
            }
        }
    }
}

impl Upstream {
    fn json(&self) -> Value {
        let mut upstream = json!({
            "DestinationName": self.service, "LocalBindAddress": self.bind.ip().to_string(), "LocalBindPort": self.bind.port(),
        });
        if self.deny_reply != REPLY_DEFAULT {
            upstream["Config"] = json!({"deny_reply": self.deny_reply});
        }
        upstream
    }

    fn hcl(&self) -> String {
        let config = match self.deny_reply {
            REPLY_DEFAULT => String::new(),
            reply => format!("            config             = {{ deny_reply = \"{reply}\" }}\n"),
        };
        format!(
            "          {{\n            # {}\n            destination_name   = {:?}\n            local_bind_address = \"{}\"\n            \
             local_bind_port    = {}\n{config}          }},\n",
            sentence(&self.purpose),
            self.service,
            self.bind.ip(),
            self.bind.port()
        )
    }
}

fn json_object<const N: usize>(pairs: [(&'static str, String); N]) -> Value {
    Value::Object(pairs.into_iter().map(|(key, value)| (key.to_owned(), Value::String(value))).collect())
}

/// With a capital and a stop.
fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), rest.as_str()))
}
