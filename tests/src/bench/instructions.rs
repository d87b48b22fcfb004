//! The instructions of a request, counted by callgrind: a figure that does not depend on what else
//! the machine does.
//!
//! The daemon serves a null device to a front end in this process, which makes a whole batch of
//! requests available, kicks once, and waits until all of them came back. Two runs of different
//! lengths are counted, and only their difference is looked at: what starting costs falls out. The
//! engine is that of threads, for valgrind does not run io_uring; a null device completes at once
//! with either.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::BenchError;
use super::error::host;
use super::host::vublk_takes;
use super::machine::bind;
use crate::frontend::{
    Descriptor, DirtyLog, FrontEnd, InflightFile, Kind, Options, Outcome, Peer, wait_readable,
};
use crate::guest::{DaemonKind, DaemonSpec, Engine, Scratch, Storage};

/// What the daemon has to keep beside serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Nothing.
    Plain,
    /// An in-flight region.
    Inflight,
    /// A dirty log, of the used ring too.
    Log,
    /// Both.
    Both,
}

impl Setting {
    pub(super) const ALL: [Self; 4] = [Self::Plain, Self::Inflight, Self::Log, Self::Both];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Inflight => "in-flight tracking",
            Self::Log => "dirty log",
            Self::Both => "in-flight tracking and dirty log",
        }
    }

    fn tracks(self) -> bool {
        matches!(self, Self::Inflight | Self::Both)
    }

    fn logs(self) -> bool {
        matches!(self, Self::Log | Self::Both)
    }
}

/// The instructions of a request under one setting.
#[derive(Clone, Copy, Debug)]
pub struct Instructions {
    /// What the daemon had to keep.
    pub setting: Setting,
    /// Requests made available at a time.
    pub depth: u32,
    /// Instructions of the whole daemon, a request.
    pub each: f64,
    /// By how much that is more than under the plain setting, 0.05 for 5 %.
    pub more: f64,
}

impl Instructions {
    /// Its part of a report.
    pub(super) fn json(&self) -> Value {
        json!({
            "setting": self.setting.name(),
            "depth": self.depth,
            "instructions": self.each,
            "more_than_plain": self.more,
        })
    }
}

/// Counts under every setting.
pub(super) fn count(depth: u32, cpus: (usize, usize)) -> Result<Vec<Instructions>, BenchError> {
    let mut counts: Vec<Instructions> = Vec::new();
    for setting in Setting::ALL {
        let few = total(setting, depth, FEW, cpus)?;
        let many = total(setting, depth, MANY, cpus)?;
        let requests = f64::from((MANY - FEW) * depth);
        let each = many.saturating_sub(few) as f64 / requests;
        let plain = counts.first().map_or(each, |plain| plain.each);
        counts.push(Instructions {
            setting,
            depth,
            each,
            more: each / plain - 1.0,
        });
    }
    Ok(counts)
}

/// The instructions of a daemon from its start to its end, with so many batches.
fn total(
    setting: Setting,
    depth: u32,
    batches: u32,
    cpus: (usize, usize),
) -> Result<u64, BenchError> {
    let scratch = Scratch::new()?;
    let counts = scratch.file("callgrind.out");
    let file = format!("--callgrind-out-file={}", counts.display());
    let mut spec = DaemonSpec::new(Storage::Null(1 << 30))
        .kind(DaemonKind::Vublk)
        .engine(Engine::Threads)
        .workers(1)
        .under(&["valgrind", "--tool=callgrind", &file]);
    if vublk_takes("--poll") {
        // How long it looks for more before it sleeps would depend on the machine.
        spec = spec.option("--poll", "never");
    }
    bind(cpus.1)?;
    let daemon = spec.start(&scratch)?;
    bind(cpus.0)?;
    drive(daemon.socket(), setting, depth, batches).map_err(BenchError::FrontEnd)?;
    daemon.stop()?;
    let text = fs::read_to_string(&counts).map_err(host(format!("read {}", counts.display())))?;
    totals(&text).ok_or_else(|| BenchError::FrontEnd("callgrind counted nothing".into()))
}

/// The sum that callgrind's file ends with.
fn totals(text: &str) -> Option<u64> {
    let line = text.lines().rev().find_map(|l| l.strip_prefix("totals:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn drive(socket: &Path, setting: Setting, depth: u32, batches: u32) -> Outcome {
    let options = Options {
        size: RING_SIZE,
        ..Options::default()
    };
    let mut front_end = FrontEnd::attach(Peer::connect(socket)?, options)?;
    if setting.tracks() {
        InflightFile::get(&front_end.peer, 1, RING_SIZE)?.set(&front_end.peer)?;
    }
    front_end.start_vring(0, 0)?;
    let log = DirtyLog::new(front_end.ram.layout().size, 0)?;
    if setting.logs() {
        front_end.start_logging(&log, 0)?;
    }
    for _ in 0..batches {
        batch(&mut front_end, depth as u16)?;
        if setting.logs() && log.take()?.is_empty() {
            return Err("reads left no mark in the dirty log".into());
        }
        // The daemon goes to sleep before the next batch, so that it finds each of them whole.
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Makes `depth` reads available, kicks, and waits for all of them.
fn batch(front_end: &mut FrontEnd, depth: u16) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [base, ..] = vring.places(0);
    let place = |index: u16| base + u64::from(index) * PLACE;
    for index in 0..depth {
        let at = place(index);
        ram.write(at, &Kind::In.header(u64::from(index) * 8))?;
        ram.write(at + STATUS, &[0xff])?;
        let chain = [
            Descriptor::source(at, 16),
            Descriptor::dest(at + DATA, 4096),
            Descriptor::dest(at + STATUS, 1),
        ];
        vring.ring.offer_chain(index * 3, &chain)?;
    }
    vring.kick.write(1)?;
    let mut came = 0;
    while came < depth {
        match vring.ring.take_used()? {
            Some(_) => came += 1,
            None => wait_readable(&vring.call)?,
        }
    }
    for index in 0..depth {
        if ram.read(place(index) + STATUS, 1)? != [0] {
            return Err(format!("read {index} of a batch failed").into());
        }
    }
    Ok(())
}

/// Batches of the shorter run and of the longer one.
const FEW: u32 = 100;
const MANY: u32 = 600;

/// Between two batches.
const PAUSE: Duration = Duration::from_millis(2);

/// Descriptors: three for each of 64 requests.
const RING_SIZE: u16 = 256;

/// Bytes from one request's header to the next one's; its status and its data are behind it.
const PLACE: u64 = 8192;
const STATUS: u64 = 16;
const DATA: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::Served;

    #[test]
    fn batches_are_served_under_every_setting() {
        let served = Served::start().unwrap();
        for (setting, depth) in Setting::ALL.into_iter().zip([1, 32, 63, 64]) {
            drive(served.path(), setting, depth, 3).unwrap();
        }
        served.stop().unwrap();
    }

    #[test]
    fn the_sum_is_found() {
        let text = "events: Ir\nfn=(1) main\n16 400\n\ntotals: 1234567\n";
        assert_eq!(totals(text), Some(1_234_567));
        assert_eq!(totals("events: Ir\n"), None);
    }
}
