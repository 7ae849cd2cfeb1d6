//! What the sidecar would enforce: the control plane runs for a moment and its snapshot is looked at.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};

use super::probe;
use super::report::Report;
use crate::config;
use crate::control::{self, Command, Status};
use crate::mesh::{Address, Bind, Identity, PublicListener, Service, Snapshot, Target, Upstream};
use crate::policy::DefaultPolicy;
use crate::store;

/// How long the control plane may take until every service has all that it needs.
const READY_TIMEOUT: Duration = Duration::from_secs(15);
/// A problem that is still there after this time is a finding and not a beginning.
const PROBLEM_TIMEOUT: Duration = Duration::from_secs(3);
/// How long endpoints may take after that: they are not part of readiness.
const ENDPOINTS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the control plane may take to end; it may log a token out.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound on dialing the app.
const APP_TIMEOUT: Duration = Duration::from_secs(2);
/// Endpoints of one target that are probed; more would be a load test.
const PROBES_MAX: usize = 8;
/// Certificates with less than this share of their life left should have been renewed.
const LIFE_LEFT_MIN: f64 = 0.1;
const PAUSE: Duration = Duration::from_millis(20);

pub(super) async fn check(settings: config::Consul, report: &mut Report) {
    // One reader stands for one worker: identities are built as for the data plane, one TLS configuration each.
    let (publisher, readers) = store::new(Snapshot::default(), 1);
    let viewer = publisher.viewer();
    let (status_sender, status) = watch::channel(Status::default());
    let (commands, receiver) = mpsc::channel(1);
    let running = control::run(settings, 1, publisher, status_sender, receiver);
    tokio::pin!(running);
    let collected = tokio::select! {
        ended = &mut running => {
            if let Err(error) = ended {
                report.fail("control plane", error.to_string(), "");
            }
            return;
        }
        collected = collect(&status, &viewer) => collected,
    };
    for service in &collected.status.services {
        if let Some(problem) = &service.problem {
            report.fail(&format!("service {}", service.proxy_id), problem, "");
        }
    }
    if !collected.status.ready && collected.status.services.iter().all(|service| service.problem.is_none()) {
        report.fail("control plane", format!("not ready after {READY_TIMEOUT:?}"), "see the failures above");
    }
    for service in &collected.snapshot.services {
        examine(service, report).await;
    }
    let stopping = async {
        // It has room for one command, and this is the only one.
        let _ = commands.send(Command::Stop).await;
        running.await
    };
    if !matches!(tokio::time::timeout(STOP_TIMEOUT, stopping).await, Ok(Ok(()))) {
        report.warn("control plane", "did not end in time", "a token of a login may live until its own end");
    }
    drop(readers);
}

struct Collected {
    status: Status,
    snapshot: Arc<Snapshot>,
}

async fn collect(status: &watch::Receiver<Status>, viewer: &store::Viewer<Snapshot>) -> Collected {
    let started = Instant::now();
    wait(READY_TIMEOUT, || {
        let status = status.borrow();
        let problem = status.services.iter().any(|service| service.problem.is_some());
        status.ready || problem && started.elapsed() > PROBLEM_TIMEOUT
    })
    .await;
    wait(ENDPOINTS_TIMEOUT, || {
        let snapshot = viewer.current();
        let mut upstreams = snapshot.services.iter().flat_map(|service| &service.upstreams);
        upstreams.all(|upstream| upstream.targets.iter().any(|target| !target.endpoints.is_empty()))
    })
    .await;
    Collected { status: status.borrow().clone(), snapshot: viewer.current() }
}

async fn wait(timeout: Duration, done: impl Fn() -> bool) {
    let deadline = Instant::now() + timeout;
    while !done() && Instant::now() < deadline {
        tokio::time::sleep(PAUSE).await;
    }
}

async fn examine(service: &Service, report: &mut Report) {
    let name = &service.name;
    match &service.identity {
        Some(identity) => certificate(identity, SystemTime::now(), report),
        None => report.fail(&format!("leaf {name}"), "no valid certificate", "see the service's line above"),
    }
    let what = format!("intentions {name}");
    let count = service.intentions.ordered().len();
    match service.intentions.default_policy() {
        DefaultPolicy::Unknown => {
            report.warn(
                &what,
                format!("{count}, default unknown: what no intention allows is denied"),
                "give the token intentions:read",
            );
        }
        DefaultPolicy::Allow => report.ok(&what, format!("{count}, default allow")),
        DefaultPolicy::Deny => report.ok(&what, format!("{count}, default deny")),
    }
    if let Some(public) = &service.public {
        inbound(name, public, report).await;
    }
    for upstream in &service.upstreams {
        outbound(upstream, service.identity.as_deref(), report).await;
    }
}

fn certificate(identity: &Identity, now: SystemTime, report: &mut Report) {
    let svid = &identity.svid;
    let what = format!("leaf {}", svid.id.service_name().map_or("", |name| &*name.service));
    let life = svid.not_after.duration_since(svid.not_before).unwrap_or_default();
    let left = svid.not_after.duration_since(now).unwrap_or_default();
    let detail = format!("{}, {} min left, chain of {}", svid.id, left.as_secs() / 60, svid.chain.len());
    if left.as_secs_f64() < life.as_secs_f64() * LIFE_LEFT_MIN {
        report.warn(&what, detail, "the agent should have renewed it: look into its log, and check the Consul servers' CA");
    } else {
        report.ok(&what, detail);
    }
}

async fn inbound(name: &str, public: &PublicListener, report: &mut Report) {
    listener(&format!("public listener {name}"), &public.bind, report);
    let what = format!("app {name}");
    let mut errors = Vec::new();
    for address in &public.app {
        let dialed = tokio::time::timeout(APP_TIMEOUT, async {
            match address {
                Address::Tcp(address) => TcpStream::connect(address).await.map(drop),
                Address::Unix(path) => UnixStream::connect(path).await.map(drop),
            }
        });
        match dialed.await {
            Ok(Ok(())) => {
                report.ok(&what, format!("answers on {address}"));
                return;
            }
            Ok(Err(error)) => errors.push(format!("{address}: {error}")),
            Err(_) => errors.push(format!("{address}: no answer within {APP_TIMEOUT:?}")),
        }
    }
    report.warn(&what, errors.join("; "), "start the app, or mend local_service_port in the sidecar's definition");
}

fn listener(what: &str, bind: &Bind, report: &mut Report) {
    let tried = match bind {
        Bind::Tcp(address) => std::net::TcpListener::bind(address).map(drop),
        Bind::Unix { path, .. } => match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => std::fs::read_dir(folder).map(drop),
            _ => Ok(()),
        },
    };
    match tried {
        Ok(()) => report.ok(what, format!("{bind} can be bound")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            report.warn(what, format!("{bind} is in use"), "good if it is this service's sidecar; else end what holds it");
        }
        Err(error) => {
            report.fail(what, format!("{bind}: {error}"), "mend bind_address and bind_port in the sidecar's definition")
        }
    }
}

async fn outbound(upstream: &Upstream, identity: Option<&Identity>, report: &mut Report) {
    listener(&format!("upstream listener {}", upstream.name), &upstream.bind, report);
    let what = format!("upstream {}", upstream.name);
    let endpoints = upstream.targets.iter().flat_map(|target| target.endpoints.iter());
    let (all, healthy) = endpoints.fold((0, 0), |(all, healthy), one| (all + 1, healthy + usize::from(one.healthy)));
    if healthy == 0 {
        let remedy = "start an instance with a sidecar and see its checks; the token needs service:read and node:read to see it";
        report.warn(&what, format!("{all} endpoints, none healthy"), remedy);
        return;
    }
    report.ok(&what, format!("{healthy} of {all} endpoints healthy, {} targets", upstream.targets.len()));
    let Some(identity) = identity else { return };
    for target in &upstream.targets {
        probes(upstream, target, identity, report).await;
    }
}

async fn probes(upstream: &Upstream, target: &Target, identity: &Identity, report: &mut Report) {
    let Some(tls) = identity.tls.first() else { return };
    for endpoint in target.endpoints.iter().filter(|endpoint| endpoint.healthy).take(PROBES_MAX) {
        let what = format!("TLS {} {}", upstream.name, endpoint.address);
        match probe::probe(tls, target, endpoint.address, upstream.connect_timeout).await {
            Ok(found) if found.refused => report.warn(
                &what,
                format!("{} in {}, then it refused us", found.peer, found.version),
                format!("consul intention create -replace -allow {} {}", own_name(identity), peer_name(&found.peer)),
            ),
            Ok(found) => {
                report.ok(&what, format!("{} in {}, {:.1} ms", found.peer, found.version, found.took.as_secs_f64() * 1e3))
            }
            Err(error) => report.fail(&what, error.to_string(), error.remedy()),
        }
    }
}

fn own_name(identity: &Identity) -> &str {
    peer_name(&identity.svid.id)
}

fn peer_name(id: &crate::identity::SpiffeId) -> &str {
    id.service_name().map_or("", |name| &*name.service)
}
