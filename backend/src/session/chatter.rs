//! Keeps a front end from filling the log, and writes errors with their causes.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

/// Lines the front ends of a device may cause at once.
const BURST: u32 = 16;

/// The time after which they may cause one more.
const REFILL: Duration = Duration::from_secs(5);

/// How many lines the front ends of a device may still cause.
#[derive(Debug)]
pub(super) struct Chatter {
    left: u32,
    since: Instant,
    held_back: u64,
}

impl Chatter {
    pub(super) fn new(now: Instant) -> Chatter {
        Chatter {
            left: BURST,
            since: now,
            held_back: 0,
        }
    }

    /// Whether a line may be written now, and how many were held back since the last one.
    pub(super) fn line(&mut self, now: Instant) -> Option<u64> {
        while self.left < BURST && now.duration_since(self.since) >= REFILL {
            self.left += 1;
            self.since += REFILL;
        }
        if self.left == 0 {
            self.held_back += 1;
            return None;
        }
        if self.left == BURST {
            self.since = now;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

/// An error and what caused it, in one line.
#[derive(Debug)]
pub struct Causes<'a>(pub &'a dyn Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gives_a_burst_and_then_a_line_now_and_then() {
        let start = Instant::now();
        let mut chatter = Chatter::new(start);
        let lines = |chatter: &mut Chatter, now| {
            (0..1000)
                .filter_map(|_| chatter.line(now))
                .collect::<Vec<_>>()
        };
        assert_eq!(lines(&mut chatter, start), vec![0; BURST as usize]);
        assert_eq!(
            lines(&mut chatter, start + REFILL),
            [1000 - u64::from(BURST)]
        );
        assert_eq!(lines(&mut chatter, start + REFILL * 3), [999, 0]);
        let long_after = start + REFILL * 1000;
        assert_eq!(lines(&mut chatter, long_after).len(), BURST as usize);
    }

    #[test]
    fn causes_follow_their_error() {
        let inner = std::io::Error::other("no room");
        let outer = crate::session::Refusal::Descriptor(inner);
        let line = Causes(&outer).to_string();
        assert_eq!(line, "the file descriptor cannot be examined: no room");
    }
}
