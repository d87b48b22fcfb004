//! Registered buffers: guest memory whose pages the kernel found once, for all workers' rings.
//!
//! The memory is registered in an io_uring that does nothing else: it takes seconds for a gibibyte
//! that nobody has touched, and holds that ring's lock. Workers' rings share the buffers by cloning
//! them, which takes microseconds and is charged to nobody's memory limit a second time.

#![expect(
    unsafe_code,
    reason = "registers memory of regions that it keeps mapped"
)]

use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use io_uring::types::CloneBuffersFlags;
use io_uring::{IoUring, Submitter};
use iov_iter::{PinnedRegion, Region};

use super::{Core, Ring};

/// Slots that one ring can have (the kernel's IORING_MAX_REG_BUFFERS).
pub const MAX_SLOTS: u16 = 1 << 14;

/// The longest slot, as a power of two of bytes: what kernels before 7.2 take.
pub const SLOT_SHIFT: u32 = 30;

/// Guest memory that is registered, and keeps registered what its regions are mapped for.
///
/// # Invariants
/// A region of an entry stays mapped, by the entry itself, until the kernel said that nothing of it
/// is registered any more: no slot ever stands for an address that belongs to something else.
#[derive(Debug)]
pub struct Buffers {
    ring: Source,
    /// Slots that are ours, in the workers' rings; another device has others.
    slots: Range<u16>,
    slot_shift: u32,
    entries: Vec<Entry>,
    /// Ends when the last lease was dropped.
    leases: Option<Receiver<Infallible>>,
}

/// An io_uring, and a descriptor of it for those who clone from it.
struct Source {
    ring: IoUring,
    shared: Arc<OwnedFd>,
}

#[derive(Debug)]
struct Entry {
    pinned: PinnedRegion,
    /// The first of its slots that is not registered yet.
    next: u16,
    /// Bytes of the region whose pages are there.
    present: u64,
}

/// How far a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has slots left to register.
    Begun,
    /// All of it is registered.
    Complete,
}

/// What is registered at one time, for a worker's ring to share ([`Ring::adopt_buffers`]). Nothing
/// is registered or given back before every copy of it was dropped.
#[derive(Clone, Debug)]
pub struct Lease {
    shared: Arc<OwnedFd>,
    regions: Vec<PinnedRegion>,
    /// Slots of regions that are not registered as a whole.
    partial: Vec<Range<u16>>,
    slots: Range<u16>,
    _lent: Sender<Infallible>,
}

impl Lease {
    /// The regions that are registered as a whole.
    #[must_use]
    pub fn regions(&self) -> &[PinnedRegion] {
        &self.regions
    }
}

impl Buffers {
    /// Nothing yet, for slots of `1 << slot_shift` bytes with these numbers.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or cannot share buffers between rings (Linux 6.13).
    pub fn new(slots: Range<u16>, slot_shift: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(ENTRIES)?;
        let submitter = ring.submitter();
        submitter.register_buffers_sparse(u32::from(slots.end.saturating_sub(slots.start)))?;
        // SAFETY: the ring is a local and keeps its descriptor open.
        let shared = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }.try_clone_to_owned()?;
        let probe = IoUring::new(1)?;
        clone(&probe.submitter(), &shared, &slots)?;
        Ok(Self {
            ring: Source {
                ring,
                shared: Arc::new(shared),
            },
            slots,
            slot_shift,
            entries: Vec::new(),
            leases: None,
        })
    }

    /// Goes on registering a region: has some of its memory faulted in, and once all of a slot is
    /// there, registers that.
    ///
    /// Registering would fault it in as well, a whole slot at a time: for seconds nobody in the
    /// process could map anything, and whoever faults would wait behind those who want to.
    ///
    /// # Errors
    /// The kernel's refusal (ENOMEM: the limit of locked memory; EFAULT or EOPNOTSUPP: memory whose
    /// file wants to know of every change), or ENOSPC when no slots are left. Nothing of the region
    /// is registered then.
    pub fn register(&mut self, region: &Arc<Region>) -> io::Result<Progress> {
        self.await_leases();
        let at = match self.entry(region) {
            Some(at) => at,
            None => self.begin(region)?,
        };
        let place = self.slots.start;
        let Some(entry) = self.entries.get_mut(at) else {
            return Ok(Progress::Complete);
        };
        match entry.go_on(&self.ring.ring.submitter(), place) {
            Ok(()) if entry.is_complete() => Ok(Progress::Complete),
            Ok(()) => Ok(Progress::Begun),
            Err(error) => {
                let entry = self.entries.swap_remove(at);
                self.take_back(entry);
                Err(error)
            }
        }
    }

    /// Gives back every region that is not to be kept, and returns when the kernel has nothing of
    /// them any more. The rings that share them must have emptied their slots.
    pub fn retain(&mut self, keep: impl Fn(&PinnedRegion) -> bool) {
        self.await_leases();
        let entries = std::mem::take(&mut self.entries);
        for entry in entries {
            match keep(&entry.pinned) {
                true => self.entries.push(entry),
                false => self.take_back(entry),
            }
        }
    }

    /// Whether all of a region is registered.
    #[must_use]
    pub fn has(&self, region: &Arc<Region>) -> bool {
        let entry = self.entry(region).and_then(|at| self.entries.get(at));
        entry.is_some_and(Entry::is_complete)
    }

    /// Regions that are registered as a whole.
    #[must_use]
    pub fn complete(&self) -> usize {
        self.entries.iter().filter(|e| e.is_complete()).count()
    }

    /// What is registered now, for workers' rings.
    pub fn lend(&mut self) -> Lease {
        self.await_leases();
        let (lent, leases) = channel();
        self.leases = Some(leases);
        let (complete, partial): (Vec<_>, Vec<_>) =
            self.entries.iter().partition(|entry| entry.is_complete());
        Lease {
            shared: self.ring.shared.clone(),
            regions: complete.iter().map(|entry| entry.pinned.clone()).collect(),
            partial: partial.iter().map(|entry| entry.used()).collect(),
            slots: self.slots.clone(),
            _lent: lent,
        }
    }

    /// A worker that clones takes this ring's lock, which nobody must hold for long meanwhile.
    fn await_leases(&mut self) {
        if let Some(leases) = self.leases.take() {
            // Nothing is ever sent: it ends with an error when the last lease is gone.
            let _ = leases.recv();
        }
    }

    fn entry(&self, region: &Arc<Region>) -> Option<usize> {
        let same = |entry: &Entry| Arc::ptr_eq(entry.pinned.region(), region);
        self.entries.iter().position(same)
    }

    /// Finds slots for a region.
    fn begin(&mut self, region: &Arc<Region>) -> io::Result<usize> {
        let full = || io::Error::from_raw_os_error(libc::ENOSPC);
        let fits = |first: u16| {
            let pinned = PinnedRegion::new(region.clone(), first, self.slot_shift)?;
            (pinned.slots().end <= self.slots.end).then_some(pinned)
        };
        let mut taken: Vec<_> = self.entries.iter().map(|e| e.pinned.slots()).collect();
        taken.sort_by_key(|slots| slots.start);
        let mut first = self.slots.start;
        for slots in taken {
            if fits(first).is_some_and(|pinned| pinned.slots().end <= slots.start) {
                break;
            }
            first = slots.end;
        }
        let pinned = fits(first).ok_or_else(full)?;
        self.entries.push(Entry {
            pinned,
            next: first,
            present: 0,
        });
        Ok(self.entries.len() - 1)
    }

    /// Empties what an entry has of its slots. Clones that are left keep their pins, and nobody
    /// hears of their end; the tag of each slot comes back from this ring.
    fn take_back(&mut self, entry: Entry) {
        let (used, place) = (entry.used(), self.slots.start);
        let tags = usize::from(entry.next - used.start);
        let emptied = empty(
            &self.ring.ring.submitter(),
            used.start - place..used.end - place,
        );
        let gone = emptied.and_then(|()| self.ring.await_tags(tags));
        if let Err(error) = gone {
            log::error!("registered memory is not given back, and stays mapped: {error}");
            std::mem::forget(entry);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.retain(|_| false);
    }
}

impl Entry {
    /// Registers the next slot, or has more of its memory faulted in. The ring's slots are numbered
    /// from `place` on.
    fn go_on(&mut self, ring: &Submitter<'_>, place: u16) -> io::Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        let slot = self.pinned.bytes_of(self.next);
        if self.present == 0 {
            // What cannot be registered at all is refused before anything of it is faulted in.
            self.register(ring, place, 0..slot.end.min(PAGE), None)?;
        }
        if self.present < slot.end {
            let chunk = self.present..slot.end.min(self.present.saturating_add(CHUNK));
            self.present = chunk.end;
            populate(self.pinned.region(), chunk);
        }
        if self.present < slot.end {
            return Ok(());
        }
        let tag = [u64::from(self.next) + 1];
        self.register(ring, place, slot, Some(&tag))?;
        self.next += 1;
        Ok(())
    }

    /// Registers bytes of the region in its next slot, in place of what is there. A tag comes back
    /// when they are registered no longer.
    fn register(
        &self,
        ring: &Submitter<'_>,
        place: u16,
        bytes: Range<u64>,
        tag: Option<&[u64]>,
    ) -> io::Result<()> {
        let vector = memory(self.pinned.region(), bytes)?;
        let slot = u32::from(self.next - place);
        // SAFETY: the memory is the region's, which the entry keeps mapped until `take_back` heard
        // that the kernel has nothing of it any more.
        unsafe { ring.register_buffers_update(slot, &[vector], tag) }
    }

    /// Its slots that something is in. The last may have the untagged page that was tried first.
    fn used(&self) -> Range<u16> {
        let slots = self.pinned.slots();
        slots.start..slots.end.min(self.next.saturating_add(1))
    }

    fn is_complete(&self) -> bool {
        self.next == self.pinned.slots().end
    }
}

impl Source {
    /// Waits for the completions that say that `count` slots are nobody's any more.
    fn await_tags(&mut self, count: usize) -> io::Result<()> {
        let mut left = count;
        while left > 0 {
            let came = self.ring.completion().count();
            left = left.saturating_sub(came);
            if left > 0 && came == 0 {
                match self.ring.submitter().submit_and_wait(1) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fd = self.ring.as_raw_fd();
        f.debug_tuple("Source").field(&fd).finish()
    }
}

impl Ring {
    /// Shares what is registered: ops whose memory has one of its slots use it from now on. Slots
    /// of regions that are registered still keep their numbers.
    ///
    /// # Errors
    /// The kernel's, or that of an engine without buffers.
    pub fn adopt_buffers(&mut self, lease: &Lease) -> io::Result<()> {
        match &self.core {
            Core::Uring(uring) => clone(&uring.submitter(), &lease.shared, &lease.slots)?,
            Core::Threads(_) => return Err(io::ErrorKind::Unsupported.into()),
        }
        // Nobody uses these, and nobody would give them back.
        for slots in &lease.partial {
            self.empty_buffers(slots.clone())?;
        }
        Ok(())
    }

    /// Shares these slots no longer. No op in flight may use them; one that does keeps their pages.
    ///
    /// # Errors
    /// The kernel's; nothing is shared any more then.
    pub fn empty_buffers(&mut self, slots: Range<u16>) -> io::Result<()> {
        let Core::Uring(uring) = &self.core else {
            return Ok(());
        };
        let submitter = uring.submitter();
        empty(&submitter, slots).or_else(|error| {
            submitter.unregister_buffers()?;
            Err(error)
        })
    }
}

/// Puts all slots of a source into a ring, in place of what it had there.
fn clone(ring: &Submitter<'_>, source: &OwnedFd, slots: &Range<u16>) -> io::Result<()> {
    let count = slots.end.saturating_sub(slots.start);
    ring.register_buffers_clone_offset(
        source.as_raw_fd(),
        0,
        slots.start.into(),
        count.into(),
        CloneBuffersFlags::DST_REPLACE,
    )
}

/// Empties slots of a ring.
fn empty(ring: &Submitter<'_>, slots: Range<u16>) -> io::Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    let nothing = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let nothing = vec![nothing; slots.len()];
    // SAFETY: no memory is registered: an entry without an address empties its slot.
    unsafe { ring.register_buffers_update(slots.start.into(), &nothing, None) }
}

/// Has the kernel find pages for memory. Where it cannot, registering will say why.
fn populate(region: &Region, bytes: Range<u64>) {
    let Ok(vector) = memory(region, bytes) else {
        return;
    };
    let into_page = vector.iov_base.addr() & (PAGE as usize - 1);
    let start = vector.iov_base.wrapping_byte_sub(into_page);
    let len = vector.iov_len + into_page;
    // SAFETY: the range is the region's, rounded down to a page of its mapping, and the region is
    // borrowed; the advice changes no contents.
    let done = unsafe { libc::madvise(start, len, libc::MADV_POPULATE_WRITE) };
    if done != 0 {
        log::debug!(
            "guest memory is not all there: {}",
            io::Error::last_os_error()
        );
    }
}

/// Bytes of a region as the kernel takes them.
fn memory(region: &Region, bytes: Range<u64>) -> io::Result<libc::iovec> {
    let len = usize::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
    let slice = region.slice(bytes.start, len);
    let slice = slice.ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
    Ok(libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: len,
    })
}

/// The smallest page.
const PAGE: u64 = 4096;

/// Bytes that are faulted in at a time: some milliseconds.
const CHUNK: u64 = 32 << 20;

/// Nothing is ever submitted; completions beyond the queue wait in the kernel.
const ENTRIES: u32 = 8;
