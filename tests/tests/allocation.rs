//! A worker allocates nothing for a request once it is warm.
#![expect(
    unsafe_code,
    reason = "a global allocator that counts is an unsafe trait"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::{File, read_dir, read_to_string};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::yield_now;

use blockdev::open::{file, memory};
use blockdev::{Access, BlockDevice, Direct, Engine, FileOptions};
use iov_iter::{MemoryTable, RegionSpec};
use rustix::process::getpid;
use rustix::thread::gettid;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::blk::{BlkDevice, BlkOptions, Pin};
use vublk::vring::Addresses;
use vublk::worker::{
    Command, DeviceId, Enablement, Outcome as Done, PollMode, Report, StopMode, TableEpoch,
    VringId, VringSetup, Workers, WorkersConfig,
};
use vublk_tests::frontend::{
    DESC_INDIRECT, DESC_NEXT, Descriptor, DriverRing, GuestRam, Kind, Outcome,
};
use vublk_tests::guest::Scratch;

/// Requests that may not allocate.
const COUNTED: usize = 100_000;
/// Requests at once.
const DEPTH: usize = 32;
/// Guest memory, in bytes.
const RAM: u64 = 64 << 20;
/// Where the buffers start; the ring is below.
const BUFFERS: u64 = 1 << 20;
/// Memory of one request, in bytes.
const ROOM: u64 = 1 << 20;
/// Bytes of the device.
const DEVICE: u64 = 16 << 20;
const RING_SIZE: u16 = 256;

/// Counts the allocations of every thread that is not exempt. The harness's own is, the first one
/// of the process: it speaks up when a test takes long.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    let is_exempt = || EXEMPT.try_with(Cell::get).unwrap_or(true);
    if !is_exempt() && gettid() != getpid() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the promises of `realloc`.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One worker that serves one vring of a device.
struct Bench {
    ram: Rc<GuestRam>,
    ring: DriverRing,
    kick: EventFd,
    device: Arc<BlkDevice>,
    workers: Workers,
    random: fastrand::Rng,
}

/// Memory that is not aligned goes through a bounce buffer where the device asks for it.
const SHIFTS: [u64; 2] = [0, 8];

/// What a request looks like.
#[derive(Clone, Copy)]
struct Shape {
    kind: Kind,
    segments: u64,
    shift: u64,
    table: Table,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Direct,
    Indirect,
}

impl Shape {
    /// Long requests and flushes seldom: they would take most of the time.
    fn random(random: &mut fastrand::Rng) -> Shape {
        Shape {
            kind: match random.u8(..) {
                0 => Kind::Flush,
                1..32 => Kind::GetId,
                32..144 => Kind::In,
                144.. => Kind::Out,
            },
            segments: if random.u8(..) == 0 {
                130
            } else {
                random.u64(1..4)
            },
            shift: SHIFTS[random.usize(..SHIFTS.len())],
            table: if random.bool() {
                Table::Direct
            } else {
                Table::Indirect
            },
        }
    }
}

const VRING: VringId = VringId {
    device: DeviceId(0),
    index: 0,
};

impl Bench {
    fn new(storage: Arc<dyn BlockDevice>, engine: Engine, pin: Pin) -> Outcome<Bench> {
        let options = BlkOptions {
            serial: "counted".into(),
            num_queues: 1,
        };
        let device = BlkDevice::new(DeviceId(0), storage, &options)?;
        let device = Arc::new(device.with_pin(pin));
        let config = WorkersConfig {
            workers: 1,
            cpus: Vec::new(),
            engine,
            poll: PollMode::default(),
        };
        let workers = Workers::spawn(&config, std::slice::from_ref(&device))?;
        let ram = Rc::new(GuestRam::new(RAM)?);
        let ring = DriverRing::new(&ram, RING_SIZE, 0);
        let region = RegionSpec {
            guest_addr: 0,
            size: RAM,
            front_end_addr: ram.front_end(0),
            mmap_offset: 0,
            file: ram.fd().try_clone_to_owned()?,
        };
        let table = Arc::new(MemoryTable::new(vec![region])?);
        let epoch = TableEpoch(1);
        workers.send(
            0,
            Command::SetTable {
                device: DeviceId(0),
                epoch,
                table: table.clone(),
            },
        );
        if device.pins().is_live() {
            share_pins(&workers, &device, (epoch, table));
        }
        let kick = EventFd::new(EFD_NONBLOCK)?;
        let [desc, used, avail] = ring.addresses();
        let setup = VringSetup {
            size: RING_SIZE,
            addresses: Addresses { desc, avail, used },
            next_avail: 0,
            inflight: None,
            log_used: None,
            features: (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES),
            enablement: Enablement::Enabled,
            kick: Some(kick.try_clone()?),
            call: Some(EventFd::new(EFD_NONBLOCK)?),
            err: None,
        };
        workers.send(0, Command::Start(VRING, Box::new(setup)));
        Ok(Bench {
            ram,
            ring,
            kick,
            device,
            workers,
            random: fastrand::Rng::with_seed(7),
        })
    }

    /// Serves a batch of every shape there is, so that every pool has met the most it ever will.
    fn warm_up(&mut self) -> Outcome {
        for kind in [Kind::In, Kind::Out] {
            for segments in [1, 2, 3, 130] {
                for shift in SHIFTS {
                    for table in [Table::Direct, Table::Indirect] {
                        let shape = Shape {
                            kind,
                            segments,
                            shift,
                            table,
                        };
                        self.serve(DEPTH, |_| shape)?;
                    }
                }
            }
        }
        self.serve(300 * DEPTH, Shape::random)
    }

    /// Serves `count` requests, a batch at a time.
    fn serve(&mut self, count: usize, shape: impl Fn(&mut fastrand::Rng) -> Shape) -> Outcome {
        for _ in 0..count / DEPTH {
            for slot in 0..DEPTH {
                let shape = shape(&mut self.random);
                self.offer(slot, shape)?;
            }
            self.kick.write(1)?;
            let mut served = 0;
            while served < DEPTH {
                match self.ring.take_used()? {
                    Some((head, len)) => {
                        assert!(len > 0, "chain {head} was refused");
                        served += 1;
                    }
                    None => yield_now(),
                }
            }
        }
        Ok(())
    }

    /// Makes one request available; it owns eight descriptors and a mebibyte.
    fn offer(&mut self, slot: usize, shape: Shape) -> Outcome {
        let Shape {
            kind,
            segments,
            shift,
            table,
        } = shape;
        let base = BUFFERS + slot as u64 * ROOM;
        let (header, status, list, data) = (base, base + 64, base + 4096, base + 64 * 1024);
        let sector = self.random.u64(..DEVICE / 512 - 8 * segments) & !7;
        let (count, len) = match kind {
            Kind::In | Kind::Out => (segments, 4096),
            Kind::Flush => (0, 0),
            Kind::GetId => (1, 20),
        };
        self.ram.write(header, &kind.header(sector))?;
        let mut chain = vec![Descriptor::source(header, 16)];
        for index in 0..count {
            // A gap, so that no two segments become one.
            let at = data + index * 5120 + shift;
            chain.push(match kind {
                Kind::Out => Descriptor::source(at, len),
                Kind::In | Kind::Flush | Kind::GetId => Descriptor::dest(at, len),
            });
        }
        chain.push(Descriptor::dest(status, 1));
        let head = u16::try_from(slot * 8)?;
        if chain.len() <= 5 && table == Table::Direct {
            return self.ring.offer_chain(head, &chain);
        }
        let last = chain.len() - 1;
        for (index, mut descriptor) in chain.into_iter().enumerate() {
            descriptor.flags |= if index < last { DESC_NEXT } else { 0 };
            descriptor.next = u16::try_from(index + 1)?;
            self.ram
                .write(list + 16 * index as u64, &descriptor.bytes())?;
        }
        let len = u32::try_from((last + 1) * 16)?;
        let table = Descriptor {
            addr: list,
            len,
            flags: DESC_INDIRECT,
            next: 0,
        };
        self.ring.offer_chain(head, &[table])
    }

    fn stop(self) {
        self.workers.send(0, Command::Stop(VRING, StopMode::Drain));
        while !self
            .workers
            .reports()
            .iter()
            .any(|(_, r)| matches!(r, Report::Stopped { .. }))
        {
            yield_now();
        }
        self.workers.join();
    }
}

/// Has the one worker share all of a table, as a session would.
fn share_pins(
    workers: &Workers,
    device: &BlkDevice,
    (epoch, table): (TableEpoch, Arc<MemoryTable>),
) {
    workers.pin(DeviceId(0), epoch, table);
    let is_pinned =
        |(_, report): &(usize, Report)| matches!(report, Report::Helper(_, Done::Pinned));
    while !workers.reports().iter().any(is_pinned) {
        yield_now();
    }
    let lease = device.pins().take().into_iter();
    lease.for_each(|lease| workers.send(0, Command::SetPins(DeviceId(0), lease)));
}

/// Waits until all threads but this one sleep. One that was started allocates when it first runs,
/// which may be long after that.
fn wait_until_others_sleep() -> Outcome {
    let this = gettid().as_raw_nonzero().to_string();
    loop {
        let mut awake = 0;
        for task in read_dir("/proc/self/task")? {
            let task = task?;
            // Threads come and go meanwhile.
            let stat = read_to_string(task.path().join("stat")).unwrap_or_default();
            awake += usize::from(task.file_name() != this.as_str() && !stat.contains(") S "));
        }
        if awake == 0 {
            return Ok(());
        }
        yield_now();
    }
}

fn allocates_nothing(storage: Arc<dyn BlockDevice>, engine: Engine, pin: Pin) -> Outcome {
    let name = storage.name();
    let mut bench = Bench::new(storage, engine, pin)?;
    bench.warm_up()?;
    wait_until_others_sleep()?;
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    assert!(before > 0, "the counter counts nothing");
    bench.serve(COUNTED, Shape::random)?;
    let counted = ALLOCATIONS.load(Ordering::Relaxed) - before;
    let line = bench.device.counters_line();
    assert_eq!(line.contains(" pinned=0 "), pin == Pin::Off, "{line}");
    bench.stop();
    assert_eq!(
        counted, 0,
        "allocations over {COUNTED} requests to {name}, pins: {pin:?}"
    );
    Ok(())
}

fn written_file(scratch: &Scratch, name: &str, direct: Direct) -> Outcome<Arc<dyn BlockDevice>> {
    let path = scratch.image(name, DEVICE)?;
    File::options()
        .write(true)
        .open(&path)?
        .write_all_at(&vec![1; DEVICE as usize], 0)?;
    let options = FileOptions {
        access: Access::ReadWrite,
        direct,
        block_size: None,
    };
    Ok(file(&path, options)?)
}

// One test, since whatever else runs in this process is counted too.
#[test]
fn nothing_is_allocated_for_requests() -> Outcome {
    EXEMPT.set(true);
    let scratch = Scratch::new()?;
    allocates_nothing(memory(DEVICE, 512)?, Engine::IoUring, Pin::Off)?;
    let direct = written_file(&scratch, "direct", Direct::On)?;
    allocates_nothing(direct.clone(), Engine::IoUring, Pin::Off)?;
    allocates_nothing(direct, Engine::IoUring, Pin::Registered { slot_shift: 20 })?;
    let cached = written_file(&scratch, "cached", Direct::Off)?;
    allocates_nothing(cached, Engine::Threads, Pin::Off)
}
