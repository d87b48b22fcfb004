//! How much memory is pinned, as the kernel counts it.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::frontend::Outcome;

/// How long pins may take to come or go. Registering a gibibyte takes seconds on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pages that a process is charged for as pinned (proc(5), VmPin).
///
/// # Errors
/// When there is no such process.
pub fn pinned_pages(process: u32) -> Outcome<u64> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    let kib: u64 = kib.ok_or(format!("no VmPin in {path}"))?.parse()?;
    Ok(kib / 4)
}

/// Waits until that many pages are pinned.
///
/// # Errors
/// When they are not for a long time.
pub fn wait_pinned(process: u32, pages: u64) -> Outcome {
    let begun = Instant::now();
    loop {
        let now = pinned_pages(process)?;
        if now == pages {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("{now} pages are pinned, and should be {pages}").into());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Pins of the whole machine that were taken and not given back (/proc/vmstat). Others take some
/// for as long as a transfer.
///
/// # Errors
/// When the kernel does not count them.
pub fn machine_pins() -> Outcome<i64> {
    // The counters of other CPUs are added up when this is written.
    let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
    let counts = fs::read_to_string("/proc/vmstat")?;
    let count = |name: &str| -> Outcome<i64> {
        let line = counts.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.ok_or(format!("no {name}"))?.trim().parse()?)
    };
    Ok(count("nr_foll_pin_acquired")? - count("nr_foll_pin_released")?)
}

/// The same once nobody gives back many any more: the rings of a process that has ended are taken
/// down after it.
///
/// # Errors
/// When the kernel does not count them.
pub fn settled_machine_pins() -> Outcome<i64> {
    let mut before = machine_pins()?;
    loop {
        thread::sleep(Duration::from_millis(100));
        let now = machine_pins()?;
        if now >= before {
            return Ok(now);
        }
        before = now;
    }
}

/// Waits until no more than `slack` pins are left above what there was. There may be fewer, which
/// others have given back.
///
/// # Errors
/// When there are more for a long time.
pub fn wait_machine_pins(before: i64, slack: i64) -> Outcome {
    let begun = Instant::now();
    loop {
        let more = machine_pins()? - before;
        if more <= slack {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("{more} pins more than before").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
}
