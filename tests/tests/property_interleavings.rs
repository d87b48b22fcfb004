//! Whatever happens between requests: stops, other memory, other logs, lost connections, storage
//! that is stuck. Every request is answered exactly once, what it changed is marked, the data is
//! the model's, and nothing is held in the end.
//!
//! VUBLK_PROPERTY_SECONDS says for how long dice are thrown (20), VUBLK_PROPERTY_SEED does one run
//! again.

use std::collections::{BTreeSet, HashMap};
use std::env;
use std::os::unix::net::UnixStream;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use blockdev::fault::{FaultHandle, FaultPlan};
use blockdev::{Engine, open};
use iov_iter::MemoryNeeds;
use vublk::worker::PollMode;
use vublk_tests::frontend::{
    Descriptor, DirtyLog, FrontEnd, GuestRam, InflightFile, Kind, LOG_ALL, Layout, Options,
    Outcome, PAGE, Peer, ServeOptions, Served, code, region_payload,
};

const VRINGS: u16 = 2;
const RING: u16 = 128;
/// Requests that a vring may have in flight; each has five descriptors.
const PLACES: u16 = 14;
/// Sectors of the disk, and 512-byte blocks of each memory, that belong to a place.
const SECTORS: u64 = 16;
const DISK: u64 = SECTORS * 512 * (PLACES as u64) * (VRINGS as u64);
/// A second region of memory, not at a multiple of 64 pages, which comes and goes.
const EXTRA: Layout = Layout {
    guest: 0x4000_3000,
    size: DISK,
    offset: 0x2000,
};
const PATIENCE: Duration = Duration::from_secs(60);
/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;

/// A request in flight.
#[derive(Debug)]
struct Pending {
    kind: Kind,
    sector: u64,
    /// What a write writes, the same in every byte.
    value: u8,
    /// Guest address and bytes of each part of its data.
    parts: Vec<(u64, u32)>,
    /// Whether some of it is in the second region.
    in_extra: bool,
    /// Whether that region went before it was answered: it may not have been taken before.
    may_fail: bool,
}

/// Whether, and where, changes are marked.
enum Logging {
    Off,
    On(DirtyLog),
}

struct Run {
    served: Served,
    handle: FaultHandle,
    releasing: Option<JoinHandle<()>>,
    front_end: FrontEnd,
    inflight: InflightFile,
    features: u64,
    extra: GuestRam,
    has_extra: bool,
    /// What the second region held when its going was acknowledged.
    left: Option<Vec<u8>>,
    logging: Logging,
    /// The other side's copies of both regions.
    copies: [GuestRam; 2],
    /// Pages that the guest itself wrote to.
    touched: BTreeSet<u64>,
    /// The bytes that each sector may hold.
    disk: Vec<BTreeSet<u8>>,
    pending: HashMap<(u16, u16), Pending>,
    random: fastrand::Rng,
    answered: u64,
    fails: bool,
}

impl Run {
    fn new(seed: u64) -> Outcome<Run> {
        let mut random = fastrand::Rng::with_seed(seed);
        let fails = random.bool();
        let align = if random.bool() { 1 } else { 512 };
        let plan = FaultPlan {
            fail: if fails { 60 } else { 0 },
            shorten: if fails { 40 } else { 0 },
            delay: 200,
            reorder: 200,
            max_delay: Duration::from_micros(200),
            memory: MemoryNeeds {
                address_align: align,
                ..MemoryNeeds::NONE
            },
            ..FaultPlan::benign(DISK, 512, seed)
        };
        let (storage, handle) = open::fault(plan)?;
        let served = Served::start_with(&ServeOptions {
            storage: Some(storage),
            workers: random.usize(1..=3),
            engine: if random.bool() {
                Engine::IoUring
            } else {
                Engine::Threads
            },
            poll: [PollMode::Always, PollMode::Adaptive, PollMode::Never][random.usize(0..3)],
            ..ServeOptions::default()
        })?;
        let features = if random.bool() { EVENT_IDX } else { 0 };
        let options = Options {
            vrings: VRINGS,
            size: RING,
            features,
        };
        let mut front_end = FrontEnd::attach(served.connect()?, options)?;
        let inflight = InflightFile::get(&front_end.peer, VRINGS, RING)?;
        inflight.set(&front_end.peer)?;
        for index in 0..VRINGS {
            front_end.start_vring(index, 0)?;
        }
        let copy = GuestRam::new(front_end.ram.layout().size)?;
        Ok(Run {
            served,
            handle,
            releasing: None,
            front_end,
            inflight,
            features,
            extra: GuestRam::at(EXTRA)?,
            has_extra: false,
            left: None,
            logging: Logging::Off,
            copies: [copy, GuestRam::at(EXTRA)?],
            touched: BTreeSet::new(),
            disk: vec![BTreeSet::from([0]); usize::try_from(DISK / 512)?],
            pending: HashMap::new(),
            random,
            answered: 0,
            fails,
        })
    }

    fn ram(&self, guest: u64) -> (&GuestRam, &GuestRam) {
        let [low, high] = &self.copies;
        if guest < EXTRA.guest {
            (&self.front_end.ram, low)
        } else {
            (&self.extra, high)
        }
    }

    fn pages_of(&mut self, index: u16, place: u16, parts: &[(u64, u32)]) -> Outcome<Vec<u64>> {
        let vring = self.front_end.vring(index)?;
        let mut pages: Vec<u64> = vring.ring.pages_of_driver().collect();
        pages.push(vring.places(place)[0] / PAGE);
        for &(at, len) in parts {
            pages.extend(at / PAGE..(at + u64::from(len)).div_ceil(PAGE));
        }
        Ok(pages)
    }

    fn submit(&mut self) -> Outcome {
        let (index, place) = (self.random.u16(..VRINGS), self.random.u16(..PLACES));
        let head = place * 5;
        if self.pending.contains_key(&(index, head)) {
            return Ok(());
        }
        let (kind, sectors) = match self.random.u8(..10) {
            0..5 => (Kind::In, self.random.u64(1..=SECTORS)),
            5..9 => (Kind::Out, self.random.u64(1..=SECTORS)),
            _ => (Kind::Flush, 0),
        };
        let area = (u64::from(index) * u64::from(PLACES) + u64::from(place)) * SECTORS;
        let sector = area + self.random.u64(..=SECTORS - sectors);
        let value = self.random.u8(..);
        let [header, status, bytes] = self.front_end.vring(index)?.places(place);
        let extra = EXTRA.guest + area * 512;
        let mut parts = Vec::new();
        let cut = self.random.u64(..=sectors);
        let mut in_extra = false;
        for (count, second) in [(cut, false), (sectors - cut, true)] {
            let elsewhere = self.has_extra && self.random.bool();
            in_extra |= elsewhere && count > 0;
            let base = if elsewhere { extra } else { bytes };
            let skip = if second && !elsewhere {
                SECTORS * 512
            } else {
                0
            };
            // Some parts are where storage that wants aligned memory cannot take them.
            let odd = if elsewhere { 0 } else { self.random.u64(..4) };
            if count > 0 {
                parts.push((base + skip + odd, u32::try_from(count * 512)?));
            }
        }
        if let [(first, len), (second, _)] = parts[..]
            && first >= EXTRA.guest
            && second >= EXTRA.guest
        {
            parts[1].0 = first + u64::from(len);
        }
        let ram = self.front_end.ram.clone();
        ram.write(header, &kind.header(sector))?;
        ram.write(status, &[0xff])?;
        let mut chain = vec![Descriptor::source(header, 16)];
        for &(at, len) in &parts {
            let fill = if kind == Kind::Out { value } else { 0xa5 };
            let (memory, _) = self.ram(at);
            memory.write(at, &vec![fill; len as usize])?;
            chain.push(match kind {
                Kind::Out => Descriptor::source(at, len),
                Kind::In | Kind::Flush | Kind::GetId => Descriptor::dest(at, len),
            });
        }
        chain.push(Descriptor::dest(status, 1));
        // The copy is of before, so that whatever changes from here on has to be marked.
        let pages = self.pages_of(index, place, &parts)?;
        self.touched.extend(pages);
        self.migrate()?;
        let vring = self.front_end.vring(index)?;
        vring.ring.offer_chain(head, &chain)?;
        vring.kick.write(1)?;
        let ring = vring.ring.pages_of_driver();
        self.touched.extend(ring);
        let pending = Pending {
            kind,
            sector,
            value,
            parts,
            in_extra,
            may_fail: false,
        };
        self.pending.insert((index, head), pending);
        Ok(())
    }

    /// One pass of the reader.
    fn migrate(&mut self) -> Outcome {
        let mut pages = std::mem::take(&mut self.touched);
        if let Logging::On(log) = &self.logging {
            pages.extend(log.take()?);
        }
        for page in pages {
            let (memory, copy) = self.ram(page * PAGE);
            let bytes = memory.read(page * PAGE, 4096)?;
            copy.write(page * PAGE, &bytes)?;
        }
        Ok(())
    }

    fn compare(&self, pages: impl IntoIterator<Item = u64>) -> Outcome {
        for page in pages {
            let (memory, copy) = self.ram(page * PAGE);
            if memory.read(page * PAGE, 4096)? != copy.read(page * PAGE, 4096)? {
                return Err(format!("page {page:#x} changed and was not marked").into());
            }
        }
        Ok(())
    }

    fn reap(&mut self) -> Outcome {
        for index in 0..VRINGS {
            while let Some((head, _)) = self.front_end.vring(index)?.ring.take_used()? {
                let head = u16::try_from(head)?;
                let pending = self.pending.remove(&(index, head));
                let pending = pending.ok_or_else(|| format!("head {head} was answered twice"))?;
                self.answered += 1;
                self.judge(index, head / 5, &pending)?;
            }
        }
        Ok(())
    }

    fn judge(&mut self, index: u16, place: u16, pending: &Pending) -> Outcome {
        let [_, status, _] = self.front_end.vring(index)?.places(place);
        let failed = self.front_end.ram.read(status, 1)? != [0];
        if failed && !self.fails && !pending.may_fail {
            return Err(format!("{pending:?} failed").into());
        }
        let mut data = Vec::new();
        for &(at, len) in &pending.parts {
            data.extend(self.ram(at).0.read(at, len as usize)?);
        }
        let first = usize::try_from(pending.sector)?;
        let sectors = first..first + data.len() / 512;
        match (pending.kind, failed) {
            (Kind::In, false) => {
                for (sector, bytes) in sectors.zip(data.chunks(512)) {
                    if !bytes.iter().all(|byte| self.disk[sector].contains(byte)) {
                        return Err(format!("sector {sector} is not as written").into());
                    }
                }
            }
            (Kind::Out, false) => {
                self.disk[sectors].fill(BTreeSet::from([pending.value]));
            }
            // Part of it may have been written.
            (Kind::Out, true) => {
                for allowed in &mut self.disk[sectors] {
                    allowed.insert(pending.value);
                }
            }
            (Kind::In, true) | (Kind::Flush | Kind::GetId, _) => {}
        }
        if matches!(self.logging, Logging::On(_)) {
            self.migrate()?;
            let pages = self.pages_of(index, place, &pending.parts)?;
            self.compare(pages)?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Outcome {
        self.release_soon();
        let begun = Instant::now();
        while !self.pending.is_empty() {
            self.reap()?;
            if begun.elapsed() > PATIENCE {
                let lost: Vec<_> = self.pending.keys().collect();
                return Err(format!("never answered (vring, head): {lost:?}").into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Storage that is stuck lets go, now or while something waits for it.
    fn release_soon(&mut self) {
        let handle = self.handle.clone();
        let pause = Duration::from_micros(self.random.u64(..1500));
        let releasing = spawn(move || {
            sleep(pause);
            handle.release();
        });
        self.join_releasing();
        self.releasing = Some(releasing);
    }

    fn join_releasing(&mut self) {
        if let Some(thread) = self.releasing.take() {
            assert!(thread.join().is_ok());
        }
    }

    /// GET_VRING_BASE, and a start from there.
    fn restart_vring(&mut self) -> Outcome {
        self.release_soon();
        let index = self.random.u16(..VRINGS);
        let base = self.front_end.peer.vring_base(u32::from(index))?;
        self.reap()?;
        // What was not taken before the stop is still in the ring.
        let left = self.pending.keys().filter(|(vring, _)| *vring == index);
        let next = self.front_end.vring(index)?.ring.next_avail();
        let untaken = next.wrapping_sub(u16::try_from(base)?);
        if left.count() != usize::from(untaken) {
            return Err(format!("vring {index} stopped with something in flight").into());
        }
        self.front_end.start_vring(index, u16::try_from(base)?)
    }

    /// The second region comes or goes; nothing of it is touched once its going is acknowledged.
    fn plug(&mut self) -> Outcome {
        let region = region_payload(self.extra.numbers());
        let payload = [vec![0; 8], region].concat();
        if !self.has_extra {
            let file = [self.extra.fd()];
            self.front_end
                .peer
                .confirm(code::ADD_MEM_REG, &payload, &file)?;
            self.has_extra = true;
            return self.check_left();
        }
        self.release_soon();
        self.front_end
            .peer
            .confirm(code::REM_MEM_REG, &payload, &[])?;
        self.has_extra = false;
        for pending in self.pending.values_mut() {
            pending.may_fail = pending.in_extra;
        }
        let size = usize::try_from(EXTRA.size)?;
        self.left = Some(self.extra.read(EXTRA.guest, size)?);
        Ok(())
    }

    /// Nobody has touched the second region while it was gone.
    fn check_left(&mut self) -> Outcome {
        let size = usize::try_from(EXTRA.size)?;
        match self.left.take() {
            Some(left) if left != self.extra.read(EXTRA.guest, size)? => {
                Err("memory was touched after it was taken away".into())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The whole table again.
    fn replace_table(&mut self) -> Outcome {
        self.release_soon();
        self.send_table()
    }

    fn send_table(&self) -> Outcome {
        let mut regions = vec![&*self.front_end.ram];
        regions.extend(self.has_extra.then_some(&self.extra));
        let count = u32::try_from(regions.len())?;
        let mut payload = [count.to_ne_bytes(), [0; 4]].concat();
        payload.extend(regions.iter().flat_map(|r| region_payload(r.numbers())));
        let files: Vec<_> = regions.iter().map(|region| region.fd()).collect();
        Ok(self
            .front_end
            .peer
            .confirm(code::SET_MEM_TABLE, &payload, &files)?)
    }

    fn new_log() -> Outcome<DirtyLog> {
        DirtyLog::new(EXTRA.guest + EXTRA.size, 0)
    }

    /// Logging begins, its log is swapped, or it ends.
    fn change_log(&mut self) -> Outcome {
        let log = Run::new_log()?;
        match &self.logging {
            Logging::Off => {
                self.front_end.start_logging(&log, self.features)?;
                self.logging = Logging::On(log);
                self.copy_all();
            }
            Logging::On(_) if self.random.bool() => {
                self.front_end.set_log(&log)?;
                if let Logging::On(old) = std::mem::replace(&mut self.logging, Logging::On(log)) {
                    self.touched.extend(old.take()?);
                }
            }
            Logging::On(_) => {
                self.logging = Logging::Off;
                self.front_end.stop_logging(self.features)?;
            }
        }
        Ok(())
    }

    /// A migration begins anew.
    fn copy_all(&mut self) {
        for copy in &self.copies {
            let Layout { guest, size, .. } = copy.layout();
            self.touched.extend(guest / PAGE..(guest + size) / PAGE);
        }
    }

    /// The connection is lost, with whatever is in flight, and made again.
    fn reconnect(&mut self) -> Outcome {
        let (nobody, _) = UnixStream::pair()?;
        self.front_end.peer = Peer::new(nobody)?;
        self.release_soon();
        let peer = self.served.connect()?;
        let logging = matches!(self.logging, Logging::On(_));
        let features = self.features | if logging { LOG_ALL } else { 0 };
        // As FrontEnd::reconnect, with both regions in the table.
        self.front_end.peer = peer;
        self.front_end.negotiate(features)?;
        self.inflight.set(&self.front_end.peer)?;
        self.send_table()?;
        for index in 0..VRINGS {
            self.front_end.start_vring(index, 0x4321)?;
        }
        if let Logging::On(log) = &self.logging {
            self.front_end.set_log(log)?;
        }
        Ok(())
    }

    fn step(&mut self) -> Outcome {
        match self.random.u8(..100) {
            0..70 => self.submit(),
            70..85 => self.reap(),
            85..88 => {
                self.join_releasing();
                self.handle.stick();
                Ok(())
            }
            88..90 => {
                self.release_soon();
                Ok(())
            }
            90..92 => self.restart_vring(),
            92..94 => self.plug(),
            94..95 => self.replace_table(),
            95..98 => self.change_log(),
            _ => self.reconnect(),
        }
    }

    fn finish(mut self) -> Outcome<u64> {
        self.settle()?;
        self.check_left()?;
        for index in 0..VRINGS {
            let base = self.front_end.peer.vring_base(u32::from(index))?;
            let ring = &self.front_end.vring(index)?.ring;
            assert_eq!(base, u32::from(ring.next_avail()));
            assert_eq!(base, u32::from(ring.used_index()?));
        }
        if matches!(self.logging, Logging::On(_)) {
            self.migrate()?;
            let low = self.front_end.ram.layout().size / PAGE;
            self.compare(0..low)?;
            self.compare(EXTRA.guest / PAGE..(EXTRA.guest + EXTRA.size) / PAGE)?;
        }
        // Answered only when no hold on the table before is left; one that was given back twice
        // would be missing here.
        self.replace_table()?;
        self.join_releasing();
        self.served.stop()?;
        Ok(self.answered)
    }
}

fn run(seed: u64) -> Outcome<u64> {
    let mut run = Run::new(seed)?;
    for _ in 0..600 {
        run.step()?;
    }
    run.finish()
}

#[test]
fn nothing_is_lost_whatever_happens_when() -> Outcome {
    let number = |name| -> Outcome<Option<u64>> {
        Ok(env::var(name).ok().map(|text| text.parse()).transpose()?)
    };
    let again = |seed, error| format!("VUBLK_PROPERTY_SEED={seed} does this again: {error}");
    if let Some(seed) = number("VUBLK_PROPERTY_SEED")? {
        run(seed).map_err(|error| again(seed, error))?;
        return Ok(());
    }
    let time = Duration::from_secs(number("VUBLK_PROPERTY_SECONDS")?.unwrap_or(20));
    let mut seeds = fastrand::Rng::new();
    let (begun, mut runs, mut requests) = (Instant::now(), 0, 0);
    while runs == 0 || begun.elapsed() < time {
        let seed = seeds.u64(..1 << 32);
        // Also for a run that panics.
        println!("VUBLK_PROPERTY_SEED={seed}");
        requests += run(seed).map_err(|error| again(seed, error))?;
        runs += 1;
    }
    println!("{runs} runs, {requests} requests");
    assert!(requests > 100 * runs, "the runs do something: {requests}");
    Ok(())
}
