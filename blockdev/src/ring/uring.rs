//! The io_uring engine.

#![expect(
    unsafe_code,
    reason = "submission entries point to memory that the ring's slots own"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, Submitter, cqueue, opcode, squeue, types};

use super::call::Call;
use super::engine::Report;
use super::entry::{Kind, entry, notify_entry, pack, unpack};
use super::eventfd;
use super::files::File;
use super::watches::{Target, Watch, Watches};
use crate::event::Event;

/// One io_uring and what is known about it.
///
/// # Invariants
/// An entry with [`Kind::Call`] points to memory of the slot it names; the ring above keeps that
/// slot until [`Report::Answer`] for it came out of [`Self::next`].
pub(super) struct Uring {
    ring: IoUring,
    /// Entries that found the submission queue full; they go first in the next submit.
    backlog: VecDeque<squeue::Entry>,
    /// Completions taken out of the kernel's queue to make room in it.
    spilled: VecDeque<cqueue::Entry>,
    watches: Watches,
    files: FileTable,
    notify: Notify,
    multishot: bool,
    notify_failed: bool,
}

/// Where registered files go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileTable {
    /// Not asked for yet.
    Untried,
    /// This many of [`FIXED_FILES`] entries are taken.
    Used(u32),
    /// The kernel refused; plain descriptors do.
    Refused,
}

/// How a call eventfd is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notify {
    /// As an entry of the next submit; the flags are what the kernel understands of
    /// "no completion when it worked".
    Entry(squeue::Flags),
    /// At once, by a system call: the kernel cannot write to an eventfd without waiting.
    Direct,
}

impl Uring {
    /// A ring for the calling thread, with as much of the set-up as the kernel understands.
    pub(super) fn new() -> io::Result<Self> {
        let ring = build()?;
        let mut uring = Self {
            ring,
            backlog: VecDeque::new(),
            spilled: VecDeque::new(),
            watches: Watches::default(),
            files: FileTable::Untried,
            notify: Notify::Direct,
            multishot: true,
            notify_failed: false,
        };
        uring.notify = uring.probe_notify()?;
        Ok(uring)
    }

    /// Its descriptor: readable while there are completions to look at.
    pub(super) fn raw(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// What registers things with it.
    pub(super) fn submitter(&self) -> Submitter<'_> {
        self.ring.submitter()
    }

    /// Queues a call of the op in slot `index`; false for calls that would only block a thread of
    /// the kernel's, and that the helper threads make instead.
    ///
    /// # Safety
    /// What the call points to stays valid until the [`Report::Answer`] with this index came out
    /// of [`Self::next`], or until this value was dropped with nothing of it submitted.
    pub(super) unsafe fn call(
        &mut self,
        index: u32,
        generation: u32,
        file: &File,
        call: &Call,
    ) -> bool {
        let Some(entry) = entry(file, call) else {
            return false;
        };
        self.push(entry.user_data(pack(Kind::Call, generation, index)));
        true
    }

    /// Watches an fd until [`Self::unwatch`].
    pub(super) fn watch(&mut self, fd: OwnedFd, target: Target) -> io::Result<Watch> {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let watch = self.watches.insert(fd, target).ok_or_else(full)?;
        self.arm(watch);
        Ok(watch)
    }

    /// Ends a watch; [`Report::Unwatched`] follows.
    pub(super) fn unwatch(&mut self, watch: Watch) {
        if let Some(watched) = self.watches.get_mut(watch)
            && !watched.ending
        {
            watched.ending = true;
            self.disarm(watch);
        }
    }

    /// Adds one to an eventfd, as an entry of the next submit.
    pub(super) fn notify(&mut self, fd: BorrowedFd<'_>) {
        match self.notify {
            Notify::Entry(flags) => {
                let entry = notify_entry(fd.as_raw_fd()).flags(flags);
                self.push(entry.user_data(pack(Kind::Notify, 0, 0)));
            }
            Notify::Direct => eventfd::write(fd),
        }
    }

    /// Puts a file into the kernel's table, if there is one and it has room.
    pub(super) fn register(&mut self, fd: RawFd) -> Option<u32> {
        if self.files == FileTable::Untried {
            let registered = self.ring.submitter().register_files_sparse(FIXED_FILES);
            self.files = match registered {
                Ok(()) => FileTable::Used(0),
                Err(_) => FileTable::Refused,
            };
        }
        let FileTable::Used(used) = self.files else {
            return None;
        };
        if used >= FIXED_FILES {
            return None;
        }
        let updated = self.ring.submitter().register_files_update(used, &[fd]);
        if !matches!(updated, Ok(1)) {
            return None;
        }
        self.files = FileTable::Used(used + 1);
        Some(used)
    }

    /// Whether [`Self::next`] has something without a system call.
    pub(super) fn is_ready(&mut self) -> bool {
        !self.spilled.is_empty() || !self.ring.completion().is_empty()
    }

    /// Whether there is a completion, or the kernel asks to be entered for one.
    #[inline]
    pub(super) fn has_news(&mut self) -> bool {
        self.is_ready() || self.ring.submission().taskrun()
    }

    /// Whether anything is queued.
    #[inline]
    pub(super) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty() || !self.backlog.is_empty()
    }

    /// Hands everything queued to the kernel, and waits for one completion if `wait` says so and
    /// none is there. May come back without one after a signal.
    pub(super) fn submit(&mut self, wait: bool) -> io::Result<()> {
        let mut refusals = 0u32;
        loop {
            self.refill();
            let ready = self.is_ready();
            let queue = self.ring.submission();
            let queued = queue.len();
            let kernel_asks = queue.taskrun() || queue.cq_overflow();
            drop(queue);
            // What is still in the backlog may be what a completion has to come from.
            let want = usize::from(wait && !ready && self.backlog.is_empty());
            if queued == 0 && want == 0 && !kernel_asks {
                return Ok(());
            }
            match self.ring.submitter().submit_and_wait(want) {
                Ok(taken) if taken >= queued && self.backlog.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    // Nothing was queued then: a signal ended the wait.
                    Some(libc::EINTR) => return Ok(()),
                    // The completion queue overflowed, or the kernel is out of memory.
                    Some(libc::EBUSY | libc::EAGAIN) => {
                        self.spill();
                        refusals = refusals.saturating_add(1);
                        if refusals > 16 {
                            std::thread::sleep(Duration::from_micros(100));
                        }
                        if refusals == PATIENCE {
                            log::error!("the kernel takes no I/O, and is asked again: {error}");
                        }
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// The next thing that happened, in the kernel's order.
    pub(super) fn next(&mut self) -> Option<Report> {
        loop {
            let entry = match self.spilled.pop_front() {
                Some(entry) => entry,
                None => self.ring.completion().next()?,
            };
            let (kind, generation, index) = unpack(entry.user_data());
            let report = match kind {
                Some(Kind::Call) => Some(Report::Answer {
                    index,
                    generation,
                    res: entry.result(),
                }),
                Some(Kind::Watch) => self.watched(Watch { index, generation }, &entry),
                Some(Kind::Cancel) => {
                    self.cancelled(Watch { index, generation }, entry.result());
                    None
                }
                Some(Kind::Notify) => {
                    self.notified(entry.result());
                    None
                }
                None => None,
            };
            if report.is_some() {
                return report;
            }
        }
    }

    /// A poll's completion: the fd was written to, or the poll ended.
    fn watched(&mut self, watch: Watch, entry: &cqueue::Entry) -> Option<Report> {
        let watched = self.watches.get_mut(watch)?;
        let (target, ending, fd) = (watched.target, watched.ending, watched.raw());
        if !cqueue::more(entry.flags()) {
            if ending || !self.rearm(watch, entry.result(), fd) {
                drop(self.watches.remove(watch));
                return match target {
                    Target::User(token) => Some(Report::Unwatched(token)),
                    Target::Helpers => None,
                };
            }
        } else if ending {
            return None;
        }
        if entry.result() < 0 {
            return None;
        }
        match target {
            Target::User(token) => Some(Report::Ready(token)),
            Target::Helpers => Some(Report::Helpers),
        }
    }

    /// Starts a poll that ended by itself anew; false when it cannot go on.
    fn rearm(&mut self, watch: Watch, res: i32, fd: RawFd) -> bool {
        if res >= 0 {
            if !self.multishot {
                // Each new poll looks at the level, so the counter must not stay up.
                eventfd::read(fd);
            }
        } else if res == -libc::EINVAL && self.multishot {
            log::info!("this kernel has no multishot poll, every wake-up re-arms it");
            self.multishot = false;
        } else {
            let error = io::Error::from_raw_os_error(res.saturating_neg());
            log::error!("watching an eventfd ended: {error}");
            return false;
        }
        self.arm(watch);
        true
    }

    fn arm(&mut self, watch: Watch) {
        let Some(fd) = self.watches.get_mut(watch).map(|watched| watched.raw()) else {
            return;
        };
        let events = u32::try_from(libc::POLLIN).unwrap_or_default();
        let entry = opcode::PollAdd::new(types::Fd(fd), events)
            .multi(self.multishot)
            .build();
        self.push(entry.user_data(pack(Kind::Watch, watch.generation, watch.index)));
    }

    fn disarm(&mut self, watch: Watch) {
        let poll = pack(Kind::Watch, watch.generation, watch.index);
        let entry = opcode::PollRemove::new(poll).build();
        self.push(entry.user_data(pack(Kind::Cancel, watch.generation, watch.index)));
    }

    /// The answer to [`Self::disarm`]. ENOENT needs nothing: the poll's last completion is already
    /// on its way. EALREADY means it was just being completed, and a multishot poll goes on after
    /// that.
    fn cancelled(&mut self, watch: Watch, res: i32) {
        if res == -libc::EALREADY && self.watches.get_mut(watch).is_some() {
            self.disarm(watch);
        }
    }

    /// A notification that left a completion. EAGAIN says that the counter is saturated: the other
    /// side has been told more often than it could count.
    fn notified(&mut self, res: i32) {
        if res < 0 && res != -libc::EAGAIN && !std::mem::replace(&mut self.notify_failed, true) {
            let error = io::Error::from_raw_os_error(res.saturating_neg());
            log::warn!("an eventfd cannot be written to (said once): {error}");
        }
    }

    /// Queues an entry, for now or for the next submit.
    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: `call`, the only one to pass entries with pointers to request memory, was
            // promised that it stays valid; `notify_entry` points to a static.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // What this submit cannot take stays in the queue, and the entry in the backlog.
            if let Err(error) = self.ring.submitter().submit() {
                log::debug!("the batch waits for its end to be submitted: {error}");
            }
        }
        self.backlog.push_back(entry);
        self.refill();
    }

    /// Moves the backlog into the submission queue as far as it has room.
    fn refill(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`, where the entry came from.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Makes room in the kernel's completion queue.
    fn spill(&mut self) {
        let completions = self.ring.completion();
        self.spilled.extend(completions);
    }

    /// Finds out how eventfds can be written, on one of our own.
    fn probe_notify(&mut self) -> io::Result<Notify> {
        let event = Event::new()?;
        self.push(notify_entry(event.as_fd().as_raw_fd()).user_data(pack(Kind::Notify, 0, 0)));
        let answer = loop {
            self.submit(true)?;
            if let Some(entry) = self.ring.completion().next() {
                break entry.result();
            }
        };
        if answer != 8 {
            log::info!("this kernel cannot write to eventfds in a batch");
            return Ok(Notify::Direct);
        }
        let quiet = self.ring.params().is_feature_skip_cqe_on_success();
        Ok(Notify::Entry(match quiet {
            true => squeue::Flags::SKIP_SUCCESS,
            false => squeue::Flags::empty(),
        }))
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("fd", &self.ring.as_raw_fd())
            .finish_non_exhaustive()
    }
}

/// Sets a ring up. A flag the kernel does not know is dropped, not io_uring: SUBMIT_ALL is 5.18,
/// COOP_TASKRUN 5.19, SINGLE_ISSUER 6.0.
///
/// DEFER_TASKRUN is not asked for: it took more processor time, 4.8 instead of 3.8 us for a direct
/// 4 KiB read at depth 32 (best of five runs on a busy host, Linux 6.18).
fn build() -> io::Result<IoUring> {
    let mut last = io::Error::from_raw_os_error(libc::EINVAL);
    for level in 0..4u32 {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(CQ_ENTRIES);
        if level < 3 {
            builder.setup_submit_all();
        }
        if level < 2 {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        if level < 1 {
            builder.setup_single_issuer();
        }
        match builder.build(SQ_ENTRIES) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// One batch. A longer one takes several system calls.
const SQ_ENTRIES: u32 = 256;

/// Room for the completions of many batches; beyond it the kernel keeps a list of its own.
const CQ_ENTRIES: u32 = 4096;

/// The kernel's table of registered files.
const FIXED_FILES: u32 = 64;

/// Refusals of a submit in a row (about a second) after which the log says so.
const PATIENCE: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::super::call::Vectors;
    use super::*;
    use crate::{FileKind, Way, Ways};

    fn watched() -> (Uring, Event) {
        let mut uring = Uring::new().unwrap();
        let event = Event::new().unwrap();
        let fd = event.as_fd().try_clone_to_owned().unwrap();
        uring.multishot = false;
        uring.watch(fd, Target::User(1)).unwrap();
        (uring, event)
    }

    /// What is reported without waiting.
    fn reports(uring: &mut Uring) -> Vec<Report> {
        uring.submit(false).unwrap();
        std::iter::from_fn(|| uring.next()).collect()
    }

    fn wait(uring: &mut Uring) -> Report {
        loop {
            uring.submit(true).unwrap();
            if let Some(report) = uring.next() {
                return report;
            }
        }
    }

    #[test]
    fn without_multishot_polls_every_write_is_reported_once() {
        let (mut uring, event) = watched();
        assert_eq!(reports(&mut uring), []);
        for _ in 0..100 {
            event.signal();
            assert_eq!(wait(&mut uring), Report::Ready(1));
            assert_eq!(
                reports(&mut uring),
                [],
                "the counter was taken, so the poll waits"
            );
        }
    }

    #[test]
    fn without_multishot_polls_a_watch_still_ends() {
        let (mut uring, event) = watched();
        event.signal();
        assert_eq!(wait(&mut uring), Report::Ready(1));
        let watch = Watch {
            index: 0,
            generation: 0,
        };
        uring.unwatch(watch);
        assert_eq!(wait(&mut uring), Report::Unwatched(1));
        event.signal();
        assert_eq!(reports(&mut uring), []);
    }

    #[test]
    fn a_kernel_that_cannot_write_in_a_batch_is_written_for_at_once() {
        let (mut uring, event) = watched();
        uring.notify = Notify::Direct;
        uring.notify(event.as_fd());
        assert_eq!(wait(&mut uring), Report::Ready(1));
    }

    #[test]
    fn a_file_that_the_table_has_no_room_for_keeps_its_descriptor() {
        let mut uring = Uring::new().unwrap();
        let event = Event::new().unwrap();
        let fd = event.as_fd().as_raw_fd();
        let all: Vec<_> = (0..FIXED_FILES + 2).map(|_| uring.register(fd)).collect();
        let expected: Vec<_> = (0..FIXED_FILES + 2)
            .map(|index| (index < FIXED_FILES).then_some(index))
            .collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn fixed_calls_name_their_slot_and_keep_their_flags() {
        let mut uring = Uring::new().unwrap();
        uring.submitter().register_buffers_sparse(2).unwrap();
        let mut page = vec![7u8; 4096];
        let vector = libc::iovec {
            iov_base: page.as_mut_ptr().cast(),
            iov_len: page.len(),
        };
        // SAFETY: the ring is dropped before the page.
        let updated = unsafe {
            uring
                .submitter()
                .register_buffers_update(1, &[vector], None)
        };
        updated.unwrap();
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let file = File::new(file.as_fd(), FileKind::Regular, Ways::all(Way::Engine)).unwrap();
        let memory = |slot| Vectors::Fixed(vector, slot);
        let write = |slot, flags| Call::Write {
            memory: memory(slot),
            offset: 0,
            flags,
        };
        let read = |slot| Call::Read {
            memory: memory(slot),
            offset: 0,
        };
        for (call, expected) in [
            (write(1, libc::RWF_DSYNC), 4096),
            // No such flag: a write that lost its flags would succeed.
            (write(1, 1 << 30), -libc::EOPNOTSUPP),
            (write(0, 0), -libc::EFAULT),
            (read(1), 4096),
            (read(0), -libc::EFAULT),
        ] {
            // SAFETY: the page outlives the ring.
            assert!(unsafe { uring.call(3, 1, &file, &call) });
            let answer = Report::Answer {
                index: 3,
                generation: 1,
                res: expected,
            };
            assert_eq!(wait(&mut uring), answer, "{call:?}");
        }
    }

    #[test]
    fn more_completions_than_the_kernels_queue_holds_all_arrive() {
        let mut uring = Uring::new().unwrap();
        let total = 3 * CQ_ENTRIES;
        for index in 0..total {
            let nop = opcode::Nop::new().build();
            uring.push(nop.user_data(pack(Kind::Call, 5, index)));
            if index % 100 == 0 {
                uring.submit(false).unwrap();
            }
        }
        let mut seen = vec![false; total as usize];
        for _ in 0..total {
            let report = uring.next().unwrap_or_else(|| wait(&mut uring));
            let Report::Answer {
                index,
                generation: 5,
                res: 0,
            } = report
            else {
                panic!("{report:?}")
            };
            assert!(
                !std::mem::replace(&mut seen[index as usize], true),
                "{index} once"
            );
        }
        assert_eq!(reports(&mut uring), []);
    }
}
