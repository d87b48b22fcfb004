//! The figures, as a table and as JSON.

use std::fmt::{self, Display, Formatter};

use serde_json::{Value, json};

use super::contender::Contender;
use super::options::{Options, WaitingName};

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Nanoseconds a request: the time of the measurement by its requests.
    pub nanos: f64,
    /// Nanoseconds of CPU time of the back end a request.
    pub cpu: f64,
    /// How often the back end went to sleep a request.
    pub sleeps: f64,
}

/// The measurements of one contender under one load.
#[derive(Clone, Debug)]
pub struct Cell {
    /// What was measured.
    pub contender: Contender,
    /// How the driver waited.
    pub waiting: WaitingName,
    /// Requests in flight.
    pub depth: u32,
    /// One for each round.
    pub samples: Vec<Sample>,
}

/// A daemon whose front end asks for nothing.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// What was measured.
    pub contender: Contender,
    /// The part of a CPU that it used, 1 for a whole one.
    pub cpu: f64,
    /// The most memory it has had until then, in bytes.
    pub peak_memory: u64,
}

/// Everything that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// With what options.
    pub options: Options,
    /// The driver's CPU and the back end's.
    pub cpus: (usize, usize),
    /// The loads, in the order of the options.
    pub cells: Vec<Cell>,
    /// The daemons at rest.
    pub idle: Vec<Idle>,
    /// Contenders that are not there, and the program that is missing.
    pub missing: Vec<(Contender, &'static str)>,
}

impl Report {
    /// The report as JSON, with every sample.
    #[must_use]
    pub fn json(&self) -> Value {
        let cell = |cell: &Cell| {
            let samples: Vec<_> = cell.samples.iter().map(|sample| sample.nanos).collect();
            json!({
                "contender": cell.contender.name(),
                "waiting": cell.waiting.name(),
                "depth": cell.depth,
                "ns": cell.spread(|sample| sample.nanos).json(),
                "cpu_ns": cell.spread(|sample| sample.cpu).json(),
                "sleeps": cell.spread(|sample| sample.sleeps).json(),
                "samples_ns": samples,
            })
        };
        let idle = |idle: &Idle| {
            json!({
                "contender": idle.contender.name(),
                "cpu": idle.cpu,
                "peak_memory": idle.peak_memory,
            })
        };
        let missing = |(contender, program): &(Contender, &str)| {
            let name = contender.name();
            json!({ "contender": name, "program": program })
        };
        json!({
            "block_size": self.options.block_size,
            "operation": self.options.operation.name(),
            "rounds": self.options.rounds,
            "seconds": self.options.seconds.as_secs_f64(),
            "cpus": { "driver": self.cpus.0, "back_end": self.cpus.1 },
            "cells": self.cells.iter().map(cell).collect::<Vec<_>>(),
            "idle": self.idle.iter().map(idle).collect::<Vec<_>>(),
            "missing": self.missing.iter().map(missing).collect::<Vec<_>>(),
        })
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let options = &self.options;
        writeln!(
            f,
            "random {} of {} bytes, one queue; driver on CPU {}, back end on CPU {}; \
             medians of {} rounds of {:?} (least..most)",
            options.operation.name(),
            options.block_size,
            self.cpus.0,
            self.cpus.1,
            options.rounds,
            options.seconds,
        )?;
        let mut load = None;
        for cell in &self.cells {
            if load.replace((cell.waiting, cell.depth)) != Some((cell.waiting, cell.depth)) {
                let title = format!("{} driver, depth {}", cell.waiting.name(), cell.depth);
                writeln!(
                    f,
                    "\n{title:<28}{:>10}  {:<20}{:>8}{:>12}{:>10}",
                    "ns/request", "", "kIOPS", "back end ns", "sleeps"
                )?;
            }
            cell.fmt(f)?;
        }
        if !self.idle.is_empty() {
            writeln!(f, "\n{:<28}{:>10}{:>14}", "at rest", "CPU", "peak memory")?;
        }
        for idle in &self.idle {
            let memory = idle.peak_memory as f64 / f64::from(1 << 20);
            let (name, cpu) = (idle.contender.name(), idle.cpu * 100.0);
            writeln!(f, "  {name:<26}{cpu:>9.2}%{memory:>10.1} MiB")?;
        }
        for (contender, program) in &self.missing {
            writeln!(
                f,
                "\n{} is left out: there is no {program}",
                contender.name()
            )?;
        }
        Ok(())
    }
}

impl Display for Cell {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let nanos = self.spread(|sample| sample.nanos);
        let name = self.contender.name();
        let range = format!("({:.0}..{:.0})", nanos.least, nanos.most);
        let thousands = 1e6 / nanos.median;
        let cpu = self.spread(|sample| sample.cpu).median;
        let sleeps = self.spread(|sample| sample.sleeps).median;
        let median = nanos.median;
        writeln!(
            f,
            "  {name:<26}{median:>10.0}  {range:<20}{thousands:>8.1}{cpu:>12.0}{sleeps:>10.3}"
        )
    }
}

impl Cell {
    fn spread(&self, figure: impl Fn(&Sample) -> f64) -> Spread {
        Spread::of(self.samples.iter().map(figure).collect())
    }
}

/// The middle and the ends of some figures; zeroes for none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Self {
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

    fn json(self) -> Value {
        json!({ "median": self.median, "least": self.least, "most": self.most })
    }
}

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
