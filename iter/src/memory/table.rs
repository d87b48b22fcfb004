//! The memory table: an immutable snapshot of a device's regions.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::area::Area;
use super::error::MemoryError;
use super::region::{Region, RegionSpec, check_numbers};
use crate::segment::Segment;

/// The most regions a table holds: what QEMU and Cloud Hypervisor can send (vhost-user:
/// `VHOST_USER_GET_MAX_MEM_SLOTS`).
pub const MAX_REGIONS: usize = 509;

/// An immutable set of mapped regions, sorted by guest address.
///
/// A change makes a new table that shares the regions both have; a region is unmapped when the
/// last table, view or [`Area`] that refers to it is gone.
#[derive(Debug)]
pub struct MemoryTable {
    regions: Vec<Arc<Region>>,
    /// Start and size of each region, close together: the only thing a look-up reads.
    spans: Box<[Span]>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    size: u64,
}

/// Where a guest address lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) region: u32,
    pub(crate) offset: u64,
    /// Bytes from the address to the region's end; never zero.
    pub(crate) left: u64,
}

impl MemoryTable {
    /// A table without memory: what a device has before its front end sends any.
    pub fn empty() -> Self {
        Self {
            regions: Vec::new(),
            spans: Box::default(),
        }
    }

    /// Maps all of `specs`; on an error nothing stays mapped.
    ///
    /// # Errors
    /// More than [`MAX_REGIONS`], overlapping regions, or a region that cannot be mapped.
    pub fn new(specs: Vec<RegionSpec>) -> Result<Self, MemoryError> {
        if specs.len() > MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        for spec in &specs {
            check_numbers(
                spec.guest_addr,
                spec.size,
                spec.front_end_addr,
                spec.mmap_offset,
            )?;
        }
        check_overlap(
            "guest address",
            specs.iter().map(|s| (s.guest_addr, s.size)),
        )?;
        check_overlap(
            "front-end address",
            specs.iter().map(|s| (s.front_end_addr, s.size)),
        )?;
        let map = |spec| Region::map(spec).map(Arc::new);
        let regions: Result<Vec<_>, _> = specs.into_iter().map(map).collect();
        Ok(Self::of(regions?))
    }

    /// A table with one region more; shares the others.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_region(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooManyRegions);
        }
        check_numbers(
            spec.guest_addr,
            spec.size,
            spec.front_end_addr,
            spec.mmap_offset,
        )?;
        let guest = self.regions.iter().map(|r| (r.guest_addr(), r.size()));
        check_overlap("guest address", guest.chain([(spec.guest_addr, spec.size)]))?;
        let front_end = self.regions.iter().map(|r| (r.front_end_addr(), r.size()));
        check_overlap(
            "front-end address",
            front_end.chain([(spec.front_end_addr, spec.size)]),
        )?;
        let mut regions = self.regions.clone();
        regions.push(Arc::new(Region::map(spec)?));
        Ok(Self::of(regions))
    }

    /// A table without the region that has exactly these numbers; shares the others.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchRegion`].
    pub fn without_region(
        &self,
        guest_addr: u64,
        size: u64,
        front_end_addr: u64,
    ) -> Result<Self, MemoryError> {
        let named = |r: &Arc<Region>| {
            r.guest_addr() == guest_addr && r.size() == size && r.front_end_addr() == front_end_addr
        };
        let at = self.regions.iter().position(named);
        let at = at.ok_or(MemoryError::NoSuchRegion {
            guest_addr,
            size,
            front_end_addr,
        })?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self::of(regions))
    }

    /// The regions, by ascending guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The guest address of the front end's `addr`, if all `len` bytes lie inside one region.
    pub fn front_end_to_guest(&self, addr: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = addr.checked_sub(region.front_end_addr())?;
            let left = region.size().checked_sub(offset).filter(|left| *left > 0)?;
            if len > left {
                return None;
            }
            region.guest_addr().checked_add(offset)
        })
    }

    /// Whether a SIGBUS hit any region.
    pub fn poisoned(&self) -> bool {
        self.regions.iter().any(|region| region.poisoned())
    }

    /// The `len` bytes at `guest_addr` as an [`Area`] that keeps its region mapped.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] if they do not lie inside one region (or `len` is zero),
    /// [`MemoryError::Misaligned`] if the guest or the host address is not a multiple of `align`.
    pub fn area(
        self: &Arc<Self>,
        guest_addr: u64,
        len: usize,
        align: usize,
    ) -> Result<Area, MemoryError> {
        let not_mapped = || MemoryError::NotMapped { guest_addr, len };
        let wanted = u64::try_from(len)
            .ok()
            .filter(|len| *len > 0)
            .ok_or_else(not_mapped)?;
        let place = self
            .find(guest_addr, 0)
            .filter(|place| wanted <= place.left);
        let place = place.ok_or_else(not_mapped)?;
        let region = self.region(place.region).ok_or_else(not_mapped)?;
        let area = Area::new(Arc::clone(region), place.offset, len).ok_or_else(not_mapped)?;
        let guest_aligned = usize::try_from(guest_addr).is_ok_and(|a| a.is_multiple_of(align));
        if guest_aligned && area.is_aligned(align) {
            Ok(area)
        } else {
            Err(MemoryError::Misaligned { guest_addr, align })
        }
    }

    /// Where `guest` lies. `hint` is the region to try first.
    #[inline]
    pub(crate) fn find(&self, guest: u64, hint: u32) -> Option<Place> {
        match self.place_in(guest, hint) {
            Some(place) => Some(place),
            None => self.search(guest),
        }
    }

    fn search(&self, guest: u64) -> Option<Place> {
        let after = self.spans.partition_point(|span| span.start <= guest);
        self.place_in(guest, u32::try_from(after.checked_sub(1)?).ok()?)
    }

    #[inline]
    fn place_in(&self, guest: u64, region: u32) -> Option<Place> {
        let span = self.spans.get(usize::try_from(region).ok()?)?;
        // Below the start this wraps to more than any size.
        let offset = guest.wrapping_sub(span.start);
        let left = span.size.checked_sub(offset).filter(|left| *left > 0)?;
        Some(Place {
            region,
            offset,
            left,
        })
    }

    /// The memory of `segment`, if this is the table it was made from.
    #[inline]
    pub(crate) fn slice(&self, segment: &Segment) -> Option<VolatileSlice<'_>> {
        self.resolve(segment).map(|(slice, _)| slice)
    }

    /// As [`slice`](Self::slice), with the region it lies in.
    #[inline]
    pub(crate) fn resolve(&self, segment: &Segment) -> Option<(VolatileSlice<'_>, &Region)> {
        let region = self.region(segment.region)?;
        // A segment of another table must not silently mean other memory.
        if region.guest_addr().wrapping_add(segment.offset) != segment.guest {
            return None;
        }
        Some((region.slice(segment.offset, segment.size())?, region))
    }

    #[inline]
    fn region(&self, index: u32) -> Option<&Arc<Region>> {
        self.regions.get(usize::try_from(index).ok()?)
    }

    fn of(mut regions: Vec<Arc<Region>>) -> Self {
        regions.sort_by_key(|region| region.guest_addr());
        let span = |r: &Arc<Region>| Span {
            start: r.guest_addr(),
            size: r.size(),
        };
        let spans = regions.iter().map(span).collect();
        Self { regions, spans }
    }
}

/// Checks that no two of the ranges (start, size) share an address; none wraps around.
fn check_overlap(
    which: &'static str,
    ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<(), MemoryError> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        if let &[(first, size), (second, _)] = pair
            && second.wrapping_sub(first) < size
        {
            return Err(MemoryError::Overlap {
                which,
                first,
                second,
            });
        }
    }
    Ok(())
}
