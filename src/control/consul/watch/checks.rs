//! The checks of a service instance, for `expose.checks`: the agent asks for each HTTP and gRPC check at a port of the sidecar's,
//! and the sidecar must pass it on.
//!
//! Over HTTP the agent tells neither path nor, before Consul 1.10, the port in a field of its own: both stand in the output of a
//! check, which the agent writes itself (`agent/checks/check.go`, `CheckHTTP` and `CheckGRPC`; seen with 1.8.7 and 1.10.12).
//!
//! Invariant: a port that the agent does not call exposed is believed only at the sidecar's own address and within the agent's
//! default range, because before a sidecar is registered the output names the app's own. What the app answered to an HTTP check
//! is never read.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Context, Name, Update, poll};
use crate::control::backoff::Backoff;
use crate::control::consul::client::{Request, Response};
use crate::control::consul::error::{AgentError, Endpoint};
use crate::control::consul::wire;

/// How often is asked while a check is not known, and once all are. The endpoint cannot block.
const INTERVALS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];
/// Consul's `expose_min_port` and `expose_max_port`.
const PORTS: RangeInclusive<u16> = 21_500..=21_755;
/// What a gRPC health check calls (`grpc.health.v1`).
const GRPC_PATH: &str = "/grpc.health.v1.Health/Check";

/// Whose checks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Ask {
    /// The app, with its id in the name's place.
    pub(crate) instance: Name,
    /// The sidecar's as registered, which the agent asks at; empty is this host.
    pub(crate) address: String,
}

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

pub(super) async fn watch(cx: &Context, ask: &Ask) {
    // Agents that know no filters here are filtered once more.
    let quoted = ask.instance.service.replace('\\', r"\\").replace('"', "\\\"");
    let filter = format!("ServiceID == \"{quoted}\" and (Type == \"http\" or Type == \"grpc\")");
    let request = ask.instance.scope(Request::get(Endpoint::Checks, &["agent", "checks"]).with("filter", &filter));
    let decode = |response: &Response| {
        let checks = decode(response, ask)?;
        let all_are_known = checks.values().all(Option::is_some);
        Ok((checks, INTERVALS[usize::from(all_are_known)]))
    };
    poll(cx, &request, Backoff::agent(), decode, Update::Checks, |error| error.to_string()).await;
}

fn decode(response: &Response, ask: &Ask) -> Result<Checks, AgentError> {
    let checks: BTreeMap<String, wire::Check> = response.json(Endpoint::Checks)?;
    let asked = |check: &wire::Check| check.service_id == ask.instance.service && matches!(&*check.kind, "http" | "grpc");
    let checks = checks.into_iter().filter(|(_, check)| asked(check));
    Ok(checks.map(|(id, check)| (id, exposed(&check, &ask.address))).collect())
}

fn exposed(check: &wire::Check, address: &str) -> Option<Exposed> {
    let told = check.exposed_port;
    let is_exposed = |port: &u16| if told == 0 { PORTS.contains(port) } else { told == *port };
    if check.kind == "grpc" {
        let found = || dialed(&check.output).and_then(|target| port_at(target, address)).filter(is_exposed);
        let port = if told == 0 { found()? } else { told };
        return Some(Exposed { port, path: GRPC_PATH.to_owned(), http2: true });
    }
    let Asked { authority, path, answered } = asked(&check.output)?;
    let found = port_at(authority, address).filter(is_exposed);
    // An error may name where the app had it redirected to, an answer is told with what was asked for at first, maybe at the app.
    let port = found.or_else(|| (answered && told != 0).then_some(told))?;
    Some(Exposed { port, path: path.to_owned(), http2: false })
}

/// The URL in `Get "http://:21500/health": dial tcp ...` or `HTTP GET http://:21500/health: 200 OK Output: ...`.
struct Asked<'a> {
    authority: &'a str,
    path: &'a str,
    answered: bool,
}

fn asked(output: &str) -> Option<Asked<'_>> {
    let answer = output.strip_prefix("HTTP ");
    let (_method, url) = answer.unwrap_or(output).split_once(' ')?;
    let url = url.strip_prefix('"').unwrap_or(url).strip_prefix("http://")?;
    let url = url.split(['"', ' ', '\n']).next().unwrap_or_default();
    let url = url.strip_suffix(':').unwrap_or(url);
    let (authority, path) = url.split_at(url.find(['/', '?']).unwrap_or(url.len()));
    let path = path.split('?').next().unwrap_or_default();
    Some(Asked { authority, path: if path.is_empty() { "/" } else { path }, answered: answer.is_some() })
}

/// The target in `gRPC check :21501/service: success` or `... Error while dialing dial tcp :21501: connect: connection refused"`.
fn dialed(output: &str) -> Option<&str> {
    let answered = output.strip_prefix("gRPC check ");
    let target = answered.or_else(|| Some(output.split_once("Error while dialing")?.1.split_once("dial tcp ")?.1))?;
    Some(target.split([' ', '/']).next().unwrap_or_default().trim_end_matches(':'))
}

/// The port of `authority` where its host is `address`.
fn port_at(authority: &str, address: &str) -> Option<u16> {
    let (host, port) = authority.rsplit_once(':')?;
    (host.trim_start_matches('[').trim_end_matches(']') == address).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn at(address: &str, kind: &str, output: &str, told: impl Into<Value>) -> Option<(u16, String)> {
        let told = told.into();
        let check = |kind: &str, service: &str| json!({"ServiceID": service, "Status": "critical", "Type": kind, "Output": output, "ExposedPort": told});
        let all = json!({
            "c": check(kind, "web"), "of-another": check(kind, "db"), "of-the-node": check(kind, ""), "t": check("tcp", "web"),
        });
        let instance = Name { service: "web".into(), namespace: String::new(), partition: String::new() };
        let ask = Ask { instance, address: address.to_owned() };
        let checks = decode(&Response::with_body(all.to_string().as_bytes()), &ask).expect("checks");
        assert_eq!(checks.len(), 1, "its own that are asked for over HTTP");
        checks["c"].clone().map(|exposed| {
            assert_eq!(exposed.http2, kind == "grpc");
            (exposed.port, exposed.path)
        })
    }

    /// Outputs as real agents wrote them.
    #[test]
    fn what_the_agent_asks_for_stands_in_the_output() {
        let http = |output, told: u16| at("", "http", output, told);
        let health = |port| Some((port, "/health".to_owned()));
        let refused = "Get \"http://:21500/health?x=1\": dial tcp :21500: connect: connection refused";
        assert_eq!([http(refused, 0), http(refused, 21_500)], [health(21_500), health(21_500)]);
        assert_eq!(http("Get http://:21500/health: dial tcp :21500: refused", 0), health(21_500), "by an older Go");
        assert_eq!(http("HTTP GET http://:21500/health?x=1: 200 OK Output: see http://:21600/other", 0), health(21_500));
        let elsewhere = "HTTP POST http://10.0.0.5:21500: 503 Service Unavailable Output: ";
        assert_eq!(at("10.0.0.5", "http", elsewhere, 0), Some((21_500, "/".into())));
        assert_eq!(at("::1", "http", "HTTP GET http://[::1]:21500?a=/b: 200 OK Output: ", 0), Some((21_500, "/".into())));
        assert_eq!(http("Get \"http://:30000/a\": context deadline exceeded", 30_000), Some((30_000, "/a".into())));
        let before = "HTTP GET http://127.0.0.1:8080/health: 200 OK Output: ";
        assert_eq!(http(before, 21_507), health(21_507), "of before it was exposed");
        let call = |port| Some((port, GRPC_PATH.to_owned()));
        let dial = "rpc error: code = Unavailable desc = connection error: desc = \"transport: Error while dialing dial tcp \
                    :21501: connect: connection refused\"";
        let success = "gRPC check :21502/svc: success";
        assert_eq!([at("", "grpc", dial, 0), at("", "grpc", success, 0)], [call(21_501), call(21_502)]);
        assert_eq!(at("", "grpc", "", 21_503), call(21_503), "a newer agent tells before the first run");
    }

    #[test]
    fn what_is_not_told_is_not_guessed() {
        let before = "HTTP GET http://127.0.0.1:8080/health: 200 OK Output: ";
        assert_eq!(at("", "http", before, 0), None, "of before the sidecar was registered");
        let outputs =
            ["", "http://", "Get ", "Get \"", "https://:21500/", "Get \"http://:x/\"", "http://:99999/", "or see http://:21600/"];
        for output in outputs {
            assert_eq!(at("", "http", output, 0), None, "{output}");
        }
        let answered = "HTTP GET https://:21500/: 200 OK Output: Get \"http://:21600/x\": refused";
        assert_eq!(at("", "http", answered, 0), None, "what an app says");
        for told in [0, 21_500] {
            let redirected = "Get \"http://login.example:80/\": dial tcp: no such host";
            assert_eq!(at("", "http", redirected, told), None, "where an app leads");
        }
        assert_eq!(at("10.0.0.5", "http", "Get \"http://10.0.0.6:21500/\": refused", 0), None, "another sidecar's");
        assert_eq!(at("", "http", "", 21_500), None, "a port without a path");
        assert_eq!(at("", "grpc", "rpc error: code = Unknown desc = dial tcp :21600: refused", 0), None);
        assert_eq!(at("", "grpc", "rpc error: Error while dialing dial tcp 127.0.0.1:50051: refused", 0), None);
        for odd in [json!(-1), json!(70_000), json!(null), json!("21500")] {
            assert_eq!(at("", "grpc", "", odd), None);
        }
    }
}
