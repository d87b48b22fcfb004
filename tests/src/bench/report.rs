//! The figures, as a table and as JSON.

use std::fmt::{self, Display, Formatter};

use serde_json::{Value, json};

use super::bars::Verdict;
use super::contender::Contender;
use super::figures::{Cell, Idle};
use super::host::Host;
use super::instructions::Instructions;
use super::options::Options;

/// Everything that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// With what options.
    pub options: Options,
    /// On what machine.
    pub host: Host,
    /// The driver's CPU and the back end's.
    pub cpus: (usize, usize),
    /// The cases, in the order of the options, and every contender in each.
    pub cells: Vec<Cell>,
    /// The daemons at rest.
    pub idle: Vec<Idle>,
    /// The instructions of a request.
    pub instructions: Vec<Instructions>,
    /// The bars.
    pub verdicts: Vec<Verdict>,
    /// Contenders that are left out, and why.
    pub missing: Vec<(Contender, String)>,
}

impl Report {
    /// The report as JSON, with every sample.
    #[must_use]
    pub fn json(&self) -> Value {
        let missing = |(contender, why): &(Contender, String)| {
            let name = contender.name();
            json!({ "contender": name, "why": why })
        };
        json!({
            "host": self.host.json(),
            "rounds": self.options.rounds,
            "seconds": self.options.seconds.as_secs_f64(),
            "cpus": { "driver": self.cpus.0, "back_end": self.cpus.1 },
            "cells": self.cells.iter().map(Cell::json).collect::<Vec<_>>(),
            "idle": self.idle.iter().map(Idle::json).collect::<Vec<_>>(),
            "instructions":
                self.instructions.iter().map(Instructions::json).collect::<Vec<_>>(),
            "bars": self.verdicts.iter().map(Verdict::json).collect::<Vec<_>>(),
            "missing": self.missing.iter().map(missing).collect::<Vec<_>>(),
        })
    }

    /// Whether no bar is missed, and none could not be measured.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.is_met)
    }

    /// How it was measured, and whether the machine was quiet.
    pub(super) fn method(&self) -> String {
        let samples: usize = self.cells.iter().map(|cell| cell.samples.len()).sum();
        let disturbed: usize = self.cells.iter().map(Cell::disturbed).sum();
        let warning = if disturbed > 0 {
            format!(" This machine was busy: {disturbed} of {samples} measurements are disturbed.")
        } else {
            String::new()
        };
        format!(
            "Random requests; driver on CPU {}, back end on CPU {}; medians of {} rounds of {:?} \
             (least..most).{warning}",
            self.cpus.0, self.cpus.1, self.options.rounds, self.options.seconds,
        )
    }

    fn cells(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut case = None;
        for cell in &self.cells {
            if case.replace(cell.case) != Some(cell.case) {
                writeln!(f, "\n{}", cell.case)?;
                writeln!(
                    f,
                    "  {:<18}{:>10} {:<19}{:>8}{:>9}{:>8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}",
                    "",
                    "ns/request",
                    "",
                    "kIOPS",
                    "CPU ns",
                    "sleeps",
                    "preempt.",
                    "waited %",
                    "syscalls",
                    "p50 us",
                    "p99 us",
                    "p99.9 us",
                    "MiB"
                )?;
            }
            row(cell, f)?;
        }
        Ok(())
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.host.facts {
            writeln!(f, "{name}: {value}")?;
        }
        if !self.cells.is_empty() {
            writeln!(f, "\n{}", self.method())?;
        }
        self.cells(f)?;
        if !self.idle.is_empty() {
            let title = format!("at rest, for {:?}", self.options.idle);
            let (cpu, wakeups, memory) = ("CPU", "wake-ups/s", "own memory");
            writeln!(f, "\n{title:<28}{cpu:>11}{wakeups:>14}{memory:>14}")?;
        }
        for idle in &self.idle {
            let (memory, cpu) = (mebibytes(idle.memory as f64), idle.cpu * 100.0);
            let name = format!("{}, queues: {}", idle.contender.name(), idle.queues);
            let wakeups = idle.wakeups;
            writeln!(
                f,
                "  {name:<26}{cpu:>9.3} %{wakeups:>14.2}{memory:>10.1} MiB"
            )?;
        }
        if let Some(first) = self.instructions.first() {
            let title = format!("null device, depth {}", first.depth);
            writeln!(f, "\n{title:<40}{:>24}{:>12}", "instructions/request", "")?;
        }
        for count in &self.instructions {
            let (name, each, more) = (count.setting.name(), count.each, count.more * 100.0);
            writeln!(f, "  {name:<38}{each:>24.1}{more:>+10.1} %")?;
        }
        if !self.verdicts.is_empty() {
            let (name, wanted, measured) = ("bar", "wanted", "measured");
            writeln!(f, "\n{name:<64} | {wanted:<10} | {measured:<24} | verdict")?;
        }
        for verdict in &self.verdicts {
            let Verdict { name, wanted, .. } = verdict;
            let measured = verdict.measured.as_deref().unwrap_or("-");
            let word = verdict.word();
            writeln!(f, "{name:<64} | {wanted:<10} | {measured:<24} | {word}")?;
        }
        for (contender, why) in &self.missing {
            writeln!(f, "\n{} is left out: {why}", contender.name())?;
        }
        Ok(())
    }
}

fn row(cell: &Cell, f: &mut Formatter<'_>) -> fmt::Result {
    let nanos = cell.spread(|sample| sample.nanos);
    let range = format!("({:.0}..{:.0})", nanos.least, nanos.most);
    let latency = cell.latency();
    let micros = |part: fn(&super::Latency) -> f64| {
        number(latency.as_ref().map(part).map(|nanos| nanos / 1e3), 1)
    };
    writeln!(
        f,
        "  {:<18}{:>10.0} {:<19}{:>8.1}{:>9.0}{:>8.3}{:>9.4}{:>9.1}{:>9}{:>9}{:>9}{:>9}{:>8}",
        cell.contender.name(),
        nanos.median,
        range,
        1e6 / nanos.median,
        cell.spread(|sample| sample.cpu).median,
        cell.spread(|sample| sample.sleeps).median,
        cell.spread(|sample| sample.preempted).median,
        cell.spread(|sample| sample.waited).median * 100.0,
        number(cell.median(|sample| sample.syscalls), 3),
        micros(|latency| latency.p50),
        micros(|latency| latency.p99),
        micros(|latency| latency.p999),
        number(cell.median(|sample| sample.memory).map(mebibytes), 1),
    )
}

/// A figure, or a dash.
pub(super) fn number(figure: Option<f64>, digits: usize) -> String {
    figure.map_or_else(|| "-".into(), |figure| format!("{figure:.digits$}"))
}

pub(super) fn mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser as _;

    use super::super::Sample;
    use super::*;
    use crate::bench::Latency;

    /// A report of these cells and nothing else.
    pub(in super::super) fn report(cells: Vec<Cell>) -> Report {
        Report {
            options: Options::try_parse_from(["bench"]).unwrap(),
            host: Host::default(),
            cpus: (0, 1),
            cells,
            idle: Vec::new(),
            instructions: Vec::new(),
            verdicts: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// Every default contender in every case of these options, with one sample each.
    pub(in super::super) fn filled(line: &str) -> Report {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        let options = Options::try_parse_from(words).unwrap();
        let mut cells = Vec::new();
        for case in options.cases() {
            for &contender in &options.contenders {
                let nanos = 1000.0 * f64::from(contender as u32 + 1) / f64::from(case.depth);
                let mut cell = Cell::new(contender, case);
                cell.samples = vec![Sample {
                    nanos,
                    cpu: nanos / 2.0,
                    sleeps: 0.25,
                    preempted: 0.0,
                    waited: 0.0,
                    latency: Some(Latency {
                        p50: nanos,
                        p99: 2.0 * nanos,
                        p999: 3.0 * nanos,
                    }),
                    syscalls: None,
                    memory: Some(f64::from(3 << 20)),
                }];
                cells.push(cell);
            }
        }
        Report {
            options,
            ..report(cells)
        }
    }

    #[test]
    fn the_json_has_every_cell_and_its_case() {
        let report = filled("--depths 1,8 --block-size 4K,64K --contenders vublk-null,fio");
        let json = report.json();
        let cells = json["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 2 * 2 * 2 * 2);
        let cell = cells
            .iter()
            .find(|cell| cell["block_size"] == 65536 && cell["contender"] == "fio")
            .unwrap();
        assert_eq!(cell["waiting"], "polling");
        assert_eq!(cell["ns"]["median"], cell["latency_ns"]["p50"]);
        assert_eq!(
            cell["latency_ns"]["p99.9"],
            3.0 * cell["ns"]["median"].as_f64().unwrap()
        );
        assert!(cell["syscalls"].is_null());
        assert_eq!(cell["samples_ns"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_busy_machine_is_told() {
        let mut report = filled("--depths 1 --contenders vublk-null,fio --waiting polling");
        assert!(!report.to_string().contains("busy"), "{report}");
        report.cells[1].samples[0].waited = 0.5;
        let told = "This machine was busy: 1 of 2 measurements are disturbed.";
        assert!(report.to_string().contains(told), "{report}");
    }

    #[test]
    fn the_table_names_every_case() {
        let report = filled("--depths 1,8 --operation mixed --queues 2 --event-idx off");
        let table = report.to_string();
        for case in report.options.cases() {
            assert!(table.contains(&case.to_string()), "{case}\n{table}");
        }
    }
}
