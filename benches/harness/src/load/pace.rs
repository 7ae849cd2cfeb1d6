//! When things are due: a timer finer than tokio's millisecond, and the schedule of an open or closed loop.
//!
//! Invariant: an open loop never forgets a message. One that could not go out on time goes out late and its wait counts from when
//! it was due; one that was still unsent when the run was given up counts as a timeout. Must not know sockets of the load. The
//! timer fails only at its start.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};

/// Wakes tasks at an instant, to the precision of one timerfd that the ring reads.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: OwnedFd,
    armed_for: Cell<Option<Instant>>,
    sleepers: RefCell<BinaryHeap<Sleeper>>,
}

#[derive(Debug)]
struct Sleeper {
    at: Instant,
    waker: Waker,
}

impl Timer {
    /// Starts the task that serves the timer; must be called inside the runtime.
    pub(crate) fn start() -> io::Result<Rc<Self>> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        let file = tokio_uring::fs::File::from_std(std::fs::File::from(fd.try_clone()?));
        let timer = Rc::new(Self { fd, armed_for: Cell::new(None), sleepers: RefCell::default() });
        tokio_uring::spawn(Rc::clone(&timer).serve(file));
        Ok(timer)
    }

    async fn serve(self: Rc<Self>, file: tokio_uring::fs::File) {
        let mut expirations = vec![0; 8];
        loop {
            let (result, buffer) = file.read_at(expirations, 0).await;
            expirations = buffer;
            assert!(result.is_ok(), "a timerfd can be read: {result:?}");
            self.armed_for.set(None);
            self.wake_due();
        }
    }

    fn wake_due(&self) {
        let now = Instant::now();
        let mut sleepers = self.sleepers.borrow_mut();
        while let Some(next) = sleepers.peek() {
            if next.at > now {
                self.arm(next.at);
                return;
            }
            if let Some(due) = sleepers.pop() {
                due.waker.wake();
            }
        }
    }

    fn arm(&self, at: Instant) {
        if self.armed_for.get().is_some_and(|earlier| earlier <= at) {
            return;
        }
        // Zero would switch the timer off.
        let wait = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        let armed = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once);
        assert!(armed.is_ok(), "a timerfd takes any time in the future: {armed:?}");
        self.armed_for.set(Some(at));
    }

    /// Sleeps until `at`, or not at all if that has passed.
    pub(crate) fn until(&self, at: Instant) -> Sleep<'_> {
        Sleep { timer: self, at }
    }
}

/// See [`Timer::until`].
#[derive(Debug)]
pub(crate) struct Sleep<'a> {
    timer: &'a Timer,
    at: Instant,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        self.timer.sleepers.borrow_mut().push(Sleeper { at: self.at, waker: context.waker().clone() });
        self.timer.arm(self.at);
        Poll::Pending
    }
}

impl Ord for Sleeper {
    /// The earliest is the greatest, because a binary heap yields the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.cmp(&self.at)
    }
}

impl PartialOrd for Sleeper {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Sleeper {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Sleeper {}

/// The measured time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    /// When the first message is due.
    pub(crate) start: Instant,
    /// From when on nothing more is due.
    pub(crate) end: Instant,
    /// How long after the end messages that are late may still go out.
    pub(crate) grace: Duration,
}

/// What one task of several does when: every `tasks`-th beat of the common rate.
#[derive(Debug)]
pub(crate) struct Schedule {
    window: Window,
    rate_per_s: Option<f64>,
    beat: u64,
    tasks: u64,
}

/// What a schedule says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Go, once this time has come. Latency counts from it.
    At {
        /// When it is due.
        at: Instant,
        /// Its number among all tasks' beats.
        beat: u64,
    },
    /// The run was over before these beats could be started.
    GivenUp(u64),
    /// Nothing more.
    Over,
}

impl Schedule {
    /// The schedule of task `task` of `tasks`. Without a rate it is a closed loop: always due now.
    pub(crate) fn new(window: Window, rate_per_s: Option<f64>, task: usize, tasks: usize) -> Self {
        Self { window, rate_per_s, beat: task as u64, tasks: tasks.max(1) as u64 }
    }

    /// What is next, seen from `now`.
    pub(crate) fn next(&mut self, now: Instant) -> Due {
        let at = self.rate_per_s.map_or(now, |rate| self.time_of(self.beat, rate));
        if at >= self.window.end {
            return Due::Over;
        }
        if now > self.window.end + self.window.grace {
            return self.give_up();
        }
        let beat = self.beat;
        self.beat += self.tasks;
        Due::At { at, beat }
    }

    fn give_up(&mut self) -> Due {
        let mut unsent = 0;
        while self.rate_per_s.is_some_and(|rate| self.time_of(self.beat, rate) < self.window.end) {
            self.beat += self.tasks;
            unsent += 1;
        }
        Due::GivenUp(unsent)
    }

    fn time_of(&self, beat: u64, rate_per_s: f64) -> Instant {
        self.window.start + Duration::from_secs_f64(beat as f64 / rate_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> Window {
        let start = Instant::now();
        Window { start, end: start + Duration::from_secs(1), grace: Duration::from_secs(2) }
    }

    #[test]
    fn tasks_share_the_beats_of_an_open_loop() {
        let window = window();
        let mut beats = Vec::new();
        for task in 0..3 {
            let mut schedule = Schedule::new(window, Some(10.0), task, 3);
            while let Due::At { at, beat } = schedule.next(window.start) {
                assert_eq!(at, window.start + Duration::from_secs_f64(beat as f64 / 10.0));
                beats.push(beat);
            }
        }
        beats.sort_unstable();
        assert_eq!(beats, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn a_late_message_keeps_its_time_and_an_unsent_one_is_counted() {
        let window = window();
        let mut schedule = Schedule::new(window, Some(10.0), 0, 1);
        let late = window.end + Duration::from_secs(1);
        assert_eq!(schedule.next(late), Due::At { at: window.start, beat: 0 });
        assert_eq!(schedule.next(window.end + Duration::from_secs(3)), Due::GivenUp(9));
        assert_eq!(schedule.next(window.end + Duration::from_secs(3)), Due::Over);
    }

    #[test]
    fn a_closed_loop_is_due_until_the_end() {
        let window = window();
        let mut schedule = Schedule::new(window, None, 0, 1);
        assert!(matches!(schedule.next(window.start), Due::At { .. }));
        assert_eq!(schedule.next(window.end), Due::Over);
    }

    #[test]
    fn the_timer_wakes_in_order_and_not_early() {
        tokio_uring::start(async {
            let timer = Timer::start().unwrap();
            let start = Instant::now();
            let late = timer.until(start + Duration::from_millis(20));
            let early = timer.until(start + Duration::from_millis(5));
            let order = RefCell::new(Vec::new());
            tokio::join!(
                async {
                    late.await;
                    order.borrow_mut().push(20);
                },
                async {
                    early.await;
                    order.borrow_mut().push(5);
                }
            );
            assert!(start.elapsed() >= Duration::from_millis(20));
            assert_eq!(*order.borrow(), [5, 20]);
        });
    }
}
