//! The daemon is killed between each two steps of a completion, and a successor takes its place:
//! every request is answered exactly once, no data is lost, and no page that changed is missed by a
//! migration that was under way all the time.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vublk_tests::frontend::{
    DirtyLog, FrontEnd, GuestRam, InflightFile, Kind, LOG_ALL, Options, Outcome, PAGE, Program,
    STEPS, failpoints_binary,
};
use vublk_tests::guest::Scratch;

const VRINGS: u16 = 2;
const RING: u16 = 64;
/// Requests that a vring may have in flight: each has a place in memory and on the disk.
const PLACES: u16 = 12;
/// Sectors of the disk that belong to a place of a vring.
const SECTORS: u64 = 64;
const DISK: u64 = SECTORS * 512 * (PLACES as u64) * (VRINGS as u64);

/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// How long an answer may take before it is taken for lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request in flight.
#[derive(Debug)]
struct Pending {
    kind: Kind,
    sector: u64,
    data: Vec<u8>,
}

/// The front end, the guest's idea of its disk, and the destination of a migration.
struct Run {
    front_end: FrontEnd,
    features: u64,
    inflight: InflightFile,
    log: DirtyLog,
    /// What the other side of the migration has of the guest's memory.
    copied: GuestRam,
    /// Pages that the guest itself changed since they were copied.
    touched: BTreeSet<u64>,
    disk: Vec<u8>,
    pending: HashMap<(u16, u16), Pending>,
    answered: u64,
    random: fastrand::Rng,
}

impl Run {
    fn new(mut front_end: FrontEnd, disk: Vec<u8>, seed: u64) -> Outcome<Run> {
        let ring = front_end.vring(0)?.ring.size();
        let inflight = InflightFile::get(&front_end.peer, VRINGS, ring)?;
        inflight.set(&front_end.peer)?;
        for index in 0..VRINGS {
            front_end.start_vring(index, 0)?;
        }
        let features = front_end.features;
        let size = front_end.ram.layout().size;
        let log = DirtyLog::new(size, 0)?;
        front_end.start_logging(&log, features)?;
        Ok(Run {
            features,
            copied: GuestRam::new(size)?,
            touched: (0..size / PAGE).collect(),
            log,
            front_end,
            inflight,
            disk,
            pending: HashMap::new(),
            answered: 0,
            random: fastrand::Rng::with_seed(seed),
        })
    }

    /// One pass of the migration: what is marked or was touched is copied.
    fn migrate(&mut self) -> Outcome {
        let mut pages = std::mem::take(&mut self.touched);
        pages.extend(self.log.take()?);
        for page in pages {
            let bytes = self.front_end.ram.read(page * PAGE, 4096)?;
            self.copied.write(page * PAGE, &bytes)?;
        }
        Ok(())
    }

    /// Something new in a place that is free, if there is one.
    fn submit(&mut self) -> Outcome {
        let index = self.random.u16(..VRINGS);
        let place = self.random.u16(..PLACES);
        let head = place * 3;
        if self.pending.contains_key(&(index, head)) {
            return Ok(());
        }
        let len = usize::from(self.random.u16(1..=16)) * 512;
        let area = (u64::from(index) * u64::from(PLACES) + u64::from(place)) * SECTORS;
        let sector = area + self.random.u64(..SECTORS - 16);
        let (kind, data) = match self.random.u8(..10) {
            0..5 => (Kind::In, vec![0xa5; len]),
            5..9 => (Kind::Out, (0..len).map(|_| self.random.u8(..)).collect()),
            _ => (Kind::Flush, Vec::new()),
        };
        self.front_end.submit(index, place, (kind, sector), &data)?;
        let vring = self.front_end.vring(index)?;
        let [header, _, bytes] = vring.places(place);
        let ring = vring.ring.pages_of_driver();
        self.touched.extend(ring);
        self.touched.insert(header / PAGE);
        self.touched
            .extend(bytes / PAGE..(bytes + len as u64).div_ceil(PAGE));
        let pending = Pending { kind, sector, data };
        self.pending.insert((index, head), pending);
        Ok(())
    }

    /// Takes what was answered, and checks it.
    fn reap(&mut self) -> Outcome {
        for index in 0..VRINGS {
            while let Some((head, len)) = self.front_end.vring(index)?.ring.take_used()? {
                let head = u16::try_from(head)?;
                let answered = self.pending.remove(&(index, head));
                let Pending { kind, sector, data } =
                    answered.ok_or_else(|| format!("head {head} was answered twice"))?;
                let [_, status, bytes] = self.front_end.vring(index)?.places(head / 3);
                assert_eq!(self.front_end.ram.read(status, 1)?, [0], "{kind:?} failed");
                let at = usize::try_from(sector)? * 512;
                let place = at..at + data.len();
                match kind {
                    Kind::In => {
                        assert_eq!(len as usize, data.len() + 1);
                        let read = self.front_end.ram.read(bytes, data.len())?;
                        assert!(
                            read == self.disk[place],
                            "sector {sector} is not as written"
                        );
                    }
                    Kind::Out => self.disk[place].copy_from_slice(&data),
                    Kind::Flush | Kind::GetId => {}
                }
                self.answered += 1;
            }
        }
        Ok(())
    }

    /// Keeps the daemon busy until it ends, or has answered so many requests.
    fn load(&mut self, daemon: &mut Program, enough: u64) -> Outcome {
        let enough = self.answered + enough;
        while self.answered < enough && daemon.ended()?.is_none() {
            self.submit()?;
            if self.random.u8(..3) == 0 {
                self.migrate()?;
            }
            self.reap()?;
        }
        Ok(())
    }

    /// Waits until nothing is in flight any more.
    fn settle(&mut self, daemon: &mut Program) -> Outcome {
        let begun = Instant::now();
        while !self.pending.is_empty() {
            if begun.elapsed() > PATIENCE {
                let mut lost: Vec<_> = self.pending.keys().collect();
                lost.sort();
                return Err(format!("never answered (vring, head): {lost:?}").into());
            }
            if let Some(status) = daemon.ended()? {
                return Err(format!("the successor ended: {status}").into());
            }
            self.reap()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// What a front end does when its daemon comes back in the middle of a migration.
    fn resume(&mut self, daemon: &mut Program) -> Outcome {
        let peer = daemon.connect()?;
        let features = self.features | LOG_ALL;
        self.front_end.reconnect(peer, features, &self.inflight)?;
        self.front_end.set_log(&self.log)
    }

    /// Stops, copies what is left, and compares all there is to compare.
    fn finish(mut self, image: &PathBuf) -> Outcome {
        for index in 0..VRINGS {
            let base = self.front_end.peer.vring_base(u32::from(index))?;
            let ring = &self.front_end.vring(index)?.ring;
            assert_eq!(base, u32::from(ring.next_avail()), "vring {index}");
            assert_eq!(base, u32::from(ring.used_index()?), "vring {index}");
        }
        self.migrate()?;
        for page in 0..self.front_end.ram.layout().size / PAGE {
            let ours = self.front_end.ram.read(page * PAGE, 4096)?;
            let theirs = self.copied.read(page * PAGE, 4096)?;
            assert!(ours == theirs, "page {page} changed and was not marked");
        }
        assert!(fs::read(image)? == self.disk, "the image is not as written");
        let descriptors = self.inflight.bytes()?;
        let ring = usize::from(self.front_end.vring(0)?.ring.size());
        let stride = (16 + 16 * ring).next_multiple_of(64);
        let recorded = descriptors.chunks(stride).take(2);
        for (index, part) in recorded.enumerate() {
            let entries = part[16..].chunks(16).take(ring);
            let left: Vec<_> = (0..).zip(entries).filter(|(_, e)| e[0] != 0).collect();
            assert!(left.is_empty(), "vring {index} has {left:?} in flight");
        }
        Ok(())
    }
}

struct Setting {
    scratch: Scratch,
    image: PathBuf,
    disk: Vec<u8>,
    args: Vec<String>,
    binary: PathBuf,
}

impl Setting {
    fn new(engine: &str, workers: u16, seed: u64) -> Outcome<Setting> {
        let scratch = Scratch::new()?;
        let mut random = fastrand::Rng::with_seed(seed);
        let disk: Vec<u8> = (0..DISK).map(|_| random.u8(..)).collect();
        let image = scratch.file("disk");
        fs::write(&image, &disk)?;
        let args = [
            format!("--blk-file={}", image.display()),
            format!("--engine={engine}"),
            format!("--workers={workers}"),
        ];
        Ok(Setting {
            image,
            disk,
            args: args.into(),
            binary: failpoints_binary()?,
            scratch,
        })
    }

    fn daemon(&self, failpoints: &str) -> Outcome<Program> {
        let environment = [("FAILPOINTS", failpoints), ("RUST_LOG", "warn")];
        let socket = self.scratch.socket("vublk");
        let log = self.scratch.file("log");
        Program::start(&self.binary, &socket, &self.args, &environment, &log)
    }

    fn front_end(&self, daemon: &mut Program) -> Outcome<FrontEnd> {
        self.front_end_with(daemon, RING, 0)
    }

    fn front_end_with(&self, daemon: &mut Program, size: u16, features: u64) -> Outcome<FrontEnd> {
        let options = Options {
            vrings: VRINGS,
            size,
            features,
        };
        FrontEnd::attach(daemon.connect()?, options)
    }
}

/// The daemon dies at `failpoint`, and so does its first successor; the second one lives.
fn dies_and_comes_back(engine: &str, workers: u16, failpoint: &str, seed: u64) -> Outcome {
    let setting = Setting::new(engine, workers, seed)?;
    let mut daemon = setting.daemon(failpoint)?;
    let front_end = setting.front_end(&mut daemon)?;
    let mut run = Run::new(front_end, setting.disk.clone(), seed)?;
    run.migrate()?;
    run.load(&mut daemon, u64::MAX / 2)?;
    for next in [failpoint, ""] {
        // Whatever the dead daemon did not mark before it died can be copied too early now.
        run.reap()?;
        run.migrate()?;
        daemon = setting.daemon(next)?;
        match run.resume(&mut daemon) {
            Ok(()) if next.is_empty() => {}
            Ok(()) => run.load(&mut daemon, u64::MAX / 2)?,
            Err(error) if next.is_empty() => return Err(error),
            // It died of what it did again, before it was even told everything.
            Err(_) => {
                daemon.wait()?;
            }
        }
    }
    run.settle(&mut daemon)?;
    run.load(&mut daemon, 50)?;
    run.settle(&mut daemon)?;
    run.finish(&setting.image)
}

fn every_step(engine: &str, workers: u16) -> Outcome {
    let mut seed = 1;
    for step in STEPS {
        for times in [0, 1, 6, 40, 150] {
            let failpoint = match times {
                0 => format!("{step}=return"),
                times => format!("{step}={times}*off->return"),
            };
            seed += 1;
            dies_and_comes_back(engine, workers, &failpoint, seed).map_err(|error| {
                format!("{engine}, {workers} workers, {failpoint}, seed {seed}: {error}")
            })?;
        }
    }
    Ok(())
}

#[test]
fn nothing_is_lost_when_it_dies_after_any_step() -> Outcome {
    every_step("io_uring", 1)
}

#[test]
fn nothing_is_lost_when_it_dies_after_any_step_with_two_workers() -> Outcome {
    every_step("io_uring", 2)
}

#[test]
fn nothing_is_lost_when_it_dies_after_any_step_with_threads() -> Outcome {
    every_step("threads", 1)
}

/// Killed at moments nobody chose, again and again under load.
#[test]
fn nothing_is_lost_when_it_is_killed_at_any_moment() -> Outcome {
    for engine in ["io_uring", "threads"] {
        let setting = Setting::new(engine, 2, 99)?;
        let mut daemon = setting.daemon("")?;
        let front_end = setting.front_end(&mut daemon)?;
        let mut run = Run::new(front_end, setting.disk.clone(), 99)?;
        for _ in 0..30 {
            let enough = run.random.u64(1..200);
            run.load(&mut daemon, enough)?;
            daemon.kill()?;
            run.reap()?;
            run.migrate()?;
            daemon = setting.daemon("")?;
            run.resume(&mut daemon)?;
        }
        run.settle(&mut daemon)?;
        run.finish(&setting.image)?;
    }
    Ok(())
}

/// The used index was published and not marked, and the guest asks for nothing more: only a
/// successor that marks the whole ring once lets the other side see it. Event indices keep it from
/// writing to that page for another reason, and the elements are in the next page by then.
#[test]
fn a_used_index_that_was_not_marked_is_marked_by_a_successor() -> Outcome {
    const EARLIER: u64 = 1300;
    for seed in 1..4 {
        let setting = Setting::new("io_uring", 1, seed)?;
        let mut daemon = setting.daemon(&format!("index-published={EARLIER}*off->return"))?;
        let front_end = setting.front_end_with(&mut daemon, 1024, EVENT_IDX)?;
        let mut run = Run::new(front_end, setting.disk.clone(), seed)?;
        // One at a time, so that as many indices are published as requests are answered; the last
        // one is seen although nobody marked it.
        while run.answered <= EARLIER {
            if run.pending.is_empty() {
                run.migrate()?;
                run.submit()?;
            }
            run.reap()?;
        }
        daemon.wait()?;
        run.migrate()?;
        let first_vring = u64::from(run.front_end.vring(0)?.ring.used_index()?);
        assert!(
            first_vring > 520 && run.answered - first_vring > 520,
            "page one"
        );
        daemon = setting.daemon("")?;
        run.resume(&mut daemon)?;
        run.finish(&setting.image)?;
    }
    Ok(())
}

/// The tests above are worth something only if they notice what is left out.
#[test]
fn a_mark_that_is_left_out_is_noticed() -> Outcome {
    for skipped in ["skip-marks", "skip-used-marks"] {
        let setting = Setting::new("io_uring", 1, 5)?;
        let mut daemon = setting.daemon(&format!("{skipped}=return"))?;
        let front_end = setting.front_end(&mut daemon)?;
        let mut run = Run::new(front_end, setting.disk.clone(), 5)?;
        run.migrate()?;
        run.load(&mut daemon, 500)?;
        run.settle(&mut daemon)?;
        let noticed =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.finish(&setting.image)));
        let message = match noticed {
            Err(panic) => panic.downcast_ref::<String>().cloned().unwrap_or_default(),
            Ok(result) => return Err(format!("{skipped} was not noticed: {result:?}").into()),
        };
        assert!(message.contains("was not marked"), "{message}");
    }
    Ok(())
}
