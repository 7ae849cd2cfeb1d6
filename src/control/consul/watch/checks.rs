//! The checks of a service instance, for `expose.checks`: the agent asks for each HTTP and gRPC check at a port of the sidecar's,
//! and the sidecar must pass it on.
//!
//! Over HTTP the agent tells neither path nor, before Consul 1.10, the port in a field of its own: both stand in the check's output,
//! which the agent writes itself (`agent/checks/check.go`, `CheckHTTP` and `CheckGRPC`; seen with 1.8.7 and 1.10.12).
//!
//! Invariant: a port that the agent does not call exposed is believed only within its default range, because before a sidecar is
//! registered the output names the app's own.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::{Context, Name, Spec, Update, follow_always};
use crate::control::consul::budget::Class;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::cursor::Style;
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

/// The endpoint cannot block: it is polled.
const SPEC: Spec = Spec { class: Class::Background, style: Style::Index, cached: false };
/// Consul's `expose_min_port` and `expose_max_port`.
const PORTS: RangeInclusive<u16> = 21_500..=21_755;
/// What a gRPC health check calls (`grpc.health.v1`).
const GRPC_PATH: &str = "/grpc.health.v1.Health/Check";

/// Where the agent asks for one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exposed {
    pub(crate) port: u16,
    /// Without the query.
    pub(crate) path: String,
    /// A gRPC check.
    pub(crate) http2: bool,
}

/// By the check's id; `None` where its output does not tell, as before its first run.
pub(crate) type Checks = BTreeMap<String, Option<Exposed>>;

pub(super) async fn watch(cx: &Context, instance: &Name) {
    let quoted = instance.service.replace('\\', r"\\").replace('"', "\\\"");
    let filter = format!("ServiceID == \"{quoted}\" and (Type == \"http\" or Type == \"grpc\")");
    let request = instance.scope(Request::get(Endpoint::Checks, &["agent", "checks"]).with("filter", &filter));
    follow_always(cx, SPEC, &request, decode).await;
}

fn decode(response: &Response) -> Result<Update, AgentError> {
    let checks: BTreeMap<String, wire::Check> = response.json(Endpoint::Checks)?;
    Ok(Update::Checks(checks.into_iter().map(|(id, check)| (id, exposed(&check))).collect()))
}

fn exposed(check: &wire::Check) -> Option<Exposed> {
    let believed = |found: u16| match check.exposed_port {
        0 => PORTS.contains(&found).then_some(found),
        told => Some(told),
    };
    let http2 = check.kind == "grpc";
    let (port, path) = if http2 { (grpc_port(&check.output), GRPC_PATH.to_owned()) } else { http(&check.output)? };
    Some(Exposed { port: believed(port.unwrap_or(0))?, path, http2 })
}

/// Port and path of the URL that was asked for: `Get "http://:21500/health": dial tcp …` or `HTTP GET http://:21500/health: 200 OK
/// Output: …`. What the app answered comes behind it.
fn http(output: &str) -> Option<(Option<u16>, String)> {
    let (_, url) = output.split_once("http://")?;
    let url = url.split(['"', ' ', '\n']).next().unwrap_or_default();
    let url = url.strip_suffix(':').unwrap_or(url);
    let (authority, path) = url.split_at(url.find(['/', '?']).unwrap_or(url.len()));
    let path = path.split('?').next().unwrap_or_default();
    let path = if path.is_empty() { "/" } else { path };
    Some((port(authority), path.to_owned()))
}

/// `… dial tcp :21501: connect: connection refused"`, or `gRPC check :21501/service: success`.
fn grpc_port(output: &str) -> Option<u16> {
    let target = ["dial tcp ", "gRPC check "].iter().find_map(|before| output.split_once(before))?.1;
    port(target.split([' ', '/']).next().unwrap_or_default().trim_end_matches(':'))
}

fn port(authority: &str) -> Option<u16> {
    authority.rsplit_once(':')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(kind: &str, output: &str, told: u16) -> Option<(u16, String, bool)> {
        let body =
            json!({"c": {"CheckID": "c", "Status": "critical", "Type": kind, "Output": output, "ExposedPort": told}}).to_string();
        let Ok(Update::Checks(checks)) = decode(&Response::with_body(body.as_bytes())) else { panic!("checks") };
        checks["c"].clone().map(|exposed| (exposed.port, exposed.path, exposed.http2))
    }

    /// Outputs as real agents wrote them.
    #[test]
    fn what_the_agent_asks_for_stands_in_the_output() {
        let http = |output, told| of("http", output, told);
        let health = Some((21_500, "/health".to_owned(), false));
        let refused = "Get \"http://:21500/health?x=1\": dial tcp :21500: connect: connection refused";
        assert_eq!([http(refused, 0), http(refused, 21_500)], [health.clone(), health.clone()]);
        assert_eq!(http("HTTP GET http://:21500/health?x=1: 200 OK Output: see http://:21600/other", 0), health);
        assert_eq!(
            http("HTTP POST http://10.0.0.5:21500: 503 Service Unavailable Output: ", 0),
            Some((21_500, "/".into(), false))
        );
        assert_eq!(http("HTTP GET http://[::1]:21500?a=/b: 200 OK Output: ", 0), Some((21_500, "/".into(), false)));
        assert_eq!(http("Get \"http://:30000/a\": context deadline exceeded", 30_000), Some((30_000, "/a".into(), false)));
        let call = |port| Some((port, GRPC_PATH.to_owned(), true));
        let dial = "rpc error: code = Unavailable desc = connection error: desc = \"transport: Error while dialing dial tcp \
                    :21501: connect: connection refused\"";
        assert_eq!([of("grpc", dial, 0), of("grpc", "gRPC check :21502/svc: success", 0)], [call(21_501), call(21_502)]);
        assert_eq!(of("grpc", "", 21_503), call(21_503), "a newer agent tells before the first run");
    }

    #[test]
    fn what_is_not_told_is_not_guessed() {
        let before = "HTTP GET http://127.0.0.1:8080/health: 200 OK Output: ";
        assert_eq!(of("http", before, 0), None, "of before the sidecar was registered");
        for output in ["", "http://", "https://:21500/", "Get \"http://:x/\"", "http://:99999/"] {
            assert_eq!(of("http", output, 0), None, "{output}");
        }
        assert_eq!(of("http", "", 21_500), None, "a port without a path");
        assert_eq!(of("grpc", "rpc error: dial tcp 127.0.0.1:50051: refused", 0), None);
    }
}
