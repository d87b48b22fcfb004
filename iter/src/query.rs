//! Pure questions about what remains of an iterator: pages, alignment, shape.
#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use crate::direction::Direction;
use crate::iov::IovIter;
use crate::kind::Kind;

/// Addresses here are guest addresses (host addresses for private memory). A guest address and
/// its host address agree below the page size wherever a front end maps whole pages; extraction
/// checks the host's.
impl<D: Direction> IovIter<D> {
    /// Pages of 4096 bytes that the remaining segments touch, counted by segment and up to `max`:
    /// a page that two segments share counts twice. Zero for a sink.
    pub fn npages(&self, max: usize) -> usize {
        let mut pages = 0_usize;
        for (addr, len) in self.runs() {
            let touched = (addr % PAGE).saturating_add(len).div_ceil(PAGE);
            pages = pages.saturating_add(usize::try_from(touched).unwrap_or(usize::MAX));
            if pages >= max {
                return max;
            }
        }
        pages
    }

    /// All addresses and lengths of the remaining segments, OR'ed; its lowest set bit is their
    /// common alignment. Zero if nothing remains.
    pub fn alignment(&self) -> u64 {
        self.runs().fold(0, |bits, (addr, len)| bits | addr | len)
    }

    /// The addresses at both sides of each border between remaining segments, OR'ed. Zero for a
    /// single segment.
    pub fn gap_alignment(&self) -> u64 {
        let mut bits = 0;
        let mut previous_end = None;
        for (addr, len) in self.runs() {
            if let Some(end) = previous_end {
                bits |= addr | end;
            }
            previous_end = Some(addr.wrapping_add(len));
        }
        bits
    }

    /// Whether no remaining segment has an address with a bit of `addr_mask` or a length with a
    /// bit of `len_mask`.
    pub fn is_aligned(&self, addr_mask: u64, len_mask: u64) -> bool {
        self.runs()
            .all(|(addr, len)| addr & addr_mask == 0 && len & len_mask == 0)
    }

    /// Bytes that remain in the segment of the position.
    pub fn single_seg_count(&self) -> usize {
        match &self.kind {
            Kind::Guest(_) | Kind::Lent { .. } => {
                self.parts(self.count).next().map_or(0, |part| part.size())
            }
            Kind::Private { .. } | Kind::Sink => self.count,
        }
    }

    /// Address and length of each remaining run of memory.
    fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let private = self
            .private_place()
            .filter(|_| self.count > 0)
            .and_then(|(memory, at)| {
                let addr = memory.slice(at, self.count)?.ptr_guard().as_ptr().addr();
                Some((u64::try_from(addr).ok()?, u64::try_from(self.count).ok()?))
            });
        let segments = self
            .parts(self.count)
            .map(|part| (part.guest, u64::from(part.len)));
        segments.chain(private)
    }
}

/// The page that guests, and the vhost dirty log, count in.
const PAGE: u64 = 4096;
