//! A migration's reader at work while requests fly: it takes bits and copies pages all the time.
//! What a request changed is in its copy soon after the request was answered, and in the end its
//! copy is the guest's memory.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockdev::fault::FaultPlan;
use blockdev::{Engine, open};
use iov_iter::{MemoryNeeds, Stability};
use vublk_tests::frontend::{
    DirtyLog, FrontEnd, GuestRam, Kind, Options, Outcome, PAGE, ServeOptions, Served,
};

const VRINGS: u16 = 3;
const PLACES: u16 = 14;
const DISK: u64 = 4 << 20;

/// What the reader and the guest share.
struct Migration<'a> {
    ram: &'a GuestRam,
    copied: GuestRam,
    /// Every log there was; the daemon may mark only the last, and what it marked in the others
    /// before it was told so counts.
    logs: Mutex<Vec<Arc<DirtyLog>>>,
    /// Pages that the guest wrote to itself.
    touched: Mutex<BTreeSet<u64>>,
    /// Passes the reader has made.
    passes: AtomicU64,
    over: AtomicBool,
}

impl Migration<'_> {
    fn pass(&self) -> Outcome<usize> {
        let mut pages = std::mem::take(&mut *lock(&self.touched));
        for log in lock(&self.logs).iter() {
            pages.extend(log.take()?);
        }
        for &page in &pages {
            let bytes = self.ram.read(page * PAGE, 4096)?;
            self.copied.write(page * PAGE, &bytes)?;
        }
        Ok(pages.len())
    }

    fn read_until_over(&self) -> Outcome<usize> {
        let mut copied = 0;
        while !self.over.load(Ordering::Acquire) {
            copied += self.pass()?;
            self.passes.fetch_add(1, Ordering::AcqRel);
            std::thread::yield_now();
        }
        Ok(copied)
    }

    /// Everything has to be copied again: for a time nothing was logged.
    fn begin_again(&self) {
        let pages = self.ram.layout().size / PAGE;
        lock(&self.touched).extend(0..pages);
    }

    fn compare_all(&self) -> Outcome {
        self.pass()?;
        self.compare(0..self.ram.layout().size / PAGE)
    }

    fn compare(&self, pages: std::ops::Range<u64>) -> Outcome {
        for page in pages {
            let ours = self.ram.read(page * PAGE, 4096)?;
            let theirs = self.copied.read(page * PAGE, 4096)?;
            assert!(ours == theirs, "page {page} changed and was not marked");
        }
        Ok(())
    }
}

/// Ends the reader when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Unchecked {
    index: u16,
    place: u16,
    len: u64,
    pass: u64,
}

/// The guest: requests in random places, answered in any order, with or without success.
struct Guest<'a> {
    front_end: FrontEnd,
    migration: &'a Migration<'a>,
    pending: HashMap<(u16, u16), u64>,
    /// Requests that were answered, and from which pass on the reader has seen all of them: their
    /// places are not used before that was looked at.
    unchecked: Vec<Unchecked>,
    logging: bool,
    random: fastrand::Rng,
    failed: u64,
    answered: u64,
}

impl Guest<'_> {
    fn submit(&mut self) -> Outcome {
        let index = self.random.u16(..VRINGS);
        let place = self.random.u16(..PLACES);
        let unchecked = |u: &Unchecked| (u.index, u.place) == (index, place);
        if self.pending.contains_key(&(index, place * 3)) || self.unchecked.iter().any(unchecked) {
            return Ok(());
        }
        let kind = match self.random.u8(..8) {
            0..5 => Kind::In,
            5 => Kind::GetId,
            6 => Kind::Flush,
            _ => Kind::Out,
        };
        let len = match kind {
            Kind::In | Kind::Out => 512 * usize::from(self.random.u16(1..=100)),
            Kind::GetId => self.random.usize(1..40),
            Kind::Flush => 0,
        };
        let sector = self.random.u64(..DISK / 512 - 128);
        let data = vec![self.random.u8(..); len];
        let vring = self.front_end.vring(index)?;
        let [header, _, bytes] = vring.places(place);
        let mut pages: BTreeSet<u64> = vring.ring.pages_of_driver().collect();
        pages.insert(header / PAGE);
        pages.extend(bytes / PAGE..(bytes + len as u64).div_ceil(PAGE));
        // The reader copies what is there now, so that it has to come again for what changes.
        lock(&self.migration.touched).extend(pages.iter().copied());
        let head = self.front_end.submit(index, place, (kind, sector), &data)?;
        // What the guest itself wrote since: its half of the ring, and what the device only reads.
        // The device marks the rest, or it is missed.
        let ring = self.front_end.vring(index)?.ring.pages_of_driver();
        lock(&self.migration.touched).extend(ring);
        if kind == Kind::Out {
            let data = bytes / PAGE..(bytes + len as u64).div_ceil(PAGE);
            lock(&self.migration.touched).extend(data);
        }
        self.pending.insert((index, head), len as u64);
        Ok(())
    }

    fn reap(&mut self) -> Outcome {
        for index in 0..VRINGS {
            while let Some((head, _)) = self.front_end.vring(index)?.ring.take_used()? {
                let head = u16::try_from(head)?;
                let known = self.pending.remove(&(index, head));
                let len = known.ok_or_else(|| format!("head {head} was answered twice"))?;
                // The pass that is under way may have been there already, and the next one was not.
                let pass = self.migration.passes.load(Ordering::Acquire) + 2;
                if self.logging {
                    self.unchecked.push(Unchecked {
                        index,
                        place: head / 3,
                        len,
                        pass,
                    });
                }
                let [_, status, _] = self.front_end.vring(index)?.places(head / 3);
                let status = self.migration.ram.read(status, 1)?;
                self.failed += u64::from(status != [0]);
                self.answered += 1;
            }
        }
        self.check()
    }

    /// Looks at what the reader has seen of requests that were answered.
    fn check(&mut self) -> Outcome {
        let passes = self.migration.passes.load(Ordering::Acquire);
        let (seen, unseen) = std::mem::take(&mut self.unchecked)
            .into_iter()
            .partition(|unchecked| unchecked.pass <= passes);
        self.unchecked = unseen;
        for Unchecked {
            index, place, len, ..
        } in seen
        {
            let [header, _, bytes] = self.front_end.vring(index)?.places(place);
            self.migration.compare(header / PAGE..header / PAGE + 1)?;
            self.migration
                .compare(bytes / PAGE..(bytes + len).div_ceil(PAGE))?;
        }
        Ok(())
    }

    /// Keeps the device busy until it has answered so many more.
    fn work(&mut self, count: u64) -> Outcome {
        let enough = self.answered + count;
        while self.answered < enough {
            self.submit()?;
            self.reap()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    fn settle(&mut self) -> Outcome {
        while !self.pending.is_empty() || !self.unchecked.is_empty() {
            self.reap()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Swaps the log while requests fly. Once that is acknowledged nothing is marked in the old
    /// one: whoever frees it then loses nothing.
    fn swap_log(&mut self) -> Outcome {
        let log = Arc::new(DirtyLog::new(self.migration.ram.layout().size, 0)?);
        lock(&self.migration.logs).push(log.clone());
        self.front_end.set_log(&log)?;
        let mut logs = lock(&self.migration.logs);
        let last = logs.len() - 1;
        let old: Vec<_> = logs.drain(..last).collect();
        drop(logs);
        let mut pages = BTreeSet::new();
        for log in &old {
            pages.extend(log.take()?);
        }
        lock(&self.migration.touched).extend(pages);
        // The reader's passes since the old log left its list did not see what was still in it.
        let pass = self.migration.passes.load(Ordering::Acquire) + 2;
        for unchecked in &mut self.unchecked {
            unchecked.pass = pass;
        }
        for _ in 0..50 {
            self.submit()?;
            self.reap()?;
            for log in &old {
                assert_eq!(
                    log.take()?,
                    [0_u64; 0],
                    "marked in a log that was given back"
                );
            }
        }
        Ok(())
    }

    /// Switches logging off and on again while requests fly: the migration begins anew.
    fn toggle(&mut self) -> Outcome {
        while !self.unchecked.is_empty() {
            self.check()?;
            std::thread::yield_now();
        }
        self.logging = false;
        self.front_end.stop_logging(0)?;
        self.work(100)?;
        let log = Arc::new(DirtyLog::new(self.migration.ram.layout().size, 0)?);
        *lock(&self.migration.logs) = vec![log.clone()];
        self.front_end.start_logging(&log, 0)?;
        self.migration.begin_again();
        self.logging = true;
        Ok(())
    }
}

fn migrate(plan: FaultPlan, engine: Engine, seed: u64) -> Outcome {
    let (storage, _handle) = open::fault(plan)?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(storage),
        workers: 2,
        engine,
        ..ServeOptions::default()
    })?;
    let options = Options {
        vrings: VRINGS,
        size: 64,
        features: 0,
    };
    let mut front_end = FrontEnd::start(served.connect()?, options)?;
    let ram = front_end.ram.clone();
    let log = Arc::new(DirtyLog::new(ram.layout().size, 0)?);
    front_end.start_logging(&log, 0)?;
    let migration = Migration {
        copied: GuestRam::new(ram.layout().size)?,
        ram: &ram,
        logs: Mutex::new(vec![log]),
        touched: Mutex::default(),
        passes: AtomicU64::new(0),
        over: AtomicBool::new(false),
    };
    migration.begin_again();
    let mut guest = Guest {
        front_end,
        migration: &migration,
        pending: HashMap::new(),
        unchecked: Vec::new(),
        logging: true,
        random: fastrand::Rng::with_seed(seed),
        failed: 0,
        answered: 0,
    };
    let copied = std::thread::scope(|scope| -> Outcome<usize> {
        let reader = scope.spawn(|| migration.read_until_over());
        // Also when a check fails: the scope waits for the reader.
        let over = Over(&migration.over);
        let ran = (|| -> Outcome {
            for round in 0..60 {
                guest.work(30)?;
                match round % 4 {
                    3 => guest.toggle()?,
                    _ => guest.swap_log()?,
                }
            }
            guest.settle()
        })();
        drop(over);
        let copied = reader.join().map_err(|panic| format!("{panic:?}"))?;
        ran.and(copied)
    })?;
    for index in 0..VRINGS {
        guest.front_end.peer.vring_base(u32::from(index))?;
    }
    guest.reap()?;
    migration.compare_all()?;
    assert!(copied > 1000, "the reader was at work: {copied} pages");
    assert!(guest.answered > 1000, "and so was the guest");
    assert_eq!(guest.failed > 0, plan.fail > 0, "failures as planned");
    served.stop()
}

#[test]
fn the_copy_is_the_guests_memory() -> Outcome {
    migrate(FaultPlan::benign(DISK, 512, 1), Engine::IoUring, 1)
}

#[test]
fn the_copy_is_the_guests_memory_when_requests_fail_late_and_in_any_order() -> Outcome {
    let plan = FaultPlan {
        fail: 100,
        shorten: 100,
        delay: 300,
        reorder: 200,
        max_delay: Duration::from_micros(300),
        ..FaultPlan::benign(DISK, 512, 2)
    };
    migrate(plan, Engine::IoUring, 2)?;
    migrate(plan, Engine::Threads, 3)
}

#[test]
fn the_copy_is_the_guests_memory_when_every_request_is_bounced() -> Outcome {
    let plan = FaultPlan {
        memory: MemoryNeeds {
            stability: Stability::Stable,
            ..MemoryNeeds::NONE
        },
        fail: 50,
        ..FaultPlan::benign(DISK, 512, 4)
    };
    migrate(plan, Engine::IoUring, 4)
}
