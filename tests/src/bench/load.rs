//! The driver's side of a measurement.

use std::hint;
use std::ops::Range;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::BenchError;
use super::options::Operation;
use crate::driver::Queue;
use crate::driver::verify::{Waiting, next_completion};

/// What the requests are like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) depth: u32,
    pub(super) block: u64,
    pub(super) operation: Operation,
    pub(super) waiting: Waiting,
}

/// Requests that were completed, and how long that took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
}

/// Random requests on one queue, always as many in flight.
pub(super) struct Load<'q> {
    queue: &'q mut Queue,
    shape: Shape,
    blocks: u64,
    whole: [Range<usize>; 1],
    rng: Rng,
    in_flight: u32,
}

impl<'q> Load<'q> {
    /// Starts the requests.
    pub(super) fn start(queue: &'q mut Queue, shape: Shape) -> Result<Self, BenchError> {
        queue.set_calls(shape.waiting == Waiting::Sleeping);
        let part = 0..shape.block as usize;
        let mut load = Self {
            blocks: (queue.disk().capacity / shape.block).max(1),
            queue,
            shape,
            whole: [part],
            rng: Rng::with_seed(7),
            in_flight: 0,
        };
        for slot in 0..shape.depth {
            load.request(slot)?;
            load.in_flight += 1;
        }
        load.queue.kick()?;
        Ok(load)
    }

    /// Goes on for `time`.
    pub(super) fn run(&mut self, time: Duration) -> Result<Progress, BenchError> {
        let start = Instant::now();
        let mut requests = 0;
        let mut looks = 0_u32;
        let mut progress = (0, start);
        loop {
            requests += u64::from(self.turn()?);
            looks += 1;
            // A look at the clock is not free, and a sleeping driver looks seldom.
            if looks < LOOKS && self.shape.waiting == Waiting::Polling {
                continue;
            }
            looks = 0;
            let now = Instant::now();
            let elapsed = now - start;
            if elapsed >= time {
                return Ok(Progress { requests, elapsed });
            }
            if requests > progress.0 {
                progress = (requests, now);
            } else if now - progress.1 > LIMIT {
                // Nothing for a long time; this one waits once more and says what is wrong.
                let (waiting, in_flight) = (self.shape.waiting, self.in_flight);
                let done = next_completion(self.queue, waiting, in_flight, LIMIT)?;
                self.again(done.slot, done.result)?;
                self.queue.kick()?;
            }
        }
    }

    /// Takes what came back and makes as many requests anew; without any, waits a little.
    fn turn(&mut self) -> Result<u32, BenchError> {
        let mut came = 0;
        while came < self.shape.depth {
            let Some(done) = self.queue.completion() else {
                break;
            };
            self.again(done.slot, done.result)?;
            came += 1;
        }
        if came > 0 {
            self.queue.kick()?;
            return Ok(came);
        }
        match self.shape.waiting {
            Waiting::Polling => hint::spin_loop(),
            Waiting::Sleeping => {
                self.queue.wait(LIMIT)?;
            }
        }
        Ok(0)
    }

    /// Waits for what is in flight.
    pub(super) fn finish(mut self) -> Result<(), BenchError> {
        while self.in_flight > 0 {
            let (waiting, in_flight) = (self.shape.waiting, self.in_flight);
            let done = next_completion(self.queue, waiting, in_flight, LIMIT)?;
            check(done.result)?;
            self.in_flight -= 1;
        }
        Ok(())
    }

    #[inline]
    fn again(&mut self, slot: u32, result: i32) -> Result<(), BenchError> {
        check(result)?;
        self.request(slot)
    }

    #[inline]
    fn request(&mut self, slot: u32) -> Result<(), BenchError> {
        let offset = self.rng.u64(0..self.blocks) * self.shape.block;
        match self.shape.operation {
            Operation::Read => self.queue.read(slot, offset, &self.whole)?,
            Operation::Write => self.queue.write(slot, offset, &self.whole)?,
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
