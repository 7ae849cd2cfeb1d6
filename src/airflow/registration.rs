//! The registration socket: one JSON object a line in, one line out.
//!
//! Invariant: who asks is whom the kernel names (SO_PEERCRED), never what the text says. Lines, time and connections are
//! bounded, for each user and in all; a peer that breaks a bound loses its connection and nobody else's.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use super::Phase;
use super::office::Office;
use super::process::Process;
use super::registry::{Claim, Peer};

/// Longest line accepted.
const LINE_BYTES_MAX: u64 = 16 << 10;
/// Bound on reading one request, and on writing one answer.
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// Requests on one connection.
const REQUESTS_MAX: usize = 64;
/// Connections that are talked with at once: of one user, and of one registered task, which has registered and needs few.
const CONNECTIONS_OF_USER_MAX: usize = 64;
const CONNECTIONS_OF_TASK_MAX: usize = 4;
/// How long one waits for its turn; the plugin itself gives up after a second.
const SEAT_TIME: Duration = Duration::from_secs(1);
/// Connections that talk or wait, in all.
const CONNECTIONS_MAX: usize = 2_048;
/// How long a failed accept waits before the next.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// The one version of the protocol.
const VERSION: u32 = 1;

/// One request.
#[derive(Debug, Deserialize)]
struct Envelope {
    version: u32,
    #[serde(flatten)]
    request: Request,
}

/// What can be asked.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Request {
    Register(Claim),
    Unregister,
    Whoami,
    Routes,
    Explain(Explain),
    Lease(Lease),
}

/// A question about a task that need not run.
#[derive(Debug, Deserialize)]
pub(super) struct Explain {
    pub(super) dag: String,
    #[serde(default)]
    pub(super) task: String,
    #[serde(default)]
    pub(super) run: String,
    #[serde(default)]
    pub(super) to: Option<String>,
}

/// An address for a task that runs in the asking process.
#[derive(Debug, Deserialize)]
pub(super) struct Lease {
    pub(super) upstream: String,
    #[serde(flatten)]
    pub(super) claim: Claim,
}

/// A refusal of the socket's own.
#[derive(Debug, Serialize)]
struct Refused<'a> {
    ok: bool,
    error: &'a str,
    remedy: &'a str,
}

/// The bound socket as tokio's.
pub(super) fn listener(socket: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Serves until aborted, while `phase` says so.
pub(super) async fn serve(listener: UnixListener, office: Rc<RefCell<Office>>, mut phase: watch::Receiver<Phase>) {
    let waiting = Rc::new(Cell::new(0));
    let seats = RefCell::new(HashMap::<Whose, Rc<Semaphore>>::new());
    loop {
        // Nobody's any more: nothing but this table has them.
        seats.borrow_mut().retain(|_, seats| Rc::strong_count(seats) > 1);
        if phase.wait_for(|phase| *phase == Phase::Serve).await.is_err() {
            return;
        }
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = phase.changed() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the registration socket cannot accept; trying again");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let Some(peer) = peer(&stream) else { continue };
        let Some(place) = Place::take(&waiting) else {
            tracing::debug!(uid = peer.uid, pid = peer.pid, "too many registration connections wait; one is closed");
            continue;
        };
        // Whoever is registered already must not keep those waiting who are not yet.
        let whose = office.borrow().task_of(peer.pid).map_or(Whose::User(peer.uid), Whose::Task);
        let seats = Rc::clone(seats.borrow_mut().entry(whose).or_insert_with(|| {
            let most = if matches!(whose, Whose::User(_)) { CONNECTIONS_OF_USER_MAX } else { CONNECTIONS_OF_TASK_MAX };
            Rc::new(Semaphore::new(most))
        }));
        let office = Rc::clone(&office);
        tokio::task::spawn_local(async move {
            let _place = place;
            if let Ok(Ok(_seat)) = tokio::time::timeout(SEAT_TIME, seats.acquire()).await {
                talk(stream, peer, &office).await;
            }
        });
        // Those who talk must get on before the backlog is taken whole.
        tokio::task::yield_now().await;
    }
}

/// Among whose connections one counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Whose {
    User(u32),
    Task(Process),
}

/// A place among all connections; given back when dropped.
struct Place(Rc<Cell<usize>>);

impl Place {
    fn take(waiting: &Rc<Cell<usize>>) -> Option<Self> {
        (waiting.get() < CONNECTIONS_MAX).then(|| {
            waiting.set(waiting.get() + 1);
            Self(Rc::clone(waiting))
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn peer(stream: &UnixStream) -> Option<Peer> {
    let credentials = stream.peer_cred().ok()?;
    Some(Peer { pid: u32::try_from(credentials.pid()?).ok()?, uid: credentials.uid() })
}

async fn talk(stream: UnixStream, peer: Peer, office: &Rc<RefCell<Office>>) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    for _ in 0..REQUESTS_MAX {
        let mut line = Vec::new();
        let mut bounded = (&mut read).take(LINE_BYTES_MAX);
        match tokio::time::timeout(REQUEST_TIME, bounded.read_until(b'\n', &mut line)).await {
            Ok(Ok(1..)) => {}
            // Gone, or silent for too long.
            _ => return,
        }
        let complete = line.last() == Some(&b'\n');
        let answer = if complete {
            answer(&line, peer, office)
        } else {
            refused("the line is longer than 16 KiB or not ended", "send one JSON object and a newline")
        };
        let written = tokio::time::timeout(REQUEST_TIME, write.write_all(&answer)).await;
        if !complete || !matches!(written, Ok(Ok(()))) {
            return;
        }
    }
}

fn answer(line: &[u8], peer: Peer, office: &Rc<RefCell<Office>>) -> Vec<u8> {
    let envelope: Envelope = match serde_json::from_slice(line) {
        Ok(envelope) => envelope,
        Err(error) => {
            return refused(&format!("not a request: {error}"), "update airflow-provider-ringfence to ringfence's version");
        }
    };
    if envelope.version != VERSION {
        let error = format!("version {} of the protocol is not known, only {VERSION}", envelope.version);
        return refused(&error, "install the airflow-provider-ringfence of this ringfence's version");
    }
    line_of(&Office::handle(office, peer, envelope.request))
}

fn refused(error: &str, remedy: &str) -> Vec<u8> {
    line_of(&serde_json::json!(Refused { ok: false, error, remedy }))
}

fn line_of(value: &serde_json::Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::super::registry::Supervisor;
    use super::*;

    fn parse(text: &str) -> Result<Request, serde_json::Error> {
        serde_json::from_str::<Envelope>(text).map(|envelope| envelope.request)
    }

    #[test]
    fn the_provider_packages_requests_are_understood() {
        let text = r#"{"version":1,"op":"register","airflow":"3.3.2","instance":"u","dag":"d","task":"t","run":"r","try":2,"map_index":3,"supervisor":"self"}"#;
        let Ok(Request::Register(claim)) = parse(text) else { panic!("a registration") };
        assert_eq!((&*claim.dag, claim.try_number, claim.map_index, claim.supervisor), ("d", 2, 3, Supervisor::Itself));
        let short = r#"{"version":1,"op":"register","dag":"d","task":"t","run":"r","try":1}"#;
        let Ok(Request::Register(claim)) = parse(short) else { panic!("a registration") };
        assert_eq!((claim.map_index, claim.supervisor), (-1, Supervisor::Task));
        for op in ["unregister", "whoami", "routes"] {
            assert!(parse(&format!(r#"{{"version":1,"op":"{op}"}}"#)).is_ok(), "{op}");
        }
        for wrong in
            ["", "[]", r#"{"op":"whoami"}"#, r#"{"version":1,"op":"become"}"#, r#"{"version":1,"op":"register","dag":1}"#]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_is_a_bound_and_places_come_back() {
        let waiting = Rc::new(Cell::new(0));
        let places: Vec<_> = (0..CONNECTIONS_MAX).map(|_| Place::take(&waiting).expect("a place")).collect();
        assert!(Place::take(&waiting).is_none());
        drop(places);
        assert!(Place::take(&waiting).is_some());
    }
}
