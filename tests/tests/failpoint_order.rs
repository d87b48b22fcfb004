//! The order of a completion's steps: that it loses nothing is shown for every interleaving of
//! them with a migration's reader and a crash, and that the daemon keeps it is seen in itself.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use vublk_tests::frontend::{DirtyLog, FrontEnd, InflightFile, Options, Outcome, STEPS, Served};

/// What a completion does, each at once as far as others can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Data and status are in guest memory.
    Data,
    /// Their pages are marked.
    Mark,
    /// The used index counts the request; the driver may act on it.
    Used,
    /// The request is no longer recorded as in flight.
    Clear,
}
use Step::{Clear, Data, Mark, Used};

/// One request's world: a page, its bit, its copy on the other side, and what a successor sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct World {
    data: bool,
    bit: bool,
    copied: bool,
    used: bool,
    recorded: bool,
}

impl World {
    fn after(mut self, step: Step) -> World {
        match step {
            Data => self.data = true,
            Mark => self.bit = true,
            Used => self.used = true,
            Clear => self.recorded = false,
        }
        self
    }

    /// The reader takes the bit and copies the page as it is. Taking and copying are two steps,
    /// but what is copied later than the bit is taken is only newer.
    fn read(mut self) -> World {
        if self.bit {
            self.bit = false;
            self.copied = self.data;
        }
        self
    }
}

/// Everything that can happen: after each step the reader may pass by, and where `crash` is set the
/// daemon may die, and a successor does again what is recorded and not used. Gives the number of
/// ends, and how many of them lost the page: the driver was told of data that the other side lacks.
fn explore(order: &[Step], crash: bool) -> (usize, usize) {
    let mut ends = 0;
    let mut lost = 0;
    let start = World {
        recorded: true,
        ..World::default()
    };
    let mut open = vec![(start, 0, crash)];
    let mut seen = BTreeSet::new();
    while let Some((world, at, may_crash)) = open.pop() {
        if !seen.insert((world, at, may_crash)) {
            continue;
        }
        let read = world.read();
        if read != world {
            open.push((read, at, may_crash));
        }
        if may_crash {
            // The used index tells a successor that the request is done, whatever is recorded.
            let again = world.recorded && !world.used;
            let next = if again { 0 } else { order.len() };
            open.push((world, next, false));
        }
        match order.get(at) {
            Some(step) => open.push((world.after(*step), at + 1, may_crash)),
            None => {
                ends += 1;
                // The last pass of the reader, with the rings stopped.
                let end = world.read();
                if end.used && end.data && !end.copied {
                    lost += 1;
                }
            }
        }
    }
    (ends, lost)
}

#[test]
fn only_marks_between_the_data_and_the_used_index_lose_nothing() {
    let all = [Data, Mark, Used, Clear];
    let mut safe = Vec::new();
    // Every order in which nobody is told of data that is not there, and nothing that is not
    // answered is forgotten.
    for a in all {
        for b in all {
            for c in all {
                for d in all {
                    let order = [a, b, c, d];
                    let at = |step| order.iter().position(|other| *other == step);
                    let (Some(data), Some(_), Some(used), Some(clear)) =
                        (at(Data), at(Mark), at(Used), at(Clear))
                    else {
                        continue;
                    };
                    if data < used && used < clear {
                        let (ends, lost) = explore(&order, true);
                        assert!(ends > 0);
                        if lost == 0 {
                            safe.push(order);
                        }
                    }
                }
            }
        }
    }
    assert_eq!(safe, [[Data, Mark, Used, Clear]]);
    // Without a crash it is enough that the mark comes after the data.
    assert_eq!(explore(&[Data, Used, Mark, Clear], false).1, 0);
    assert!(explore(&[Mark, Data, Used, Clear], false).1 > 0);
}

#[test]
fn the_daemon_keeps_the_order() -> Outcome {
    let scenario = fail::FailScenario::setup();
    let trace = Arc::new(Mutex::new(Vec::new()));
    // A chain is entered when it is taken, long before it comes to its end.
    let [_entered, completion @ ..] = STEPS;
    for step in completion {
        let trace = trace.clone();
        fail::cfg_callback(step, move || {
            trace
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(step);
        })?;
    }
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    InflightFile::get(&front_end.peer, 1, 16)?.set(&front_end.peer)?;
    front_end.start_vring(0, 0)?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    front_end.start_logging(&log, 0)?;
    front_end.read(0, 0, 4096)?;
    front_end.write(0, 0, &[1; 4096])?;
    served.stop()?;
    let trace = trace.lock().unwrap_or_else(PoisonError::into_inner);
    let expected: Vec<&str> = completion.into_iter().chain(completion).collect();
    assert_eq!(*trace, expected);
    drop(scenario);
    Ok(())
}
