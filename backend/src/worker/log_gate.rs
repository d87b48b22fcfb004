//! Keeps what guests and broken storage cause from filling the log.

use std::time::{Duration, Instant};

/// The time between two lines of one kind.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets one line through every ten seconds, and counts what it held back.
#[derive(Debug, Default)]
pub(super) struct LogGate {
    last: Option<Instant>,
    held_back: u64,
}

impl LogGate {
    /// Whether a line may be written now, and how many were held back since the last one.
    pub(super) fn open(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < PERIOD)
        {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_gives_one_line() {
        let mut gate = LogGate::default();
        assert_eq!(gate.open(), Some(0));
        assert_eq!((0..1000).filter_map(|_| gate.open()).count(), 0);
        gate.last = Instant::now().checked_sub(PERIOD);
        assert_eq!(gate.open(), Some(1000), "what was held back is told");
    }
}
