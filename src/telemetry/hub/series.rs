//! Listener counters added up over workers and over time.
//!
//! Invariant: totals never fall. The cells of a closed listener are read until its worker has let go of them, then folded
//! into a sum, so a listener that comes and goes costs no memory and loses no count. At most [`SERIES_MAX`] names are told
//! apart; all further ones count under the service `other`.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::mesh::router::{Route, RouterSettings, Way};
use crate::telemetry::cells::{Cell, Direction, ListenerCells, SUITES};
use crate::telemetry::close::CloseReason;

/// Listeners told apart by name, over the life of the process.
const SERIES_MAX: usize = 4_096;

/// What counters are grouped by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Inbound or outbound.
    pub direction: Direction,
    /// The local service.
    pub service: Arc<str>,
    /// The upstream's name on outbound listeners.
    pub upstream: Option<Arc<str>>,
}

impl Key {
    /// Of a service's way in.
    pub fn inbound(service: &Arc<str>) -> Self {
        Self { direction: Direction::Inbound, service: Arc::clone(service), upstream: None }
    }

    /// Of a way out.
    pub fn outbound(service: &Arc<str>, upstream: &Arc<str>) -> Self {
        Self { direction: Direction::Outbound, service: Arc::clone(service), upstream: Some(Arc::clone(upstream)) }
    }

    /// What the connections of a route are counted under.
    pub fn of_route(settings: &RouterSettings, route: &Route) -> Self {
        match &route.way {
            Way::Terminate { service, .. } => Self::inbound(&service.name),
            Way::Originate { service, .. } => Self::outbound(&service.name, &route.name),
            Way::Forward(_) | Way::Original(_) => Self::outbound(&settings.service, &route.name),
        }
    }

    /// The key that series share once there are too many.
    pub(in crate::telemetry) fn other(direction: Direction) -> Self {
        Self { direction, service: "other".into(), upstream: None }
    }
}

/// Sums of one key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub active: u64,
    /// Connections that intentions allowed.
    pub allowed: u64,
    /// Payload bytes from the mesh leg to the plain leg.
    pub bytes_from_mesh: u64,
    /// Payload bytes from the plain leg to the mesh leg.
    pub bytes_to_mesh: u64,
    /// TLS handshakes completed.
    pub handshakes: u64,
    /// Of those, resumed ones.
    pub handshakes_resumed: u64,
    /// TLS handshakes completed with whoever is outside of the mesh: the app behind a gateway, or clients before one.
    pub outside_handshakes: u64,
    /// And those that failed.
    pub outside_handshakes_failed: u64,
    /// Connects tried.
    pub connect_attempts: u64,
    /// Of those, failed ones.
    pub connect_failures: u64,
    /// Of the connects that failed, those that took too long.
    pub connect_timeouts: u64,
    /// Far legs open or being opened now.
    pub far_active: u64,
    /// TLS handshakes completed, by cipher suite.
    pub suites: [u64; SUITES.len()],
    /// Endpoints ejected.
    pub ejections: u64,
    /// Choices in panic.
    pub in_panic: u64,
    /// Connections ended, by reason.
    pub closed: [u64; CloseReason::ALL.len()],
}

/// What one worker counted for one key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now.
    pub active: u64,
}

impl Totals {
    /// Adds what `other` counted.
    pub fn merge(&mut self, other: &Self) {
        let pairs = [
            (&mut self.connections, other.connections),
            (&mut self.active, other.active),
            (&mut self.allowed, other.allowed),
            (&mut self.bytes_from_mesh, other.bytes_from_mesh),
            (&mut self.bytes_to_mesh, other.bytes_to_mesh),
            (&mut self.handshakes, other.handshakes),
            (&mut self.handshakes_resumed, other.handshakes_resumed),
            (&mut self.outside_handshakes, other.outside_handshakes),
            (&mut self.outside_handshakes_failed, other.outside_handshakes_failed),
            (&mut self.connect_attempts, other.connect_attempts),
            (&mut self.connect_failures, other.connect_failures),
            (&mut self.connect_timeouts, other.connect_timeouts),
            (&mut self.far_active, other.far_active),
            (&mut self.ejections, other.ejections),
            (&mut self.in_panic, other.in_panic),
        ];
        let lists = self.suites.iter_mut().zip(other.suites).chain(self.closed.iter_mut().zip(other.closed));
        for (mine, theirs) in pairs.into_iter().chain(lists) {
            *mine = mine.wrapping_add(theirs);
        }
    }

    fn add(&mut self, cells: &ListenerCells) {
        let add = |sum: &mut u64, cell: &Cell| *sum = sum.wrapping_add(cell.value());
        add(&mut self.connections, &cells.connections);
        add(&mut self.active, &cells.active);
        add(&mut self.allowed, &cells.allowed);
        add(&mut self.bytes_from_mesh, &cells.bytes_from_mesh);
        add(&mut self.bytes_to_mesh, &cells.bytes_to_mesh);
        add(&mut self.handshakes, &cells.handshakes);
        add(&mut self.handshakes_resumed, &cells.handshakes_resumed);
        add(&mut self.outside_handshakes, &cells.outside_handshakes);
        add(&mut self.outside_handshakes_failed, &cells.outside_handshakes_failed);
        add(&mut self.connect_attempts, &cells.connect_attempts);
        add(&mut self.connect_failures, &cells.connect_failures);
        add(&mut self.connect_timeouts, &cells.connect_timeouts);
        add(&mut self.far_active, &cells.far_active);
        add(&mut self.ejections, &cells.ejections);
        add(&mut self.in_panic, &cells.in_panic);
        for (sum, cell) in self.suites.iter_mut().zip(&cells.suites) {
            add(sum, cell);
        }
        for (sum, cell) in self.closed.iter_mut().zip(&cells.closed) {
            add(sum, cell);
        }
    }
}

/// All listeners' counters.
#[derive(Debug, Default)]
pub struct Series(BTreeMap<Key, Entry>);

#[derive(Debug, Default)]
struct Entry {
    /// Each with its worker.
    live: Vec<(usize, Arc<ListenerCells>)>,
    retired: Totals,
    /// Connections of the retired cells, by worker.
    retired_of: Vec<u64>,
}

impl Series {
    /// Counts `cells` in from now on.
    pub(super) fn add(&mut self, worker: usize, cells: &Arc<ListenerCells>) {
        let mut key = Key { direction: cells.direction, service: Arc::clone(&cells.service), upstream: cells.upstream.clone() };
        if self.0.len() >= SERIES_MAX && !self.0.contains_key(&key) {
            key = Key::other(cells.direction);
        }
        let live = &mut self.0.entry(key).or_default().live;
        if !live.iter().any(|(_, known)| Arc::ptr_eq(known, cells)) {
            live.push((worker, Arc::clone(cells)));
        }
    }

    /// Folds the cells that no worker holds any more.
    pub(super) fn fold(&mut self) {
        for entry in self.0.values_mut() {
            let (retired, retired_of) = (&mut entry.retired, &mut entry.retired_of);
            entry.live.retain_mut(|(worker, cells)| {
                // `get_mut` sees the worker's last writes: its drop of the count happened before.
                let gone = Arc::get_mut(cells);
                if let Some(cells) = gone {
                    retired.add(cells);
                    // Nothing can be open on a listener that nobody holds.
                    (retired.active, retired.far_active) = (0, 0);
                    retired_of.resize(retired_of.len().max(*worker + 1), 0);
                    retired_of[*worker] += cells.connections.value();
                    return false;
                }
                true
            });
        }
    }

    /// The sums as they stand now, in a stable order.
    pub fn totals(&self) -> impl Iterator<Item = (&Key, Totals)> {
        self.0.iter().map(|(key, entry)| {
            let mut totals = entry.retired.clone();
            entry.live.iter().for_each(|(_, cells)| totals.add(cells));
            (key, totals)
        })
    }

    /// How the connections of `key` are spread over the workers, by worker.
    pub fn shares(&self, key: &Key) -> Vec<Share> {
        let Some(entry) = self.0.get(key) else { return Vec::new() };
        let retired = entry.retired_of.iter().map(|connections| Share { connections: *connections, active: 0 });
        let mut shares: Vec<Share> = retired.collect();
        for (worker, cells) in &entry.live {
            shares.resize(shares.len().max(worker + 1), Share::default());
            shares[*worker].connections += cells.connections.value();
            shares[*worker].active += cells.active.value();
        }
        shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(service: &str) -> Arc<ListenerCells> {
        Arc::new(ListenerCells::new(Direction::Inbound, service.into(), None))
    }

    fn only(series: &Series) -> Totals {
        let mut all: Vec<_> = series.totals().map(|(_, totals)| totals).collect();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    #[test]
    fn workers_are_added_up_and_twice_the_same_cells_count_once() {
        let mut series = Series::default();
        let workers = [cells("db"), cells("db")];
        for (worker, cells) in workers.iter().enumerate().chain(workers.iter().enumerate()) {
            series.add(worker, cells);
        }
        workers[0].connections.add(3);
        workers[1].connections.add(4);
        workers[1].closed[CloseReason::Denied as usize].add(2);
        let totals = only(&series);
        assert_eq!((totals.connections, totals.closed[CloseReason::Denied as usize]), (7, 2));
        let key = series.totals().next().expect("one").0.clone();
        assert_eq!(series.shares(&key).iter().map(|share| share.connections).collect::<Vec<_>>(), [3, 4]);
        drop(workers);
        series.fold();
        assert_eq!(series.shares(&key).iter().map(|share| share.connections).collect::<Vec<_>>(), [3, 4], "folded");
    }

    #[test]
    fn a_listener_that_comes_and_goes_keeps_its_counts_and_no_memory() {
        let mut series = Series::default();
        for round in 1..=100 {
            let cells = cells("db");
            series.add(0, &cells);
            cells.bytes_to_mesh.add(10);
            cells.active.add(1);
            series.fold();
            assert_eq!(only(&series).bytes_to_mesh, round * 10, "still held by the worker");
            drop(cells);
            series.fold();
            assert_eq!((only(&series).bytes_to_mesh, only(&series).active), (round * 10, 0));
        }
        assert!(series.0.values().all(|entry| entry.live.is_empty()));
    }

    #[test]
    fn too_many_names_share_one() {
        let mut series = Series::default();
        for index in 0..SERIES_MAX + 5 {
            let cells = cells(&format!("s{index}"));
            cells.connections.add(1);
            series.add(0, &cells);
        }
        assert_eq!(series.totals().count(), SERIES_MAX + 1);
        let other = series.totals().find(|(key, _)| &*key.service == "other").expect("shared").1;
        assert_eq!(other.connections, 5);
    }
}
