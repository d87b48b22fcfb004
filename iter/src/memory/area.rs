//! Areas: checked parts of a region that stay mapped, for rings and their like.
#![expect(
    unsafe_code,
    reason = "forms a volatile slice from a pointer it keeps mapped"
)]
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use vm_memory::{ByteValued, VolatileMemory, VolatileSlice};

use super::error::MemoryError;
use super::line::Line;
use super::region::{Region, RegionSpec};

/// A resolved, checked part of one region that keeps its region mapped: what each of a vring's
/// three parts lives in.
///
/// # Invariants
/// `start` and the `len` bytes after it lie inside the mapping that `region` owns.
#[derive(Clone, Debug)]
pub struct Area {
    start: NonNull<u8>,
    len: usize,
    guest_addr: u64,
    region: Arc<Region>,
}

// SAFETY: the pointer is into the mapping that `region` (itself `Send` and `Sync`) keeps at its
// place, and is only ever used for volatile or atomic accesses, from whatever thread.
unsafe impl Send for Area {}
// SAFETY: as for `Send`; the guest accesses the same bytes at any time anyway.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `len` bytes of a front end's file from `offset` on that are no guest memory: a dirty
    /// log, an in-flight region. Its guest address is zero and means nothing.
    ///
    /// # Errors
    /// As for a region of guest memory.
    pub fn map(file: OwnedFd, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let region = Region::map(RegionSpec {
            guest_addr: 0,
            size: len,
            front_end_addr: 0,
            mmap_offset: offset,
            file,
        })?;
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        Self::new(Arc::new(region), 0, bytes).ok_or(MemoryError::NotMapped {
            guest_addr: 0,
            len: bytes,
        })
    }

    /// The `len` bytes of `region` from `offset` on, if they lie inside it.
    pub(crate) fn new(region: Arc<Region>, offset: u64, len: usize) -> Option<Self> {
        let start = NonNull::new(region.slice(offset, len)?.ptr_guard_mut().as_ptr())?;
        let guest_addr = region.guest_addr().checked_add(offset)?;
        Some(Self {
            start,
            len,
            guest_addr,
            region,
        })
    }

    /// Length in bytes; never zero.
    #[expect(clippy::len_without_is_empty, reason = "an area is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Guest physical address of the first byte.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }

    /// Whether a SIGBUS hit the area's region.
    pub fn poisoned(&self) -> bool {
        self.region.poisoned()
    }

    /// The byte at `offset`, or nothing if it lies outside.
    #[inline]
    pub fn atomic_u8(&self, offset: usize) -> Option<&AtomicU8> {
        let field = self.field::<u8>(offset)?;
        // SAFETY: `field` checked the bounds, `region` keeps it mapped while `self` is borrowed,
        // and all sides touch such fields only as atomics or volatile.
        Some(unsafe { AtomicU8::from_ptr(field) })
    }

    /// The 16-bit field at `offset` bytes, or nothing if it lies outside or is misaligned.
    #[inline]
    pub fn atomic_u16(&self, offset: usize) -> Option<&AtomicU16> {
        let field = self.field::<u16>(offset)?;
        // SAFETY: `field` checked bounds and alignment, `region` keeps it mapped while `self` is
        // borrowed, and both sides touch ring fields only as atomics or volatile.
        Some(unsafe { AtomicU16::from_ptr(field) })
    }

    /// The 32-bit field at `offset` bytes, or nothing if it lies outside or is misaligned.
    #[inline]
    pub fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let field = self.field::<u32>(offset)?;
        // SAFETY: as in `atomic_u16`.
        Some(unsafe { AtomicU32::from_ptr(field) })
    }

    /// The 64-bit field at `offset` bytes, or nothing if it lies outside or is misaligned.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let field = self.field::<u64>(offset)?;
        // SAFETY: as in `atomic_u16`.
        Some(unsafe { AtomicU64::from_ptr(field) })
    }

    /// The two 32-bit fields at `offset` bytes, or nothing if they lie outside or are misaligned.
    #[inline]
    pub fn atomic_u32s(&self, offset: usize) -> Option<&[AtomicU32; 2]> {
        let field = self.field::<[AtomicU32; 2]>(offset)?;
        // SAFETY: as in `atomic_u16`; an array of two has no padding.
        Some(unsafe { &*field })
    }

    /// The area's 64-bit fields in pairs, from its start on; none if they are misaligned.
    #[inline]
    pub fn pairs(&self) -> &[[AtomicU64; 2]] {
        let start = self.start.cast::<[AtomicU64; 2]>();
        if !start.is_aligned() {
            return &[];
        }
        let count = self.len >> size_of::<[AtomicU64; 2]>().trailing_zeros();
        // SAFETY: so many pairs lie inside the area; the rest is as in `atomic_u16`.
        unsafe { slice::from_raw_parts(start.as_ptr(), count) }
    }

    /// The `len` bytes from `offset` on as an area of their own, if they lie inside and are any.
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        let left = self.len.checked_sub(offset)?;
        let start = NonNull::new(self.start.as_ptr().wrapping_add(offset))?;
        let guest_addr = self.guest_addr.checked_add(u64::try_from(offset).ok()?)?;
        (1..=left).contains(&len).then(|| Self {
            start,
            len,
            guest_addr,
            region: Arc::clone(&self.region),
        })
    }

    /// One volatile copy of the `T` at `offset` bytes, or nothing if it does not lie inside.
    #[inline]
    pub fn load<T: ByteValued>(&self, offset: usize) -> Option<T> {
        self.slice().get_ref(offset).ok().map(|field| field.load())
    }

    /// One volatile store of `value` at `offset` bytes; nothing if it does not lie inside.
    #[inline]
    pub fn store<T: ByteValued>(&self, offset: usize, value: T) -> Option<()> {
        self.slice()
            .get_ref(offset)
            .ok()
            .map(|field| field.store(value))
    }

    /// The cache line at `offset` bytes; of one outside nothing comes.
    #[inline]
    pub fn line(&self, offset: usize) -> Line {
        Line::at(self.start.as_ptr().wrapping_add(offset))
    }

    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        self.start.addr().get().is_multiple_of(align)
    }

    /// The address of an aligned `T` at `offset` bytes, if it lies inside.
    #[inline]
    fn field<T>(&self, offset: usize) -> Option<*mut T> {
        let left = self.len.checked_sub(offset)?;
        let field = self.start.as_ptr().wrapping_add(offset).cast::<T>();
        (left >= size_of::<T>() && field.is_aligned()).then_some(field)
    }

    #[inline]
    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `new` took the pointer from a checked slice of `region`, which keeps it mapped
        // for as long as `self`, and so the borrow, lives. The guest may write at any time, and
        // nobody makes a plain reference to it.
        unsafe { VolatileSlice::new(self.start.as_ptr(), self.len) }
    }
}
