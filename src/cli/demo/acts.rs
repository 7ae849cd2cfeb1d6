//! The steps of the story, each with what must hold and a deadline.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::database::Client;
use super::journal::field;
use super::load::{Figures, Load};
use super::scene::{DESTINATION, SOURCE, Scene, set_intention};
use super::story::Story;
use crate::app::Sidecar;
use crate::control::ServiceStatus;

/// How long the first answer through the mesh may take: the upstream's endpoints may still be on their way.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one answer may take after that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// What the product promises between an intention's change at the agent and the cut.
const CUT_PROMISE: Duration = Duration::from_millis(100);
/// Beyond this the step fails. Wider than the promise, because a busy host also delays this program's own clock.
const CUT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a connection log may lag.
const LOG_TIMEOUT: Duration = Duration::from_secs(5);
/// How long both sidecars may take to carry certificates of the new root.
const ROTATION_TIMEOUT: Duration = Duration::from_secs(45);
/// Load before and after the rotation.
const LOAD_MARGIN: Duration = Duration::from_secs(1);
/// Pause of polls and retries.
const PAUSE: Duration = Duration::from_millis(10);
/// Pause between looks at the logs while the demo stays up.
const STAY_PAUSE: Duration = Duration::from_millis(200);
/// How long the connection log may lag behind.
const LOG_SETTLE: Duration = Duration::from_millis(500);

/// Identities issued.
pub(super) async fn identities(scene: &Scene, story: &mut Story) -> anyhow::Result<()> {
    story.step("identities", "Each sidecar holds a certificate of its own; the keys never touch a disk");
    for (name, sidecar) in [(SOURCE, &scene.source), (DESTINATION, &scene.destination)] {
        let status = service_status(sidecar)?;
        let id = status.spiffe_id.as_deref().with_context(|| format!("{name} has no identity"))?;
        ensure!(id.ends_with(&format!("/svc/{name}")), "{name} was given the identity {id}");
        let not_after = status.leaf_not_after.with_context(|| format!("the certificate of {name} has no end"))?;
        let left =
            not_after.duration_since(SystemTime::now()).map_err(|_| anyhow::anyhow!("the certificate of {name} is expired"))?;
        let serial = status.leaf_serial.as_deref().unwrap_or("-");
        story.tell(
            "identity",
            &format!("{id}\n  expires {} (in {}), serial {serial}", stamp(not_after), hours(left)),
            json!({ "service": name, "spiffe_id": id, "not_after": stamp(not_after), "serial": serial }),
        );
    }
    Ok(())
}

/// Traffic allowed.
pub(super) async fn traffic(scene: &mut Scene, story: &mut Story) -> anyhow::Result<()> {
    story.step("traffic", "A client of the worker asks the warehouse; neither of them knows about TLS");
    let (mut client, first) = first_answer(scene).await?;
    for number in 0..10 {
        answer(client.ask(&format!("select {number}"))).await?;
    }
    drop(client);
    let line = scene
        .destination_log
        .wait_for(LOG_TIMEOUT, |line| field(line, "direction") == "inbound" && field(line, "decision") == "allowed")
        .await?
        .context("the connection log of the warehouse has no line of an allowed connection")?;
    let source = field(&line, "source");
    ensure!(source.ends_with(&format!("/svc/{SOURCE}")), "the warehouse saw the caller as {source}");
    let version = field(&line, "tls_version");
    ensure!(version.starts_with("TLSv1."), "no TLS version was negotiated: {version}");
    story.tell(
        "allowed",
        &format!(
            "11 answers, the first {:.1} ms after connecting, TLS handshake included\nallowed by {}\n{source} spoke {version}, {}",
            millis(first),
            field(&line, "by"),
            field(&line, "tls_suite"),
        ),
        json!({ "first_answer_ms": millis(first), "connection": line }),
    );
    Ok(())
}

/// An intention denied, the live connection cut.
pub(super) async fn intention(scene: &mut Scene, story: &mut Story) -> anyhow::Result<()> {
    story.step("intention", "The intention is changed to deny while a connection is live");
    let (mut live, _) = first_answer(scene).await?;
    scene.destination_log.read()?;
    let changed = Instant::now();
    // The cut is awaited while the agent still answers the change: it may well come first.
    let (written, cut) = tokio::join!(
        set_intention(&scene.http, "deny"),
        tokio::time::timeout(CUT_TIMEOUT, async {
            let reset = live.wait_closed().await;
            reset.map(|reset| (reset, changed.elapsed()))
        })
    );
    written?;
    let (reset, took) = cut.map_err(|_| anyhow::anyhow!("the live connection was not cut within {CUT_TIMEOUT:?}"))??;
    story.tell(
        "cut",
        &format!(
            "the live connection was cut {:.1} ms after the change was sent ({}; promised: {} ms)",
            millis(took),
            if reset { "reset" } else { "closed" },
            CUT_PROMISE.as_millis(),
        ),
        json!({ "cut_ms": millis(took), "reset": reset, "within_promise": took <= CUT_PROMISE }),
    );
    let refused = async {
        let mut client = Client::connect(scene.upstream).await?;
        client.ask("select 'denied'").await
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, refused).await {
        Ok(Ok(())) => bail!("a new connection got an answer in spite of the deny"),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => bail!("a new connection got bytes: {error}"),
        Ok(Err(_)) => {}
        Err(_) => bail!("a denied connection was held open for {ANSWER_TIMEOUT:?}"),
    }
    let line = scene
        .destination_log
        .wait_for(LOG_TIMEOUT, |line| field(line, "reason") == "denied")
        .await?
        .context("the connection log of the warehouse has no line of the denied connection")?;
    ensure!(field(&line, "by").contains(SOURCE), "the denial does not name its intention: {line}");
    story.tell(
        "denied",
        &format!(
            "a new connection is denied before the warehouse hears of it\n{}\n  by     {}\n  remedy {}",
            field(&line, "source"),
            field(&line, "by"),
            field(&line, "remedy"),
        ),
        json!({ "connection": line }),
    );
    set_intention(&scene.http, "allow").await?;
    let asked = Instant::now();
    drop(first_answer(scene).await.context("after the intention was set back to allow")?);
    story.tell(
        "allowed_again",
        &format!("allow again: answers after {:.1} ms", millis(asked.elapsed())),
        json!({ "after_ms": millis(asked.elapsed()) }),
    );
    Ok(())
}

/// The certificate authority rotated under load.
pub(super) async fn rotation(scene: &mut Scene, story: &mut Story) -> anyhow::Result<Figures> {
    story.step("rotation", "The certificate authority is replaced while traffic flows");
    let before = serials(scene)?;
    let load = Load::start(scene.upstream).await.context("the load cannot start")?;
    tokio::time::sleep(LOAD_MARGIN).await;
    let rotated = Instant::now();
    scene.agent.rotate_ca().context("the agent cannot rotate its authority")?;
    let after = match new_serials(scene, &before).await {
        Ok(after) => after,
        Err(error) => {
            load.finish().await;
            return Err(error);
        }
    };
    let took = rotated.elapsed();
    tokio::time::sleep(LOAD_MARGIN).await;
    let figures = load.finish().await;
    for ((name, old), (_, new)) in before.iter().zip(&after) {
        story.tell(
            "rotated",
            &format!("{name}: serial {old} -> {new}"),
            json!({ "service": name, "old_serial": old, "new_serial": new }),
        );
    }
    if let Some(first) = figures.failures.first() {
        bail!("{} failures under rotation; the first: {first}", figures.failures.len());
    }
    story.tell(
        "rotation",
        &format!(
            "new root and both certificates in use after {:.0} ms; {} live connections stayed, {} new ones succeeded, 0 failed",
            millis(took),
            figures.live_connections,
            figures.short_connections,
        ),
        json!({
            "took_ms": millis(took),
            "live_connections": figures.live_connections,
            "new_connections": figures.short_connections,
            "failed": 0,
        }),
    );
    Ok(figures)
}

/// Figures at the end.
pub(super) fn figures(scene: &Scene, story: &mut Story, figures: &Figures) {
    story.step("figures", "Figures of the load that ran through both sidecars");
    let connections = figures.live_connections + figures.short_connections;
    let (p50, p99) = (millis(figures.percentile(500)), millis(figures.percentile(990)));
    let rotations: u64 = [&scene.source, &scene.destination]
        .iter()
        .filter_map(|sidecar| sidecar.status().services.first().map(|service| service.rotations))
        .sum();
    story.tell(
        "figures",
        &format!(
            "connections {connections}  requests {}  failed {}  certificates taken up {rotations}\n\
             a request: p50 {p50:.2} ms, p99 {p99:.2} ms (client, two sidecars and database share this host's cores)",
            figures.requests,
            figures.failures.len(),
        ),
        json!({
            "connections": connections,
            "requests": figures.requests,
            "failed": figures.failures.len(),
            "p50_ms": p50,
            "p99_ms": p99,
            "certificates": rotations,
        }),
    );
}

/// Stays up for the user's own clients and tells each connection. Ends with the signal that ends the demo, or with a
/// sidecar's failure.
pub(super) async fn stay(scene: &mut Scene, story: &mut Story) -> anyhow::Result<()> {
    story.step("yours", "Everything stays up until Ctrl-C; now it is yours");
    let agent = scene.agent.address();
    let change = |action: &str| {
        format!(
            "curl -X PUT -d '{{\"SourceType\":\"consul\",\"Action\":\"{action}\"}}' \\\n     \
             'http://{agent}/v1/connect/intentions/exact?source={SOURCE}&destination={DESTINATION}'"
        )
    };
    let (host, port) = (scene.upstream.ip(), scene.upstream.port());
    story.tell(
        "yours",
        &format!(
            "ask the warehouse      nc {host} {port}        (every line gets a row)\n\
             deny                   {}\n\
             allow                  {}\n\
             with Consul's tool     CONSUL_HTTP_ADDR={agent} consul intention create -replace -deny {SOURCE} {DESTINATION}\n\
             rotate                 curl -X PUT http://{agent}/v1/connect/ca/rotate\n\
             what is enforced       curl http://{}/snapshot\n\
             metrics                curl http://{}/metrics\n\
             every connection is told below as it ends",
            change("deny"),
            change("allow"),
            scene.destination.admin_address(),
            scene.source.admin_address(),
        ),
        json!({
            "upstream": scene.upstream,
            "agent": agent,
            "source_admin": scene.source.admin_address(),
            "destination_admin": scene.destination.admin_address(),
        }),
    );
    // The load's own lines are not news, and they are written some ticks of the admin thread after the load ended.
    tokio::time::sleep(LOG_SETTLE).await;
    while !(scene.source_log.read()?.is_empty() && scene.destination_log.read()?.is_empty()) {}
    loop {
        for line in scene.destination_log.read()? {
            story.tell("connection", &told(&line), line.clone());
        }
        for sidecar in [&mut scene.source, &mut scene.destination] {
            if let Some(error) = sidecar.take_failure() {
                return Err(error.into());
            }
        }
        tokio::time::sleep(STAY_PAUSE).await;
    }
}

/// One connection in one line.
fn told(line: &Value) -> String {
    let source = field(line, "source").rsplit('/').next().unwrap_or("-");
    let total_ms = line["total_ms"].as_f64().unwrap_or_default();
    format!(
        "{source} -> {}: {} by {}; {} in {total_ms:.1} ms, {} bytes in, {} out",
        field(line, "service"),
        field(line, "decision"),
        field(line, "by"),
        field(line, "reason"),
        line["bytes_from_mesh"],
        line["bytes_to_mesh"],
    )
}

/// Asks until there is an answer, because what was changed a moment ago may not have arrived. Gives the connection and how
/// long it took from connecting to the answer.
async fn first_answer(scene: &Scene) -> anyhow::Result<(Client, Duration)> {
    let deadline = Instant::now() + FIRST_ANSWER_TIMEOUT;
    loop {
        let asked = Instant::now();
        let attempt = async {
            let mut client = Client::connect(scene.upstream).await?;
            client.ask("select 1").await?;
            std::io::Result::Ok((client, asked.elapsed()))
        };
        let error = match tokio::time::timeout(ANSWER_TIMEOUT, attempt).await {
            Ok(Ok(answered)) => return Ok(answered),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("nothing within {ANSWER_TIMEOUT:?}"),
        };
        ensure!(Instant::now() < deadline, "no answer through {} within {FIRST_ANSWER_TIMEOUT:?}: {error}", scene.upstream);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn answer(question: impl Future<Output = std::io::Result<()>>) -> anyhow::Result<()> {
    tokio::time::timeout(ANSWER_TIMEOUT, question).await.context("no answer")?.context("an answer went wrong")
}

fn service_status(sidecar: &Sidecar) -> anyhow::Result<ServiceStatus> {
    sidecar.status().services.into_iter().next().context("the sidecar reports no service")
}

fn serials(scene: &Scene) -> anyhow::Result<Vec<(&'static str, String)>> {
    [(SOURCE, &scene.source), (DESTINATION, &scene.destination)]
        .into_iter()
        .map(|(name, sidecar)| {
            let serial = service_status(sidecar)?.leaf_serial;
            Ok((name, serial.with_context(|| format!("{name} has no certificate"))?))
        })
        .collect()
}

async fn new_serials(scene: &Scene, before: &[(&'static str, String)]) -> anyhow::Result<Vec<(&'static str, String)>> {
    let deadline = Instant::now() + ROTATION_TIMEOUT;
    loop {
        let now = serials(scene)?;
        let old: Vec<&str> = now.iter().zip(before).filter(|(now, before)| now == before).map(|((name, _), _)| *name).collect();
        if old.is_empty() {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "still with the old certificate after {ROTATION_TIMEOUT:?}: {}", old.join(", "));
        tokio::time::sleep(PAUSE).await;
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn hours(duration: Duration) -> String {
    format!("{} h {} min", duration.as_secs() / 3_600, duration.as_secs() % 3_600 / 60)
}

fn stamp(at: SystemTime) -> String {
    time::OffsetDateTime::from(at)
        .replace_nanosecond(0)
        .ok()
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_told_in_one_line() {
        let line = json!({
            "source": "spiffe://t.consul/ns/default/dc/dc1/svc/airflow-worker",
            "service": "warehouse",
            "decision": "denied",
            "by": "intention airflow-worker -> warehouse deny (precedence 9)",
            "reason": "denied",
            "total_ms": 1.25,
            "bytes_from_mesh": 0,
            "bytes_to_mesh": 0,
        });
        assert_eq!(
            told(&line),
            "airflow-worker -> warehouse: denied by intention airflow-worker -> warehouse deny (precedence 9); \
             denied in 1.2 ms, 0 bytes in, 0 out"
        );
        assert!(told(&Value::Null).starts_with("- -> -"), "a broken line is told too");
    }

    #[test]
    fn times_are_for_people() {
        assert_eq!(hours(Duration::from_secs(71 * 3_600 + 59 * 60)), "71 h 59 min");
        assert_eq!(stamp(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}
