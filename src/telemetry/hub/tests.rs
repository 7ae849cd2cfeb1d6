//! Events in, tables and lines out.

use std::io;

use super::callers::tests::{outbound, task};
use super::*;
use crate::mesh::Bind;
use crate::telemetry::cells::{Direction, ListenerCells};
use crate::telemetry::channel::{self, EVENTS_MAX, Sender};
use crate::telemetry::export::tests::page;
use crate::telemetry::log::tests::{inbound, said};
use crate::telemetry::log::{Destination, Reopener};

fn hub(workers: usize) -> (Vec<Sender>, Hub) {
    let (senders, receivers) = (0..workers).map(|_| channel::pair()).unzip();
    let log = ConnectionLog::open(&Destination::None, &Reopener::default()).expect("opens");
    (senders, Hub::new(receivers, log))
}

fn tcp(port: u16) -> Bind {
    Bind::Tcp(([127, 0, 0, 1], port).into())
}

fn up(bind: Bind) -> (Event, Arc<ListenerCells>) {
    let cells = Arc::new(ListenerCells::new(Direction::Inbound, "db".into(), None));
    (Event::ListenerUp { bind, cells: Arc::clone(&cells) }, cells)
}

fn in_use(bind: Bind) -> Event {
    Event::BindFailed { bind, error: io::Error::from_raw_os_error(libc::EADDRINUSE) }
}

#[test]
fn a_drain_is_bounded_and_fair() {
    let (mut senders, mut hub) = hub(2);
    for _ in 0..EVENTS_MAX {
        senders[0].send(Event::Connection(Box::new(inbound(true))));
    }
    senders[1].send(Event::Adopted { worker: 1, generation: 7 });
    assert_eq!(hub.drain(), Progress { events: EVENTS_PER_DRAIN_MAX, more: true });
    assert_eq!(hub.workers()[1].generation, 7, "the quiet worker was heard in the first turn");
    while hub.drain().more {}
    assert_eq!(hub.drain(), Progress { events: 0, more: false });
}

#[test]
fn a_hub_without_workers_drains_nothing() {
    assert_eq!(hub(0).1.drain(), Progress { events: 0, more: false });
}

#[test]
fn a_listener_counts_as_bound_when_all_workers_have_it() {
    let (mut senders, mut hub) = hub(2);
    let wanted = [tcp(20_000), tcp(20_001)];
    let (event, _first) = up(tcp(20_000));
    senders[0].send(event);
    let (event, _second) = up(tcp(20_001));
    senders[0].send(event);
    let (event, _third) = up(tcp(20_001));
    senders[1].send(event);
    senders[1].send(in_use(tcp(20_000)));
    said(|| _ = hub.drain());
    let unbound = hub.listeners().unbound(&wanted);
    assert_eq!(unbound.len(), 1);
    assert_eq!((unbound[0].bind.clone(), unbound[0].bound, unbound[0].wanted), (tcp(20_000), 1, 2));
    assert!(unbound[0].error.as_deref().expect("told").contains("in use"));

    let (event, _fourth) = up(tcp(20_000));
    senders[1].send(event);
    hub.drain();
    assert_eq!(hub.listeners().unbound(&wanted), []);

    for sender in &mut senders {
        sender.send(Event::ListenerDown { bind: tcp(20_000) });
    }
    hub.drain();
    assert_eq!(hub.listeners().iter().count(), 1, "a closed listener is forgotten");
}

#[test]
fn one_worker_is_enough_for_a_unix_socket() {
    let (mut senders, mut hub) = hub(2);
    let bind = Bind::Unix { path: "/run/app.sock".into(), mode: None };
    let (event, _cells) = up(bind.clone());
    senders[1].send(event);
    hub.drain();
    assert_eq!(hub.listeners().unbound([&bind]), []);
}

#[test]
fn a_bind_error_is_told_once_a_change_with_its_remedy() {
    let (mut senders, mut hub) = hub(2);
    let text = said(|| {
        for _ in 0..5 {
            senders[0].send(in_use(tcp(20_000)));
            senders[1].send(in_use(tcp(20_000)));
            hub.drain();
        }
    });
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("127.0.0.1:20000") && text.contains("in use") && text.contains("sport = :20000"), "{text}");

    let mut kept = Vec::new();
    let text = said(|| {
        for sender in &mut senders {
            let (event, cells) = up(tcp(20_000));
            sender.send(event);
            kept.push(cells);
        }
        hub.drain();
        senders[0].send(in_use(tcp(20_000)));
        hub.drain();
    });
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].contains("bound now") && lines[1].contains("ERROR"), "{text}");
}

#[test]
fn a_connection_reaches_every_table_once() {
    let (mut senders, mut hub) = hub(1);
    let denied = || outbound(task("payroll", "load", "r1", 1), "db", Some(7));
    let id = denied().denial.expect("denied").to_string();
    senders[0].send(Event::Connection(Box::new(denied())));
    senders[0].send(Event::Connection(Box::new(inbound(true))));
    said(|| _ = hub.drain());
    assert_eq!(hub.denials().len(), 1);
    assert!(hub.denials().get(&id).is_some_and(|denial| denial.line.get().contains(&id)));
    let totals: Vec<_> = hub.callers().totals().map(|(_, upstream, counts)| (&**upstream, counts.connections)).collect();
    assert_eq!(totals, [("db", 1)]);
    assert_eq!(hub.callers().tries().iter().count(), 1);
}

#[test]
fn accept_errors_are_told_once_an_interval() {
    let (mut senders, mut hub) = hub(1);
    let text = said(|| {
        for _ in 0..50 {
            senders[0].send(Event::AcceptFailed { bind: tcp(20_000), error: io::Error::from_raw_os_error(libc::EMFILE) });
        }
        let now = Instant::now();
        hub.drain_at(now);
        hub.drain_at(now + Duration::from_secs(60));
    });
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].contains("LimitNOFILE") && lines[1].contains("suppressed=49"), "{text}");
}

#[test]
fn ejections_end_and_are_told_by_endpoint() {
    let (mut senders, mut hub) = hub(2);
    let ejected = |seconds| Event::Ejected {
        upstream: "db".into(),
        endpoint: ([10, 0, 0, 1], 20_000).into(),
        duration: Duration::from_secs(seconds),
    };
    senders[0].send(ejected(30));
    senders[1].send(ejected(60));
    let now = Instant::now();
    hub.drain_at(now);
    let ejections = hub.ejections();
    assert_eq!((ejections.len(), ejections[0].workers), (1, 2));
    assert!(ejections[0].remaining > Duration::from_secs(50));
    hub.drain_at(now + Duration::from_secs(61));
    assert!(hub.ejections.is_empty());
}

#[test]
fn drained_turns_true_with_the_last_worker() {
    let (mut senders, mut hub) = hub(2);
    let drained = hub.drained();
    senders[0].send(Event::Drained { worker: 0 });
    senders[0].send(Event::Drained { worker: 0 });
    hub.drain();
    assert!(!*drained.borrow());
    senders[1].send(Event::Drained { worker: 1 });
    hub.drain();
    assert!(*drained.borrow());
}

#[test]
fn rendering_sums_workers_and_keeps_removed_listeners() {
    let (mut senders, mut hub) = hub(2);
    let mut all = Vec::new();
    for (sender, count) in senders.iter_mut().zip([3, 4]) {
        let (event, cells) = up(tcp(20_000));
        cells.connections.add(count);
        sender.send(event);
        sender.cells.enters.add(count);
        all.push(cells);
    }
    hub.drain();
    let sum = r#"ringfence_connections_total{direction="inbound",service="db"} 7"#;
    assert!(page(&mut hub, Which::All).lines().any(|line| line == sum));
    assert!(page(&mut hub, Which::All).lines().any(|line| line == r#"ringfence_worker_enters_total{worker="1"} 4"#));
    all.clear();
    for sender in &mut senders {
        sender.send(Event::ListenerDown { bind: tcp(20_000) });
    }
    hub.drain_at(Instant::now() + SWEEP_INTERVAL * 2);
    assert!(page(&mut hub, Which::All).lines().any(|line| line == sum), "counters of a removed listener stay");
}
