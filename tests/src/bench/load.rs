//! The driver's side of a measurement.

use std::hint;
use std::ops::Range;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::BenchError;
use super::case::Case;
use super::error::host;
use super::latency::{Latency, Stopwatch};
use crate::driver::verify::{Waiting, next_completion};
use crate::driver::{Queue, wait_any};

/// Requests that were completed, and how long that took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
}

/// Random requests on all queues, always as many in flight.
pub(super) struct Load<'q> {
    queues: &'q mut [Queue],
    case: Case,
    waiting: Waiting,
    blocks: u64,
    whole: [Range<usize>; 1],
    rng: Rng,
    watch: Option<Stopwatch>,
}

impl<'q> Load<'q> {
    /// Starts the requests; there is at least one queue.
    pub(super) fn start(queues: &'q mut [Queue], case: Case) -> Result<Self, BenchError> {
        let waiting = case.waiting.waiting();
        let first = queues
            .first()
            .ok_or_else(|| host("use the first queue")(std::io::ErrorKind::NotFound.into()))?;
        let part = 0..case.block as usize;
        let mut load = Self {
            blocks: (first.disk().capacity / case.block).max(1),
            queues,
            case,
            waiting,
            whole: [part],
            rng: Rng::with_seed(7),
            watch: None,
        };
        for queue in 0..load.queues.len() {
            load.queues[queue].set_calls(waiting == Waiting::Sleeping);
            for slot in 0..case.depth {
                load.request(queue, slot)?;
            }
            load.queues[queue].kick()?;
        }
        Ok(load)
    }

    /// Goes on for `time`, and until something came back.
    pub(super) fn run(&mut self, time: Duration) -> Result<Progress, BenchError> {
        let start = Instant::now();
        let mut requests = 0;
        let mut looks = 0_u32;
        let mut progress = (0, start);
        loop {
            requests += u64::from(self.turn()?);
            looks += 1;
            // A look at the clock is not free, and a sleeping driver looks seldom.
            if looks < LOOKS && self.waiting == Waiting::Polling {
                continue;
            }
            looks = 0;
            let now = Instant::now();
            let elapsed = now - start;
            if elapsed >= time && requests > 0 {
                return Ok(Progress { requests, elapsed });
            }
            if requests > progress.0 {
                progress = (requests, now);
            } else if now - progress.1 > LIMIT {
                self.revive()?;
            }
        }
    }

    /// Goes on for `time` with an eye on each request.
    pub(super) fn latency(&mut self, time: Duration) -> Result<Option<Latency>, BenchError> {
        self.watch = Some(Stopwatch::new(self.case.in_flight())?);
        self.run(time)?;
        Ok(self.watch.take().and_then(|watch| watch.latency()))
    }

    /// Nothing for a long time: each queue is waited for once more, which says what is wrong.
    fn revive(&mut self) -> Result<(), BenchError> {
        let (waiting, depth) = (self.waiting, self.case.depth);
        for index in 0..self.queues.len() {
            let queue = &mut self.queues[index];
            let done = next_completion(queue, waiting, depth, LIMIT)?;
            check(done.result)?;
            self.request(index, done.slot)?;
            self.queues[index].kick()?;
        }
        Ok(())
    }

    /// Takes what came back and makes as many requests anew; without any, waits a little.
    #[inline]
    fn turn(&mut self) -> Result<u32, BenchError> {
        let mut came = 0;
        for queue in 0..self.queues.len() {
            came += self.serve(queue)?;
        }
        if came == 0 {
            match self.waiting {
                Waiting::Polling => hint::spin_loop(),
                Waiting::Sleeping => {
                    wait_any(self.queues, LIMIT)?;
                }
            }
        }
        Ok(came)
    }

    #[inline]
    fn serve(&mut self, queue: usize) -> Result<u32, BenchError> {
        let mut came = 0;
        let mut now = None;
        while came < self.case.depth {
            let Some(done) = self.queues[queue].completion() else {
                break;
            };
            check(done.result)?;
            if let Some(watch) = &mut self.watch {
                let slot = queue as u32 * self.case.depth + done.slot;
                watch.lap(slot, *now.get_or_insert_with(Instant::now));
            }
            self.request(queue, done.slot)?;
            came += 1;
        }
        if came > 0 {
            self.queues[queue].kick()?;
        }
        Ok(came)
    }

    /// Waits for what is in flight.
    pub(super) fn finish(self) -> Result<(), BenchError> {
        for queue in self.queues {
            for in_flight in (1..=self.case.depth).rev() {
                let done = next_completion(queue, self.waiting, in_flight, LIMIT)?;
                check(done.result)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn request(&mut self, queue: usize, slot: u32) -> Result<(), BenchError> {
        let offset = self.rng.u64(0..self.blocks) * self.case.block;
        let reads = self.case.operation.reads(&mut self.rng);
        let queue = &mut self.queues[queue];
        if reads {
            queue.read(slot, offset, &self.whole)?;
        } else {
            queue.write(slot, offset, &self.whole)?;
        }
        Ok(())
    }
}

fn check(result: i32) -> Result<(), BenchError> {
    match result {
        0 => Ok(()),
        _ => Err(BenchError::Request { result }),
    }
}

/// A polling driver looks at the clock once in so many looks at the ring.
const LOOKS: u32 = 64;

/// Without progress for so long, something was lost.
const LIMIT: Duration = Duration::from_secs(10);
