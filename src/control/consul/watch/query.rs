//! A prepared query, executed every 30 seconds as agents do; the endpoint cannot block.

use std::time::Duration;

use super::{Context, Update, health};
use crate::control::backoff::{Backoff, jittered};
use crate::control::consul::client::{Request, Response};
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

/// Consul's own interval for prepared query upstreams (`agent/proxycfg`).
const INTERVAL: Duration = Duration::from_secs(30);

pub(super) async fn watch(cx: &Context, name: &str, datacenter: &str) {
    let request = Request::get(Endpoint::Query, &["query", name, "execute"]).with("connect", "true").with("dc", datacenter);
    let mut backoff = Backoff::new(Duration::from_millis(200), INTERVAL);
    let mut last = None;
    let mut token = cx.client.token().subscribe();
    loop {
        let wait = match cx.client.call(&request).await.and_then(|response| decode(&response)) {
            Ok(instances) => {
                backoff.reset();
                cx.recovered().await;
                if last.as_ref() != Some(&instances) {
                    last = Some(instances.clone());
                    cx.data(Update::Instances(instances)).await;
                }
                jittered(INTERVAL)
            }
            Err(AgentError::NotFound { .. }) => {
                cx.trouble(format!("prepared query `{name}` does not exist; create it or correct the upstream")).await;
                backoff.wait()
            }
            Err(error) => {
                cx.trouble(error.to_string()).await;
                backoff.wait()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            Ok(()) = token.changed() => {}
        }
    }
}

fn decode(response: &Response) -> Result<Vec<health::Instance>, AgentError> {
    let answer: wire::QueryAnswer = response.json(Endpoint::Query)?;
    Ok(health::instances(answer.nodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capture_has_no_nodes_and_that_is_an_answer() {
        let body = crate::control::fixture("query-execute").to_string();
        assert_eq!(decode(&Response::with_body(body.as_bytes())).expect("parses"), []);
        assert!(decode(&Response::with_body(b"[]")).is_err());
    }
}
