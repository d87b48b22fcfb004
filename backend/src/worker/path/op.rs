//! Ops: made of ranges, and taken apart again.

use blockdev::{Durability, Op, Tag};
use iov_iter::Hold;

use crate::blk::{Range, RangeOp};
use crate::worker::attachment::Lent;
use crate::worker::slots::Job;

/// The range that follows, of a request that has one.
pub(super) fn next_range(lent: &mut Lent<'_>, tag: Tag) -> Option<(RangeOp, Range)> {
    let Job::Ranges { op, next } = &mut lent.slots.get_mut(tag)?.job else {
        return None;
    };
    let (op, at) = (*op, *next);
    *next += 1;
    lent.slots.ranges(tag).get(at).map(|range| (op, *range))
}

pub(super) fn range_op(op: RangeOp, range: &Range, durability: Durability, hold: Hold) -> Op {
    let Range { at, unmap } = *range;
    match op {
        RangeOp::Discard => Op::Discard {
            at,
            durability,
            hold,
        },
        RangeOp::WriteZeroes => Op::WriteZeroes {
            at,
            unmap,
            durability,
            hold,
        },
    }
}

pub(super) fn into_hold(op: Op) -> Hold {
    match op {
        // Nothing of a read that is given up lands in the guest.
        Op::Read { into, .. } => into.land(0),
        Op::Write { from, .. } => from.into_hold(),
        Op::Flush { hold } | Op::Discard { hold, .. } | Op::WriteZeroes { hold, .. } => hold,
    }
}
