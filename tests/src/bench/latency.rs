//! How long requests take, one by one.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::BenchError;
use super::error::host;

/// Some of the percentiles, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    /// Half of all requests take no longer.
    pub p50: f64,
    /// 99 % take no longer.
    pub p99: f64,
    /// 99.9 % take no longer.
    pub p999: f64,
}

impl Latency {
    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        json!({ "p50": self.p50, "p99": self.p99, "p99.9": self.p999 })
    }
}

/// When the requests in flight began, and how long those took that came back.
///
/// A look at the clock costs as much as a request of a null device, so this never runs while
/// throughput is measured. One look serves all requests that came back together, as end of these
/// and as beginning of the next.
pub(super) struct Stopwatch {
    started: Vec<Instant>,
    taken: Histogram<u64>,
}

impl Stopwatch {
    /// For `slots` requests in flight, all of which begin now.
    pub(super) fn new(slots: u32) -> Result<Self, BenchError> {
        // A fixed size: 1 ns to a minute, three digits.
        let taken = Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 3)
            .map_err(|error| host("make a histogram")(std::io::Error::other(error)))?;
        Ok(Self {
            started: vec![Instant::now(); slots as usize],
            taken,
        })
    }

    /// The request in `slot` came back at `now`, and the next one begins.
    #[inline]
    pub(super) fn lap(&mut self, slot: u32, now: Instant) {
        if let Some(started) = self.started.get_mut(slot as usize) {
            let nanos = now.duration_since(*started).as_nanos() as u64;
            self.taken.saturating_record(nanos.max(1));
            *started = now;
        }
    }

    /// What was seen, unless nothing came back.
    pub(super) fn latency(&self) -> Option<Latency> {
        let at = |part| self.taken.value_at_quantile(part) as f64;
        (!self.taken.is_empty()).then(|| Latency {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
        })
    }
}

const LONGEST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_requests() {
        let mut watch = Stopwatch::new(1).unwrap();
        assert_eq!(watch.latency(), None);
        let mut now = watch.started[0];
        for micros in 1..=1000 {
            now += Duration::from_micros(micros);
            watch.lap(0, now);
        }
        let latency = watch.latency().unwrap();
        let near = |got: f64, micros: f64| (got / (micros * 1e3) - 1.0).abs() < 0.002;
        assert!(near(latency.p50, 500.0), "{latency:?}");
        assert!(near(latency.p99, 990.0), "{latency:?}");
        assert!(near(latency.p999, 999.0), "{latency:?}");
    }

    #[test]
    fn slots_are_timed_apart() {
        let mut watch = Stopwatch::new(2).unwrap();
        watch.started[1] = watch.started[0];
        let start = watch.started[0];
        watch.lap(0, start + Duration::from_millis(9));
        watch.lap(0, start + Duration::from_millis(10));
        watch.lap(1, start + Duration::from_millis(10));
        let latency = watch.latency().unwrap();
        assert!((9.9e6..10.1e6).contains(&latency.p999), "{latency:?}");
    }
}
