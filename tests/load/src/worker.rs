#![expect(unsafe_code, reason = "requests name memory by its address")]
//! One process of the load.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use crate::aio::{Command, Completion, Queue};
use crate::error::LoadError;
use crate::options::Load;
use crate::own::{Own, Run};
use crate::pages::Pages;
use crate::pattern::SECTOR_BYTES;
use crate::pool::{Pool, PoolRead};
use crate::progress::{Counts, Progress};

/// Sizes of requests, in sectors: 512 bytes to 256 KiB, 4 KiB most of all.
const SIZES: [usize; 10] = [1, 3, 8, 8, 8, 8, 32, 64, 128, 512];
const LARGEST: usize = 512;
/// Sectors of the pool that are compared between two looks at the queue.
const CHECKED_AT_ONCE: usize = 1024;
/// How long a look at the queue waits for a completion.
const PATIENCE: Duration = Duration::from_millis(2);

/// What a request in flight is for.
#[derive(Debug)]
enum Job {
    /// Fills pages of the pool.
    Fill(PoolRead),
    /// Writes the next generation of sectors of its own.
    Write(Run),
    /// Reads sectors of its own to compare them.
    ReadBack(Run),
}

impl Job {
    fn count(&self) -> usize {
        match self {
            Self::Fill(read) => read.count(),
            Self::Write(run) | Self::ReadBack(run) => run.count(),
        }
    }
}

/// The jobs in flight, and what they need.
struct Worker {
    // Before the memory: its drop waits for what the kernel still does to it.
    queue: Queue,
    disk: File,
    random: fastrand::Rng,
    known_sectors: u64,
    pool: Pool,
    own: Own,
    /// A place of `LARGEST` sectors for each tag.
    buffers: Pages,
    jobs: Vec<Option<Job>>,
    counts: Counts,
}

/// Works until it is told to stop, then compares all pages and all its sectors once more.
pub(crate) fn run(load: &Load, number: u32) -> Result<(), LoadError> {
    let mut worker = Worker::new(load, number)?;
    let mut progress = Progress::new(&load.state, number);
    while !progress.is_stop_due(&worker.counts)? {
        worker.fill_queue()?;
        worker.reap()?;
        if worker.pool.check_next(CHECKED_AT_ONCE)? {
            worker.counts.sweeps += 1;
        }
    }
    worker.drain()?;
    worker.pool.check_all()?;
    worker.counts.sweeps += 1;
    worker.read_all_back()?;
    progress.show(&worker.counts)
}

impl Worker {
    fn new(load: &Load, number: u32) -> Result<Self, LoadError> {
        let layout = &load.layout;
        let wide = |value: u32| usize::try_from(value).map_err(io::Error::other);
        let depth = wide(load.depth).map_err(LoadError::system("count the requests"))?;
        let own = wide(layout.own_sectors).map_err(LoadError::system("count the sectors"))?;
        let pages = wide(load.pages).map_err(LoadError::system("count the pages"))?;
        let disk = OpenOptions::new()
            .read(true)
            .write(layout.own_sectors > 0)
            .custom_flags(libc::O_DIRECT)
            .open(&layout.disk)
            .map_err(LoadError::system(format!("open {}", layout.disk.display())))?;
        Ok(Self {
            queue: Queue::new(depth).map_err(LoadError::system("set up asynchronous I/O"))?,
            disk,
            random: fastrand::Rng::with_seed(load.seed.wrapping_add(u64::from(number) << 32)),
            known_sectors: u64::from(layout.known_sectors),
            pool: Pool::new(pages)?,
            own: Own::new(layout.own_start(number), own),
            buffers: Pages::new(depth * LARGEST).map_err(LoadError::system("map the buffers"))?,
            jobs: (0..depth).map(|_| None).collect(),
            counts: Counts::default(),
        })
    }

    /// Starts a job for every free tag.
    fn fill_queue(&mut self) -> Result<(), LoadError> {
        for tag in 0..self.jobs.len() {
            if self.jobs.get(tag).is_some_and(Option::is_some) {
                continue;
            }
            let count = *self.random.choice(&SIZES).unwrap_or(&1);
            let kind = if self.own.is_empty() {
                0
            } else {
                self.random.u32(..10)
            };
            match kind {
                0..6 => self.start_fill(tag, count)?,
                6..8 => {
                    if let Some(run) = self.own.begin(&mut self.random, count) {
                        self.own.fill_next(&run, &mut self.buffers, tag * LARGEST);
                        self.start_own(tag, Command::Write, Job::Write(run.clone()), &run)?;
                    }
                }
                _ => {
                    if let Some(run) = self.own.begin(&mut self.random, count) {
                        self.start_own(tag, Command::Read, Job::ReadBack(run.clone()), &run)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn start_fill(&mut self, tag: usize, count: usize) -> Result<(), LoadError> {
        let last = self.known_sectors - as_u64(count);
        let sector = self.random.u64(..=last);
        let begun = self.pool.begin(&mut self.random, sector, count);
        let Some((read, address)) = begun else {
            return Ok(());
        };
        self.submit(tag, Command::Read, Job::Fill(read), address, sector)
    }

    fn start_own(
        &mut self,
        tag: usize,
        command: Command,
        job: Job,
        run: &Run,
    ) -> Result<(), LoadError> {
        let address = self.buffers.address(tag * LARGEST, run.count());
        let sector = self.own.sector(run);
        self.submit(tag, command, job, address, sector)
    }

    fn submit(
        &mut self,
        tag: usize,
        command: Command,
        job: Job,
        address: *mut u8,
        sector: u64,
    ) -> Result<(), LoadError> {
        let length = job.count() * SECTOR_BYTES;
        let offset = sector * as_u64(SECTOR_BYTES);
        // SAFETY: the memory is a run of the pool or of the buffers, which live as long as the
        // queue. The run is busy or the tag taken until the job ends in `reap`, and nobody looks at
        // memory that is.
        let submitted = unsafe {
            self.queue
                .submit(command, &self.disk, address, length, offset, tag)
        };
        submitted.map_err(LoadError::system("submit a request"))?;
        if let Some(slot) = self.jobs.get_mut(tag) {
            *slot = Some(job);
        }
        Ok(())
    }

    /// Ends the jobs whose requests completed.
    fn reap(&mut self) -> Result<(), LoadError> {
        let completions = self.queue.reap(PATIENCE);
        for completion in completions.map_err(LoadError::system("await a request"))? {
            self.complete(completion)?;
        }
        Ok(())
    }

    fn complete(&mut self, completion: Completion) -> Result<(), LoadError> {
        let Completion { tag, result } = completion;
        let Some(job) = self.jobs.get_mut(tag).and_then(Option::take) else {
            let source = io::Error::other(format!("tag {tag} completed and was not in flight"));
            return Err(LoadError::system("await a request")(source));
        };
        check_result(&job, result)?;
        let buffer = tag * LARGEST;
        match job {
            Job::Fill(read) => {
                self.pool.finish(read)?;
                self.counts.reads += 1;
            }
            Job::Write(run) => {
                self.own.written(&run);
                self.counts.writes += 1;
            }
            Job::ReadBack(run) => {
                self.own.read_back(&run, &self.buffers, buffer)?;
                self.counts.read_backs += 1;
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), LoadError> {
        while self.jobs.iter().any(Option::is_some) {
            self.reap()?;
        }
        Ok(())
    }

    fn read_all_back(&mut self) -> Result<(), LoadError> {
        for run in self.own.runs(LARGEST) {
            self.own.take_run(&run);
            self.start_own(0, Command::Read, Job::ReadBack(run.clone()), &run)?;
            self.drain()?;
        }
        Ok(())
    }
}

/// An error unless the request moved all its bytes.
fn check_result(job: &Job, result: i64) -> Result<(), LoadError> {
    let length = job.count() * SECTOR_BYTES;
    if i64::try_from(length) == Ok(result) {
        return Ok(());
    }
    let what = match job {
        Job::Fill(_) => "a read of known sectors",
        Job::Write(_) => "a write",
        Job::ReadBack(_) => "a read of its own sectors",
    };
    let what = format!("{what} of {length} bytes");
    match i32::try_from(-result) {
        Ok(code) if code > 0 => Err(LoadError::Request {
            what,
            source: io::Error::from_raw_os_error(code),
        }),
        _ => Err(LoadError::Short {
            what,
            moved: result,
            length,
        }),
    }
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
