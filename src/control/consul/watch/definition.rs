//! The sidecar's own registration, merged by the agent with central configuration. Blocks by hash.

use std::collections::BTreeMap;

use super::{Context, Spec, Update, follow};
use crate::config::Proxy;
use crate::control::backoff::Backoff;
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Client, Request};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

const SPEC: Spec = Spec { class: Class::Definition, style: Style::Hash, cached: false };

/// Finds the registration, follows it, and finds it again after it went away.
pub(super) async fn watch(cx: &Context, proxy: &Proxy) {
    let mut backoff = Backoff::agent();
    loop {
        let id = match resolve(&cx.client, proxy).await {
            Ok(Some(id)) => id,
            Ok(None) => return,
            Err(Missing::Unregistered(text)) => {
                cx.gone(text).await;
                tokio::time::sleep(backoff.wait()).await;
                continue;
            }
            Err(Missing::Agent(error)) => {
                cx.trouble(error.to_string()).await;
                tokio::time::sleep(backoff.wait()).await;
                continue;
            }
        };
        let request = Request::get(Endpoint::Definition, &["agent", "service", &id]);
        let started = std::time::Instant::now();
        let error = follow(cx, SPEC, &request, |response| {
            let service: wire::Service = response.json(Endpoint::Definition)?;
            Ok(Update::Definition(Box::new(service)))
        })
        .await;
        if started.elapsed().as_secs() > 5 {
            backoff.reset();
        }
        cx.gone(format!("{error}; register the sidecar again, or stop this process")).await;
        tokio::time::sleep(backoff.wait()).await;
    }
}

enum Missing {
    Agent(AgentError),
    Unregistered(String),
}

async fn resolve(client: &Client, proxy: &Proxy) -> Result<Option<String>, Missing> {
    match proxy {
        Proxy::Service(_) => Ok(None),
        Proxy::ProxyId(id) => Ok(Some(id.clone())),
        Proxy::SidecarFor(id) => {
            let request = Request::get(Endpoint::Services, &["agent", "services"]);
            let services = client.call(&request).await.and_then(|response| response.json(Endpoint::Services));
            sidecar_for(&services.map_err(Missing::Agent)?, id).map(Some).map_err(Missing::Unregistered)
        }
    }
}

/// The one sidecar of the service instance `id`, in the words of Consul's own commands.
fn sidecar_for(services: &BTreeMap<String, wire::Service>, id: &str) -> Result<String, String> {
    let mut found: Vec<&str> = services
        .values()
        .filter(|service| service.kind == "connect-proxy" && service.proxy.destination_service_id.eq_ignore_ascii_case(id))
        .map(|service| service.id.as_str())
        .collect();
    found.sort_unstable();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(format!(
            "No sidecar proxy registered for {id}; register one (connect {{ sidecar_service {{}} }}) at this agent, and check \
             that the token has service:read on it"
        )),
        many => Err(format!(
            "More than one sidecar proxy registered for {id}. Start proxy with -proxy-id and one of the following IDs: {}",
            many.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecars_are_found_by_the_instance_they_front() {
        let capture = crate::control::fixture("agent-services-sidecars");
        let services: BTreeMap<String, wire::Service> = serde_json::from_value(capture).expect("the capture parses");
        assert_eq!(sidecar_for(&services, "airflow-worker").as_deref(), Ok("airflow-worker-sidecar-proxy"));
        assert!(sidecar_for(&services, "nothing").expect_err("none").starts_with("No sidecar proxy registered for nothing"));
        let mut twice = services.clone();
        let mut second = services["airflow-worker-sidecar-proxy"].clone();
        second.id = "second".into();
        twice.insert("second".into(), second);
        let error = sidecar_for(&twice, "airflow-worker").expect_err("two");
        assert!(error.contains("airflow-worker-sidecar-proxy, second"), "{error}");
    }
}
