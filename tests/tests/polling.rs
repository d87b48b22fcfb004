//! How workers wait: every mode answers everything, kicks are asked for when they are needed and
//! only then, no vring keeps another one waiting, and a daemon at rest does not wake up.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blockdev::fault::FaultPlan;
use blockdev::{Engine, open};
use iov_iter::{MemoryNeeds, Stability};
use rustix::process::Signal;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::tempdir::TempDir;
use vublk::worker::PollMode;
use vublk_tests::frontend::{
    Descriptor, FrontEnd, Kind, Options, Outcome, Program, ServeOptions, Served, code, words,
};
use vublk_tests::guest::vublk_path;

const MODES: [PollMode; 3] = [PollMode::Always, PollMode::Adaptive, PollMode::Never];
/// VRING_USED_F_NO_NOTIFY (virtio 2.7.8).
const NO_NOTIFY: u16 = 1;

/// One test at a time: they look at the worker of this process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(poll: PollMode, engine: Engine) -> Outcome<Served> {
    Served::start_with(&ServeOptions {
        workers: 1,
        engine,
        poll,
        ..ServeOptions::default()
    })
}

/// Asks a condition again and again, for a long time at the most.
fn eventually(what: &str, mut is_so: impl FnMut() -> Outcome<bool>) -> Outcome {
    let start = Instant::now();
    while !is_so()? {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("{what}: not within a minute").into());
        }
        thread::yield_now();
    }
    Ok(())
}

#[test]
fn every_mode_answers_everything() -> Outcome {
    let _alone = alone();
    for poll in MODES {
        for engine in [Engine::IoUring, Engine::Threads] {
            let served = serve(poll, engine)?;
            let options = Options {
                vrings: 2,
                ..Options::default()
            };
            let mut front_end = FrontEnd::start(served.connect()?, options)?;
            for seed in 0..4 {
                front_end.verify(seed)?;
                // Long enough for every window to close.
                thread::sleep(Duration::from_millis(1));
            }
            served.stop()?;
        }
    }
    Ok(())
}

/// A driver whose kicks reach nobody.
fn without_kicks(served: &Served) -> Outcome<FrontEnd> {
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.vring(0)?.kick = EventFd::new(EFD_NONBLOCK)?;
    Ok(front_end)
}

fn used_flags(front_end: &FrontEnd) -> Outcome<u16> {
    let ring = front_end.vrings.first().ok_or("no vring")?;
    front_end.ram.load(ring.ring.used_addr())
}

#[test]
fn a_worker_that_never_sleeps_needs_no_kick_and_asks_for_none() -> Outcome {
    let _alone = alone();
    let served = serve(PollMode::Always, Engine::IoUring)?;
    let mut front_end = without_kicks(&served)?;
    for round in 0..50 {
        front_end.write(0, round, &[7; 512])?;
        assert_eq!(used_flags(&front_end)?, NO_NOTIFY);
    }
    served.stop()
}

#[test]
fn a_worker_that_sleeps_asks_for_a_kick_and_gets_on_with_it() -> Outcome {
    let _alone = alone();
    for poll in [PollMode::Adaptive, PollMode::Never] {
        let served = serve(poll, Engine::IoUring)?;
        let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
        for round in 0..50 {
            front_end.write(0, round, &[7; 512])?;
            eventually("a kick is asked for", || Ok(used_flags(&front_end)? == 0))?;
        }
        // It may have the last kick before it still, for a request that it found without.
        eventually("the worker sleeps", || {
            Ok(worker_state()? == Some('S') && used_flags(&front_end)? == 0)
        })?;
        let unheard = front_end.vring(0)?.kick.try_clone()?;
        front_end.vring(0)?.kick = EventFd::new(EFD_NONBLOCK)?;
        let head = front_end.submit(0, 0, (Kind::Out, 1), &[9; 512])?;
        thread::sleep(Duration::from_millis(20));
        let used = front_end.vring(0)?.ring.take_used()?;
        assert_eq!(used, None, "nobody looks while the worker sleeps");
        unheard.write(1)?;
        assert_eq!(front_end.wait(0, head)?, 0);
        served.stop()?;
    }
    Ok(())
}

/// Whoever serves the vring next may wait for a kick, so the driver is asked for one.
#[test]
fn a_vring_that_is_disabled_asks_for_kicks_again() -> Outcome {
    let _alone = alone();
    let served = serve(PollMode::Always, Engine::IoUring)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.write(0, 0, &[7; 512])?;
    assert_eq!(used_flags(&front_end)?, NO_NOTIFY);
    let enable = |on: u32| words(&[0, on]);
    front_end
        .peer
        .confirm(code::SET_VRING_ENABLE, &enable(0), &[])?;
    assert_eq!(used_flags(&front_end)?, 0, "before it is acknowledged");
    let kick = front_end.vring(0)?.kick.try_clone()?;
    front_end.submit(0, 0, (Kind::Out, 1), &[9; 512])?;
    assert_eq!(front_end.peer.vring_base(0)?, 1);
    assert_ne!(kick.read()?, 0, "a chain waits for the next owner");
    served.stop()
}

/// A driver that never lets its vring run dry, as a guest with many jobs does: another thread of it
/// makes the same chain available again as soon as it was used.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Outcome<u64>>,
}

impl Flood {
    fn start(front_end: &mut FrontEnd, index: u16) -> Outcome<Flood> {
        let head = front_end.submit(index, 0, (Kind::In, 0), &[0; 512])?;
        assert_eq!((front_end.wait(index, head)?, head), (0, 0));
        let vring = front_end.vring(index)?;
        let (size, used) = (vring.ring.size(), vring.ring.used_addr());
        let avail = vring.ring.pages_of_driver().end * 4096 - 4096;
        let file = front_end.ram.fd().try_clone_to_owned()?.into();
        let bytes = usize::try_from(front_end.ram.layout().size)?;
        let ram: MmapRegion<()> = MmapRegion::from_file(FileOffset::new(file, 0), bytes)?;
        let kick = front_end.vring(index)?.kick.try_clone()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || -> Result<u64, String> {
            let text = |error: vm_memory::VolatileMemoryError| error.to_string();
            let word = |guest: u64| -> Result<&AtomicU16, String> {
                let at = usize::try_from(guest).map_err(|error| error.to_string())?;
                ram.get_atomic_ref::<AtomicU16>(at).map_err(text)
            };
            let (avail, used) = (word(avail + 2)?, word(used + 2)?);
            let (mut seen, mut served) = (used.load(Ordering::Acquire), 0);
            while !stopped.load(Ordering::Relaxed) {
                let now = used.load(Ordering::Acquire);
                served += u64::from(now.wrapping_sub(seen));
                seen = now;
                avail.store(now.wrapping_add(size), Ordering::Release);
                kick.write(1).map_err(|error| error.to_string())?;
            }
            // It may not have run for long.
            Ok(served + u64::from(used.load(Ordering::Acquire).wrapping_sub(seen)))
        });
        let thread = thread::spawn(move || match thread.join() {
            Ok(served) => Ok(served?),
            Err(_panicked) => Err("the flood panicked".into()),
        });
        let ring = &front_end.vring(index)?.ring;
        let start = ring.used_index()?;
        eventually("a flood begins", || {
            Ok(ring.used_index()?.wrapping_sub(start) > ring.size())
        })?;
        Ok(Flood { stop, thread })
    }

    fn stop(self) -> Outcome<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_panicked| "the flood panicked")?
    }
}

#[test]
fn a_vring_that_never_runs_dry_keeps_no_other_waiting() -> Outcome {
    let _alone = alone();
    for poll in MODES {
        let served = Served::start_with(&ServeOptions {
            storage: Some(open::null(1 << 30, 512)?),
            workers: 1,
            poll,
            ..ServeOptions::default()
        })?;
        let options = Options {
            vrings: 2,
            size: 256,
            features: 0,
        };
        let mut front_end = FrontEnd::start(served.connect()?, options)?;
        let flood = Flood::start(&mut front_end, 0)?;
        for round in 0..200 {
            front_end.write(1, round, &[7; 512])?;
        }
        // A stop is heard as well.
        assert_eq!(front_end.peer.vring_base(1)?, 200);
        let flooded = flood.stop()?;
        assert!(flooded > 200, "{flooded} requests are no flood");
        served.stop()?;
    }
    Ok(())
}

/// What the kernel says of the first worker's thread, in one of its files.
fn of_worker(file: &str) -> Outcome<String> {
    let mut threads = fs::read_dir("/proc/self/task")?.flatten();
    // Threads come and go meanwhile.
    let is_worker = |thread: &fs::DirEntry| {
        fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name == "worker-0\n")
    };
    let thread = threads.find(is_worker).ok_or("there is no worker")?;
    Ok(fs::read_to_string(thread.path().join(file))?)
}

/// Its state, by the letter of proc(5): S is asleep, with nothing left that would wake it.
fn worker_state() -> Outcome<Option<char>> {
    let stat = of_worker("stat")?;
    Ok(stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next()))
}

/// What it has used, in nanoseconds of CPU time.
fn worker_time() -> Outcome<u64> {
    let times = of_worker("schedstat")?;
    Ok(times.split_whitespace().next().ok_or("no time")?.parse()?)
}

/// A request that waits for a buffer waits for the storage, whatever the driver offers meanwhile.
#[test]
fn a_worker_whose_request_is_parked_sleeps() -> Outcome {
    let _alone = alone();
    let (storage, handle) = open::fault(FaultPlan {
        memory: MemoryNeeds {
            stability: Stability::Stable,
            ..MemoryNeeds::NONE
        },
        ..FaultPlan::benign(8 << 20, 512, 3)
    })?;
    // With so many workers each may have 16 MiB of buffers.
    let served = Served::start_with(&ServeOptions {
        storage: Some(storage),
        workers: 8,
        ..ServeOptions::default()
    })?;
    let options = Options {
        size: 64,
        ..Options::default()
    };
    let mut front_end = FrontEnd::start(served.connect()?, options)?;
    // Short waits, so that the worker looks for a while before it sleeps.
    for round in 0..20 {
        front_end.write(0, round, &[7; 512])?;
    }
    handle.stick();
    let [header, status, _] = front_end.vring(0)?.places(0);
    let [data, _, _] = front_end.vring(0)?.places(1);
    front_end.ram.write(header, &Kind::In.header(0))?;
    let vring = front_end.vring(0)?;
    for place in 0..20 {
        let chain = [
            Descriptor::source(header, 16),
            Descriptor::dest(data, 960 << 10),
            Descriptor::dest(status, 1),
        ];
        vring.ring.offer_chain(place * 3, &chain)?;
        vring.kick.write(1)?;
    }
    while handle.stuck_now() < 16 {
        thread::yield_now();
    }
    eventually("the worker sleeps", || {
        let before = worker_time()?;
        thread::sleep(Duration::from_millis(50));
        Ok(worker_time()? == before && worker_state()? == Some('S'))
    })?;
    handle.release();
    eventually("all are answered", || {
        Ok(front_end.vring(0)?.ring.used_index()? == 40)
    })?;
    served.stop()
}

/// Voluntary context switches of all threads, and the CPU time they used in nanoseconds.
fn usage(pid: u32) -> Outcome<(u64, u64)> {
    let (mut switches, mut nanoseconds) = (0, 0);
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        let status = fs::read_to_string(thread.join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches += line.ok_or("no count of switches")?.trim().parse::<u64>()?;
        let times = fs::read_to_string(thread.join("schedstat"))?;
        let on_cpu = times.split_whitespace().next().ok_or("no time")?;
        nanoseconds += on_cpu.parse::<u64>()?;
    }
    Ok((switches, nanoseconds))
}

#[test]
fn a_daemon_at_rest_does_not_wake_up() -> Outcome {
    for args in [
        ["--memory=1G", "--engine=io_uring"],
        ["--memory=1G", "--engine=threads"],
    ] {
        let folder = TempDir::new()?;
        let path = |name: &str| folder.as_path().join(name);
        let binary = vublk_path()?;
        let mut program = Program::start(&binary, &path("s"), &args, &[], &path("log"))?;
        let peer = program.connect()?;
        let mut front_end = FrontEnd::start(peer, Options::default())?;
        front_end.verify(1)?;
        // Some of its threads may still have to come to rest.
        eventually("two seconds without a wake-up", || {
            let before = usage(program.id())?;
            thread::sleep(Duration::from_secs(2));
            Ok(usage(program.id())? == before)
        })?;
        front_end.verify(2)?;
        program.signal(Signal::TERM)?;
        assert!(program.leaves()?.success());
    }
    Ok(())
}
