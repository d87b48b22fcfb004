//! Random requests, and a model that knows every byte they must read.

mod layout;
mod model;

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::{Disk, Done, DriverError, Queue};
use layout::Layout;
pub use layout::{Placement, slot_bytes};
pub use model::{Mismatch, Model};

/// How the driver learns that a request came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// It looks at the used ring until something is there, and asks for no calls.
    Polling,
    /// It sleeps until it is called.
    Sleeping,
}

/// A run of random requests on one queue.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Requests kept in flight.
    pub depth: u32,
    /// How the driver waits.
    pub waiting: Waiting,
    /// The shortest and the longest transfer, in bytes; powers of two.
    pub sizes: (usize, usize),
    /// Where the data lies in memory.
    pub placement: Placement,
    /// The number of requests.
    pub requests: u64,
    /// The seed of everything random.
    pub seed: u64,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Reads, all of them checked.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Writes of zeroes, with and without unmap.
    pub write_zeroes: u64,
    /// The most requests that were in flight at one time.
    pub deepest: u32,
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The front end cannot go on.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A request that must succeed did not.
    #[error("{what} of bytes {start}..{end} came back with {result}")]
    Failed {
        /// The request.
        what: &'static str,
        /// Its first byte.
        start: u64,
        /// Its end.
        end: u64,
        /// The result, a negative errno.
        result: i32,
    },
    /// A read brought other bytes than the model's.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// A read wrote to memory it was not given.
    #[error("byte {at} of slot {slot} was written by a read that was not given it")]
    Overrun {
        /// The slot.
        slot: u32,
        /// The byte in the slot.
        at: usize,
    },
    /// A request came back that was not in flight.
    #[error("slot {slot} came back but was not in flight")]
    Unasked {
        /// The slot.
        slot: u32,
    },
    /// Nothing came back for a long time.
    #[error("nothing came back for {limit:?} with {in_flight} requests in flight: {verdict}")]
    Stalled {
        /// How long.
        limit: Duration,
        /// Requests in flight.
        in_flight: u32,
        /// What was lost, as far as the rings tell.
        verdict: &'static str,
    },
}

/// Runs `workload` on `queue`, inside the model's part of the device.
///
/// # Errors
/// `Failed`, `Mismatch`, `Overrun`, `Unasked` when the device answers wrongly; `Stalled` when it
/// stops answering; `Driver` when the front end cannot go on.
pub fn run(
    queue: &mut Queue,
    model: &mut Model,
    workload: &Workload,
) -> Result<Counts, VerifyError> {
    queue.set_calls(workload.waiting == Waiting::Sleeping);
    let mut run = Run {
        disk: queue.disk(),
        slots: (0..workload.depth).map(|_| None).collect(),
        in_flight: 0,
        rng: Rng::with_seed(workload.seed),
        counts: Counts::default(),
        queue,
        model,
        workload,
    };
    let mut left = workload.requests;
    loop {
        while left > 0 && run.issue()? {
            left -= 1;
        }
        run.queue.kick()?;
        if run.in_flight == 0 {
            return Ok(run.counts);
        }
        let done = next_completion(run.queue, workload.waiting, run.in_flight, LIMIT)?;
        run.complete(done)?;
        while let Some(done) = run.queue.completion() {
            run.complete(done)?;
        }
    }
}

/// Reads the model's whole part of the device, one request at a time, and checks it.
///
/// # Errors
/// As for `run`.
pub fn check_all(queue: &mut Queue, model: &mut Model, step: usize) -> Result<(), VerifyError> {
    queue.set_calls(true);
    let area = model.area();
    let mut data = vec![0; step];
    for start in area.clone().step_by(step) {
        let end = area.end.min(start + step as u64);
        let data = &mut data[..(end - start) as usize];
        let whole = 0..data.len();
        queue.read(0, start, &[whole])?;
        queue.kick()?;
        let done = next_completion(queue, Waiting::Sleeping, 1, LIMIT)?;
        if done.result != 0 {
            return Err(failed("read", &(start..end), done.result));
        }
        queue.get(0, 0, data)?;
        model.check(start, data)?;
    }
    Ok(())
}

/// Waits for the next request to come back.
///
/// # Errors
/// `Stalled` after `limit`, `Driver` when the front end cannot go on.
pub fn next_completion(
    queue: &mut Queue,
    waiting: Waiting,
    in_flight: u32,
    limit: Duration,
) -> Result<Done, VerifyError> {
    let started = Instant::now();
    loop {
        if let Some(done) = queue.completion() {
            return Ok(done);
        }
        let stalled = match waiting {
            Waiting::Polling => {
                thread::yield_now();
                started.elapsed() > limit
            }
            Waiting::Sleeping => !queue.wait(limit)?,
        };
        if stalled {
            return Err(VerifyError::Stalled {
                limit,
                in_flight,
                verdict: verdict(queue),
            });
        }
    }
}

/// Tells a lost call from a lost wake-up: a completion that lies in the used ring while the driver
/// sleeps was not called for; a request that one more kick brings back was overlooked.
fn verdict(queue: &mut Queue) -> &'static str {
    if queue.has_completion() {
        return "a call was lost";
    }
    if queue.kick_anyway().is_err() {
        return "the kick cannot be written";
    }
    let deadline = Instant::now() + AFTER_KICK;
    while Instant::now() < deadline {
        if queue.has_completion() {
            return "one more kick brought it back: a kick was lost, or work was slept on";
        }
        thread::sleep(Duration::from_millis(1));
    }
    "a request is stuck in the back end"
}

struct Run<'r> {
    queue: &'r mut Queue,
    model: &'r mut Model,
    workload: &'r Workload,
    disk: Disk,
    slots: Vec<Option<Flight>>,
    in_flight: u32,
    rng: Rng,
    counts: Counts,
}

/// A request in flight.
struct Flight {
    what: What,
    range: Range<u64>,
}

enum What {
    Read(Layout),
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl What {
    fn name(&self) -> &'static str {
        match self {
            Self::Read(_) => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write of zeroes",
        }
    }

    fn only_reads(&self) -> bool {
        match self {
            Self::Read(_) | Self::Flush => true,
            Self::Write | Self::Discard | Self::WriteZeroes => false,
        }
    }
}

impl Run<'_> {
    /// Queues one more request; false when no slot is free, or when what chance offers overlaps
    /// what is in flight.
    fn issue(&mut self) -> Result<bool, VerifyError> {
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            return Ok(false);
        };
        for _ in 0..TRIES {
            let range = self.range();
            let what = self.what(&range);
            if self.is_free(&what, &range) {
                self.queue_request(slot, what, range)?;
                self.in_flight += 1;
                self.counts.deepest = self.counts.deepest.max(self.in_flight);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A length whose logarithm is even, so that short requests are as many as long ones, of
    /// whole blocks; somewhere in the model's area.
    fn range(&mut self) -> Range<u64> {
        let block = u64::from(self.disk.block_size);
        let (shortest, longest) = self.workload.sizes;
        let power = self.rng.u32(shortest.ilog2()..=longest.ilog2());
        let ceiling = 1_u64 << power;
        let len = if self.rng.bool() {
            ceiling
        } else {
            self.rng.u64(shortest as u64..=ceiling)
        };
        let len = len.next_multiple_of(block).min(longest as u64);
        let area = self.model.area();
        let blocks = (area.end - area.start - len) / block;
        let start = area.start + self.rng.u64(0..=blocks) * block;
        start..start + len
    }

    fn what(&mut self, range: &Range<u64>) -> What {
        let len = range.end - range.start;
        match self.rng.u32(0..100) {
            0..3 => What::Flush,
            3..7 if len <= self.disk.max_discard => What::Discard,
            7..15 if len <= self.disk.max_write_zeroes => What::WriteZeroes,
            15..55 => What::Write,
            _ => {
                let placement = self.workload.placement;
                What::Read(Layout::random(&mut self.rng, placement, len as usize))
            }
        }
    }

    fn is_free(&self, what: &What, range: &Range<u64>) -> bool {
        self.slots.iter().flatten().all(|flight| {
            let apart = range.end <= flight.range.start || flight.range.end <= range.start;
            apart || (what.only_reads() && flight.what.only_reads())
        })
    }

    /// The model is written here already: nothing in flight reads what a write overlaps.
    fn queue_request(
        &mut self,
        slot: usize,
        what: What,
        range: Range<u64>,
    ) -> Result<(), VerifyError> {
        let tag = slot as u32;
        let len = range.end - range.start;
        match &what {
            What::Read(layout) => {
                self.counts.reads += 1;
                self.queue.put(tag, 0, &vec![CANARY; layout.span()])?;
                self.queue.read(tag, range.start, layout.parts())?;
            }
            What::Write => {
                self.counts.writes += 1;
                let mut data = vec![0; len as usize];
                self.rng.fill(&mut data);
                let layout = Layout::random(&mut self.rng, self.workload.placement, data.len());
                for (part, piece) in layout.pieces(&data) {
                    self.queue.put(tag, part.start, piece)?;
                }
                self.queue.write(tag, range.start, layout.parts())?;
                self.model.write(range.start, &data);
            }
            What::Flush => {
                self.counts.flushes += 1;
                self.queue.flush(tag)?;
            }
            What::Discard => {
                self.counts.discards += 1;
                self.queue.discard(tag, range.start, len)?;
                self.model.discard(&range);
            }
            What::WriteZeroes => {
                self.counts.write_zeroes += 1;
                let unmap = self.rng.bool();
                self.queue.write_zeroes(tag, range.start, len, unmap)?;
                self.model.write(range.start, &vec![0; len as usize]);
            }
        }
        self.slots[slot] = Some(Flight { what, range });
        Ok(())
    }

    fn complete(&mut self, done: Done) -> Result<(), VerifyError> {
        let slot = done.slot;
        let flight = self
            .slots
            .get_mut(slot as usize)
            .and_then(Option::take)
            .ok_or(VerifyError::Unasked { slot })?;
        self.in_flight -= 1;
        if done.result != 0 {
            return Err(failed(flight.what.name(), &flight.range, done.result));
        }
        let What::Read(layout) = &flight.what else {
            return Ok(());
        };
        let mut span = vec![0; layout.span()];
        self.queue.get(slot, 0, &mut span)?;
        let data = layout.gather(&span);
        if let Some(at) = layout.first_stray(&span, CANARY) {
            return Err(VerifyError::Overrun { slot, at });
        }
        self.model.check(flight.range.start, &data)?;
        Ok(())
    }
}

fn failed(what: &'static str, range: &Range<u64>, result: i32) -> VerifyError {
    VerifyError::Failed {
        what,
        start: range.start,
        end: range.end,
        result,
    }
}

/// How long nothing may come back. The storage of a busy machine is allowed to be slow.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a kick that was written a second time may take.
const AFTER_KICK: Duration = Duration::from_secs(2);

/// How often chance is asked for a range that is free before the driver waits for one.
const TRIES: usize = 64;

/// What memory holds where a read must not write.
const CANARY: u8 = 0xa5;
