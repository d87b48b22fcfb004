//! The order of the measurements.

use std::path::Path;

use super::contender::{Contender, Disk, Form};
use super::figures::Cell;
use super::host::{Host, version, vublk_takes};
use super::image::Tmpfs;
use super::machine::usable_cpus;
use super::measure::Bench;
use super::report::Report;
use super::schedule::Schedule;
use super::{BenchError, Options, bars, image, instructions, rest};
use crate::guest::DaemonKind;

/// Measures what the options ask for.
///
/// # Errors
/// [`BenchError`], when a back end does not start, fails a request or stops answering.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let cpus = cpus(options)?;
    let (mut cells, mut resting) = plan(options);
    let missing = missing(&cells);
    let is_there = |contender| !missing.iter().any(|(other, _)| *other == contender);
    cells.retain(|cell| is_there(cell.contender));
    resting.retain(|(contender, _)| is_there(*contender));

    let needs = |disk| {
        let mut all = cells.iter().map(|cell| cell.contender);
        all.any(|contender| contender.about().disk == disk)
    };
    let file = needs(Disk::File)
        .then(|| image::prepare(options.file.as_deref(), options.size))
        .transpose()?;
    let tmpfs = needs(Disk::Tmpfs)
        .then(|| Tmpfs::new(options.size))
        .transpose()?;
    let bench = Bench {
        options,
        cpus,
        schedule: Schedule::current()?,
        file: file.as_deref().unwrap_or(Path::new("")),
        tmpfs: tmpfs.as_ref().map_or(Path::new(""), Tmpfs::path),
    };
    let mut turns: Vec<(Contender, usize)> = Vec::new();
    for cell in &cells {
        let turn = (cell.contender, cell.case.queues);
        if !turns.contains(&turn) {
            turns.push(turn);
        }
    }
    for round in 0..options.rounds {
        for &turn in &turns {
            bench.turn(&mut cells, turn, round)?;
        }
        turns.reverse();
    }
    let idle = rest::watch(&bench, &resting)?;
    let mut report = Report {
        options: options.clone(),
        host: Host::describe(file.as_deref()),
        cpus,
        cells,
        idle,
        instructions: Vec::new(),
        verdicts: Vec::new(),
        missing,
    };
    // Bars that need it are told as not measured.
    if options.instructions || options.bars && version("valgrind").is_some() {
        let depth = options.depths.iter().copied().max().unwrap_or(1);
        report.instructions = instructions::count(depth, cpus)?;
    }
    if options.bars {
        report.verdicts = bars::judge(&report);
    }
    Ok(report)
}

fn cpus(options: &Options) -> Result<(usize, usize), BenchError> {
    if let Some([driver, back_end]) = options.cpus.as_deref() {
        return Ok((*driver, *back_end));
    }
    let usable = usable_cpus()?;
    let first = usable.first().copied().unwrap_or(0);
    Ok((first, usable.get(1).copied().unwrap_or(first)))
}

/// Every cell, without samples, and the daemons to be watched at rest.
fn plan(options: &Options) -> (Vec<Cell>, Vec<(Contender, usize)>) {
    if options.bars {
        return (bars::cells(), bars::resting());
    }
    if options.instructions {
        return (Vec::new(), Vec::new());
    }
    let mut cells = Vec::new();
    for case in options.cases() {
        let all = options.contenders.iter().copied();
        let fitting = all.filter(|contender| contender.fits(&case));
        cells.extend(fitting.map(|contender| Cell::new(contender, case)));
    }
    let queues = options.queues.first().copied().unwrap_or(1).into();
    let daemons = options.contenders.iter().filter(|one| one.is_daemon());
    (cells, daemons.map(|&one| (one, queues)).collect())
}

/// Contenders that cannot be measured here, and why.
fn missing(cells: &[Cell]) -> Vec<(Contender, String)> {
    let mut seen = Vec::new();
    let mut missing = Vec::new();
    for cell in cells {
        if seen.contains(&cell.contender) {
            continue;
        }
        seen.push(cell.contender);
        if let Some(why) = lacks(cell.contender) {
            missing.push((cell.contender, why));
        }
    }
    missing
}

fn lacks(contender: Contender) -> Option<String> {
    if let Some(program) = contender.program() {
        return version(program)
            .is_none()
            .then(|| format!("there is no {program}"));
    }
    let Form::Daemon(DaemonKind::Vublk, _, options) = contender.about().form else {
        return None;
    };
    let mut names = options.iter().map(|(name, _)| name);
    let unknown = names.find(|name| !vublk_takes(name))?;
    Some(format!("this vublk has no {unknown}"))
}
