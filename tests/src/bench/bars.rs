//! What vublk is held to. Each bar compares figures of one run.

use serde_json::{Value, json};

use super::case::{Case, Operation, Switch, WaitingName};
use super::contender::Contender;
use super::figures::{Cell, Idle, Sample, Spread};
use super::instructions::Setting;
use super::report::Report;

/// A bar, and what was measured for it.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// What it is about.
    pub name: &'static str,
    /// What is asked for, with its unit.
    pub wanted: String,
    /// What was measured, with its unit; none where something is missing.
    pub measured: Option<String>,
    /// Whether it is met.
    pub is_met: bool,
}

impl Verdict {
    /// What a table says of it.
    pub(super) fn word(&self) -> &'static str {
        match (&self.measured, self.is_met) {
            (None, _) => "not measured",
            (Some(_), true) => "met",
            (Some(_), false) => "missed",
        }
    }

    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        json!({
            "bar": self.name,
            "wanted": self.wanted,
            "measured": self.measured,
            "verdict": self.word(),
        })
    }
}

/// One line of the table below.
struct Bar {
    name: &'static str,
    figure: Figure,
    wanted: Wanted,
}

/// Where a figure comes from.
enum Figure {
    /// Requests a second of one contender by those of another.
    Speed(Of, Of),
    /// CPU time a request of one contender by that of another.
    Cpu(Of, Of),
    /// System calls a request.
    Syscalls(Of),
    /// How many more instructions than under the plain setting, in percent.
    Instructions(Setting),
    /// Wake-ups a second at rest.
    Wakeups(Contender),
    /// CPU time at rest, in percent of a CPU.
    RestingCpu(Contender),
    /// Memory with one queue, in MiB.
    Memory(Contender),
    /// Memory that each further queue adds, in MiB.
    MemoryPerQueue(Contender),
}

/// Which cell: a contender, how the driver waits, the depth, the length in KiB.
type Of = (Contender, WaitingName, u32, u64);

enum Wanted {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

use Contender::{
    Fio, QsdFile, QsdNull, QsdTmpfs, Ring, UringSleep, UringSpin, VublkFile, VublkNull,
    VublkPollFile, VublkTmpfs,
};
use Figure::{Cpu, Instructions, Memory, MemoryPerQueue, RestingCpu, Speed, Syscalls, Wakeups};
use WaitingName::{Polling, Sleeping};
use Wanted::{AtLeast, AtMost, Below};

const BARS: [Bar; 21] = [
    Bar {
        name: "null, depth 32, polling driver, against qsd",
        figure: Speed((VublkNull, Polling, 32, 4), (QsdNull, Polling, 32, 4)),
        wanted: AtLeast(5.0),
    },
    Bar {
        name: "null, depth 1, polling driver, against the bare ring",
        figure: Speed((VublkNull, Polling, 1, 4), (Ring, Polling, 1, 4)),
        wanted: AtLeast(0.8),
    },
    Bar {
        name: "null, depth 32, sleeping driver, against qsd",
        figure: Speed((VublkNull, Sleeping, 32, 4), (QsdNull, Sleeping, 32, 4)),
        wanted: AtLeast(2.3),
    },
    Bar {
        name: "file, depth 32, polling driver, against fio",
        figure: Speed((VublkFile, Polling, 32, 4), (Fio, Polling, 32, 4)),
        wanted: AtLeast(0.95),
    },
    Bar {
        name: "file, depth 32: CPU time, against a sleeping io_uring loop",
        figure: Cpu((VublkFile, Polling, 32, 4), (UringSleep, Polling, 32, 4)),
        wanted: AtMost(1.25),
    },
    Bar {
        name: "file, depth 32: CPU time, against qsd",
        figure: Cpu((VublkFile, Polling, 32, 4), (QsdFile, Polling, 32, 4)),
        wanted: AtMost(0.6),
    },
    Bar {
        name: "file, depth 32, --poll always, against a spinning io_uring loop",
        figure: Speed((VublkPollFile, Polling, 32, 4), (UringSpin, Polling, 32, 4)),
        wanted: AtLeast(0.95),
    },
    Bar {
        name: "file, depth 1, --poll always, against a spinning io_uring loop",
        figure: Speed((VublkPollFile, Polling, 1, 4), (UringSpin, Polling, 1, 4)),
        wanted: AtLeast(0.95),
    },
    Bar {
        name: "file, depth 1, polling driver, against a sleeping io_uring loop",
        figure: Speed((VublkFile, Polling, 1, 4), (UringSleep, Polling, 1, 4)),
        wanted: AtLeast(0.95),
    },
    Bar {
        name: "file, depth 1, sleeping driver, against qsd",
        figure: Speed((VublkFile, Sleeping, 1, 4), (QsdFile, Sleeping, 1, 4)),
        wanted: AtLeast(1.4),
    },
    Bar {
        name: "file, depth 1, sleeping driver, --poll always, against qsd",
        figure: Speed((VublkPollFile, Sleeping, 1, 4), (QsdFile, Sleeping, 1, 4)),
        wanted: AtLeast(2.0),
    },
    Bar {
        name: "tmpfs, depth 32, polling driver, against qsd",
        figure: Speed((VublkTmpfs, Polling, 32, 4), (QsdTmpfs, Polling, 32, 4)),
        wanted: AtLeast(2.0),
    },
    Bar {
        name: "file, 128K, depth 32, polling driver, against fio",
        figure: Speed((VublkFile, Polling, 32, 128), (Fio, Polling, 32, 128)),
        wanted: AtLeast(1.0),
    },
    Bar {
        name: "instructions: more with in-flight tracking",
        figure: Instructions(Setting::Inflight),
        wanted: AtMost(5.0),
    },
    Bar {
        name: "instructions: more with the dirty log",
        figure: Instructions(Setting::Log),
        wanted: AtMost(15.0),
    },
    Bar {
        name: "at rest: wake-ups",
        figure: Wakeups(VublkFile),
        wanted: AtMost(0.0),
    },
    Bar {
        name: "at rest: CPU",
        figure: RestingCpu(VublkFile),
        wanted: AtMost(0.0),
    },
    Bar {
        name: "memory: one queue of 256",
        figure: Memory(VublkFile),
        wanted: AtMost(8.0),
    },
    Bar {
        name: "memory: each further queue",
        figure: MemoryPerQueue(VublkFile),
        wanted: AtMost(1.0),
    },
    Bar {
        name: "system calls a request: file, depth 32",
        figure: Syscalls((VublkFile, Polling, 32, 4)),
        wanted: Below(0.1),
    },
    Bar {
        name: "system calls a request: null, depth 32",
        figure: Syscalls((VublkNull, Polling, 32, 4)),
        wanted: Below(0.1),
    },
];

/// The cells that the bars name, without samples.
pub(super) fn cells() -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for bar in &BARS {
        let named = match bar.figure {
            Speed(one, other) | Cpu(one, other) => vec![one, other],
            Syscalls(of) => vec![of],
            Instructions(_) | Wakeups(_) | RestingCpu(_) | Memory(_) | MemoryPerQueue(_) => {
                Vec::new()
            }
        };
        for of in named {
            let is_there = |cell: &Cell| cell.contender == of.0 && cell.case == case(of);
            if !cells.iter().any(is_there) {
                cells.push(Cell::new(of.0, case(of)));
            }
        }
    }
    cells
}

/// The daemons to be watched at rest, and with how many queues.
pub(super) fn resting() -> Vec<(Contender, usize)> {
    let mut resting = Vec::new();
    for bar in &BARS {
        let named = match bar.figure {
            Wakeups(contender) | RestingCpu(contender) | Memory(contender) => vec![(contender, 1)],
            MemoryPerQueue(contender) => vec![(contender, 1), (contender, 1 + FURTHER)],
            Speed(..) | Cpu(..) | Syscalls(_) | Instructions(_) => Vec::new(),
        };
        for daemon in named {
            if !resting.contains(&daemon) {
                resting.push(daemon);
            }
        }
    }
    resting
}

/// Every bar, held against what was measured.
pub(super) fn judge(report: &Report) -> Vec<Verdict> {
    BARS.iter().map(|bar| bar.judge(report)).collect()
}

fn case((_, waiting, depth, kibibytes): Of) -> Case {
    Case {
        waiting,
        operation: Operation::Read,
        block: kibibytes << 10,
        queues: 1,
        event_idx: Switch::On,
        depth,
    }
}

impl Bar {
    fn judge(&self, report: &Report) -> Verdict {
        let spread = self.figure.of(report);
        let unit = self.figure.unit();
        let is_met = spread.is_some_and(|spread| self.wanted.is_met(spread.median));
        let measured = spread.map(
            |Spread {
                 median,
                 least,
                 most,
             }| {
                if least == most {
                    format!("{median:.2}{unit}")
                } else {
                    format!("{median:.2}{unit} ({least:.2}..{most:.2})")
                }
            },
        );
        let (word, limit) = match self.wanted {
            AtLeast(limit) => (">=", limit),
            AtMost(limit) => ("<=", limit),
            Below(limit) => ("<", limit),
        };
        Verdict {
            name: self.name,
            wanted: format!("{word} {limit}{unit}"),
            measured,
            is_met,
        }
    }
}

impl Figure {
    fn of(&self, report: &Report) -> Option<Spread> {
        let one = |figure: f64| Some(Spread::of(vec![figure]));
        let idle = |contender, queues| {
            let is_it = |idle: &&Idle| idle.contender == contender && idle.queues == queues;
            report.idle.iter().find(is_it)
        };
        let mebibytes = |idle: &Idle| idle.memory as f64 / f64::from(1 << 20);
        match *self {
            // A request's time is the inverse of speed.
            Speed(a, b) => ratios(find(report, b)?, find(report, a)?, |sample| sample.nanos),
            Cpu(a, b) => ratios(find(report, a)?, find(report, b)?, |sample| sample.cpu),
            Syscalls(of) => one(find(report, of)?.median(|sample| sample.syscalls)?),
            Instructions(setting) => {
                let mut counts = report.instructions.iter();
                one(counts.find(|count| count.setting == setting)?.more * 100.0)
            }
            Wakeups(contender) => one(idle(contender, 1)?.wakeups),
            RestingCpu(contender) => one(idle(contender, 1)?.cpu * 100.0),
            Memory(contender) => one(mebibytes(idle(contender, 1)?)),
            MemoryPerQueue(contender) => {
                let more = mebibytes(idle(contender, 1 + FURTHER)?);
                one((more - mebibytes(idle(contender, 1)?)) / FURTHER as f64)
            }
        }
    }

    fn unit(&self) -> &'static str {
        match self {
            Speed(..) | Cpu(..) => " x",
            Syscalls(_) => "",
            Instructions(_) | RestingCpu(_) => " %",
            Wakeups(_) => "/s",
            Memory(_) | MemoryPerQueue(_) => " MiB",
        }
    }
}

impl Wanted {
    fn is_met(&self, figure: f64) -> bool {
        match *self {
            AtLeast(limit) => figure >= limit,
            AtMost(limit) => figure <= limit,
            Below(limit) => figure < limit,
        }
    }
}

fn find(report: &Report, of: Of) -> Option<&Cell> {
    let is_it = |cell: &&Cell| cell.contender == of.0 && cell.case == case(of);
    report.cells.iter().find(is_it)
}

/// The ratio of each round: what slows the machine for a while slows both.
fn ratios(above: &Cell, below: &Cell, figure: fn(&Sample) -> f64) -> Option<Spread> {
    let rounds = above.samples.iter().zip(&below.samples);
    let ratios: Vec<_> = rounds.map(|(a, b)| figure(a) / figure(b)).collect();
    (!ratios.is_empty()).then(|| Spread::of(ratios))
}

/// Queues beside the first, in the comparison of memory.
const FURTHER: usize = 3;

#[cfg(test)]
mod tests {
    use super::super::Instructions as Count;
    use super::super::report::tests::report;
    use super::*;

    fn sample(nanos: f64) -> Sample {
        Sample {
            nanos,
            cpu: nanos / 2.0,
            sleeps: 0.0,
            preempted: 0.0,
            waited: 0.0,
            latency: None,
            syscalls: Some(0.1),
            memory: None,
        }
    }

    fn verdict(report: &Report, name: &str) -> Verdict {
        let mut verdicts = judge(report).into_iter();
        verdicts.find(|verdict| verdict.name == name).unwrap()
    }

    #[test]
    fn a_bar_compares_the_rounds() {
        let mut report = report(cells());
        for cell in &mut report.cells {
            // The second round met a slow minute.
            cell.samples = if cell.contender == VublkNull {
                vec![sample(10.0), sample(20.0), sample(10.0)]
            } else {
                vec![sample(50.0), sample(100.0), sample(40.0)]
            };
        }
        let null = verdict(&report, "null, depth 32, polling driver, against qsd");
        assert_eq!(null.measured.as_deref(), Some("5.00 x (4.00..5.00)"));
        assert_eq!((null.wanted.as_str(), null.word()), (">= 5 x", "met"));
        let file = verdict(&report, "file, depth 32: CPU time, against qsd");
        assert_eq!((file.wanted.as_str(), file.word()), ("<= 0.6 x", "missed"));
        let calls = verdict(&report, "system calls a request: null, depth 32");
        assert_eq!((calls.wanted.as_str(), calls.word()), ("< 0.1", "missed"));
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let verdicts = judge(&report(Vec::new()));
        assert_eq!(verdicts.len(), BARS.len());
        assert!(
            verdicts
                .iter()
                .all(|verdict| verdict.word() == "not measured")
        );
    }

    #[test]
    fn instructions_and_memory_are_differences() {
        let mut report = report(Vec::new());
        report.instructions = vec![Count {
            setting: Setting::Log,
            depth: 32,
            each: 116.0,
            more: 0.16,
        }];
        report.idle = vec![idle(1, 5 << 20), idle(4, 11 << 20)];
        let log = verdict(&report, "instructions: more with the dirty log");
        assert_eq!(log.measured.as_deref(), Some("16.00 %"));
        assert!(!log.is_met);
        let queue = verdict(&report, "memory: each further queue");
        assert_eq!(queue.measured.as_deref(), Some("2.00 MiB"));
        assert!(!queue.is_met && verdict(&report, "at rest: CPU").is_met);
    }

    fn idle(queues: usize, memory: u64) -> Idle {
        Idle {
            contender: VublkFile,
            queues,
            cpu: 0.0,
            wakeups: 0.0,
            memory,
        }
    }
}
