//! The agent: reachable, its clock, and the token's rights, endpoint by endpoint.
//!
//! Each call is made once and raw: what the agent says is the finding. Sources of the rights: Consul's API documentation
//! and measurements against 1.8.7.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::report::Report;
use crate::cli::http::{Answer, Http, HttpError, encode};
use crate::config::{Consul, Login, Proxy, TokenSource};

/// Certificates are back-dated by one minute; a clock that is further behind sees them as not yet valid.
const SKEW_MAX: Duration = Duration::from_secs(30);

/// Returns whether the agent answered, so that it makes sense to go on.
pub(super) async fn check(settings: &Consul, report: &mut Report) -> bool {
    let bare = match Http::new(settings, None) {
        Ok(http) => http,
        Err(error) => {
            report.fail("agent address", error.to_string(), "");
            return false;
        }
    };
    if !reachable(&bare, report).await {
        return false;
    }
    let Some((token, login)) = token(settings, &bare, report).await else {
        return true;
    };
    let http = match Http::new(settings, token) {
        Ok(http) => http,
        Err(error) => {
            report.fail("agent address", error.to_string(), "");
            return false;
        }
    };
    let mut checked = BTreeSet::new();
    for proxy in &settings.proxies {
        rights(&http, proxy, &mut checked, report).await;
    }
    if login {
        // What a login made, a logout ends; if that fails, the token's own end does it.
        let _ = http.post("/v1/acl/logout", &Value::Null).await;
    }
    true
}

/// Roots need no right at all: who gets them has an agent with Connect switched on.
async fn reachable(http: &Http, report: &mut Report) -> bool {
    let answer = match http.get("/v1/agent/connect/ca/roots").await {
        Ok(answer) => answer,
        Err(error) => {
            let remedy = match &error {
                HttpError::Connect { source, .. } if source.kind() == std::io::ErrorKind::ConnectionRefused => {
                    "start the Consul agent of this host, or name its address with -http-addr"
                }
                HttpError::Connect { .. } => "check -http-addr, -ca-file and -tls-server-name",
                _ => "an https agent needs https:// in -http-addr, a plain one http://",
            };
            report.fail("agent", error.to_string(), remedy);
            return false;
        }
    };
    report.ok("agent", "answers");
    if let Some(date) = answer.date {
        clock(date, SystemTime::now(), report);
    }
    let roots = answer.json();
    match (answer.is_ok(), roots["TrustDomain"].as_str()) {
        (true, Some(domain)) => {
            let count = roots["Roots"].as_array().map_or(0, Vec::len);
            report.ok("roots", format!("trust domain {domain}, {count} roots"));
        }
        _ => report.fail("roots", answer.text(), "switch Connect on: connect { enabled = true } on the Consul servers"),
    }
    true
}

fn clock(theirs: SystemTime, ours: SystemTime, report: &mut Report) {
    let skew = ours.duration_since(theirs).unwrap_or_else(|error| error.duration());
    if skew > SKEW_MAX {
        let detail = format!("{} s from the agent's", skew.as_secs());
        report.fail("clock", detail, "synchronise the clock: certificates are valid from one minute before their issue");
    } else {
        report.ok("clock", "within seconds of the agent's");
    }
}

/// The token to call with and whether it came from a login. `None`: there is none to go on with.
async fn token(settings: &Consul, http: &Http, report: &mut Report) -> Option<(Option<Zeroizing<String>>, bool)> {
    match &settings.token {
        TokenSource::None => {
            report.ok("token", "none: the agent's default token, or anonymous");
            Some((None, false))
        }
        TokenSource::Static(token) => Some((Some(token.clone()), false)),
        // A file that cannot be read has its line already.
        TokenSource::File(path) => {
            let text = Zeroizing::new(std::fs::read_to_string(path).ok()?);
            Some((Some(Zeroizing::new(text.trim().to_owned())), false))
        }
        TokenSource::Login(login) => log_in(login, http, report).await.map(|token| (Some(token), true)),
    }
}

async fn log_in(login: &Login, http: &Http, report: &mut Report) -> Option<Zeroizing<String>> {
    let bearer = Zeroizing::new(std::fs::read_to_string(&login.bearer_token_file).ok()?);
    let meta: serde_json::Map<String, Value> =
        login.meta.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    let body = json!({ "AuthMethod": login.method, "BearerToken": bearer.trim(), "Meta": meta });
    let remedy = "check the auth method's name, its binding rules and whether the bearer token is still valid";
    match http.post("/v1/acl/login", &body).await {
        Ok(answer) if answer.is_ok() => match answer.json()["SecretID"].as_str() {
            Some(token) => {
                report.ok("login", format!("auth method {}", login.method));
                Some(Zeroizing::new(token.to_owned()))
            }
            None => {
                report.fail("login", "the answer has no SecretID", remedy);
                None
            }
        },
        Ok(answer) => {
            report.fail("login", answer.text(), remedy);
            None
        }
        Err(error) => {
            report.fail("login", error.to_string(), remedy);
            None
        }
    }
}

/// `checked` holds the upstreams (kind, name) that have their lines already: the calls are the same for all that share one.
async fn rights(http: &Http, proxy: &Proxy, checked: &mut BTreeSet<(String, String)>, report: &mut Report) {
    let (service, upstreams): (_, Vec<_>) = match proxy {
        Proxy::Service(service) => {
            let upstreams = service.upstreams.iter().map(|one| ("service".to_owned(), one.destination.clone())).collect();
            (service.name.clone(), upstreams)
        }
        Proxy::ProxyId(id) => match definition(http, id, report).await {
            Some(found) => found,
            None => return,
        },
        Proxy::SidecarFor(id) => {
            let Some(proxy_id) = sidecar_of(http, id, report).await else { return };
            match definition(http, &proxy_id, report).await {
                Some(found) => found,
                None => return,
            }
        }
    };
    let service_path = encode(&service);
    let write = format!("give the token service:write on `{service}` (a service identity of it has all that is needed)");
    let call = format!("/v1/agent/connect/ca/leaf/{service_path}");
    right(http, &format!("right: leaf {service}"), &call, &write, report).await;
    let call = format!("/v1/connect/intentions/match?by=destination&name={service_path}");
    let read = format!("give the token intentions:read on `{service}`; service:write implies it");
    right(http, &format!("right: intentions {service}"), &call, &read, report).await;
    for (kind, name) in upstreams {
        if checked.insert((kind.clone(), name.clone())) {
            upstream(http, &kind, &name, report).await;
        }
    }
}

async fn upstream(http: &Http, kind: &str, name: &str, report: &mut Report) {
    let path = encode(name);
    let remedy = format!("give the token service:read on `{name}` and node:read on its nodes");
    if kind == "prepared_query" {
        let call = format!("/v1/query/{path}/execute?connect=true");
        right(http, &format!("right: query {name}"), &call, &remedy, report).await;
        return;
    }
    right(http, &format!("right: chain {name}"), &format!("/v1/discovery-chain/{path}"), &remedy, report).await;
    let Some(answer) =
        right(http, &format!("right: health {name}"), &format!("/v1/health/connect/{path}"), &remedy, report).await
    else {
        return;
    };
    // Without the right Consul does not refuse, it leaves everything out.
    if answer.json().as_array().is_some_and(Vec::is_empty) {
        report.warn(&format!("health {name}"), "no instance is visible", format!("start one, or {remedy}"));
    }
}

/// The sidecar registered for a service's instance.
async fn sidecar_of(http: &Http, id: &str, report: &mut Report) -> Option<String> {
    let what = format!("-sidecar-for {id}");
    let remedy = "give the token service:read on the sidecar's own name (NAME-sidecar-proxy)";
    let answer = right(http, &what, "/v1/agent/services", remedy, report).await?;
    match sidecars(&answer.json(), id).as_slice() {
        [] => {
            let detail = format!("no sidecar proxy registered for {id}");
            report.fail(
                &what,
                detail,
                "add `connect { sidecar_service {} }` to the service's definition and register it again, or see above",
            );
            None
        }
        [one] => Some(one.clone()),
        several => {
            let detail = format!("more than one sidecar proxy registered for {id}: {}", several.join(", "));
            report.fail(&what, detail, "choose one with -proxy-id");
            None
        }
    }
}

/// IDs of the sidecars of `id` in an answer of `/v1/agent/services`.
fn sidecars(services: &Value, id: &str) -> Vec<String> {
    let services = services.as_object().into_iter().flatten();
    services
        .filter(|(_, one)| one["Kind"] == "connect-proxy" && one["Proxy"]["DestinationServiceID"] == id)
        .map(|(key, _)| key.clone())
        .collect()
}

/// Destination service and upstreams (kind, name) of a sidecar's definition.
async fn definition(http: &Http, id: &str, report: &mut Report) -> Option<(String, Vec<(String, String)>)> {
    let what = format!("definition {id}");
    let remedy = "register it, or give the token service:read on the sidecar's own name";
    let answer = right(http, &what, &format!("/v1/agent/service/{}", encode(id)), remedy, report).await?;
    let value = answer.json();
    if value["Kind"] != "connect-proxy" {
        let kind = value["Kind"].as_str().unwrap_or_default();
        report.fail(
            &what,
            format!("its kind is `{kind}`, not connect-proxy"),
            "name the sidecar's ID, or use -sidecar-for SERVICE_ID",
        );
        return None;
    }
    let Some(service) = value["Proxy"]["DestinationServiceName"].as_str().filter(|name| !name.is_empty()) else {
        report.fail(&what, "it names no destination service", "set proxy.destination_service_name");
        return None;
    };
    Some((service.to_owned(), upstreams_of(&value)))
}

fn upstreams_of(definition: &Value) -> Vec<(String, String)> {
    let upstreams = definition["Proxy"]["Upstreams"].as_array().into_iter().flatten();
    upstreams
        .filter_map(|one| {
            let kind = one["DestinationType"].as_str().filter(|kind| !kind.is_empty()).unwrap_or("service");
            Some((kind.to_owned(), one["DestinationName"].as_str()?.to_owned()))
        })
        .collect()
}

/// Calls once; says what it means; gives the answer if it can be used.
async fn right(http: &Http, what: &str, call: &str, remedy: &str, report: &mut Report) -> Option<Answer> {
    match http.get(call).await {
        Ok(answer) if answer.is_ok() => {
            report.ok(what, format!("GET {}", call.split('?').next().unwrap_or(call)));
            Some(answer)
        }
        Ok(answer) => {
            let remedy = match answer.status {
                403 if answer.text().contains("ACL not found") => "the token is unknown to Consul: deleted, expired or mistyped",
                404 | 403 => remedy,
                429 => "raise limits.http_max_conns_per_client of the agent",
                _ => "look into the agent's log; errors of its servers are repeated here",
            };
            report.fail(what, answer.text(), remedy);
            None
        }
        Err(error) => {
            report.fail(what, error.to_string(), "the agent closed the connection or is too slow; look into its log");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    #[test]
    fn the_sidecar_of_a_service_is_found_by_its_destination() {
        let services = json!({
            "web-1": { "Kind": "", "Proxy": {} },
            "web-1-sidecar-proxy": { "Kind": "connect-proxy", "Proxy": { "DestinationServiceID": "web-1" } },
            "other": { "Kind": "connect-proxy", "Proxy": { "DestinationServiceID": "web-2" } },
            "gateway": { "Kind": "mesh-gateway", "Proxy": { "DestinationServiceID": "web-1" } },
        });
        assert_eq!(sidecars(&services, "web-1"), ["web-1-sidecar-proxy"]);
        assert!(sidecars(&services, "db").is_empty() && sidecars(&Value::Null, "db").is_empty());
    }

    #[test]
    fn upstreams_have_a_kind() {
        let definition = json!({ "Proxy": { "Upstreams": [
            { "DestinationName": "db" },
            { "DestinationType": "prepared_query", "DestinationName": "q" },
            { "DestinationType": "service" },
        ]}});
        assert_eq!(upstreams_of(&definition), [("service".into(), "db".into()), ("prepared_query".into(), "q".into())]);
    }

    #[test]
    fn a_clock_half_a_minute_off_fails() {
        let now = SystemTime::now();
        for (theirs, wanted) in [
            (now, Exit::Ok),
            (now + Duration::from_secs(29), Exit::Ok),
            (now + Duration::from_secs(31), Exit::Failed),
            (now - Duration::from_secs(3_600), Exit::Failed),
        ] {
            let mut report = Report::new(true);
            clock(theirs, now, &mut report);
            assert_eq!(report.finish(), wanted);
        }
    }
}
