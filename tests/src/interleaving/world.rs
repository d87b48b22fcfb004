//! One run.

use std::collections::BTreeSet;
use std::ops::AddAssign;
use std::time::Duration;

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::{Engine, open};
use iov_iter::{MemoryNeeds, Stability};
use vublk::worker::PollMode;

use super::requests::Request;
use super::stops::Pending;
use super::{Memory, Sectors};
use crate::frontend::{
    DirtyLog, FrontEnd, InflightFile, Options, Outcome, ServeOptions, Served, wait_readable,
};

/// Requests that a vring may have at a time.
pub(super) const SLOTS: u16 = 16;
/// Descriptors of each: a header, up to four pieces of data, a status, and room.
pub(super) const CHAIN: u16 = 8;
/// Bytes of data that a request may have in each region.
pub(super) const AREA: u64 = 64 << 10;
/// Sectors of the device.
const SECTORS: usize = 2048;

/// What a run came across.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Requests answered with OK.
    pub done: u64,
    /// Requests answered with IOERR.
    pub failed: u64,
    /// Stops.
    pub stops: u64,
    /// Stops, removals and tables that were asked for while storage hung.
    pub waited: u64,
    /// Regions removed.
    pub removals: u64,
    /// Logs that replaced another.
    pub swaps: u64,
    /// Pages that were copied because they were marked.
    pub pages: u64,
    /// Copies compared with guest memory.
    pub compared: u64,
    /// Requests in flight when a connection was lost.
    pub redone: u64,
}

impl Counts {
    fn all(&mut self) -> [&mut u64; 9] {
        let Counts {
            done,
            failed,
            stops,
            waited,
            removals,
            swaps,
            pages,
            compared,
            redone,
        } = self;
        [
            done, failed, stops, waited, removals, swaps, pages, compared, redone,
        ]
    }

    /// Whether there was some of everything.
    #[must_use]
    pub fn is_of_everything(mut self) -> bool {
        self.all().iter().all(|count| **count > 0)
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, mut more: Counts) {
        for (sum, count) in self.all().into_iter().zip(more.all()) {
            *sum += *count;
        }
    }
}

/// A daemon, its front end and everything that is known of both.
#[derive(Debug)]
pub struct World {
    pub(super) seed: u64,
    pub(super) served: Served,
    pub(super) handle: FaultHandle,
    pub(super) front: FrontEnd,
    pub(super) memory: Memory,
    pub(super) sectors: Sectors,
    pub(super) inflight: Option<InflightFile>,
    /// By vring and slot.
    pub(super) slots: Vec<Vec<Option<Request>>>,
    /// The base of each vring that is stopped.
    pub(super) stopped: Vec<Option<u16>>,
    pub(super) log: Option<DirtyLog>,
    /// Logs that were given back.
    pub(super) old_logs: Vec<DirtyLog>,
    pub(super) pending: Option<Pending>,
    pub(super) sticking: bool,
    /// Whether storage fails now and then.
    pub(super) faulty: bool,
    /// What happened so far.
    pub counts: Counts,
    /// The steps so far, for whoever reads of a failure.
    pub trace: Vec<String>,
}

impl World {
    /// A daemon and a front end with its vrings started.
    ///
    /// # Errors
    /// When they do not come together.
    pub fn new(seed: u64) -> Outcome<World> {
        let mut dice = fastrand::Rng::with_seed(seed);
        let faulty = dice.bool();
        let rarely = if faulty { 40 } else { 0 };
        let needs = [
            MemoryNeeds::NONE,
            MemoryNeeds {
                address_align: 512,
                len_align: 512,
                stability: Stability::AsIs,
            },
        ];
        let (storage, handle) = open::fault(FaultPlan {
            memory: needs[dice.usize(0..2)],
            fail: rarely,
            shorten: rarely,
            delay: dice.u16(0..700),
            reorder: dice.u16(0..300),
            ..FaultPlan::benign((SECTORS * 512) as u64, 512, seed)
        })?;
        let served = Served::start_with(&ServeOptions {
            storage: Some(storage),
            workers: if dice.bool() { 1 } else { 3 },
            engine: if dice.bool() {
                Engine::IoUring
            } else {
                Engine::Threads
            },
            poll: [PollMode::Always, PollMode::Adaptive, PollMode::Never][dice.usize(0..3)],
            ..ServeOptions::default()
        })?;
        let vrings = dice.u16(1..=3);
        let options = Options {
            vrings,
            size: SLOTS * CHAIN,
            features: 0,
        };
        let mut front = FrontEnd::attach(served.connect()?, options)?;
        let inflight = if dice.u8(0..5) > 0 {
            let region = InflightFile::get(&front.peer, vrings, options.size)?;
            region.set(&front.peer)?;
            Some(region)
        } else {
            None
        };
        for index in 0..vrings {
            front.start_vring(index, 0)?;
        }
        let dimm = AREA * u64::from(SLOTS * vrings);
        let slots = || (0..SLOTS).map(|_| None).collect();
        Ok(World {
            seed,
            memory: Memory::new(&front.ram, dimm)?,
            served,
            handle,
            front,
            sectors: Sectors::new(SECTORS),
            inflight,
            slots: (0..vrings).map(|_| slots()).collect(),
            stopped: vec![None; usize::from(vrings)],
            log: None,
            old_logs: Vec::new(),
            pending: None,
            sticking: false,
            faulty,
            counts: Counts::default(),
            trace: Vec::new(),
        })
    }

    /// All steps that the seed asks for.
    ///
    /// # Errors
    /// The first thing that is not as it has to be.
    pub fn run(&mut self) -> Outcome {
        let steps = fastrand::Rng::with_seed(!self.seed).u64(60..300);
        for step in 0..steps {
            let number = (step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.step(&mut fastrand::Rng::with_seed(self.seed ^ number))?;
        }
        self.finish()
    }

    fn step(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        match dice.u8(0..100) {
            0..30 => self.submit(dice),
            30..50 => self.reap_all(),
            50..54 => self.await_some(dice),
            54..64 => self.stop_or_start(dice),
            64..75 => self.change_table(dice),
            75..80 => self.change_log(dice),
            80..88 => self.observe(),
            88..93 => self.hang_or_go_on(dice),
            93..95 => self.lose_connection(dice),
            95..97 => self.cut_over(dice),
            97.. => {
                std::thread::sleep(Duration::from_micros(dice.u64(0..1500)));
                Ok(())
            }
        }
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
    }

    /// Storage hangs, or goes on, or gives up what it has.
    fn hang_or_go_on(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        if !self.sticking {
            self.note("stick");
            self.handle.stick();
            self.sticking = true;
        } else if dice.u8(0..4) == 0 {
            self.note("abort");
            let requests = self.slots.iter_mut().flatten().flatten();
            requests.for_each(|request| request.aborted = true);
            self.handle.abort();
            self.release();
        } else {
            self.note("release");
            self.release();
        }
        Ok(())
    }

    pub(super) fn release(&mut self) {
        self.handle.release();
        self.sticking = false;
        if let Some(pending) = &mut self.pending {
            pending.waits = false;
        }
    }

    /// Waits until something of a vring is answered, if anything can be.
    fn await_some(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        let vring = dice.usize(0..self.slots.len());
        let before = self.outstanding(vring);
        if self.sticking || self.pending.is_some() || self.stopped[vring].is_some() || before == 0 {
            return Ok(());
        }
        self.note(format!("await vring {vring}"));
        self.reap(vring)?;
        while self.outstanding(vring) >= before {
            wait_readable(&self.front.vrings[vring].call)?;
            self.reap(vring)?;
        }
        Ok(())
    }

    pub(super) fn outstanding(&self, vring: usize) -> usize {
        self.slots[vring].iter().flatten().count()
    }

    /// Waits for every answer, stops everything and looks at all of it once more.
    fn finish(&mut self) -> Outcome {
        self.note("finish");
        self.settle(true)?;
        self.release();
        for vring in 0..self.slots.len() {
            self.start(vring)?;
        }
        for vring in 0..self.slots.len() {
            self.reap(vring)?;
            while self.outstanding(vring) > 0 {
                wait_readable(&self.front.vrings[vring].call)?;
                self.reap(vring)?;
            }
        }
        self.read_all()?;
        // Acknowledged only when no request holds an earlier table.
        self.replace_table(BTreeSet::new(), 0x3c)?;
        self.settle(true)?;
        for vring in 0..self.slots.len() {
            self.stop(vring)?;
            self.settle(true)?;
        }
        if self.log.is_some() {
            self.compare()?;
        }
        if self.inflight.is_some() {
            // Whatever was still recorded would be done, and answered, again.
            self.lose_connection(&mut fastrand::Rng::with_seed(self.seed))?;
            for vring in 0..self.slots.len() {
                self.stop(vring)?;
                self.settle(true)?;
            }
            self.reap_all()?;
        }
        self.memory.check_untouched()?;
        self.check_old_logs()
    }

    /// Drains the daemon and waits until it left.
    ///
    /// # Errors
    /// When it failed.
    pub fn leave(self) -> Outcome {
        self.served.stop()
    }
}
