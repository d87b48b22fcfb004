//! The order of the measurements.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use super::bare::Bare;
use super::contender::Contender;
use super::error::host;
use super::load::{Load, Progress, Shape};
use super::machine::{Usage, Watched, bind, peak_memory, usable_cpus};
use super::options::{EventIdx, WaitingName};
use super::report::{Cell, Idle, Report, Sample};
use super::spinner::Spinner;
use super::{BenchError, Options, fio, image};
use crate::driver::{Spec, connect};
use crate::guest::{Daemon, DaemonKind, DaemonSpec, Engine, Scratch, Storage};

/// Measures what the options ask for.
///
/// # Errors
/// [`BenchError`], when a back end does not start, fails a request or stops answering.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let cpus = cpus(options)?;
    let (missing, contenders): (Vec<_>, Vec<_>) = options
        .contenders
        .iter()
        .copied()
        .partition(|contender| !is_there(*contender));
    let mut report = Report {
        options: options.clone(),
        cpus,
        cells: cells(options, &contenders),
        idle: Vec::new(),
        missing: missing
            .into_iter()
            .map(|contender| (contender, contender.program().unwrap_or_default()))
            .collect(),
    };
    let file = if contenders.iter().any(|contender| contender.is_on_file()) {
        Some(image::prepare(options.file.as_deref(), options.size)?)
    } else {
        None
    };
    for round in 0..options.rounds {
        let mut order = contenders.clone();
        if round % 2 == 1 {
            order.reverse();
        }
        for contender in order {
            let file = file.as_deref().unwrap_or(Path::new(""));
            Turn {
                options,
                cpus,
                contender,
                file,
                report: &mut report,
            }
            .take(round)?;
        }
    }
    report
        .idle
        .sort_by_key(|idle| contenders.iter().position(|other| *other == idle.contender));
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

fn is_there(contender: Contender) -> bool {
    contender.program().is_none_or(|program| {
        let mut command = Command::new(program);
        command.arg("--version").stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

/// Every load of every contender, without samples.
fn cells(options: &Options, contenders: &[Contender]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &waiting in &options.waiting {
        for &depth in &options.depths {
            for &contender in contenders {
                // fio sleeps, and the spinning ring is never asked to call.
                let fits = match contender {
                    Contender::Fio => waiting == WaitingName::Sleeping,
                    Contender::Ring => waiting == WaitingName::Polling,
                    Contender::VublkNull
                    | Contender::QsdNull
                    | Contender::Uring
                    | Contender::VublkFile
                    | Contender::VublkThreads
                    | Contender::QsdFile => true,
                };
                if fits {
                    cells.push(Cell {
                        contender,
                        waiting,
                        depth,
                        samples: Vec::new(),
                    });
                }
            }
        }
    }
    cells
}

/// One contender's turn in a round.
struct Turn<'r> {
    options: &'r Options,
    cpus: (usize, usize),
    contender: Contender,
    file: &'r Path,
    report: &'r mut Report,
}

impl Turn<'_> {
    fn take(mut self, round: u32) -> Result<(), BenchError> {
        let (driver, back_end) = self.cpus;
        let scratch = Scratch::new()?;
        // What is started now inherits the CPU.
        bind(back_end)?;
        match self.contender {
            Contender::Ring => {
                bind(driver)?;
                self.all_loads(|turn, shape| turn.spinner(&scratch, shape))
            }
            Contender::Uring => self.all_loads(|turn, shape| turn.bare(shape)),
            Contender::Fio => self.all_loads(|turn, shape| {
                let Options {
                    warm_up, seconds, ..
                } = *turn.options;
                let cpu = turn.cpus.1;
                let (progress, usage) = fio::run(turn.file, shape, warm_up, seconds, cpu)?;
                Ok(sample(progress, Usage::default(), usage))
            }),
            Contender::VublkNull => self.daemon(&scratch, round, DaemonKind::Vublk),
            Contender::QsdNull => self.daemon(&scratch, round, DaemonKind::QemuStorageDaemon),
            Contender::VublkFile | Contender::VublkThreads => {
                self.daemon(&scratch, round, DaemonKind::Vublk)
            }
            Contender::QsdFile => self.daemon(&scratch, round, DaemonKind::QemuStorageDaemon),
        }
    }

    fn daemon(
        &mut self,
        scratch: &Scratch,
        round: u32,
        kind: DaemonKind,
    ) -> Result<(), BenchError> {
        let storage = if self.contender.is_on_file() {
            Storage::File(self.file.to_owned())
        } else {
            Storage::Null(self.options.size)
        };
        let engine = match self.contender {
            Contender::VublkThreads => Engine::Threads,
            Contender::Ring
            | Contender::VublkNull
            | Contender::QsdNull
            | Contender::Uring
            | Contender::Fio
            | Contender::VublkFile
            | Contender::QsdFile => Engine::IoUring,
        };
        let spec = DaemonSpec::new(storage)
            .kind(kind)
            .queues(1)
            .direct(true)
            .engine(engine);
        let daemon = spec.start(scratch)?;
        bind(self.cpus.0)?;
        self.all_loads(|turn, shape| turn.through(&daemon, shape))?;
        if round == 0 {
            let idle = self.rest(&daemon)?;
            self.report.idle.push(idle);
        }
        daemon.stop()?;
        Ok(())
    }

    /// Measures every load of this contender once.
    fn all_loads(
        &mut self,
        measure: impl Fn(&Self, Shape) -> Result<Sample, BenchError>,
    ) -> Result<(), BenchError> {
        for index in 0..self.report.cells.len() {
            let cell = &self.report.cells[index];
            if cell.contender != self.contender {
                continue;
            }
            let shape = Shape {
                depth: cell.depth,
                block: self.options.block_size,
                operation: self.options.operation,
                waiting: cell.waiting.waiting(),
            };
            let sample = measure(self, shape)?;
            self.report.cells[index].samples.push(sample);
        }
        Ok(())
    }

    fn through(&self, daemon: &Daemon, shape: Shape) -> Result<Sample, BenchError> {
        self.driver(daemon.socket(), &Watched::Process(daemon.pid()), shape)
    }

    fn spinner(&self, scratch: &Scratch, shape: Shape) -> Result<Sample, BenchError> {
        let socket = scratch.socket(&format!("ring-{}-{}", shape.depth, self.samples()));
        let spinner = Spinner::start(&socket, self.options.size, self.cpus.1)?;
        let sample = self.driver(&socket, spinner.watched(), shape)?;
        spinner.stop()?;
        Ok(sample)
    }

    fn samples(&self) -> usize {
        let cells = &self.report.cells;
        cells.iter().map(|cell| cell.samples.len()).sum()
    }

    fn driver(&self, socket: &Path, watched: &Watched, shape: Shape) -> Result<Sample, BenchError> {
        let mut queues = connect(socket, &self.spec(shape))?;
        let queue = queues
            .first_mut()
            .ok_or_else(|| host("use the first queue")(std::io::ErrorKind::NotFound.into()))?;
        let mut load = Load::start(queue, shape)?;
        load.run(self.options.warm_up)?;
        let before = watched.usage()?;
        let progress = load.run(self.options.seconds)?;
        let after = watched.usage()?;
        load.finish()?;
        Ok(sample(progress, before, after))
    }

    fn bare(&self, shape: Shape) -> Result<Sample, BenchError> {
        let watched = Watched::this_thread()?;
        let mut bare = Bare::start(self.file, self.options.size, shape)?;
        bare.run(self.options.warm_up)?;
        let before = watched.usage()?;
        let progress = bare.run(self.options.seconds)?;
        Ok(sample(progress, before, watched.usage()?))
    }

    /// Watches a daemon while its front end, after some requests, asks for nothing.
    fn rest(&self, daemon: &Daemon) -> Result<Idle, BenchError> {
        let shape = Shape {
            depth: 1,
            block: self.options.block_size,
            operation: self.options.operation,
            waiting: WaitingName::Sleeping.waiting(),
        };
        let watched = Watched::Process(daemon.pid());
        let mut queues = connect(daemon.socket(), &self.spec(shape))?;
        for queue in &mut queues {
            let mut load = Load::start(queue, shape)?;
            load.run(self.options.warm_up)?;
            load.finish()?;
        }
        let (before, start) = (watched.usage()?, Instant::now());
        thread::sleep(self.options.idle);
        let used = watched.usage()?.cpu.saturating_sub(before.cpu);
        Ok(Idle {
            contender: self.contender,
            cpu: used as f64 / start.elapsed().as_nanos() as f64,
            peak_memory: peak_memory(daemon.pid())?,
        })
    }

    fn spec(&self, shape: Shape) -> Spec {
        Spec {
            event_idx: self.options.event_idx == EventIdx::On,
            queues: 1,
            queue_size: 256,
            slots: shape.depth,
            slot_bytes: shape.block as usize,
        }
    }
}

fn sample(progress: Progress, before: Usage, after: Usage) -> Sample {
    let requests = progress.requests.max(1) as f64;
    Sample {
        nanos: progress.elapsed.as_nanos() as f64 / requests,
        cpu: after.cpu.saturating_sub(before.cpu) as f64 / requests,
        sleeps: after.sleeps.saturating_sub(before.sleeps) as f64 / requests,
    }
}
