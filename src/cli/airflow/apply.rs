//! `-apply`: registers the services at the agent and makes sure of the intentions.
//!
//! Invariant: what is there already as it should be is left untouched, so a second run changes nothing. What somebody else
//! decided stays unless `-force` is given: a denial that stands where an allowance is wanted, a service of the same id that
//! belongs to no deployment or to another. Each thing has its line; nothing without a line was changed.

use anyhow::Context;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::intentions::{self, ConsulRelease, Intention};
use super::output::Output;
use super::plan::{Plan, Service};
use super::service::META_DEPLOYMENT;
use crate::app::AppError;
use crate::cli::http::{Answer, Http, HttpError, encode};
use crate::cli::{Exit, UsageError};
use crate::config::{Consul, TokenSource};

/// One run.
struct Applier<'r> {
    http: Http,
    output: &'r Output,
    force: bool,
    kept: usize,
}

/// What was done about one thing.
enum Done {
    Nothing,
    Made,
    /// With what differed.
    Changed(String),
    /// With the reason.
    Kept(String),
}

/// Gives [`Exit::Failed`] if something was kept as it is that ought to be otherwise.
pub(super) async fn apply(
    settings: &Consul,
    plan: &Plan,
    written_for: ConsulRelease,
    output: &Output,
    force: bool,
) -> anyhow::Result<Exit> {
    let http = Http::new(settings, token(&settings.token)?).map_err(|error| AppError::Config(error.to_string()))?;
    let mut applier = Applier { http, output, force, kept: 0 };
    let release = applier.release(written_for).await?;
    for service in &plan.services {
        let done = applier.service(service, plan).await.with_context(|| format!("service {}", service.name))?;
        applier.tell("service", &service.name, done);
    }
    let wanted = intentions::of_host(plan);
    let list = if release == ConsulRelease::Records { applier.records().await? } else { Value::Null };
    for intention in &wanted {
        let name = format!("{} {} -> {}", intention.action(), intention.source, intention.destination);
        let done = match release {
            ConsulRelease::Entries => applier.exact(intention).await,
            ConsulRelease::Records => applier.record(intention, &list).await,
        };
        applier.tell("intention", &name, done.with_context(|| format!("intention {name}"))?);
    }
    Ok(if applier.kept == 0 { Exit::Ok } else { Exit::Failed })
}

impl Applier<'_> {
    fn tell(&mut self, kind: &str, name: &str, done: Done) {
        let (word, detail) = match done {
            Done::Nothing => ("unchanged", String::new()),
            Done::Made => ("made", String::new()),
            Done::Changed(what) => ("changed", what),
            Done::Kept(why) => {
                self.kept += 1;
                ("KEPT", why)
            }
        };
        let separator = if detail.is_empty() { "" } else { ": " };
        self.output.tell(
            &format!("{word:<9} {kind} {name}{separator}{detail}"),
            &json!({"apply": kind, "name": name, "done": word.to_lowercase(), "detail": detail}),
        );
    }

    /// How this agent keeps intentions. Without the right to ask (agent:read), what the files were written for.
    async fn release(&self, written_for: ConsulRelease) -> anyhow::Result<ConsulRelease> {
        let answer = self.http.get("/v1/agent/self").await.map_err(away)?;
        let about = answer.json();
        let found = about["Config"]["Version"].as_str().and_then(|version| ConsulRelease::parse(version).ok());
        if found.is_some_and(|found| found != written_for) {
            let version = about["Config"]["Version"].as_str().unwrap_or_default();
            self.output.tell(
                &format!("note      the agent is Consul {version}: its own way is used here; give -consul so that the files suit it too"),
                &json!({"apply": "note", "version": version}),
            );
        }
        Ok(found.unwrap_or(written_for))
    }

    async fn service(&self, service: &Service, plan: &Plan) -> anyhow::Result<Done> {
        let found = self.http.get(&format!("/v1/agent/service/{}", encode(&service.name))).await.map_err(away)?;
        let done = match found.status {
            404 => Done::Made,
            200 => {
                let have = found.json();
                let mut differences = differences(&have, &service.expected(&plan.deployment));
                let sidecar =
                    self.http.get(&format!("/v1/agent/service/{}", encode(&service.sidecar_id()))).await.map_err(away)?;
                differences.extend(match sidecar.status {
                    200 => self::differences(&sidecar.json(), &service.expected_sidecar()),
                    404 => vec!["no sidecar".to_owned()],
                    _ => return Err(refused(&sidecar, "service", &service.sidecar_id(), "read").into()),
                });
                if differences.is_empty() {
                    return Ok(Done::Nothing);
                }
                let owner = have["Meta"][META_DEPLOYMENT].as_str().unwrap_or_default();
                if owner != plan.deployment.name && !self.force {
                    let owner = if owner.is_empty() { "no deployment".to_owned() } else { format!("the deployment {owner}") };
                    return Ok(Done::Kept(format!(
                        "it is registered by {owner} and differs in {}; choose another -deployment, or -force to replace it",
                        differences.join(", ")
                    )));
                }
                Done::Changed(format!("differed in {}", differences.join(", ")))
            }
            _ => return Err(refused(&found, "service", &service.name, "read").into()),
        };
        let answer = self.http.put("/v1/agent/service/register", &service.registration(&plan.deployment)).await.map_err(away)?;
        if !answer.is_ok() {
            return Err(refused(&answer, "service", &service.name, "write").into());
        }
        Ok(done)
    }

    /// From 1.9 on: one source of an entry, the others left alone.
    async fn exact(&self, intention: &Intention) -> anyhow::Result<Done> {
        let Intention { source, destination, .. } = intention;
        let path = format!("/v1/connect/intentions/exact?source={}&destination={}", encode(source), encode(destination));
        let found = self.http.get(&path).await.map_err(away)?;
        let done = match found.status {
            404 => Done::Made,
            200 => match self.verdict(&found.json(), intention) {
                Done::Changed(was) => Done::Changed(was),
                done => return Ok(done),
            },
            _ => return Err(refused(&found, "intention", destination, "read").into()),
        };
        let body = json!({"SourceType": "consul", "Action": intention.action(), "Description": description(intention)});
        let answer = self.http.put(&path, &body).await.map_err(away)?;
        if answer.is_ok() { Ok(done) } else { Err(refused(&answer, "intention", destination, "write").into()) }
    }

    async fn records(&self) -> anyhow::Result<Value> {
        let answer = self.http.get("/v1/connect/intentions").await.map_err(away)?;
        if answer.is_ok() { Ok(answer.json()) } else { Err(refused(&answer, "intention", "*", "read").into()) }
    }

    /// Before 1.9. A list that hides what the token may not see does no harm: Consul refuses a second record of one pair.
    async fn record(&self, intention: &Intention, list: &Value) -> anyhow::Result<Done> {
        let is_it = |one: &&Value| {
            one["SourceName"] == intention.source.as_str() && one["DestinationName"] == intention.destination.as_str()
        };
        let body = json!({
            "SourceName": intention.source, "DestinationName": intention.destination, "SourceType": "consul",
            "Action": intention.action(), "Description": description(intention),
        });
        let (done, answer) = match list.as_array().and_then(|list| list.iter().find(is_it)) {
            None => (Done::Made, self.http.post("/v1/connect/intentions", &body).await.map_err(away)?),
            Some(found) => match self.verdict(found, intention) {
                Done::Changed(was) => {
                    let id = found["ID"].as_str().unwrap_or_default();
                    (
                        Done::Changed(was),
                        self.http.put(&format!("/v1/connect/intentions/{}", encode(id)), &body).await.map_err(away)?,
                    )
                }
                done => return Ok(done),
            },
        };
        if answer.is_ok() { Ok(done) } else { Err(refused(&answer, "intention", &intention.destination, "write").into()) }
    }

    /// What is to be done about an intention that exists.
    fn verdict(&self, found: &Value, wanted: &Intention) -> Done {
        let was = match found["Action"].as_str() {
            Some(action) if action == wanted.action() => return Done::Nothing,
            Some(action) if !action.is_empty() => action.to_owned(),
            _ => "L7 permissions".to_owned(),
        };
        if self.force {
            Done::Changed(format!("was {was}"))
        } else {
            Done::Kept(format!("somebody decided {was} here; -force to change it"))
        }
    }
}

fn description(intention: &Intention) -> String {
    format!("Airflow: {}", intention.purpose)
}

/// Where `have` lacks or contradicts what `want` says; what `want` does not say may be as it likes.
fn differences(have: &Value, want: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare(have, want, "", &mut found);
    found
}

fn compare(have: &Value, want: &Value, place: &str, found: &mut Vec<String>) {
    match (have, want) {
        (Value::Object(have), Value::Object(want)) => {
            for (key, want) in want {
                let place = if place.is_empty() { key.clone() } else { format!("{place}.{key}") };
                compare(have.get(key).unwrap_or(&Value::Null), want, &place, found);
            }
        }
        // Consul leaves an empty list out, or writes null.
        (Value::Null, Value::Array(want)) if want.is_empty() => {}
        (Value::Array(have), Value::Array(want)) if have.len() == want.len() => {
            for (at, (have, want)) in have.iter().zip(want).enumerate() {
                compare(have, want, &format!("{place}[{at}]"), found);
            }
        }
        _ if have == want => {}
        _ => found.push(place.to_owned()),
    }
}

fn away(error: HttpError) -> AppError {
    AppError::Unavailable(format!("the Consul agent {error}; start it, or name its address with -http-addr or CONSUL_HTTP_ADDR"))
}

fn refused(answer: &Answer, kind: &str, name: &str, right: &str) -> AppError {
    let rules = match kind {
        "service" => format!("service \"{name}\" {{ policy = \"{right}\" }}"),
        _ => format!("service \"{name}\" {{ policy = \"read\" intentions = \"{right}\" }}"),
    };
    let remedy = match answer.status {
        401 | 403 => format!("; the token needs {rules}: -token-file or CONSUL_HTTP_TOKEN_FILE"),
        _ => String::new(),
    };
    AppError::Config(format!("{}{remedy}", answer.text()))
}

fn token(source: &TokenSource) -> anyhow::Result<Option<Zeroizing<String>>> {
    match source {
        TokenSource::None => Ok(None),
        TokenSource::Static(token) => Ok(Some(token.clone())),
        TokenSource::File(path) => {
            let text = std::fs::read_to_string(path).map(Zeroizing::new);
            let text =
                text.map_err(|error| AppError::Config(format!("token file {}: {error}; check -token-file", path.display())))?;
            Ok(Some(Zeroizing::new(text.trim().to_owned())))
        }
        TokenSource::Login(_) => Err(UsageError(
            "-login-method gives a service's rights, and -apply writes intentions: use -token-file with an operator's token"
                .to_owned(),
        )
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wanted_is_compared() {
        let have =
            json!({"Port": 1, "Meta": {"a": "b", "more": "x"}, "Proxy": {"Upstreams": [{"Name": "db", "Type": "service"}]}});
        assert!(differences(&have, &json!({"Port": 1, "Meta": {"a": "b"}, "Proxy": {"Upstreams": [{"Name": "db"}]}})).is_empty());
        assert_eq!(
            differences(&have, &json!({"Port": 2, "Meta": {"c": "d"}, "Proxy": {"Upstreams": [{"Name": "web"}]}})),
            ["Port", "Meta.c", "Proxy.Upstreams[0].Name"]
        );
        assert_eq!(differences(&have, &json!({"Proxy": {"Upstreams": []}})), ["Proxy.Upstreams"]);
        assert!(differences(&json!({"Proxy": {"Upstreams": null}}), &json!({"Proxy": {"Upstreams": []}})).is_empty());
    }
}
