//! What the event loop dispatches to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{error, info, warn};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::port::{PORTS, Port, Side, side};
use super::signals::{Request, Signals};
use super::{ControlError, faults};
use crate::worker::{Errand, Report, Workers};

/// How often the log says what is being waited for.
const WAIT_LOG_PERIOD: Duration = Duration::from_secs(5);

/// The data of the daemon's own events.
const STOP: u32 = 0;
const REPORTS: u32 = 1;
const SIGNAL: u32 = 2;
const FAULT: u32 = 3;
const TIMER: u32 = 4;
const _: () = assert!(TIMER < PORTS);

/// Everything the event loop dispatches to.
#[derive(Debug)]
pub(super) struct Daemon {
    ports: Vec<Port>,
    workers: Workers,
    signals: Option<Signals>,
    stop: Arc<EventFd>,
    fault: EventFd,
    timer: TimerFd,
    ticking: Ticking,
    phase: Phase,
    /// How long requests in flight may take once the daemon is told to leave; none waits for ever.
    drain_timeout: Option<Duration>,
    /// When that ends.
    deadline: Option<Instant>,
    /// Why the event loop cannot watch what it has to.
    failure: Option<event_manager::Error>,
}

/// How far the daemon is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    /// Front ends are served.
    Serving,
    /// It was told to leave, and requests in flight come back.
    Draining,
    /// Nothing is left to do.
    Done,
    /// It was told to leave a second time.
    Interrupted,
    /// Requests did not come back in the time they were given.
    TimedOut,
}

/// Whether the timer runs. It does not while nothing waits: an idle daemon is not woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ticking {
    Still,
    Running,
}

impl Daemon {
    pub(super) fn new(
        ports: Vec<Port>,
        workers: Workers,
        signals: Option<Signals>,
        stop: Arc<EventFd>,
        drain_timeout: Option<Duration>,
    ) -> Result<Daemon, ControlError> {
        let fault = faults::watch().map_err(|source| ControlError::Setup {
            what: "the SIGBUS handler",
            source,
        })?;
        let timer = TimerFd::new().map_err(|errno| ControlError::Setup {
            what: "the timer",
            source: errno.into(),
        })?;
        Ok(Daemon {
            ports,
            workers,
            signals,
            stop,
            fault,
            timer,
            ticking: Ticking::Still,
            phase: Phase::Serving,
            drain_timeout,
            deadline: None,
            failure: None,
        })
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// Requests that storage has not given back.
    pub(super) fn in_flight(&self) -> u64 {
        self.ports
            .iter()
            .map(|port| port.device().in_flight())
            .sum()
    }

    /// Why it cannot run, if it cannot.
    pub(super) fn take_failure(&mut self) -> Option<event_manager::Error> {
        self.failure.take()
    }

    /// Ends the workers, which have nothing left in flight.
    pub(super) fn leave(self) {
        self.workers.join();
    }

    fn told_to_leave(&mut self, ops: &mut EventOps<'_>) {
        match self.phase {
            Phase::Serving => {
                info!("leaving as soon as the requests in flight are done");
                self.phase = Phase::Draining;
                self.deadline = self.drain_timeout.map(|timeout| Instant::now() + timeout);
                // One that runs may run for longer than that.
                self.ticking = Ticking::Still;
                let Daemon { ports, workers, .. } = self;
                for (place, port) in (0..).zip(ports.iter_mut()) {
                    port.drain(place, &*workers, ops);
                }
            }
            Phase::Draining => self.phase = Phase::Interrupted,
            Phase::Done | Phase::Interrupted | Phase::TimedOut => {}
        }
    }

    fn signalled(&mut self, ops: &mut EventOps<'_>) {
        while let Some(request) = self.signals.as_mut().and_then(Signals::next) {
            match request {
                Request::Leave => self.told_to_leave(ops),
                Request::Refresh => {
                    for port in &self.ports {
                        self.workers.errand(port.device().id(), Errand::Refresh);
                    }
                }
                Request::Report => {
                    for port in &self.ports {
                        info!("{}", port.device().counters_line());
                    }
                }
            }
        }
    }

    fn reports(&mut self, ops: &mut EventOps<'_>) {
        let Daemon { ports, workers, .. } = self;
        for (worker, report) in workers.reports() {
            let device = match report {
                Report::Adopted(device, _)
                | Report::Released(device, _)
                | Report::Fenced(device, _)
                | Report::Helper(device, _) => device,
                Report::Stopped { id, .. } | Report::Broken(id) => id.device,
            };
            for (place, port) in (0..).zip(ports.iter_mut()) {
                if port.device().id() == device {
                    port.reported(place, (worker, report), &*workers, ops);
                }
            }
        }
    }

    fn fault(&mut self, ops: &mut EventOps<'_>) {
        let Daemon { ports, workers, .. } = self;
        for (place, port) in (0..).zip(ports.iter_mut()) {
            port.check_memory(place, &*workers, ops);
        }
    }

    fn socket(&mut self, event: Events, ops: &mut EventOps<'_>) {
        let Daemon { ports, workers, .. } = self;
        let Some((place, side)) = side(event.data()) else {
            return;
        };
        let port = usize::try_from(place)
            .ok()
            .and_then(|index| ports.get_mut(index));
        let Some(port) = port else { return };
        match side {
            Side::Door => port.knocked(place, &*workers, ops),
            Side::Link => port.ready(place, event.event_set(), &*workers, ops),
        }
    }

    fn tick(&mut self) {
        // Setting the timer takes what it has to say back; reading it could wait, since whatever it
        // went off for may be over by now.
        self.ticking = Ticking::Still;
        if let Err(error) = self.timer.clear() {
            error!("the timer cannot be cleared: {error}");
        }
        for port in &self.ports {
            if let Some((since, what)) = port.waits_for()
                && (since >= WAIT_LOG_PERIOD || self.is_late())
            {
                warn!(
                    "{}: {what}, for {} s now",
                    port.device().name(),
                    since.as_secs()
                );
            }
        }
        if matches!(self.phase, Phase::Draining) && self.is_late() {
            self.phase = Phase::TimedOut;
        }
    }

    /// Whether requests had all the time they were given.
    fn is_late(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| deadline <= Instant::now())
    }

    /// How long the timer runs: until somebody has waited long enough to say so, or too long.
    fn tick_after(&self) -> Duration {
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // A timer of no time at all is none.
        let least = Duration::from_millis(1);
        left.map_or(WAIT_LOG_PERIOD, |left| left.clamp(least, WAIT_LOG_PERIOD))
    }

    /// Runs the timer exactly while somebody waits.
    fn set_timer(&mut self) {
        let waiting = self.ports.iter().any(|port| port.waits_for().is_some());
        let set = match (waiting, self.ticking) {
            (true, Ticking::Still) => {
                self.ticking = Ticking::Running;
                self.timer.reset(self.tick_after(), None)
            }
            (false, Ticking::Running) => {
                self.ticking = Ticking::Still;
                self.timer.clear()
            }
            (true, Ticking::Running) | (false, Ticking::Still) => Ok(()),
        };
        if let Err(error) = set {
            error!("the timer cannot be set: {error}");
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&*self.stop, STOP, EventSet::IN))?;
        ops.add(Events::with_data(
            self.workers.event(),
            REPORTS,
            EventSet::IN,
        ))?;
        ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN))?;
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        ops.add(Events::with_data(&self.fault, FAULT, edges))?;
        if let Some(signals) = &self.signals {
            ops.add(Events::with_data(signals, SIGNAL, EventSet::IN))?;
        }
        for (place, port) in (0..).zip(self.ports.iter_mut()) {
            port.start(place, ops)?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for Daemon {
    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        match event.data() {
            STOP => {
                // The counter says how often: twice before we looked is a second time too.
                for _ in 0..self.stop.read().unwrap_or(0).min(2) {
                    self.told_to_leave(ops);
                }
            }
            REPORTS => self.reports(ops),
            SIGNAL => self.signalled(ops),
            FAULT => self.fault(ops),
            TIMER => self.tick(),
            _ => self.socket(event, ops),
        }
        self.set_timer();
        let busy = self.ports.iter().any(|port| !port.is_done());
        if !busy && matches!(self.phase, Phase::Serving | Phase::Draining) {
            self.phase = Phase::Done;
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.failure = self.watch(ops).err();
    }
}
