//! The ranges of DISCARD and WRITE_ZEROES (virtio 5.2.6).

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use blockdev::{Extent, Sector, Unmap};
use iov_iter::{Hold, IovIter, Source};
use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use super::Profile;
use super::request::{RangeOp, Status};
use crate::limits::MAX_RANGES;

/// Bytes of one `virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// One range of a DISCARD or WRITE_ZEROES request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The bytes of the device.
    pub at: Extent,
    /// Whether the device may give up the blocks.
    pub unmap: Unmap,
}

/// Reads the ranges of a request, each once, and judges them all before the first is carried out.
///
/// # Errors
/// The status virtio 5.2.6.2 names: UNSUPP for a flag that is unknown or does not belong, IOERR for
/// a list or a range beyond what was offered.
pub(super) fn parse(
    op: RangeOp,
    source: &mut IovIter<Source>,
    hold: &Hold,
    profile: &Profile,
    ranges: &mut Vec<Range>,
) -> Result<(), Status> {
    ranges.clear();
    let count = source.count().checked_div(RANGE_BYTES).unwrap_or(0);
    let whole = count.checked_mul(RANGE_BYTES) == Some(source.count());
    if !whole || count == 0 || u32::try_from(count).map_or(true, |count| count > MAX_RANGES) {
        return Err(Status::IoErr);
    }
    let limit = match op {
        RangeOp::Discard => profile.discard.map(|limits| limits.max_sectors),
        RangeOp::WriteZeroes => profile.write_zeroes.map(|limits| limits.max_sectors),
    };
    let limit = limit.ok_or(Status::Unsupp)?;
    for _ in 0..count {
        let mut bytes = [0; RANGE_BYTES];
        if source.copy_from(hold, &mut bytes) != RANGE_BYTES {
            return Err(Status::IoErr);
        }
        ranges.push(range(op, u128::from_le_bytes(bytes), limit, profile)?);
    }
    Ok(())
}

/// `raw` is a little-endian structure: sector (64 bits), number of sectors (32), flags (32).
fn range(op: RangeOp, raw: u128, limit: u32, profile: &Profile) -> Result<Range, Status> {
    let low = |bits: u128| u32::try_from(bits & u128::from(u32::MAX)).unwrap_or(u32::MAX);
    let sector = u64::try_from(raw & u128::from(u64::MAX)).unwrap_or(u64::MAX);
    let (sectors, flags) = (low(raw >> 64), low(raw >> 96));
    let unmap = match (op, flags) {
        (RangeOp::Discard, 0) | (RangeOp::WriteZeroes, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => {
            Unmap::Allowed
        }
        (RangeOp::WriteZeroes, 0) => Unmap::Forbidden,
        (RangeOp::Discard | RangeOp::WriteZeroes, _) => return Err(Status::Unsupp),
    };
    if sectors > limit {
        return Err(Status::IoErr);
    }
    let len = u64::from(sectors) << blockdev::SECTOR_SHIFT;
    let at = Extent::new(Sector(sector), len, profile.capacity)
        .ok()
        .filter(|at| at.is_aligned(profile.block_size))
        .ok_or(Status::IoErr)?;
    Ok(Range { at, unmap })
}
