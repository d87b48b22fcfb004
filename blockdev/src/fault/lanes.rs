//! The thread of a fault device: it decides when an op ends, and never touches one.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::plan::{Decision, Verdict};
use crate::event::Event;
use crate::op::Tag;

/// An op that ends now.
pub(super) type Ready = (Tag, Verdict);

/// The device's thread and the lanes it serves, one for each channel.
#[derive(Debug)]
pub(super) struct Lanes {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lanes: Vec<Option<Lane>>,
    sticking: bool,
    stopping: bool,
}

/// One channel's ops.
#[derive(Debug)]
struct Lane {
    waiting: Vec<Ticket>,
    ready: Vec<Ready>,
    event: Arc<Event>,
    next_order: u64,
}

#[derive(Debug)]
struct Ticket {
    tag: Tag,
    order: u64,
    verdict: Verdict,
    due: Instant,
    hold_back: bool,
    stuck: bool,
}

impl Lanes {
    pub(super) fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("blockdev-fault".to_owned())
            .spawn(move || {
                theirs.run();
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A lane for another channel, and the event that tells it of ops that end.
    pub(super) fn open(&self) -> io::Result<(usize, Arc<Event>)> {
        let event = Arc::new(Event::new()?);
        let lane = Lane {
            waiting: Vec::new(),
            ready: Vec::new(),
            event: Arc::clone(&event),
            next_order: 0,
        };
        let mut state = self.shared.lock();
        state.lanes.push(Some(lane));
        Ok((state.lanes.len() - 1, event))
    }

    /// Forgets a lane and the ops in it.
    pub(super) fn close(&self, lane: usize) {
        if let Some(lane) = self.shared.lock().lanes.get_mut(lane) {
            *lane = None;
        }
    }

    /// Takes an op that ends as decided, and not before.
    pub(super) fn push(&self, lane: usize, tag: Tag, decision: Decision, patience: Duration) {
        let mut state = self.shared.lock();
        let sticking = state.sticking;
        let Some(Some(lane)) = state.lanes.get_mut(lane) else {
            return;
        };
        let order = lane.next_order;
        lane.next_order += 1;
        let delay = if decision.hold_back {
            patience
        } else {
            decision.delay
        };
        lane.waiting.push(Ticket {
            tag,
            order,
            verdict: decision.verdict,
            due: Instant::now() + delay,
            hold_back: decision.hold_back,
            stuck: decision.stuck || sticking,
        });
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Moves the ops of a lane that end now into `into`.
    pub(super) fn collect(&self, lane: usize, into: &mut Vec<Ready>) {
        if let Some(Some(lane)) = self.shared.lock().lanes.get_mut(lane) {
            into.append(&mut lane.ready);
        }
    }

    /// From now on ops stick.
    pub(super) fn stick(&self) {
        self.shared.lock().sticking = true;
    }

    /// Ops do not stick any longer; those that did end as they would have.
    pub(super) fn release(&self) {
        let mut state = self.shared.lock();
        state.sticking = false;
        for lane in state.lanes.iter_mut().flatten() {
            lane.waiting
                .iter_mut()
                .for_each(|ticket| ticket.stuck = false);
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Every op that has not ended ends now, without effect.
    pub(super) fn abort(&self) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        for lane in state.lanes.iter_mut().flatten() {
            for ticket in &mut lane.waiting {
                ticket.abort(now);
            }
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// One op of a lane ends now, without effect, unless it has ended already.
    pub(super) fn abort_one(&self, lane: usize, tag: Tag) {
        let now = Instant::now();
        let mut state = self.shared.lock();
        let Some(Some(lane)) = state.lanes.get_mut(lane) else {
            return;
        };
        let taken = lane.waiting.iter_mut().find(|ticket| ticket.tag == tag);
        let Some(ticket) = taken else { return };
        ticket.abort(now);
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Ops that are stuck now.
    pub(super) fn stuck(&self) -> usize {
        let state = self.shared.lock();
        let lanes = state.lanes.iter().flatten();
        lanes
            .flat_map(|lane| &lane.waiting)
            .filter(|ticket| ticket.stuck)
            .count()
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the fault device's thread panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's life: ends what is due, sleeps until the next one is.
    fn run(&self) {
        let mut state = self.lock();
        while !state.stopping {
            let now = Instant::now();
            let lanes = state.lanes.iter_mut().flatten();
            let next = lanes.filter_map(|lane| lane.end_due(now)).min();
            state = match next {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let pause = due.saturating_duration_since(now);
                    let woken = self.changed.wait_timeout(state, pause);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Ticket {
    /// It ends at once and nothing of it is done.
    fn abort(&mut self, now: Instant) {
        self.verdict = Verdict::Abort;
        self.stuck = false;
        self.due = now;
    }
}

impl Lane {
    /// Ends what is due; gives the time the next one is.
    fn end_due(&mut self, now: Instant) -> Option<Instant> {
        let was_empty = self.ready.is_empty();
        loop {
            let is_due = |ticket: &Ticket| !ticket.stuck && ticket.due <= now;
            let Some(index) = self.waiting.iter().position(is_due) else {
                break;
            };
            let ticket = self.waiting.remove(index);
            self.ready.push((ticket.tag, ticket.verdict));
            // Whoever waited to be overtaken has been.
            for other in &mut self.waiting {
                if other.hold_back && other.order < ticket.order {
                    other.due = now;
                }
            }
        }
        if was_empty && !self.ready.is_empty() {
            self.event.signal();
        }
        let waiting = self.waiting.iter().filter(|ticket| !ticket.stuck);
        waiting.map(|ticket| ticket.due).min()
    }
}
