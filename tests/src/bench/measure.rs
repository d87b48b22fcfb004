//! One contender's turn in a round.

use std::path::Path;
use std::time::Duration;

use super::bare::Bare;
use super::case::{Case, Switch, WaitingName};
use super::contender::{Contender, Disk, Form};
use super::figures::{Cell, Sample};
use super::load::{Load, Progress};
use super::machine::{Usage, Watched, bind, forget_peak, peak_memory};
use super::schedule::Schedule;
use super::spinner::Spinner;
use super::syscalls::Syscalls;
use super::{BenchError, Options, fio};
use crate::driver::{Spec, connect};
use crate::guest::{Daemon, DaemonSpec, Scratch, Storage};

/// What all measurements of a run share.
pub(super) struct Bench<'o> {
    pub(super) options: &'o Options,
    /// The driver's CPU and the back end's.
    pub(super) cpus: (usize, usize),
    /// How this thread is scheduled.
    pub(super) schedule: Schedule,
    /// The file that is served.
    pub(super) file: &'o Path,
    /// The file in memory.
    pub(super) tmpfs: &'o Path,
}

impl Bench<'_> {
    /// Measures every case of this contender with so many queues once.
    pub(super) fn turn(
        &self,
        cells: &mut [Cell],
        turn: (Contender, usize),
        round: u32,
    ) -> Result<(), BenchError> {
        let (contender, queues) = turn;
        let scratch = Scratch::new()?;
        let form = contender.about().form;
        let daemon = match form {
            Form::Daemon(..) => Some(self.start(contender, queues, &scratch)?),
            Form::Spinner | Form::Bare(_) | Form::Fio => None,
        };
        // Loops of this thread and programs that it starts run on the back end's CPU.
        let (driver, back_end) = self.cpus;
        let is_driver = matches!(form, Form::Daemon(..) | Form::Spinner);
        bind(if is_driver { driver } else { back_end })?;
        for index in 0..cells.len() {
            let cell = &cells[index];
            if (cell.contender, cell.case.queues) != turn {
                continue;
            }
            let case = contender.essence(&cell.case);
            let same = |other: &&Cell| {
                other.contender == contender && contender.essence(&other.case) == case
            };
            if let Some(twin) = cells[..index].iter().find(same) {
                let sample = twin.samples.last().copied();
                cells[index].samples.extend(sample);
                continue;
            }
            let count = round == 0;
            let sample = match (&daemon, form) {
                (Some(daemon), _) => self.through(daemon, case, count)?,
                (None, Form::Fio) => self.fio(&case)?,
                (None, Form::Bare(_)) => self.bare(case, count)?,
                (None, Form::Spinner | Form::Daemon(..)) => {
                    let socket = scratch.socket(&format!("ring-{index}"));
                    self.spinner(&socket, case, count)?
                }
            };
            cells[index].samples.push(sample);
        }
        daemon.map_or(Ok(()), Daemon::stop)?;
        Ok(())
    }

    /// Starts the daemon of a contender, and makes this thread its driver.
    pub(super) fn start(
        &self,
        contender: Contender,
        queues: usize,
        scratch: &Scratch,
    ) -> Result<Daemon, BenchError> {
        let about = contender.about();
        let storage = match about.disk {
            Disk::Null => Storage::Null(self.options.size),
            Disk::File => Storage::File(self.file.to_owned()),
            Disk::Tmpfs => Storage::File(self.tmpfs.to_owned()),
        };
        let mut spec = DaemonSpec::new(storage)
            .queues(queues as u16)
            .direct(about.disk != Disk::Tmpfs);
        if let Form::Daemon(kind, engine, options) = about.form {
            spec = spec.kind(kind).engine(engine);
            for (name, value) in options {
                spec = spec.option(name, value);
            }
        }
        // What is started now inherits the CPU and the schedule.
        bind(self.cpus.1)?;
        if contender.never_sleeps() {
            Schedule::NORMAL.apply()?;
        }
        let daemon = spec.start(scratch)?;
        self.schedule.apply()?;
        bind(self.cpus.0)?;
        Ok(daemon)
    }

    /// What a front end asks for.
    pub(super) fn spec(case: &Case) -> Spec {
        Spec {
            event_idx: case.event_idx == Switch::On,
            queues: case.queues,
            queue_size: 256,
            slots: case.depth,
            slot_bytes: case.block as usize,
        }
    }

    fn through(&self, daemon: &Daemon, case: Case, count: bool) -> Result<Sample, BenchError> {
        forget_peak(daemon.pid())?;
        let watched = Watched::Process(daemon.pid());
        let memory = || peak_memory(daemon.pid()).map(Some);
        self.driver(daemon.socket(), &watched, case, (count, &memory))
    }

    fn spinner(&self, socket: &Path, case: Case, count: bool) -> Result<Sample, BenchError> {
        let spinner = Spinner::start(socket, self.options.size, self.cpus.1)?;
        let sample = self.driver(socket, spinner.watched(), case, (count, &|| Ok(None)))?;
        spinner.stop()?;
        Ok(sample)
    }

    /// Measures through virtio-driver. The memory is asked for while the connection lasts.
    fn driver(
        &self,
        socket: &Path,
        watched: &Watched,
        case: Case,
        (count, memory): (bool, Memory<'_>),
    ) -> Result<Sample, BenchError> {
        let mut queues = connect(socket, &Self::spec(&case))?;
        let mut load = Load::start(&mut queues, case)?;
        load.run(self.options.warm_up)?;
        let driver = Watched::this_thread()?;
        let before = (driver.usage()?, watched.usage()?);
        let progress = load.run(self.options.seconds)?;
        let driven = sample(progress, before.0, driver.usage()?);
        let mut sample = sample(progress, before.1, watched.usage()?);
        sample.waited = sample.waited.max(driven.waited);
        sample.latency = load.latency(self.glance())?;
        if count {
            sample.syscalls = syscalls(watched, || load.run(self.glance()))?;
        }
        sample.memory = memory()?.map(|bytes| bytes as f64);
        load.finish()?;
        Ok(sample)
    }

    fn bare(&self, case: Case, count: bool) -> Result<Sample, BenchError> {
        let watched = Watched::this_thread()?;
        if case.waiting == WaitingName::Polling {
            Schedule::NORMAL.apply()?;
        }
        let mut bare = Bare::start(self.file, self.options.size, case)?;
        bare.run(self.options.warm_up)?;
        let before = watched.usage()?;
        let progress = bare.run(self.options.seconds)?;
        let mut sample = sample(progress, before, watched.usage()?);
        sample.latency = bare.latency(self.glance())?;
        if count {
            sample.syscalls = syscalls(&watched, || bare.run(self.glance()))?;
        }
        drop(bare);
        self.schedule.apply()?;
        Ok(sample)
    }

    fn fio(&self, case: &Case) -> Result<Sample, BenchError> {
        let Options {
            warm_up, seconds, ..
        } = *self.options;
        let told = fio::run(self.file, case, warm_up, seconds, self.cpus.1)?;
        Ok(Sample {
            latency: Some(told.latency),
            ..sample(told.progress, Usage::default(), told.usage)
        })
    }

    /// The length of a measurement that is not of throughput.
    fn glance(&self) -> Duration {
        self.options.seconds / 4
    }
}

/// Asks for the memory of a back end that has some of its own.
type Memory<'m> = &'m dyn Fn() -> Result<Option<u64>, BenchError>;

/// System calls a request while `run` runs; none where the host does not let them be counted.
fn syscalls(
    watched: &Watched,
    mut run: impl FnMut() -> Result<Progress, BenchError>,
) -> Result<Option<f64>, BenchError> {
    let Ok(syscalls) = Syscalls::watch(&watched.thread_ids()?) else {
        return Ok(None);
    };
    let before = syscalls.count();
    let progress = run()?;
    let count = match (before, syscalls.count()) {
        (Ok(before), Ok(after)) => after.saturating_sub(before),
        (Err(_), _) | (_, Err(_)) => return Ok(None),
    };
    Ok(Some(count as f64 / progress.requests.max(1) as f64))
}

fn sample(progress: Progress, before: Usage, after: Usage) -> Sample {
    let requests = progress.requests.max(1) as f64;
    let each = |before: u64, after: u64| after.saturating_sub(before) as f64 / requests;
    let elapsed = progress.elapsed.as_nanos() as f64;
    Sample {
        nanos: elapsed / requests,
        cpu: each(before.cpu, after.cpu),
        sleeps: each(before.sleeps, after.sleeps),
        preempted: each(before.preempted, after.preempted),
        waited: after.waited.saturating_sub(before.waited) as f64 / elapsed,
        latency: None,
        syscalls: None,
        memory: None,
    }
}
