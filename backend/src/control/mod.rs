//! The control thread: listeners, front ends' sockets, signals, the workers' reports and timers.
//!
//! One thread, one epoll, nothing on it blocks. Requests never pass through it.

mod daemon;
mod faults;
mod listen;
mod port;
mod signals;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, SubscriberOps};
use log::info;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use listen::{Listen, ListenError};
pub use signals::Signals;

use crate::blk::BlkDevice;
use crate::worker::Workers;
use daemon::{Daemon, Phase};
use port::Port;

/// Why the daemon does not serve, or no longer does.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A socket cannot be served.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// An eventfd, a timer or a signal descriptor cannot be made.
    #[error("{what} cannot be set up")]
    Setup {
        /// What it is for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The event loop failed.
    #[error("the event loop failed")]
    Events(#[from] event_manager::Error),
    /// A second signal came while the first was being obeyed.
    #[error("told to leave a second time; requests in flight were not waited for")]
    Interrupted,
    /// Requests did not come back in the time they were given.
    #[error(
        "{in_flight} {} left in flight after the {} s that --drain-timeout gives; what its front \
         end has recorded is done again by the next daemon",
        if *.in_flight == 1 { "request is" } else { "requests are" },
        .timeout.as_secs()
    )]
    DrainTimedOut {
        /// Requests that the storage has not given back.
        in_flight: u64,
        /// The time.
        timeout: Duration,
    },
}

/// The control thread's work, ready to run.
#[derive(Debug)]
pub struct Control {
    events: EventManager<Daemon>,
    daemon: event_manager::SubscriberId,
    stop: Arc<EventFd>,
    drain_timeout: Option<Duration>,
}

/// Stops a [`Control`] from another thread, as SIGTERM would.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<EventFd>);

impl StopHandle {
    /// Asks it to drain and leave; a second time, to leave at once.
    ///
    /// # Errors
    /// When the kernel refuses the eventfd.
    pub fn stop(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Control {
    /// Opens the sockets. Each serves one device, one front end at a time.
    ///
    /// `signals` says whether SIGTERM, SIGINT, SIGUSR1 and SIGHUP are obeyed; they have to be
    /// blocked before the workers are started, which is why they are made by the caller.
    /// `drain_timeout` bounds how long requests in flight are waited for at the end.
    ///
    /// # Errors
    /// What cannot be opened, with the mend where there is one.
    pub fn new(
        sockets: Vec<(Listen, Arc<BlkDevice>)>,
        workers: Workers,
        signals: Option<Signals>,
        drain_timeout: Option<Duration>,
    ) -> Result<Control, ControlError> {
        let stop =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| ControlError::Setup {
                what: "the stop event",
                source,
            })?;
        let stop = Arc::new(stop);
        let mut ports = Vec::new();
        for (listen, device) in sockets {
            ports.push(Port::open(listen, device, workers.count())?);
        }
        let daemon = Daemon::new(ports, workers, signals, stop.clone(), drain_timeout)?;
        let mut events = EventManager::new()?;
        let daemon = events.add_subscriber(daemon);
        if let Some(failure) = events.subscriber_mut(daemon)?.take_failure() {
            return Err(failure.into());
        }
        Ok(Control {
            events,
            daemon,
            stop,
            drain_timeout,
        })
    }

    /// What stops it from another thread.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.stop.clone())
    }

    /// Serves until it is told to leave, or until the last front end of a connected socket left.
    ///
    /// # Errors
    /// When the event loop fails, or on a second signal.
    pub fn run(mut self) -> Result<(), ControlError> {
        loop {
            self.events.run()?;
            let daemon = self.events.subscriber_mut(self.daemon)?;
            match daemon.phase() {
                Phase::Serving | Phase::Draining => {}
                Phase::Done => break,
                Phase::Interrupted => return Err(ControlError::Interrupted),
                Phase::TimedOut => {
                    return Err(ControlError::DrainTimedOut {
                        in_flight: daemon.in_flight(),
                        timeout: self.drain_timeout.unwrap_or_default(),
                    });
                }
            }
        }
        let daemon = self.events.remove_subscriber(self.daemon)?;
        daemon.leave();
        info!("nothing is left in flight");
        Ok(())
    }
}
