//! The readiness half of the threads engine: epoll, edge-triggered.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::engine::Report;
use super::watches::{Target, Watch, Watches};

/// An epoll instance and what it watches.
pub(super) struct Poller {
    epoll: Epoll,
    watches: Watches,
    events: Vec<EpollEvent>,
    reports: VecDeque<Report>,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            watches: Watches::default(),
            events: vec![EpollEvent::default(); BATCH],
            reports: VecDeque::with_capacity(2 * BATCH),
        })
    }

    /// Its descriptor: readable while something it watches has become ready.
    pub(super) fn raw(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watches an fd until [`Self::unwatch`].
    pub(super) fn watch(&mut self, fd: OwnedFd, target: Target) -> io::Result<Watch> {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let watch = self.watches.insert(fd, target).ok_or_else(full)?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, pack(watch));
        let Some(raw) = self.watches.get_mut(watch).map(|watched| watched.raw()) else {
            return Err(full());
        };
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, raw, event) {
            drop(self.watches.remove(watch));
            return Err(error);
        }
        Ok(watch)
    }

    /// Ends a watch; [`Report::Unwatched`] follows.
    pub(super) fn unwatch(&mut self, watch: Watch) {
        let Some(watched) = self.watches.remove(watch) else {
            return;
        };
        let none = EpollEvent::default();
        if let Err(error) = self
            .epoll
            .ctl(ControlOperation::Delete, watched.raw(), none)
        {
            log::error!("epoll does not let go of an eventfd: {error}");
        }
        if let Target::User(token) = watched.target {
            self.reports.push_back(Report::Unwatched(token));
        }
    }

    /// Whether [`Self::next`] has something without a system call.
    pub(super) fn is_ready(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Takes what epoll has, and waits for something if `wait` says so. May come back with nothing
    /// after a signal.
    pub(super) fn poll(&mut self, wait: bool) -> io::Result<()> {
        let timeout = if wait && !self.is_ready() { -1 } else { 0 };
        let count = match self.epoll.wait(timeout, &mut self.events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in self.events.iter().take(count) {
            // An event of a watch that ended in the meantime has an old generation.
            if let Some(watched) = self.watches.get_mut(unpack(event.data())) {
                self.reports.push_back(match watched.target {
                    Target::User(token) => Report::Ready(token),
                    Target::Helpers => Report::Helpers,
                });
            }
        }
        Ok(())
    }

    /// The next thing that happened.
    pub(super) fn next(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller")
            .field("watches", &self.watches)
            .finish_non_exhaustive()
    }
}

fn pack(watch: Watch) -> u64 {
    u64::from(watch.generation) << 32 | u64::from(watch.index)
}

fn unpack(data: u64) -> Watch {
    Watch {
        index: data as u32,
        generation: (data >> 32) as u32,
    }
}

/// Events taken per system call; the rest comes with the next.
const BATCH: usize = 64;
