//! The load of `tests/load` in the guest: verified reads, writes and pages.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::{Guest, GuestError, Images};

const WHO: &str = "the load";
const SECTOR_BYTES: u64 = 512;
/// Limits against a load that hangs, far above what a loaded machine needs.
const LIMIT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(200);

/// How the load is to run. It covers a whole disk: sectors that every process reads and none
/// writes, then a part for each process alone.
#[derive(Debug, Clone)]
pub struct Load {
    processes: u32,
    known_sectors: u32,
    own_sectors: u32,
    pages: u32,
    seed: u64,
}

/// What the load has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadCounts {
    /// Reads into pages that are watched from then on.
    pub reads: u64,
    /// Acknowledged writes.
    pub writes: u64,
    /// Reads of what was written, compared.
    pub read_backs: u64,
    /// Comparisons of all watched pages of a process.
    pub sweeps: u64,
}

impl Load {
    /// A load of so many processes, with 8 MiB of pages, 8 MiB of the disk and 8 requests in flight
    /// each.
    #[must_use]
    pub fn new(processes: u32) -> Self {
        Self {
            processes,
            known_sectors: 1 << 16,
            own_sectors: 1 << 14,
            pages: 2048,
            seed: 1,
        }
    }

    /// Only reads, for a disk that cannot be written.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.own_sectors = 0;
        self
    }

    /// The pages that each process keeps filled.
    #[must_use]
    pub fn pages(mut self, pages: u32) -> Self {
        self.pages = pages;
        self
    }

    /// What the places and sizes of requests follow from.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The size of the disk it covers, in bytes.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        let own = u64::from(self.processes) * u64::from(self.own_sectors);
        (u64::from(self.known_sectors) + own) * SECTOR_BYTES
    }

    /// Fills an image on the host, before a guest has it.
    ///
    /// # Errors
    /// `NoImages` without the program, `Host` when it cannot be run, `Garbled` when it fails.
    pub fn prepare(&self, image: &Path) -> Result<(), GuestError> {
        let output = Command::new(Images::find()?.load)
            .arg("prepare")
            .arg(image)
            .args(self.layout())
            .output()
            .map_err(GuestError::host("run guest-load"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(GuestError::Garbled {
            who: WHO,
            what: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Starts the load on /dev/disk0 of a guest and waits until every process has read.
    ///
    /// # Errors
    /// As `Guest::shell`; `Command` with the load's own words when it ended at once.
    pub fn start(&self, guest: &mut Guest) -> Result<RunningLoad, GuestError> {
        let layout = self.layout().join(" ");
        let Self { pages, seed, .. } = self;
        guest.shell(&format!(
            "rm -rf /run/load*
            (guest-load run /dev/disk0 {layout} --pages {pages} --seed {seed} --state /run/load \
             >/run/load.out 2>&1
            echo $? >/run/load.status) & echo"
        ))?;
        let processes = self.processes;
        let load = RunningLoad { processes };
        load.work_on(guest, 1)?;
        Ok(load)
    }

    fn layout(&self) -> [String; 3] {
        [
            format!("--processes={}", self.processes),
            format!("--known-sectors={}", self.known_sectors),
            format!("--own-sectors={}", self.own_sectors),
        ]
    }
}

/// A load that was started. It goes on in the guest wherever that one migrates to.
#[derive(Debug)]
#[must_use = "a load proves nothing until it has stopped well"]
pub struct RunningLoad {
    processes: u32,
}

impl RunningLoad {
    /// What each process has done so far; fewer than there are processes at the very start.
    fn each(&self, guest: &mut Guest) -> Result<Vec<LoadCounts>, GuestError> {
        let text = guest.shell(
            "[ ! -e /run/load.status ] || { cat /run/load.out >&2; exit 1; }
            cat /run/load/progress.* 2>/dev/null || true",
        )?;
        text.lines().map(parse_counts).collect()
    }

    /// What all processes have done so far.
    ///
    /// # Errors
    /// `Command` with the load's own words when it has ended, which it does at the first wrong
    /// byte; otherwise as `Guest::shell`.
    pub fn counts(&self, guest: &mut Guest) -> Result<LoadCounts, GuestError> {
        Ok(sum(&self.each(guest)?))
    }

    /// Waits until every process has compared all its pages `sweeps` more times and has read and,
    /// unless it only reads, written meanwhile.
    ///
    /// # Errors
    /// As `counts`; `TimedOut` when the load does not get on.
    pub fn work_on(&self, guest: &mut Guest, sweeps: u64) -> Result<(), GuestError> {
        let deadline = Instant::now() + LIMIT;
        let mut before = self.each(guest)?;
        before.resize(self.count()?, LoadCounts::default());
        loop {
            let now = self.each(guest)?;
            let has_moved = |(old, new): (&LoadCounts, &LoadCounts)| {
                new.sweeps >= old.sweeps + sweeps && new.reads > old.reads
            };
            if now.len() == before.len() && before.iter().zip(&now).all(has_moved) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(GuestError::TimedOut {
                    what: format!("{sweeps} sweeps of the load"),
                    limit: LIMIT,
                    context: format!("{before:?}\n{now:?}\n{}", guest.console()),
                });
            }
            thread::sleep(POLL);
        }
    }

    /// Ends the load, which then compares every page and reads back every sector it wrote.
    ///
    /// # Errors
    /// `Command` with the load's own words when a byte was wrong or a request failed; otherwise as
    /// `Guest::shell`.
    pub fn stop(self, guest: &mut Guest) -> Result<LoadCounts, GuestError> {
        guest.shell(
            "touch /run/load/stop
            while [ ! -e /run/load.status ]; do sleep 0.1; done
            cat /run/load.out >&2
            exit $(cat /run/load.status)",
        )?;
        let text = guest.shell("cat /run/load/progress.*")?;
        let each: Vec<_> = text.lines().map(parse_counts).collect::<Result<_, _>>()?;
        if each.len() == self.count()? {
            Ok(sum(&each))
        } else {
            Err(garbled(&text))
        }
    }

    fn count(&self) -> Result<usize, GuestError> {
        usize::try_from(self.processes).map_err(|error| garbled(&error.to_string()))
    }
}

fn parse_counts(line: &str) -> Result<LoadCounts, GuestError> {
    let numbers: Result<Vec<u64>, _> = line.split(' ').map(str::parse).collect();
    match numbers.as_deref() {
        Ok(&[reads, writes, read_backs, sweeps]) => Ok(LoadCounts {
            reads,
            writes,
            read_backs,
            sweeps,
        }),
        Ok(_) | Err(_) => Err(garbled(line)),
    }
}

fn sum(each: &[LoadCounts]) -> LoadCounts {
    each.iter()
        .fold(LoadCounts::default(), |sum, one| LoadCounts {
            reads: sum.reads + one.reads,
            writes: sum.writes + one.writes,
            read_backs: sum.read_backs + one.read_backs,
            sweeps: sum.sweeps + one.sweeps,
        })
}

fn garbled(what: &str) -> GuestError {
    GuestError::Garbled {
        who: WHO,
        what: what.to_owned(),
    }
}
