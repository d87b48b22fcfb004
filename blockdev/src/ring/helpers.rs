//! Threads that execute calls which block: all file I/O of the threads engine, and the slow calls
//! (fallocate, BLKDISCARD) of both.

#![expect(
    unsafe_code,
    reason = "executes calls whose memory the ring's slots own"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::call::Call;
use crate::event::Event;

/// A call to execute for the op in a slot.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) index: u32,
    pub(super) fd: RawFd,
    pub(super) call: Call,
}

/// What the kernel answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) index: u32,
    pub(super) res: i32,
}

/// The threads of one ring: started when there is more work than ever, joined when the ring goes.
#[derive(Debug)]
pub(super) struct Helpers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Jobs whose answers were not collected, now and at most.
    outstanding: usize,
    peak: usize,
    complained: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    answers: Mutex<Vec<Answer>>,
    /// Whether `answers` may have any; spares the ring a lock each time it looks.
    answered: AtomicBool,
    event: Event,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stopping: bool,
}

impl Helpers {
    /// No threads yet, and the eventfd that will tell of their answers.
    pub(super) fn new() -> io::Result<Self> {
        let shared = Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            answers: Mutex::default(),
            answered: AtomicBool::new(false),
            event: Event::new()?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
            outstanding: 0,
            peak: 0,
            complained: false,
        })
    }

    /// Readable since the last answer; its counter is never read.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Hands over a job. Exactly one answer with its index follows.
    ///
    /// # Safety
    /// What the call points to stays valid until its answer was taken or this value was dropped.
    pub(super) unsafe fn execute(&mut self, job: Job) {
        self.outstanding += 1;
        if self.outstanding > self.peak {
            self.grow();
        }
        if self.threads.len() < self.outstanding.min(MAX_THREADS) {
            self.start_thread();
        }
        lock(&self.shared.queue).jobs.push_back(job);
        if self.threads.is_empty() {
            // Slow is better than stuck: without any thread the work is done here.
            self.shared.drain();
        }
        self.shared.work.notify_one();
    }

    /// Moves the answers that have come into `into`.
    pub(super) fn collect(&mut self, into: &mut VecDeque<Answer>) {
        if self.has_answers() {
            // Cleared first: an answer that comes now sets it again.
            self.shared.answered.store(false, Ordering::Release);
            let before = into.len();
            into.reserve(self.peak);
            into.extend(lock(&self.shared.answers).drain(..));
            self.outstanding = self.outstanding.saturating_sub(into.len() - before);
        }
    }

    /// Whether [`Self::collect`] would find something.
    pub(super) fn has_answers(&self) -> bool {
        self.shared.answered.load(Ordering::Acquire)
    }

    /// More jobs are out than ever: makes room for them all, so that no list grows later.
    fn grow(&mut self) {
        self.peak = self.outstanding;
        let mut queue = lock(&self.shared.queue);
        let more = self.peak.saturating_sub(queue.jobs.len());
        queue.jobs.reserve(more);
        drop(queue);
        let mut answers = lock(&self.shared.answers);
        let more = self.peak.saturating_sub(answers.len());
        answers.reserve(more);
    }

    fn start_thread(&mut self) {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name("blockdev-io".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || shared.run());
        match thread {
            Ok(thread) => self.threads.push(thread),
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    log::error!("helper threads cannot be started, I/O may block: {error}");
                }
            }
        }
    }
}

impl Drop for Helpers {
    /// Waits for the calls that are being executed; those that have not begun are forgotten.
    fn drop(&mut self) {
        let mut queue = lock(&self.shared.queue);
        queue.stopping = true;
        queue.jobs.clear();
        drop(queue);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a helper thread panicked");
            }
        }
    }
}

impl Shared {
    /// A thread's life.
    fn run(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stopping {
                return;
            }
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                self.perform(&job);
                queue = lock(&self.queue);
            } else {
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Does all there is on the caller's thread.
    fn drain(&self) {
        loop {
            let job = lock(&self.queue).jobs.pop_front();
            match job {
                Some(job) => self.perform(&job),
                None => return,
            }
        }
    }

    fn perform(&self, job: &Job) {
        // SAFETY: the caller of `Helpers::execute` keeps the memory valid until the answer is
        // taken, which is after this, or until `Helpers` was dropped, which waits for this thread.
        let res = unsafe { job.call.execute(job.fd) };
        let mut answers = lock(&self.answers);
        let first = answers.is_empty();
        answers.push(Answer {
            index: job.index,
            res,
        });
        self.answered.store(true, Ordering::Release);
        drop(answers);
        // One wake-up for all that come before the ring looks.
        if first {
            self.event.signal();
        }
    }
}

/// A helper that panicked has left nothing half-done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads per ring: enough to keep a disk busy at the depths guests use, few enough that a machine
/// with many workers does not drown in them. They spend their time blocked in the kernel.
const MAX_THREADS: usize = 16;

/// The threads call into the kernel from a few small frames.
const STACK_SIZE: usize = 128 * 1024;
