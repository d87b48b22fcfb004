//! A stand-in for a worker: guest memory, a ring and a channel.

#![expect(unsafe_code, reason = "makes a memfd and eventfds")]
#![expect(
    clippy::missing_panics_doc,
    reason = "all of it panics when something goes wrong"
)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{Dest, Held, Hold, IovIter, MemoryTable, Pools, RegionSpec, Source, View};

use crate::{
    BlockDevice, Channel, Completion, Durability, Engine, Event, Extent, IoError, Op, Ring, Sector,
    Tag, Unmap, Wait,
};

/// Bytes of guest memory a rig has.
pub const MEMORY: usize = 32 << 20;

/// Where it starts: guest memory rarely starts at zero, and never where the host maps it.
pub const GUEST_BASE: u64 = 0x1_0000_0000;

/// Room for every bounce buffer the suite asks for at once.
const BOUNCE_BUDGET: usize = 64 << 20;

/// The token of the channel's own event.
const CHANNEL: u32 = u32::MAX;

/// A run of guest memory: its offset from the start of memory and its length, in bytes.
pub type Run = (usize, usize);

/// One worker's view of one device.
pub struct Rig {
    /// Dropped before the ring, as the trait asks.
    channel: Option<Box<dyn Channel>>,
    ring: Option<Ring>,
    device: Arc<dyn BlockDevice>,
    view: Rc<View>,
    next_tag: u32,
    expected: HashMap<Tag, u64>,
}

impl std::fmt::Debug for Rig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rig")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Rig {
    /// A worker with an engine of this kind and memory of its own.
    #[must_use]
    pub fn new(device: &Arc<dyn BlockDevice>, engine: Engine) -> Self {
        let mut ring = Ring::new(engine).expect("the engine is available");
        let channel = device.open_channel(&mut ring).expect("a channel opens");
        if let Some(event) = channel.event() {
            ring.watch(event, CHANNEL)
                .expect("the channel's event can be watched");
        }
        Self {
            channel: Some(channel),
            ring: Some(ring),
            device: Arc::clone(device),
            view: guest_memory(),
            next_tag: 0,
            expected: HashMap::new(),
        }
    }

    /// The device under test.
    #[must_use]
    pub fn device(&self) -> &dyn BlockDevice {
        &*self.device
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut Ring {
        self.ring.as_mut().expect("the ring is there until the end")
    }

    /// Holds that are out.
    #[must_use]
    pub fn holds(&self) -> usize {
        self.view.holds()
    }

    /// Guest memory as this worker sees it.
    #[must_use]
    pub fn view(&self) -> &Rc<View> {
        &self.view
    }

    /// A hold, as a request without data has.
    pub fn hold(&self) -> Hold {
        self.view.hold()
    }

    /// `len` bytes from `sector` on.
    #[must_use]
    pub fn extent(&self, sector: u64, len: usize) -> Extent {
        Extent::new(Sector(sector), len as u64, self.device.geometry().capacity)
            .expect("the suite stays inside the device")
    }

    /// Memory for a read.
    #[must_use]
    pub fn dest(&self, runs: &[Run]) -> Held<Dest> {
        let mut iter = IovIter::<Dest>::guest(&self.view, &ranges(runs)).expect("runs are mapped");
        let needs = self.device.capabilities().memory;
        iter.extract(self.view.hold(), usize::MAX, &needs)
            .expect("memory can be extracted")
    }

    /// Memory for a write.
    #[must_use]
    pub fn source(&self, runs: &[Run]) -> Held<Source> {
        let mut iter =
            IovIter::<Source>::guest(&self.view, &ranges(runs)).expect("runs are mapped");
        let needs = self.device.capabilities().memory;
        iter.extract(self.view.hold(), usize::MAX, &needs)
            .expect("memory can be extracted")
    }

    /// A read from `sector` into the runs.
    #[must_use]
    pub fn read_op(&self, sector: u64, runs: &[Run]) -> Op {
        Op::Read {
            at: self.extent(sector, total(runs)),
            into: self.dest(runs),
        }
    }

    /// A write of the runs to `sector`.
    #[must_use]
    pub fn write_op(&self, sector: u64, runs: &[Run], durability: Durability) -> Op {
        let at = self.extent(sector, total(runs));
        Op::Write {
            at,
            from: self.source(runs),
            durability,
        }
    }

    /// A flush.
    #[must_use]
    pub fn flush_op(&self) -> Op {
        Op::Flush { hold: self.hold() }
    }

    /// A discard.
    #[must_use]
    pub fn discard_op(&self, sector: u64, len: usize, durability: Durability) -> Op {
        Op::Discard {
            at: self.extent(sector, len),
            durability,
            hold: self.hold(),
        }
    }

    /// A write-zeroes.
    #[must_use]
    pub fn zero_op(&self, sector: u64, len: usize, unmap: Unmap, durability: Durability) -> Op {
        Op::WriteZeroes {
            at: self.extent(sector, len),
            unmap,
            durability,
            hold: self.hold(),
        }
    }

    /// Puts bytes into guest memory.
    pub fn fill(&self, runs: &[Run], bytes: &[u8]) {
        let mut rest = bytes;
        for (offset, len) in runs {
            let (head, tail) = rest.split_at(*len);
            self.slice(*offset, *len).copy_from(head);
            rest = tail;
        }
    }

    /// Takes bytes out of guest memory.
    #[must_use]
    pub fn peek(&self, runs: &[Run]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(total(runs));
        for (offset, len) in runs {
            let mut part = vec![0; *len];
            self.slice(*offset, *len).copy_to(&mut part);
            bytes.extend(part);
        }
        bytes
    }

    fn slice(&self, offset: usize, len: usize) -> vm_memory::VolatileSlice<'_> {
        let region = &self.view.table().regions()[0];
        region
            .slice(offset as u64, len)
            .expect("runs lie inside memory")
    }

    /// Preps an op under the next tag.
    pub fn prep(&mut self, op: Op) -> Tag {
        let tag = Tag(self.next_tag % TAGS);
        self.next_tag += 1;
        let before = self.expected.insert(tag, op.payload());
        assert_eq!(before, None, "{tag:?} is free");
        let (channel, ring) = (self.channel.as_mut(), self.ring.as_mut());
        channel
            .expect("the channel is open")
            .prep(ring.expect("the ring is there"), tag, op);
        tag
    }

    /// Takes an op back, if the device can.
    pub fn abort(&mut self, tag: Tag) {
        let (channel, ring) = (self.channel.as_mut(), self.ring.as_mut());
        channel
            .expect("the channel is open")
            .abort(ring.expect("the ring is there"), tag);
    }

    /// Preps ops that are checked and answered as they come: any order, each exactly once.
    pub fn run_all(&mut self, ops: Vec<Op>) -> Vec<(Tag, u32, Result<(), IoError>)> {
        for op in ops {
            let _: Tag = self.prep(op);
        }
        self.drain()
    }

    /// Waits for everything in flight.
    pub fn drain(&mut self) -> Vec<(Tag, u32, Result<(), IoError>)> {
        let mut ended = Vec::new();
        while !self.expected.is_empty() {
            self.ring().submit(Wait::Event).expect("the ring works");
            ended.extend(self.reap());
        }
        assert_eq!(self.ring().in_flight(), 0, "nothing is left behind");
        ended
    }

    /// Takes what is there, landing what was read.
    pub fn reap(&mut self) -> Vec<(Tag, u32, Result<(), IoError>)> {
        let mut ended = Vec::new();
        while let Some(event) = self.ring().reap() {
            match event {
                Event::Done(completion) => ended.push(self.finish(completion)),
                Event::Ready(CHANNEL) => {
                    let (channel, ring) = (self.channel.as_mut(), self.ring.as_mut());
                    channel
                        .expect("it is open")
                        .collect(ring.expect("the ring is there"));
                }
                Event::Ready(token) | Event::Unwatched(token) => {
                    assert_eq!(token, CHANNEL, "nobody else is watched");
                }
            }
        }
        ended
    }

    fn finish(&mut self, completion: Completion) -> (Tag, u32, Result<(), IoError>) {
        let Completion {
            tag,
            op,
            moved,
            outcome,
        } = completion;
        let payload = self.expected.remove(&tag).expect("each op completes once");
        if outcome.is_ok() {
            assert_eq!(
                u64::from(moved),
                payload,
                "success means everything moved: {op:?}"
            );
        } else {
            assert!(
                u64::from(moved) <= payload,
                "no more moved than there was: {op:?}"
            );
        }
        if let Op::Read { into, .. } = op {
            drop(into.land(moved as usize));
        }
        (tag, moved, outcome)
    }

    /// Does one op and gives its outcome.
    ///
    /// # Errors
    /// The op's own.
    pub fn run(&mut self, op: Op) -> Result<(), IoError> {
        let tag = self.prep(op);
        let ended = self.drain();
        assert_eq!(ended.len(), 1, "nothing else is in flight");
        assert_eq!(ended[0].0, tag);
        ended[0].2
    }

    /// Ends channel and ring with whatever is in flight.
    pub fn abandon(&mut self) {
        drop(self.channel.take());
        drop(self.ring.take());
        self.expected.clear();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.abandon();
        if !std::thread::panicking() {
            assert_eq!(self.view.holds(), 0, "every hold was given back");
        }
    }
}

/// Bytes in the runs.
#[must_use]
pub fn total(runs: &[Run]) -> usize {
    runs.iter().map(|(_, len)| len).sum()
}

/// An eventfd as a worker has it: non-blocking.
#[must_use]
pub fn eventfd() -> File {
    // SAFETY: eventfd takes no pointer.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    assert!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and belongs to nobody else.
    unsafe { File::from_raw_fd(fd) }
}

/// Guest memory of [`MEMORY`] bytes, as a worker sees it.
#[must_use]
pub fn guest_memory() -> Rc<View> {
    // SAFETY: the name is a static string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = MEMORY as u64;
    let resized = file.as_fd().try_clone_to_owned().map(File::from);
    resized
        .and_then(|file| file.set_len(size))
        .expect("a memfd can be resized");
    let region = RegionSpec {
        guest_addr: GUEST_BASE,
        size,
        front_end_addr: 0x7f00_0000_0000,
        mmap_offset: 0,
        file,
    };
    let table = MemoryTable::new(vec![region]).expect("the memory can be mapped");
    View::new(Arc::new(table), Pools::new(BOUNCE_BUDGET))
}

/// Runs as guest addresses.
fn ranges(runs: &[Run]) -> Vec<(u64, u32)> {
    let range = |(offset, len): &Run| {
        (
            GUEST_BASE + *offset as u64,
            u32::try_from(*len).expect("runs are short"),
        )
    };
    runs.iter().map(range).collect()
}

/// Tags a rig uses: the largest ring there is.
const TAGS: u32 = 32768;
