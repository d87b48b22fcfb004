//! The daemons at rest: their front ends are connected and ask for nothing.

use std::thread;
use std::time::{Duration, Instant};

use super::BenchError;
use super::case::{Case, Operation, Switch, WaitingName};
use super::contender::Contender;
use super::figures::Idle;
use super::load::Load;
use super::machine::{Usage, Watched, own_memory};
use super::measure::Bench;
use crate::driver::{Queue, connect};
use crate::guest::{Daemon, Scratch};

/// Watches daemons, each with so many queues, all at the same time: those that rest do not disturb
/// one another.
pub(super) fn watch(
    bench: &Bench<'_>,
    wanted: &[(Contender, usize)],
) -> Result<Vec<Idle>, BenchError> {
    if bench.options.idle.is_zero() {
        return Ok(Vec::new());
    }
    let scratch = Scratch::new()?;
    let mut resting = Vec::new();
    for (index, &(contender, queues)) in wanted.iter().enumerate() {
        // No two daemons serve one file.
        let own = scratch.image(&format!("disk-{index}"), bench.options.size)?;
        let bench = Bench {
            file: &own,
            tmpfs: &own,
            ..*bench
        };
        let daemon = bench.start(contender, queues, &scratch)?;
        resting.push(Resting::begin(contender, queues, daemon)?);
    }
    // Whoever goes on looking for a little while after the last request may do so.
    thread::sleep(SETTLE);
    for daemon in &mut resting {
        daemon.before = daemon.watched().usage()?;
    }
    let start = Instant::now();
    thread::sleep(bench.options.idle);
    let seconds = start.elapsed().as_secs_f64();
    resting
        .into_iter()
        .map(|daemon| daemon.end(seconds))
        .collect()
}

/// A daemon that has served some requests.
struct Resting {
    contender: Contender,
    // Declared before the daemon: the front end leaves first.
    queues: Vec<Queue>,
    daemon: Daemon,
    before: Usage,
}

impl Resting {
    fn begin(contender: Contender, queues: usize, daemon: Daemon) -> Result<Self, BenchError> {
        let case = Case {
            waiting: WaitingName::Sleeping,
            operation: Operation::Read,
            block: 4096,
            queues,
            event_idx: Switch::On,
            depth: 32,
        };
        let mut queues = connect(daemon.socket(), &Bench::spec(&case))?;
        let mut load = Load::start(&mut queues, case)?;
        load.run(BUSY)?;
        load.finish()?;
        Ok(Self {
            contender,
            queues,
            daemon,
            before: Usage::default(),
        })
    }

    fn watched(&self) -> Watched {
        Watched::Process(self.daemon.pid())
    }

    fn end(self, seconds: f64) -> Result<Idle, BenchError> {
        let after = self.watched().usage()?;
        let idle = Idle {
            contender: self.contender,
            queues: self.queues.len(),
            cpu: (after.cpu - self.before.cpu) as f64 / 1e9 / seconds,
            wakeups: (after.sleeps - self.before.sleeps) as f64 / seconds,
            memory: own_memory(self.daemon.pid())?,
        };
        drop(self.queues);
        self.daemon.stop()?;
        Ok(idle)
    }
}

/// How long a daemon serves before it rests.
const BUSY: Duration = Duration::from_millis(100);

/// How long it has until it must be at rest.
const SETTLE: Duration = Duration::from_millis(200);
