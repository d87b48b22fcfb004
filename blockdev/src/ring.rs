//! One worker's ring: it owns every op in flight, and is the one place where the worker waits.

#![expect(
    unsafe_code,
    reason = "hands memory of the slots it owns to the kernel"
)]

pub(crate) mod buffers;
mod call;
mod engine;
mod entry;
mod eventfd;
mod files;
mod flight;
mod helpers;
mod poller;
mod slots;
mod uring;
mod watches;
mod way;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use self::engine::Report;
use self::files::File;
use self::flight::{Flight, Next, Step};
use self::helpers::{Answer, Helpers, Job};
use self::poller::Poller;
use self::slots::Slots;
use self::uring::Uring;
use self::watches::Target;
use self::way::Allowance;
use crate::completion::{Completion, IoError};
use crate::op::{Op, Tag};

pub use self::engine::{Engine, RingError};
pub use self::files::{FileKind, FileSlot};
pub use self::watches::Watch;
pub use self::way::{Way, Ways};

/// Whether [`Ring::submit`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It returns at once.
    No,
    /// It returns when there is something to reap, or after a signal.
    Event,
}

/// What [`Ring::reap`] found.
#[derive(Debug)]
#[must_use = "a completion carries the request's memory and is owed an answer"]
pub enum Event {
    /// An op ended.
    Done(Completion),
    /// A watched eventfd was written to since the last time; its token. Its counter is untouched.
    Ready(u32),
    /// A watch ended, and nothing refers to its fd any more; its token.
    Unwatched(u32),
}

/// One worker's ring. Made on the worker's thread and used there only.
///
/// # Invariants
/// An op that the kernel or a helper thread may touch lies in its slot until their answer came:
/// [`Ring::reap`] is the only way out of a slot, and dropping the ring waits.
#[derive(Debug)]
pub struct Ring {
    core: Core,
    slots: Slots,
    files: Vec<File>,
    helpers: Option<Helpers>,
    /// Answers of helper threads that were collected and not looked at yet.
    answers: VecDeque<Answer>,
    /// Ops that ended without a system call.
    done: VecDeque<Completion>,
    allowance: Allowance,
    broken: bool,
}

#[derive(Debug)]
enum Core {
    Uring(Box<Uring>),
    Threads(Box<Poller>),
}

impl Ring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    /// [`RingError`] when the engine is not available; [`Engine::Threads`] works everywhere.
    pub fn new(engine: Engine) -> Result<Self, RingError> {
        let core = match engine {
            Engine::IoUring => Core::Uring(Box::new(Uring::new().map_err(RingError::IoUring)?)),
            Engine::Threads => Core::Threads(Box::new(Poller::new().map_err(RingError::Epoll)?)),
        };
        Ok(Self {
            core,
            slots: Slots::default(),
            files: Vec::new(),
            helpers: None,
            answers: VecDeque::new(),
            done: VecDeque::new(),
            allowance: Allowance::new(),
            broken: false,
        })
    }

    /// Which engine it is.
    #[must_use]
    pub fn engine(&self) -> Engine {
        match &self.core {
            Core::Uring(_) => Engine::IoUring,
            Core::Threads(_) => Engine::Threads,
        }
    }

    /// Watches an eventfd: every write to it from now on is followed by at least one
    /// [`Event::Ready`] with this token, and so is the present if it is readable already. The
    /// counter is not read. The ring keeps a duplicate of the fd, so the caller may close it.
    ///
    /// # Errors
    /// When no descriptor is left, or the fd cannot be polled.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: u32) -> io::Result<Watch> {
        let fd = fd.try_clone_to_owned()?;
        match &mut self.core {
            Core::Uring(uring) => uring.watch(fd, Target::User(token)),
            Core::Threads(poller) => poller.watch(fd, Target::User(token)),
        }
    }

    /// Ends a watch. [`Event::Unwatched`] follows after the next [`Self::submit`]; until then there
    /// may be an [`Event::Ready`] more. A watch that has ended already is left alone.
    pub fn unwatch(&mut self, watch: Watch) {
        match &mut self.core {
            Core::Uring(uring) => uring.unwatch(watch),
            Core::Threads(poller) => poller.unwatch(watch),
        }
    }

    /// Adds one to an eventfd with the next [`Self::submit`], without ever waiting: a counter that
    /// is saturated has been signalled. The fd must be non-blocking, and must stay open until that
    /// submit has returned.
    pub fn notify(&mut self, fd: BorrowedFd<'_>) {
        match &mut self.core {
            Core::Uring(uring) => uring.notify(fd),
            Core::Threads(_) => eventfd::write(fd),
        }
    }

    /// Makes a file known to the ring, which keeps a duplicate of its descriptor.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn register_file(
        &mut self,
        fd: BorrowedFd<'_>,
        kind: FileKind,
        ways: Ways,
    ) -> io::Result<FileSlot> {
        let mut file = File::new(fd, kind, ways)?;
        let index = u32::try_from(self.files.len())
            .map_err(|error| io::Error::new(io::ErrorKind::QuotaExceeded, error))?;
        self.start_helpers()?;
        if let Core::Uring(uring) = &mut self.core {
            file.fixed = uring.register(file.raw());
        }
        self.files.push(file);
        Ok(FileSlot(index))
    }

    /// Does an op on a file: reads and writes go on until everything was moved, a write-zeroes
    /// takes the best way the file has, and what must be durable ends with an fdatasync (a write
    /// with RWF_DSYNC). The caller has checked the op against the device ([`Op::check`]).
    pub fn start(&mut self, file: FileSlot, tag: Tag, op: Op) {
        let Some(known) = self.files.get(file.0 as usize) else {
            return self.complete(Completion::failed(tag, op, IoError::Os(libc::EBADF)));
        };
        let nothing_to_do = match &op {
            // A discard is advice: what is no whole sector keeps its contents.
            Op::Discard { at, .. } => known.whole_sectors(*at).is_empty(),
            Op::Read { at, .. } | Op::Write { at, .. } | Op::WriteZeroes { at, .. } => {
                at.is_empty()
            }
            Op::Flush { .. } => false,
        };
        if nothing_to_do {
            return self.complete(Completion {
                tag,
                op,
                moved: 0,
                outcome: Ok(()),
            });
        }
        let flight = Flight::new(op, file.0, known);
        match self.slots.insert(tag, flight) {
            Ok(()) => self.call(tag.0),
            Err(flight) => self.complete(busy(tag, flight)),
        }
    }

    /// Takes a completion from a device that did the op at once. It comes out of the next
    /// [`Self::reap`] without a system call.
    pub fn complete(&mut self, completion: Completion) {
        self.done.push_back(completion);
    }

    /// Keeps an op while a device's own threads work on it. Only this thread may touch its memory
    /// meanwhile, through [`Self::parked`]: dropping the ring drops the op.
    ///
    /// # Errors
    /// The op's completion when its tag is in flight already, for [`Self::complete`].
    #[expect(
        clippy::result_large_err,
        reason = "the op comes back by value and is never lost"
    )]
    pub fn park(&mut self, tag: Tag, op: Op) -> Result<(), Completion> {
        self.slots
            .insert(tag, Flight::parked(op))
            .map_err(|flight| busy(tag, flight))
    }

    /// The parked op with this tag.
    pub fn parked(&mut self, tag: Tag) -> Option<&mut Op> {
        self.slots
            .get_mut(tag.0)
            .filter(|flight| flight.step == Step::Parked)
            .map(|f| &mut f.op)
    }

    /// Ends a parked op; its completion comes out of the next [`Self::reap`]. Nothing happens when
    /// no op with this tag is parked.
    pub fn finish_parked(&mut self, tag: Tag, moved: u32, outcome: Result<(), IoError>) {
        if self.parked(tag).is_some()
            && let Some(flight) = self.slots.remove(tag.0)
        {
            self.complete(Completion {
                tag,
                op: flight.op,
                moved,
                outcome,
            });
        }
    }

    /// Ops that were taken and have not come out of [`Self::reap`] yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() + self.done.len()
    }

    /// Whether memory shows that a turn of [`Self::submit`] and [`Self::reap`] brings something.
    /// What only a system call can tell is not seen here: all that the threads engine watches.
    #[inline]
    pub fn has_news(&mut self) -> bool {
        let kernel = match &mut self.core {
            Core::Uring(uring) => uring.has_news(),
            Core::Threads(poller) => poller.is_ready(),
        };
        let helped = || self.helpers.as_ref().is_some_and(Helpers::has_answers);
        kernel || !self.done.is_empty() || !self.answers.is_empty() || helped()
    }

    /// Whether the kernel has not been handed everything yet: a [`Self::submit`] is owed.
    #[inline]
    pub fn has_queued(&mut self) -> bool {
        match &mut self.core {
            Core::Uring(uring) => uring.has_queued(),
            Core::Threads(_) => false,
        }
    }

    /// Hands the batch to the kernel, and waits for an event if `wait` says so and nothing is ready
    /// to reap. It is one system call at most unless the batch is longer than the kernel's queue,
    /// and none when there is nothing to submit and nothing to wait for (the threads engine asks
    /// epoll every time). It may return without an event.
    ///
    /// # Errors
    /// When the kernel takes no more batches. The ring cannot be used any longer then, and neither
    /// can what it has in flight: dropping it leaks that, since the kernel may still write there.
    pub fn submit(&mut self, wait: Wait) -> io::Result<()> {
        let helped = self.helpers.as_ref().is_some_and(Helpers::has_answers);
        let ready = helped || !self.done.is_empty() || !self.answers.is_empty();
        let wait = wait == Wait::Event && !ready;
        self.allowance = Allowance::new();
        if self.broken {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let submitted = match &mut self.core {
            Core::Uring(uring) => uring.submit(wait),
            Core::Threads(poller) => poller.poll(wait),
        };
        if submitted.is_err() {
            self.broken = true;
        }
        submitted
    }

    /// The next event, if there is one. To be called until there is none.
    pub fn reap(&mut self) -> Option<Event> {
        loop {
            if let Some(completion) = self.done.pop_front() {
                return Some(Event::Done(completion));
            }
            if let Some(answer) = self.answers.pop_front() {
                match self.answered(answer.index, answer.res) {
                    Some(completion) => return Some(Event::Done(completion)),
                    None => continue,
                }
            }
            let report = match &mut self.core {
                Core::Uring(uring) => uring.next(),
                Core::Threads(poller) => poller.next(),
            };
            match report {
                Some(Report::Answer {
                    index,
                    generation,
                    res,
                }) => {
                    if self.slots.is_current(index, generation)
                        && let Some(completion) = self.answered(index, res)
                    {
                        return Some(Event::Done(completion));
                    }
                }
                Some(Report::Ready(token)) => return Some(Event::Ready(token)),
                Some(Report::Unwatched(token)) => return Some(Event::Unwatched(token)),
                Some(Report::Helpers) => self.collect_helpers(),
                None => {
                    self.collect_helpers();
                    if self.answers.is_empty() {
                        return None;
                    }
                }
            }
        }
    }

    fn collect_helpers(&mut self) {
        if let Some(helpers) = &mut self.helpers {
            helpers.collect(&mut self.answers);
        }
    }

    /// The kernel answered the call of an op: the next one follows, or the op ends.
    fn answered(&mut self, index: u32, res: i32) -> Option<Completion> {
        let flight = self.slots.get_mut(index)?;
        flight.calling = false;
        let file = self.files.get_mut(flight.file as usize)?;
        match flight.answer(res, file) {
            Next::Call => {
                self.call(index);
                None
            }
            Next::End(outcome) => {
                let Flight { op, moved, .. } = self.slots.remove(index)?;
                Some(Completion {
                    tag: Tag(index),
                    op,
                    moved,
                    outcome,
                })
            }
        }
    }

    /// Makes the call that the op in a slot needs now.
    fn call(&mut self, index: u32) {
        let generation = self.slots.generation(index);
        let Some(flight) = self.slots.get_mut(index) else {
            return;
        };
        let Some(file) = self.files.get(flight.file as usize) else {
            return;
        };
        let Some(call) = flight.call(file) else {
            return;
        };
        let way = file.ways.choose(&call, flight.left(), &mut self.allowance);
        match (way, &mut self.core) {
            (Way::Engine, Core::Uring(uring)) => {
                // SAFETY: the call points into the slot's op. The op leaves the slot only in
                // `answered`, for this call's answer; dropping the ring waits for it or leaks the
                // slot.
                if unsafe { uring.call(index, generation, file, &call) } {
                    flight.calling = true;
                    return;
                }
            }
            (Way::Inline, _) => {
                // SAFETY: as above; it has returned when anything else happens to the slot.
                let res = unsafe { call.execute(file.raw()) };
                // Looked at by `reap`, like every answer: an op in many parts does not recurse.
                self.answers.push_back(Answer { index, res });
                return;
            }
            (Way::Engine, Core::Threads(_)) => {}
        }
        if let Some(helpers) = &mut self.helpers {
            // SAFETY: as above; dropping the ring drops the helpers before the slots.
            unsafe {
                helpers.execute(Job {
                    index,
                    fd: file.raw(),
                    call,
                })
            };
        }
    }

    /// Readies the helper threads; none runs before there is work for it.
    fn start_helpers(&mut self) -> io::Result<()> {
        if self.helpers.is_some() {
            return Ok(());
        }
        let helpers = Helpers::new()?;
        let event = helpers.event().try_clone_to_owned()?;
        match &mut self.core {
            Core::Uring(uring) => uring.watch(event, Target::Helpers)?,
            Core::Threads(poller) => poller.watch(event, Target::Helpers)?,
        };
        self.helpers = Some(helpers);
        Ok(())
    }

    /// Waits until the kernel holds nothing of the slots; false if that cannot be known.
    fn settle(&mut self) -> bool {
        // Calls of the helper threads end here; what they answered does not matter any more.
        drop(self.helpers.take());
        let Core::Uring(uring) = &mut self.core else {
            return true;
        };
        while self.slots.iter_mut().any(|flight| flight.calling) {
            if self.broken || uring.submit(true).is_err() {
                return false;
            }
            while let Some(report) = uring.next() {
                if let Report::Answer {
                    index, generation, ..
                } = report
                    && self.slots.is_current(index, generation)
                    && let Some(flight) = self.slots.get_mut(index)
                {
                    flight.calling = false;
                }
            }
        }
        true
    }
}

impl AsFd for Ring {
    /// What a loop that waits elsewhere polls instead of [`Ring::submit`]: it is readable while
    /// something may have come in since the last [`Ring::reap`] that found nothing. What the ring
    /// itself has still to hand out does not show; it is reaped before the wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        let raw = match &self.core {
            Core::Uring(uring) => uring.raw(),
            Core::Threads(poller) => poller.raw(),
        };
        // SAFETY: the core owns the descriptor, keeps it open, and is borrowed for as long as the
        // result.
        unsafe { BorrowedFd::borrow_raw(raw) }
    }
}

impl Drop for Ring {
    /// Waits for every call the kernel has; the ops are dropped without a completion.
    fn drop(&mut self) {
        if !self.settle() {
            log::error!(
                "the kernel does not give back {} ops: their memory is leaked",
                self.slots.len()
            );
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// A tag that is in flight already: the op that came second fails, the first one goes on.
fn busy(tag: Tag, flight: Flight) -> Completion {
    log::error!("tag {} is in flight already", tag.0);
    Completion::failed(tag, flight.op, IoError::Os(libc::EBUSY))
}
