//! What is measured.

use serde_json::{Value, json};

use super::case::Case;
use super::contender::Contender;
use super::latency::Latency;

/// One measurement. Everything but latencies and memory is a request's share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Nanoseconds: the time of the measurement by its requests.
    pub nanos: f64,
    /// Nanoseconds of CPU time of the back end.
    pub cpu: f64,
    /// How often the back end went to sleep.
    pub sleeps: f64,
    /// How often a thread of the back end had to make room for another.
    pub preempted: f64,
    /// The part of the time in which the driver or the back end could have run but had no CPU. With
    /// one busy thread on each, that is for something else on this machine.
    pub waited: f64,
    /// How long requests took.
    pub latency: Option<Latency>,
    /// System calls of the back end, where they can be counted; in the first round only.
    pub syscalls: Option<f64>,
    /// The most memory the daemon had of its own, in bytes.
    pub memory: Option<f64>,
}

/// The measurements of one contender in one case.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What was measured.
    pub contender: Contender,
    /// How.
    pub case: Case,
    /// One for each round.
    pub samples: Vec<Sample>,
}

impl Cell {
    /// No measurements so far.
    pub(super) fn new(contender: Contender, case: Case) -> Self {
        Self {
            contender,
            case,
            samples: Vec::new(),
        }
    }

    /// A figure of all samples.
    pub(super) fn spread(&self, figure: impl Fn(&Sample) -> f64) -> Spread {
        Spread::of(self.samples.iter().map(figure).collect())
    }

    /// A figure of the samples that have it; its median, unless none has it.
    pub(super) fn median(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let figures: Vec<_> = self.samples.iter().filter_map(figure).collect();
        (!figures.is_empty()).then(|| Spread::of(figures).median)
    }

    /// The medians of the percentiles, each over the rounds.
    pub(super) fn latency(&self) -> Option<Latency> {
        let median =
            |part: fn(&Latency) -> f64| self.median(|sample| sample.latency.as_ref().map(part));
        Some(Latency {
            p50: median(|latency| latency.p50)?,
            p99: median(|latency| latency.p99)?,
            p999: median(|latency| latency.p999)?,
        })
    }

    /// Measurements during which this machine was busy with something else for a good part.
    pub(super) fn disturbed(&self) -> usize {
        let is_disturbed = |sample: &&Sample| sample.waited > DISTURBED;
        self.samples.iter().filter(is_disturbed).count()
    }

    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        let samples: Vec<_> = self.samples.iter().map(|sample| sample.nanos).collect();
        let mut cell = self.case.json();
        cell["contender"] = self.contender.name().into();
        cell["ns"] = self.spread(|sample| sample.nanos).json();
        cell["cpu_ns"] = self.spread(|sample| sample.cpu).json();
        cell["sleeps"] = self.spread(|sample| sample.sleeps).json();
        cell["preempted"] = self.spread(|sample| sample.preempted).json();
        cell["waited"] = self.spread(|sample| sample.waited).json();
        cell["latency_ns"] = self.latency().map_or(Value::Null, |latency| latency.json());
        cell["syscalls"] = self.median(|sample| sample.syscalls).into();
        cell["peak_memory"] = self.median(|sample| sample.memory).into();
        cell["samples_ns"] = samples.into();
        cell
    }
}

/// A daemon whose front end asks for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// What was measured.
    pub contender: Contender,
    /// The vrings, of 256 descriptors each.
    pub queues: usize,
    /// The part of a CPU that it used, 1 for a whole one.
    pub cpu: f64,
    /// How often one of its threads went to sleep again, a second.
    pub wakeups: f64,
    /// The memory of its own that it has, in bytes.
    pub memory: u64,
}

impl Idle {
    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        json!({
            "contender": self.contender.name(),
            "queues": self.queues,
            "cpu": self.cpu,
            "wakeups": self.wakeups,
            "memory": self.memory,
        })
    }
}

/// The middle and the ends of some figures; zeroes for none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    pub(super) fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_unstable_by(f64::total_cmp);
        let half = figures.len() / 2;
        let (Some(&least), Some(&most)) = (figures.first(), figures.last()) else {
            return Self::default();
        };
        let median = if figures.len().is_multiple_of(2) {
            f64::midpoint(figures[half - 1], figures[half])
        } else {
            figures[half]
        };
        Self {
            median,
            least,
            most,
        }
    }

    /// Its part of a report.
    pub(super) fn json(self) -> Value {
        json!({ "median": self.median, "least": self.least, "most": self.most })
    }
}

/// More than sleeping threads wait for a CPU at each of their wake-ups.
const DISTURBED: f64 = 0.2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = Spread::of(vec![5.0, 1.0, 9.0]);
        let expected = Spread {
            median: 5.0,
            least: 1.0,
            most: 9.0,
        };
        assert_eq!(spread, expected);
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 9.0]).median, 3.0);
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }
}
