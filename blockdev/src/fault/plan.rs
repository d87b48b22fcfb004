//! What goes wrong, how often, and the dice that decide.

use std::time::Duration;

use iov_iter::MemoryNeeds;

use crate::op::Op;

/// How a fault device misbehaves. Chances are out of a thousand ops.
///
/// What happens to the nth op of the kth channel follows from the seed alone; only the moment at
/// which delayed ops end depends on the clock.
#[derive(Clone, Copy, Debug)]
pub struct FaultPlan {
    /// The size in bytes.
    pub size: u64,
    /// The block size in bytes.
    pub block_size: u32,
    /// What memory the device asks for.
    pub memory: MemoryNeeds,
    /// Where the dice start.
    pub seed: u64,
    /// The op fails, after part of it may have been done.
    pub fail: u16,
    /// A read or write ends before its end and says so.
    pub shorten: u16,
    /// The op takes up to `max_delay`.
    pub delay: u16,
    /// The longest delay, and the longest time an op waits to be overtaken.
    pub max_delay: Duration,
    /// The op ends after one that came later, if one comes within `max_delay`.
    pub reorder: u16,
    /// The op does not end before [`super::FaultHandle::release`] or [`super::FaultHandle::abort`].
    pub stick: u16,
}

impl FaultPlan {
    /// A device of this size on which nothing goes wrong yet.
    #[must_use]
    pub const fn benign(size: u64, block_size: u32, seed: u64) -> Self {
        Self {
            size,
            block_size,
            memory: MemoryNeeds::NONE,
            seed,
            fail: 0,
            shorten: 0,
            delay: 0,
            max_delay: Duration::from_millis(2),
            reorder: 0,
            stick: 0,
        }
    }
}

/// What is done with an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// What it asks for.
    Obey,
    /// Its first bytes, and an error that counts them.
    Shorten(u32),
    /// This errno. Its first bytes may have been transferred, which a disk does not say either.
    Fail {
        /// The errno.
        errno: i32,
        /// Bytes transferred without a word.
        silently: u32,
    },
    /// Nothing: it was taken back.
    Abort,
}

/// What was decided about an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) verdict: Verdict,
    pub(super) delay: Duration,
    pub(super) hold_back: bool,
    pub(super) stuck: bool,
}

/// The decisions of one channel, in the order of its ops.
#[derive(Debug)]
pub(super) struct Dice {
    rng: fastrand::Rng,
    plan: FaultPlan,
}

impl Dice {
    pub(super) fn new(plan: FaultPlan, channel: u64) -> Self {
        // Neighbouring seeds must not give neighbouring channels the same dice.
        let seed = plan.seed ^ channel.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self {
            rng: fastrand::Rng::with_seed(seed),
            plan,
        }
    }

    /// The next decision. Every op takes the same number of throws, so that what happens to one
    /// does not depend on what the ones before it were.
    pub(super) fn decide(&mut self, op: &Op) -> Decision {
        let [fail, shorten, delay, reorder, stick] = std::array::from_fn(|_| self.rng.u16(0..1000));
        let errno = self.rng.choice(ERRNOS).unwrap_or(libc::EIO);
        let fraction = self.rng.u64(0..1000);
        let micros = self.rng.u64(0..1000);
        let part = u32::try_from(op.payload() * fraction / 1000).unwrap_or(0);
        let verdict = if fail < self.plan.fail {
            Verdict::Fail {
                errno,
                silently: part,
            }
        } else if shorten < self.plan.shorten && op.payload() > 0 {
            Verdict::Shorten(part)
        } else {
            Verdict::Obey
        };
        let wait = self.plan.max_delay.mul_f64(micros as f64 / 1000.0);
        Decision {
            verdict,
            delay: if delay < self.plan.delay {
                wait
            } else {
                Duration::ZERO
            },
            hold_back: reorder < self.plan.reorder,
            stuck: stick < self.plan.stick,
        }
    }
}

/// What failing storage says.
const ERRNOS: [i32; 4] = [libc::EIO, libc::ENOSPC, libc::ETIMEDOUT, libc::ENODATA];
