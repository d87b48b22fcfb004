//! When a worker looks at its rings again instead of going to sleep.
//!
//! To be woken costs far more than a request does, but a loop that never sleeps takes a CPU whether
//! there is work or not. So a worker that finds nothing looks again for a while, and learns from
//! how long it had to wait whether that pays: the algorithm by which a hypervisor polls before it
//! halts a virtual CPU (Linux, `halt_poll_ns`).

use std::time::{Duration, Instant};

/// How a worker waits for work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollMode {
    /// It never sleeps while a vring is started: least latency, and a CPU for each worker.
    Always,
    /// It looks again for as long as that has paid of late, and sleeps when it did not.
    #[default]
    Adaptive,
    /// It sleeps as soon as there is nothing to do.
    Never,
}

/// The longest wait that is spent looking: what waking up costs both sides, a few times over.
const LONGEST: Duration = Duration::from_micros(100);

/// The window after the first wait that was short enough to be worth one.
const FIRST: Duration = Duration::from_micros(10);

/// Looks between two looks at the clock, which costs more than a look at a ring.
const LOOKS: u32 = 16;

/// How one worker waits.
#[derive(Debug)]
pub(super) struct Idle {
    mode: PollMode,
    /// While the storage has nothing of the worker's, so that only the driver can bring work.
    for_driver: Window,
    /// While it has.
    for_storage: Window,
    /// The wait under way, if there is one.
    wait: Option<Wait>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    in_flight: usize,
    looks: u32,
    /// When it began, or none before the first look at the clock.
    since: Option<Instant>,
    /// Whether it has lasted longer than the window.
    is_over: bool,
}

impl Wait {
    fn new(in_flight: usize) -> Wait {
        Wait {
            in_flight,
            looks: 0,
            since: None,
            is_over: false,
        }
    }
}

impl Idle {
    pub(super) fn new(mode: PollMode) -> Idle {
        Idle {
            mode,
            for_driver: Window::CLOSED,
            for_storage: Window::CLOSED,
            wait: None,
        }
    }

    /// Whether to look again rather than sleep, with so many requests in flight.
    #[inline]
    pub(super) fn is_open(&mut self, in_flight: usize) -> bool {
        match self.mode {
            PollMode::Always => true,
            PollMode::Never => false,
            PollMode::Adaptive => {
                let is_over = self.wait.is_some_and(|wait| wait.is_over);
                !is_over && !self.window(in_flight).open_for(in_flight).is_zero()
            }
        }
    }

    /// A look found nothing, with so many requests in flight: whether to look again.
    #[inline]
    pub(super) fn looks_again(&mut self, in_flight: usize) -> bool {
        // Nothing closes a window between two looks at the clock.
        let is_between =
            |wait: Wait| !wait.looks.is_multiple_of(LOOKS) && wait.in_flight == in_flight;
        if !self.wait.is_some_and(is_between) && !self.is_open(in_flight) {
            return false;
        }
        let wait = self.wait.get_or_insert(Wait::new(in_flight));
        wait.looks = wait.looks.wrapping_add(1);
        if wait.looks.is_multiple_of(LOOKS) && self.mode == PollMode::Adaptive {
            self.look_at_clock(in_flight);
        }
        true
    }

    #[cold]
    fn look_at_clock(&mut self, in_flight: usize) {
        let window = self.window(in_flight).open_for(in_flight);
        if let Some(wait) = &mut self.wait {
            wait.is_over = wait.since.get_or_insert_with(Instant::now).elapsed() >= window;
        }
    }

    /// The worker goes to sleep until something happens.
    pub(super) fn sleeps(&mut self, in_flight: usize) {
        let wait = self.wait.get_or_insert(Wait::new(in_flight));
        wait.since.get_or_insert_with(Instant::now);
    }

    /// There is something to do.
    #[inline]
    pub(super) fn ends(&mut self) {
        // Found before the clock was looked at: soon enough for any window, which stays as it is.
        if let Some(Wait {
            since: Some(since),
            in_flight,
            ..
        }) = self.wait.take()
        {
            self.window(in_flight).learn(since.elapsed(), in_flight);
        }
    }

    fn window(&mut self, in_flight: usize) -> &mut Window {
        if in_flight == 0 {
            &mut self.for_driver
        } else {
            &mut self.for_storage
        }
    }
}

/// How long looking again has paid of late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window(Duration);

impl Window {
    const CLOSED: Window = Window(Duration::ZERO);

    /// What is learnt from a wait that took so long: a little longer would have found the work, or
    /// no length worth its CPU would have.
    fn learn(&mut self, took: Duration, in_flight: usize) {
        if took > longest(in_flight) {
            *self = Window::CLOSED;
        } else if took > self.0 {
            *self = Window((self.0 * 2).max(FIRST).min(LONGEST));
        }
    }

    #[inline]
    fn open_for(self, in_flight: usize) -> Duration {
        self.0.min(longest(in_flight))
    }
}

/// The longest wait worth its CPU. With one request in flight, being woken late delays all there
/// is; of many, the others go on meanwhile.
#[inline]
fn longest(in_flight: usize) -> Duration {
    match u32::try_from(in_flight) {
        Ok(0 | 1) => LONGEST,
        Ok(count) => LONGEST / count,
        Err(_) => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    fn learnt(waits: &[u32], in_flight: usize) -> Duration {
        let mut window = Window::CLOSED;
        for wait in waits {
            window.learn(*wait * MICROSECOND, in_flight);
        }
        window.open_for(in_flight)
    }

    #[test]
    fn the_window_grows_while_waits_are_short_and_closes_after_a_long_one() {
        assert_eq!(learnt(&[60], 0), FIRST);
        assert_eq!(learnt(&[60, 60, 60], 0), 4 * FIRST);
        assert_eq!(learnt(&[60; 9], 0), 8 * FIRST, "long enough for these");
        assert_eq!(learnt(&[99; 9], 0), LONGEST);
        assert_eq!(
            learnt(&[60, 60, 1, 2], 0),
            2 * FIRST,
            "soon found: as it was"
        );
        assert_eq!(learnt(&[60, 60, 101], 0), Duration::ZERO);
    }

    #[test]
    fn the_more_is_in_flight_the_shorter_is_the_longest_wait() {
        assert_eq!(learnt(&[40; 9], 1), 4 * FIRST);
        assert_eq!(
            learnt(&[40; 9], 4),
            Duration::ZERO,
            "four share what is gained"
        );
        assert_eq!(learnt(&[4; 9], 32), Duration::ZERO);
        assert_eq!(learnt(&[2; 9], 32), LONGEST / 32);
        assert_eq!(longest(usize::MAX), Duration::ZERO);
    }

    /// Looks until the window closes; false if that takes forever.
    fn gives_up(idle: &mut Idle, in_flight: usize) -> bool {
        (0..100_000_000).any(|_| !idle.looks_again(in_flight))
    }

    #[test]
    fn a_worker_sleeps_at_first_and_looks_again_once_that_would_have_paid() {
        let mut idle = Idle::new(PollMode::Adaptive);
        assert!(!idle.looks_again(0));
        // Unless the machine was busy with something else meanwhile, the wait is short.
        let was_short = (0..1000).any(|_| {
            idle.sleeps(0);
            idle.ends();
            idle.is_open(0)
        });
        assert!(was_short && idle.looks_again(0));
        assert!(!idle.looks_again(1), "nothing is known of the storage's");
        assert!(gives_up(&mut idle, 0));
        assert!(!idle.is_open(0), "until this wait is over");
        idle.sleeps(0);
        std::thread::sleep(2 * LONGEST);
        idle.ends();
        assert!(!idle.looks_again(0), "too long a wait");
    }

    #[test]
    fn the_other_modes_learn_nothing() {
        for (mode, looks) in [(PollMode::Always, true), (PollMode::Never, false)] {
            let mut idle = Idle::new(mode);
            for wait in [Duration::ZERO, 2 * LONGEST] {
                idle.sleeps(0);
                std::thread::sleep(wait);
                idle.ends();
                assert_eq!((idle.is_open(0), idle.looks_again(7)), (looks, looks));
            }
        }
    }
}
