//! The way of events from one worker to the admin thread.

use std::sync::Arc;

use super::cells::WorkerCells;
use super::record::Event;

/// Events that may wait in one worker's ring. A burst beyond it is dropped and counted.
pub const EVENTS_MAX: usize = 8_192;

/// A worker's end.
#[derive(Debug)]
pub struct Sender {
    events: rtrb::Producer<Event>,
    /// The worker's own counters.
    pub cells: Arc<WorkerCells>,
}

/// The admin thread's end.
#[derive(Debug)]
pub struct Receiver {
    events: rtrb::Consumer<Event>,
    /// The worker's own counters.
    pub cells: Arc<WorkerCells>,
}

/// One worker's pair.
pub fn pair() -> (Sender, Receiver) {
    let (producer, consumer) = rtrb::RingBuffer::new(EVENTS_MAX);
    let cells = Arc::new(WorkerCells::default());
    (Sender { events: producer, cells: Arc::clone(&cells) }, Receiver { events: consumer, cells })
}

impl Sender {
    /// Sends, or drops and counts; says whether it was sent.
    pub fn send(&mut self, event: Event) -> bool {
        let sent = self.events.push(event).is_ok();
        if !sent {
            self.cells.events_dropped.add(1);
        }
        sent
    }
}

impl Iterator for Receiver {
    type Item = Event;

    /// The next event, if there is one now; after `None` there may be more later.
    fn next(&mut self) -> Option<Event> {
        self.events.pop().ok()
    }
}
