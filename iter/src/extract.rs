//! Extraction: the next part of an iterator as memory that a device may touch.
#![expect(
    unsafe_code,
    reason = "forms volatile slices from vectors whose memory it holds"
)]

use std::fmt;
use std::marker::PhantomData;
use std::rc::Rc;

use vm_memory::VolatileSlice;

use crate::direction::{Dest, Direction, Source};
use crate::hold::{Extra, Hold};
use crate::iov::IovIter;
use crate::kind::Kind;
use crate::memory::MemoryTable;
use crate::pools::Recycled;
use crate::private::PrivateMemory;
use crate::segment::Segment;

/// What a device needs of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// Each vector's address is a multiple of this many bytes; a power of two.
    pub address_align: u32,
    /// Each vector's length is a multiple of this many bytes; a power of two.
    pub len_align: u32,
    /// Whether the data may change while the device works on it.
    pub stability: Stability,
}

impl MemoryNeeds {
    /// No needs: any address, any length, data as it is.
    pub const NONE: Self = Self {
        address_align: 1,
        len_align: 1,
        stability: Stability::AsIs,
    };
}

/// Whether guest data may change under a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// It may: the device only moves it.
    AsIs,
    /// It may not: the device computes over it, and gets a private copy.
    Stable,
}

/// Why nothing was extracted. The hold comes back; the iterator is where it was.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct ExtractError {
    /// What went wrong.
    pub kind: ExtractErrorKind,
    /// The hold that was given.
    pub hold: Hold,
}

/// Why nothing was extracted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtractErrorKind {
    /// No bytes were asked for, or none remain.
    #[error("nothing to extract")]
    Empty,
    /// The total is not a multiple of what the device needs, which no copy can mend.
    #[error("{len} bytes are not a multiple of the {align} that the device needs")]
    Misaligned {
        /// Bytes to extract.
        len: usize,
        /// The device's alignment of lengths.
        align: u32,
    },
    /// A bounce buffer is needed, and the budget is used up or the part is too large for one.
    #[error("no bounce buffer for {len} bytes")]
    NoBounce {
        /// Bytes to extract.
        len: usize,
    },
    /// The memory faulted, or is not of the hold's table.
    #[error("the memory is gone")]
    Faulted,
    /// A sink has no memory.
    #[error("a sink has no memory")]
    Sink,
}

/// Extracted, held memory: what a device, or the kernel on its behalf, may touch.
///
/// # Invariants
/// Every vector lies in memory that `hold` keeps in place: the hold's table, its bounce buffer,
/// or what it shares with another owner. If there are several, they stay at one address until
/// [`advance`](Self::advance), also when this is moved.
pub struct Held<D: Direction> {
    hold: Hold,
    vectors: Vectors,
    /// Vectors done with.
    first: usize,
    left: usize,
    moved: usize,
    direction: PhantomData<D>,
}

/// One vector in place, as most requests need, or several on the heap.
enum Vectors {
    One(libc::iovec),
    Many(Recycled<libc::iovec>),
}

impl Vectors {
    #[inline]
    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    fn get_mut(&mut self, index: usize) -> Option<&mut libc::iovec> {
        match self {
            Self::One(one) => (index == 0).then_some(one),
            Self::Many(many) => many.get_mut(index),
        }
    }
}

impl<D: Direction> IovIter<D> {
    /// Takes the next `max` bytes, or what remains of them, as memory for a device, and advances
    /// past it.
    ///
    /// The hold moves in, and what the extraction used is added to it: nothing, or a slot where
    /// the memory is one vector inside a registered buffer
    /// ([`set_pins`](crate::View::set_pins)), or a bounce buffer where a vector's address or
    /// length is not as the device needs it, or where the data must be stable. Vectors that
    /// follow each other in a region become one.
    ///
    /// # Errors
    /// As [`ExtractErrorKind`] names them; the hold comes back and the position stays.
    pub fn extract(
        &mut self,
        hold: Hold,
        max: usize,
        needs: &MemoryNeeds,
    ) -> Result<Held<D>, ExtractError> {
        let len = max.min(self.count());
        let extracted = match self.check(len, needs) {
            Err(kind) => Err((kind, hold)),
            Ok(()) => match self.in_place(&hold, len, needs) {
                Ok(Some(vectors)) => Ok(self.hold_in_place(hold, Vectors::Many(vectors), len)),
                Ok(None) => self.bounced(hold, len),
                Err(kind) => Err((kind, hold)),
            },
        };
        let held = extracted.map_err(|(kind, hold)| ExtractError { kind, hold })?;
        self.advance(len);
        Ok(held)
    }

    fn check(&self, len: usize, needs: &MemoryNeeds) -> Result<(), ExtractErrorKind> {
        if matches!(self.kind, Kind::Sink) {
            return Err(ExtractErrorKind::Sink);
        }
        if len == 0 {
            return Err(ExtractErrorKind::Empty);
        }
        if len & mask(needs.len_align) != 0 {
            return Err(ExtractErrorKind::Misaligned {
                len,
                align: needs.len_align,
            });
        }
        Ok(())
    }

    /// The vectors of the memory itself, or nothing if it is not as the device needs it.
    fn in_place(
        &self,
        hold: &Hold,
        len: usize,
        needs: &MemoryNeeds,
    ) -> Result<Option<Recycled<libc::iovec>>, ExtractErrorKind> {
        match needs.stability {
            Stability::AsIs => {}
            Stability::Stable => return Ok(None),
        }
        let segments = self.kind.list().map_or(1, |list| list.len() - self.index);
        let mut vectors = Recycled::take(hold.view().pools(), segments);
        match &self.kind {
            Kind::Guest(_) => self.gather(hold.view().table(), len, &mut vectors)?,
            Kind::Lent { keeper, .. } => {
                self.gather(keeper.view().table(), len, &mut vectors)?;
            }
            Kind::Private { .. } => {
                let (memory, at) = self.private_place().ok_or(ExtractErrorKind::Faulted)?;
                vectors.push(vector(
                    &memory.slice(at, len).ok_or(ExtractErrorKind::Faulted)?,
                ));
            }
            Kind::Sink => return Err(ExtractErrorKind::Sink),
        }
        let (address, length) = (mask(needs.address_align), mask(needs.len_align));
        let fits = |v: &libc::iovec| v.iov_base.addr() & address == 0 && v.iov_len & length == 0;
        Ok(vectors.iter().all(fits).then_some(vectors))
    }

    fn gather(
        &self,
        table: &MemoryTable,
        len: usize,
        vectors: &mut Recycled<libc::iovec>,
    ) -> Result<(), ExtractErrorKind> {
        let mut last_region = None;
        for part in self.parts(len) {
            let (memory, region) = table.resolve(&part).ok_or(ExtractErrorKind::Faulted)?;
            // A poisoned page is no longer the guest's, so a device must not fill it.
            if region.poisoned() {
                return Err(ExtractErrorKind::Faulted);
            }
            let next = vector(&memory);
            match vectors.last_mut() {
                // Never across regions: they are neighbours by chance, and registered apart.
                Some(last) if last_region == Some(part.region) && end(last) == next.iov_base => {
                    last.iov_len += next.iov_len;
                }
                Some(_) | None => vectors.push(next),
            }
            last_region = Some(part.region);
        }
        Ok(())
    }

    fn hold_in_place(&self, mut hold: Hold, vectors: Vectors, len: usize) -> Held<D> {
        hold.set_extra(match &self.kind {
            Kind::Guest(_) => self.pin(&hold, vectors.as_slice(), len),
            Kind::Sink => Extra::Nothing,
            Kind::Lent { keeper, .. } => Extra::Lent(Rc::clone(keeper)),
            Kind::Private { memory, .. } => Extra::Private(Rc::clone(memory)),
        });
        Held::new(hold, vectors, len)
    }

    /// The same bytes in a bounce buffer, copied there if the device reads them.
    fn bounced(&mut self, mut hold: Hold, len: usize) -> Result<Held<D>, (ExtractErrorKind, Hold)> {
        let pools = Rc::clone(hold.view().pools());
        // An earlier part's buffer first, so that a request needs one at a time.
        hold.set_extra(Extra::Nothing);
        let slot = pools.bounce().take(len);
        let Some(slot) = slot else {
            return Err((ExtractErrorKind::NoBounce { len }, hold));
        };
        // From here on the hold gives the buffer back, whatever happens.
        hold.set_extra(Extra::Bounce(slot));
        let memory = hold.bounce();
        let Some(buffer) = memory.as_ref().and_then(|memory| memory.slice(0, len)) else {
            hold.set_extra(Extra::Nothing);
            return Err((ExtractErrorKind::NoBounce { len }, hold));
        };
        if D::CHANGES_MEMORY {
            let landing = self.extracted_part(len, &pools);
            pools.bounce().set_landing(slot, landing);
        } else {
            let at = self.save();
            let copied = self.walk(&hold, len, |guest, done| copy_run(&guest, &buffer, done));
            // Nothing changed that could make its own cursor foreign.
            let returned = self.restore(at);
            if copied < len || returned.is_err() {
                hold.set_extra(Extra::Nothing);
                return Err((ExtractErrorKind::Faulted, hold));
            }
        }
        let vectors = Vectors::One(vector(&buffer));
        Ok(Held::new(hold, vectors, len))
    }
}

impl<D: Direction> Held<D> {
    /// One segment of guest memory, as it is.
    ///
    /// # Errors
    /// The hold, where [`IovIter::extract`] has to be asked: the memory is not as the device needs
    /// it, or something is wrong with it.
    #[inline]
    pub fn in_place(mut hold: Hold, segment: &Segment, needs: &MemoryNeeds) -> Result<Self, Hold> {
        let memory = match (needs.stability, hold.view().table().resolve(segment)) {
            (Stability::AsIs, Some((memory, region))) if !region.poisoned() => vector(&memory),
            _ => return Err(hold),
        };
        let (address, length) = (mask(needs.address_align), mask(needs.len_align));
        let len = memory.iov_len;
        if len == 0 || memory.iov_base.addr() & address != 0 || len & length != 0 {
            return Err(hold);
        }
        if !hold.view().pins().is_empty() {
            hold.set_extra(hold.view().pins().pin(segment));
        }
        Ok(Self::new(hold, Vectors::One(memory), len))
    }

    #[inline]
    fn new(hold: Hold, vectors: Vectors, len: usize) -> Self {
        Self {
            hold,
            vectors,
            first: 0,
            left: len,
            moved: 0,
            direction: PhantomData,
        }
    }

    /// Bytes left to transfer.
    #[inline]
    pub fn len(&self) -> usize {
        self.left
    }

    /// Whether nothing is left to transfer.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// What is left, as vectors for the kernel; possibly more than the 1024 it takes at a time.
    ///
    /// What they point to is valid for as long as this lives. Several of them stay at one address
    /// until [`advance`](Self::advance); a single one is to be copied.
    #[inline]
    pub fn vectors(&self) -> &[libc::iovec] {
        self.vectors
            .as_slice()
            .get(self.first..)
            .unwrap_or_default()
    }

    /// Moves on by `n` bytes, or all that are left, after a short transfer.
    pub fn advance(&mut self, n: usize) {
        let n = n.min(self.left);
        self.left -= n;
        self.moved += n;
        let mut rest = n;
        while rest > 0 {
            let Some(vector) = self.vectors.get_mut(self.first) else {
                break;
            };
            let step = rest.min(vector.iov_len);
            vector.iov_base = vector.iov_base.wrapping_byte_add(step);
            vector.iov_len -= step;
            rest -= step;
            if vector.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Bytes advanced by so far.
    #[inline]
    pub fn moved(&self) -> usize {
        self.moved
    }

    /// What is left, for devices that copy.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.vectors().iter().map(|vector| {
            // SAFETY: each vector was made from a checked slice of memory that `self.hold` keeps
            // in place while `self`, and so this borrow, lives. Guests and devices change it at
            // any time, so it is only ever volatile.
            unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) }
        })
    }

    /// Whether a bounce buffer stands in for the memory itself.
    pub fn is_bounced(&self) -> bool {
        self.hold.flags().contains(crate::HoldFlags::BOUNCED)
    }

    /// The slot of registered buffers that the one vector left lies in, if it is pinned.
    #[inline]
    pub fn slot(&self) -> Option<u16> {
        self.hold.slot()
    }

    /// The hold, which stays in here.
    pub fn hold(&self) -> &Hold {
        &self.hold
    }
}

impl Held<Source> {
    /// Ends the transfer: nothing is touched any more, and the hold comes back.
    pub fn into_hold(self) -> Hold {
        self.hold
    }
}

impl Held<Dest> {
    /// Ends the transfer, of which the first `n` bytes arrived: if they came into a bounce
    /// buffer, they are copied to where they belong. The hold comes back.
    ///
    /// Count from the start of the extracted part, `advance`d bytes included; zero if nothing
    /// arrived.
    #[inline]
    pub fn land(self, n: usize) -> Hold {
        let Self {
            hold, left, moved, ..
        } = self;
        if let Some((memory, landing)) = hold.take_landing() {
            land(&hold, &memory, landing, n, left + moved);
        }
        hold
    }
}

/// Copies the first `n` of the `len` bytes in `memory` to where they belong.
fn land(hold: &Hold, memory: &PrivateMemory, landing: Kind, n: usize, len: usize) {
    let mut dest = IovIter::<Dest>::from_kind(landing, len);
    dest.walk(hold, n.min(len), |guest, done| {
        let run = memory.slice(done, guest.len());
        run.map_or(0, |run| {
            run.copy_to_volatile_slice(guest);
            run.len()
        })
    });
}

impl<D: Direction> fmt::Debug for Held<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("direction", &D::NAME)
            .field("left", &self.left)
            .field("moved", &self.moved)
            .field("vectors", &self.vectors().len())
            .field("hold", &self.hold)
            .finish_non_exhaustive()
    }
}

/// Copies the run `from` to byte `at` of `to`; the bytes copied.
fn copy_run(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>, at: usize) -> usize {
    let Ok(to) = to.subslice(at, from.len()) else {
        return 0;
    };
    from.copy_to_volatile_slice(to);
    from.len()
}

fn vector(memory: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: memory.ptr_guard_mut().as_ptr().cast(),
        iov_len: memory.len(),
    }
}

fn end(vector: &libc::iovec) -> *mut libc::c_void {
    vector.iov_base.wrapping_byte_add(vector.iov_len)
}

/// The bits that a multiple of `align`, a power of two, does not have.
fn mask(align: u32) -> usize {
    align.saturating_sub(1) as usize
}
