//! What reaches a lane from outside its thread: questions of the host's connection, and the wake-up
//! for them and for completions.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, RecvError, SendError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iov_iter::MemoryTable;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{HostError, Memory};
use crate::fds::take;

/// What the connection's thread asks of a lane.
#[derive(Debug)]
pub(super) enum Ask {
    /// Nothing: the answer says that the lane is there.
    Nothing,
    /// Go by these features of the driver from now on.
    Features(u64),
    /// Let everything in flight come back, and use this memory after that.
    Memory {
        /// The lane's own mappings of it.
        table: Arc<MemoryTable>,
        /// The host's.
        memory: Arc<Memory>,
    },
    /// Let what is in flight of a vring, or of all of them, come back. By its place in the lane.
    Drain(Option<usize>),
}

/// An [`Ask`] on its way. Dropped before it was sent through, `done` says that nobody will do it.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) ask: Ask,
    pub(super) done: Sender<()>,
}

/// What somebody who asked waits for.
#[derive(Debug)]
pub(super) struct Answer(Receiver<()>);

impl Answer {
    /// Waits, without a limit: a request that does not come back may still write to memory.
    pub(super) fn wait(self) -> Result<(), HostError> {
        self.0.recv().map_err(|RecvError| HostError::Gone)
    }
}

/// One thread's gate. The host polls its descriptor, which is an epoll instance: the lane's ring is
/// made later than the host wants to know what to listen to.
#[derive(Debug)]
pub(super) struct Gate {
    epoll: Epoll,
    /// Written to when something was asked.
    event: EventFd,
    asks: Sender<Asked>,
    /// The other end, until the lane takes it.
    asked: Mutex<Option<Receiver<Asked>>>,
}

impl Gate {
    pub(super) fn new() -> io::Result<Gate> {
        let (asks, asked) = channel();
        let gate = Gate {
            epoll: Epoll::new()?,
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            asks,
            asked: Mutex::new(Some(asked)),
        };
        gate.listen(&gate.event)?;
        Ok(gate)
    }

    /// Lets the host be woken by this descriptor too, for as long as it is open.
    pub(super) fn listen(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// Asks the lane.
    pub(super) fn ask(&self, ask: Ask) -> Result<Answer, HostError> {
        let (done, answer) = channel();
        self.asks
            .send(Asked { ask, done })
            .map_err(|SendError(_)| HostError::Gone)?;
        self.event.write(1).map_err(HostError::Events)?;
        Ok(Answer(answer))
    }

    /// Takes the wake-up of what was asked so far.
    pub(super) fn woken(&self) {
        // Nothing to take is no error: completions wake the host too.
        let _ = take(&self.event);
    }

    /// The lane's end; only the first to ask gets it.
    pub(super) fn open(&self) -> Option<Receiver<Asked>> {
        self.lock().take()
    }

    /// There will be no lane: whoever asks is told so.
    pub(super) fn close(&self) {
        drop(self.open());
        self.woken();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Receiver<Asked>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
