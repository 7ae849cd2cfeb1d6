//! A prepared query, executed every 30 seconds as agents do; the endpoint cannot block.

use std::time::Duration;

use super::{Context, Update, health, poll};
use crate::control::backoff::Backoff;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

/// Consul's own interval for prepared query upstreams (`agent/proxycfg`).
const INTERVAL: Duration = Duration::from_secs(30);

pub(super) async fn watch(cx: &Context, name: &str, datacenter: &str) {
    let request = Request::get(Endpoint::Query, &["query", name, "execute"]).with("connect", "true").with("dc", datacenter);
    let backoff = Backoff::new(Duration::from_millis(200), INTERVAL);
    let problem = |error| match error {
        AgentError::NotFound { .. } => format!("prepared query `{name}` does not exist; create it or correct the upstream"),
        error => error.to_string(),
    };
    poll(cx, &request, backoff, |response| Ok((decode(response)?, INTERVAL)), Update::Instances, problem).await;
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
