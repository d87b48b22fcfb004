//! An op in flight: which call it needs next, and what an answer means for it.

#![expect(
    unsafe_code,
    reason = "a static array of raw vectors is shared between threads"
)]

use libc::{c_int, iovec};

use super::call::{Call, Vectors};
use super::files::{File, FileKind};
use crate::completion::{IoError, Verdict, settle};
use crate::geometry::Extent;
use crate::op::{Durability, Op, Unmap};

/// What an op in a slot waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A device's own threads; no call of the ring's.
    Parked,
    /// Reading or writing the op's memory.
    Move,
    /// Giving space back: FALLOC_FL_PUNCH_HOLE, which leaves zeroes.
    Punch,
    /// Zeroing in place: FALLOC_FL_ZERO_RANGE.
    ZeroRange,
    /// Writing zeroes from this byte of the extent on, for want of a better way.
    ZeroFill(u64),
    /// ioctl(BLKDISCARD).
    Discard,
    /// The fdatasync that ends a flush or a durable change.
    Sync,
}

/// An op, and how far it is.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) op: Op,
    pub(super) file: u32,
    pub(super) step: Step,
    pub(super) moved: u32,
    /// Whether io_uring has a call of it.
    pub(super) calling: bool,
    /// Whether its memory is taken as it is, without the slot that it may have.
    plain: bool,
    idle_tries: u8,
}

/// What follows an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another call.
    Call,
    /// The op ends.
    End(Result<(), IoError>),
}

impl Flight {
    /// An op that a device's own threads work on.
    pub(super) fn parked(op: Op) -> Self {
        Self {
            op,
            file: 0,
            step: Step::Parked,
            moved: 0,
            calling: false,
            plain: false,
            idle_tries: 0,
        }
    }

    /// An op on `file`; the error is for an op the file is known not to support.
    pub(super) fn new(op: Op, index: u32, file: &File) -> Self {
        let step = match &op {
            Op::Read { .. } | Op::Write { .. } => Step::Move,
            Op::Flush { .. } => Step::Sync,
            Op::Discard { .. } => match file.kind {
                FileKind::Regular => Step::Punch,
                FileKind::Block { .. } => Step::Discard,
            },
            Op::WriteZeroes { at, .. } if !file.changes(*at) => Step::ZeroFill(0),
            Op::WriteZeroes { unmap, .. } => match unmap {
                Unmap::Allowed if file.punches => Step::Punch,
                Unmap::Allowed | Unmap::Forbidden if file.zeroes => Step::ZeroRange,
                Unmap::Allowed | Unmap::Forbidden => Step::ZeroFill(0),
            },
        };
        Self {
            op,
            file: index,
            step,
            moved: 0,
            calling: false,
            plain: false,
            idle_tries: 0,
        }
    }

    /// Bytes that its calls have still to move.
    pub(super) fn left(&self) -> u64 {
        match self.step {
            Step::Move => self.op.payload().saturating_sub(u64::from(self.moved)),
            Step::ZeroFill(done) => self.op.extent().unwrap_or(EMPTY).len().saturating_sub(done),
            Step::Parked | Step::Punch | Step::ZeroRange | Step::Discard | Step::Sync => 0,
        }
    }

    /// The call it needs now; `None` while it is parked.
    pub(super) fn call(&self, file: &File) -> Option<Call> {
        let at = self.op.extent().unwrap_or(EMPTY);
        let here = at.offset().saturating_add(u64::from(self.moved));
        match (self.step, &self.op) {
            (Step::Parked, _) => None,
            (Step::Move, Op::Read { into, .. }) => Some(Call::Read {
                memory: Vectors::in_slot(into.vectors(), into.slot().filter(|_| !self.plain)),
                offset: here,
            }),
            (
                Step::Move,
                Op::Write {
                    from, durability, ..
                },
            ) => Some(Call::Write {
                memory: Vectors::in_slot(from.vectors(), from.slot().filter(|_| !self.plain)),
                offset: here,
                flags: write_flags(*durability),
            }),
            (Step::Punch, _) => Some(fallocate(libc::FALLOC_FL_PUNCH_HOLE, at)),
            (Step::ZeroRange, _) => Some(fallocate(libc::FALLOC_FL_ZERO_RANGE, at)),
            (Step::ZeroFill(done), _) => {
                let rest = at.advance(done);
                Some(Call::Write {
                    memory: zeroes(rest.len()),
                    offset: rest.offset(),
                    flags: 0,
                })
            }
            (Step::Discard, _) => {
                let whole = file.whole_sectors(at);
                Some(Call::Discard {
                    offset: whole.offset(),
                    len: whole.len(),
                })
            }
            (
                Step::Sync | Step::Move,
                Op::Flush { .. }
                | Op::Discard { .. }
                | Op::WriteZeroes { .. }
                | Op::Read { .. }
                | Op::Write { .. },
            ) => Some(Call::Sync),
        }
    }

    /// Takes the answer to [`Self::call`]; remembers in `file` what it cannot do.
    pub(super) fn answer(&mut self, res: i32, file: &mut File) -> Next {
        match self.step {
            Step::Parked => Next::End(Err(IoError::Os(libc::EIO))),
            Step::Move => self.moved_by(res),
            Step::ZeroFill(done) => self.filled_by(done, res),
            Step::Sync | Step::Punch | Step::ZeroRange | Step::Discard => match settle(0, res) {
                Verdict::Done | Verdict::Partial(_) => self.changed(),
                Verdict::Again => self.again(res),
                Verdict::Failed(error) => self.refused(error, file),
            },
        }
    }

    /// Read and write: counts what arrived and goes on with the rest.
    fn moved_by(&mut self, res: i32) -> Next {
        let want = u32::try_from(self.op.payload()).unwrap_or(u32::MAX);
        match settle(want.saturating_sub(self.moved), res) {
            Verdict::Done => {
                self.moved = want;
                Next::End(Ok(()))
            }
            Verdict::Partial(got) => {
                self.moved = self.moved.saturating_add(got);
                self.idle_tries = 0;
                match &mut self.op {
                    Op::Read { into, .. } => into.advance(got as usize),
                    Op::Write { from, .. } => from.advance(got as usize),
                    Op::Flush { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => {}
                }
                Next::Call
            }
            Verdict::Again => self.again(res),
            // The ring does not have the slot: the kernel finds the pages itself.
            Verdict::Failed(IoError::Os(libc::EFAULT)) if self.is_fixed() => {
                log::debug!("a slot of registered buffers is not there, and does without");
                self.plain = true;
                Next::Call
            }
            // O_DIRECT refuses to go on from where a file ends in the middle of a block.
            Verdict::Failed(IoError::Os(libc::EINVAL)) if self.moved > 0 => {
                Next::End(Err(IoError::Short {
                    want,
                    got: self.moved,
                }))
            }
            Verdict::Failed(IoError::Short { .. }) => Next::End(Err(IoError::Short {
                want,
                got: self.moved,
            })),
            Verdict::Failed(error) => Next::End(Err(error)),
        }
    }

    fn is_fixed(&self) -> bool {
        let slot = match &self.op {
            Op::Read { into, .. } => into.slot(),
            Op::Write { from, .. } => from.slot(),
            Op::Flush { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => None,
        };
        slot.is_some() && !self.plain
    }

    /// Write-zeroes by writing: goes on until the extent is full.
    fn filled_by(&mut self, done: u64, res: i32) -> Next {
        let left = self.op.extent().unwrap_or(EMPTY).len().saturating_sub(done);
        match settle(u32::try_from(left).unwrap_or(u32::MAX), res) {
            Verdict::Done => self.changed(),
            Verdict::Partial(got) => {
                self.idle_tries = 0;
                self.step = Step::ZeroFill(done.saturating_add(u64::from(got)));
                Next::Call
            }
            Verdict::Again => self.again(res),
            Verdict::Failed(error) => Next::End(Err(error)),
        }
    }

    /// The change is made; a durable one still has to reach stable storage.
    fn changed(&mut self) -> Next {
        if self.step != Step::Sync && self.op.durability() == Durability::Durable {
            self.step = Step::Sync;
            self.idle_tries = 0;
            return Next::Call;
        }
        Next::End(Ok(()))
    }

    /// The call failed: tries the next way to the same end, where there is one.
    fn refused(&mut self, error: IoError, file: &mut File) -> Next {
        // A file system that cannot do it says EOPNOTSUPP; a block driver without discard
        // EOPNOTSUPP too, an old one ENOTTY.
        let unsupported = matches!(
            error,
            IoError::Os(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV)
        );
        if !unsupported {
            return Next::End(Err(error));
        }
        let discard = matches!(self.op, Op::Discard { .. });
        match self.step {
            Step::Punch if !discard => {
                file.cannot_punch();
                self.step = if file.zeroes {
                    Step::ZeroRange
                } else {
                    Step::ZeroFill(0)
                };
                Next::Call
            }
            Step::ZeroRange => {
                file.cannot_zero();
                self.step = Step::ZeroFill(0);
                Next::Call
            }
            Step::Punch | Step::Discard => Next::End(Err(IoError::Unsupported)),
            Step::Parked | Step::Move | Step::ZeroFill(_) | Step::Sync => Next::End(Err(error)),
        }
    }

    /// The kernel asked for the same call again; it gets it a few times in a row.
    fn again(&mut self, res: i32) -> Next {
        self.idle_tries = self.idle_tries.saturating_add(1);
        if self.idle_tries > MAX_IDLE_TRIES {
            return Next::End(Err(IoError::Os(res.saturating_neg())));
        }
        Next::Call
    }
}

/// RWF_DSYNC makes one write stable before it completes, without a flush of all the others.
fn write_flags(durability: Durability) -> c_int {
    match durability {
        Durability::Cached => 0,
        Durability::Durable => libc::RWF_DSYNC,
    }
}

/// fallocate over an extent; none of the modes used here may change the file's size.
fn fallocate(mode: c_int, at: Extent) -> Call {
    let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
    Call::Fallocate {
        mode,
        offset: at.offset(),
        len: at.len(),
    }
}

/// Up to a mebibyte of zeroes, in memory aligned for any O_DIRECT.
fn zeroes(len: u64) -> Vectors {
    let chunk = ZEROES.0.len() as u64;
    if len >= chunk {
        let count = (len / chunk).min(ZERO_VECTORS.0.len() as u64);
        return Vectors::Many(ZERO_VECTORS.0.as_ptr(), u32::try_from(count).unwrap_or(1));
    }
    let iov_len = usize::try_from(len).unwrap_or(0);
    Vectors::One(iovec {
        iov_base: (&raw const ZEROES).cast_mut().cast(),
        iov_len,
    })
}

/// Answers without progress in a row before an op fails with them.
const MAX_IDLE_TRIES: u8 = 16;

/// What an op without an extent works on.
const EMPTY: Extent = Extent::EMPTY;

#[repr(align(4096))]
struct Zeroes([u8; 65536]);

static ZEROES: Zeroes = Zeroes([0; 65536]);

struct ZeroVectors([iovec; 16]);

// SAFETY: the vectors point to an immutable static and are only ever handed to calls that read.
unsafe impl Sync for ZeroVectors {}

static ZERO_VECTORS: ZeroVectors = ZeroVectors(
    [iovec {
        iov_base: (&raw const ZEROES).cast_mut().cast(),
        iov_len: 65536,
    }; 16],
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::rig::{Rig, Run, eventfd};
    use crate::{Engine, Way, Ways, open};
    use std::os::fd::AsFd;

    fn rig() -> Rig {
        Rig::new(&open::null(1 << 30, 512).unwrap(), Engine::Threads)
    }

    fn file(kind: FileKind) -> File {
        // Nothing here calls the kernel; any descriptor will do.
        File::new(eventfd().as_fd(), kind, Ways::all(Way::Engine)).unwrap()
    }

    /// What a call would transfer: offset, bytes and vectors.
    fn transfer(call: Option<Call>) -> (u64, usize, usize) {
        let (memory, offset) = match call.unwrap() {
            Call::Read { memory, offset } | Call::Write { memory, offset, .. } => (memory, offset),
            call @ (Call::Sync | Call::Fallocate { .. } | Call::Discard { .. }) => {
                panic!("{call:?} transfers nothing")
            }
        };
        match memory {
            Vectors::One(one) | Vectors::Fixed(one, _) => (offset, one.iov_len, 1),
            Vectors::Many(first, count) => {
                // SAFETY: the array belongs to the op in the flight that the caller borrows, or is
                // the static one.
                let vectors = unsafe { std::slice::from_raw_parts(first, count as usize) };
                (
                    offset,
                    vectors.iter().map(|vector| vector.iov_len).sum(),
                    vectors.len(),
                )
            }
        }
    }

    fn fallocate_mode(call: Option<Call>) -> c_int {
        match call {
            Some(Call::Fallocate { mode, .. }) => mode & !libc::FALLOC_FL_KEEP_SIZE,
            other => panic!("{other:?} is no fallocate"),
        }
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_ended() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        let runs: [Run; 3] = [(0, 4096), (8192, 512), (16384, 3584)];
        for op in [
            rig.read_op(8, &runs),
            rig.write_op(8, &runs, Durability::Cached),
        ] {
            let mut flight = Flight::new(op, 0, &file);
            assert_eq!(transfer(flight.call(&file)), (4096, 8192, 3));
            assert_eq!(flight.answer(1000, &mut file), Next::Call);
            assert_eq!(transfer(flight.call(&file)), (5096, 7192, 3));
            assert_eq!(flight.answer(3096 + 512, &mut file), Next::Call);
            assert_eq!(transfer(flight.call(&file)), (8704, 3584, 1));
            assert_eq!(flight.answer(3583, &mut file), Next::Call);
            assert_eq!(transfer(flight.call(&file)), (12287, 1, 1));
            assert_eq!(flight.answer(1, &mut file), Next::End(Ok(())));
            assert_eq!(flight.moved, 8192);
        }
    }

    #[test]
    fn a_transfer_that_stops_is_an_error_that_counts() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        for last in [0, -libc::EINVAL] {
            let mut flight = Flight::new(rig.read_op(0, &[(0, 4096)]), 0, &file);
            assert_eq!(flight.answer(512, &mut file), Next::Call);
            let short = IoError::Short {
                want: 4096,
                got: 512,
            };
            assert_eq!(flight.answer(last, &mut file), Next::End(Err(short)));
        }
        let mut flight = Flight::new(rig.read_op(0, &[(0, 4096)]), 0, &file);
        let invalid = IoError::Os(libc::EINVAL);
        assert_eq!(
            flight.answer(-libc::EINVAL, &mut file),
            Next::End(Err(invalid))
        );
    }

    #[test]
    fn more_vectors_than_a_call_takes_need_several() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        let runs: Vec<Run> = (0..2500).map(|index| (index * 1024, 512)).collect();
        let mut flight = Flight::new(rig.read_op(0, &runs), 0, &file);
        for (offset, vectors) in [(0, 1024), (1024 * 512, 1024), (2048 * 512, 452)] {
            let bytes = vectors * 512;
            assert_eq!(transfer(flight.call(&file)), (offset, bytes, vectors));
            let next = flight.answer(i32::try_from(bytes).unwrap(), &mut file);
            assert_eq!(next == Next::Call, vectors == 1024);
        }
        assert_eq!(flight.moved as usize, 2500 * 512);
    }

    #[test]
    fn the_kernel_may_ask_for_the_same_call_only_so_often() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        let mut flight = Flight::new(rig.read_op(0, &[(0, 4096)]), 0, &file);
        for _ in 0..3 {
            for _ in 0..MAX_IDLE_TRIES {
                assert_eq!(flight.answer(-libc::EAGAIN, &mut file), Next::Call);
            }
            // Progress starts the count anew.
            assert_eq!(flight.answer(512, &mut file), Next::Call);
        }
        for _ in 0..MAX_IDLE_TRIES {
            assert_eq!(flight.answer(-libc::EINTR, &mut file), Next::Call);
        }
        let end = Next::End(Err(IoError::Os(libc::EINTR)));
        assert_eq!(flight.answer(-libc::EINTR, &mut file), end);
    }

    #[test]
    fn write_zeroes_takes_the_best_way_there_is_and_remembers() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        let zero = |unmap| rig.zero_op(0, (1 << 20) + 65536 + 512, unmap, Durability::Durable);
        let mut flight = Flight::new(zero(Unmap::Allowed), 0, &file);
        assert_eq!(
            fallocate_mode(flight.call(&file)),
            libc::FALLOC_FL_PUNCH_HOLE
        );
        assert_eq!(flight.answer(-libc::EOPNOTSUPP, &mut file), Next::Call);
        assert_eq!(
            fallocate_mode(flight.call(&file)),
            libc::FALLOC_FL_ZERO_RANGE
        );
        assert_eq!(flight.answer(-libc::EOPNOTSUPP, &mut file), Next::Call);
        assert_eq!(transfer(flight.call(&file)), (0, 1 << 20, 16));
        assert_eq!(flight.answer(1 << 20, &mut file), Next::Call);
        assert_eq!(transfer(flight.call(&file)), (1 << 20, 65536, 1));
        assert_eq!(flight.answer(65536, &mut file), Next::Call);
        assert_eq!(transfer(flight.call(&file)), ((1 << 20) + 65536, 512, 1));
        assert_eq!(flight.answer(512, &mut file), Next::Call);
        assert!(
            matches!(flight.call(&file), Some(Call::Sync)),
            "durable to the end"
        );
        assert_eq!(flight.answer(0, &mut file), Next::End(Ok(())));

        let next = Flight::new(zero(Unmap::Allowed), 0, &file);
        assert_eq!(
            next.step,
            Step::ZeroFill(0),
            "it is not asked a second time"
        );
    }

    #[test]
    fn write_zeroes_that_keeps_the_space_never_punches() {
        let rig = rig();
        let mut file = file(FileKind::Regular);
        let op = rig.zero_op(0, 4096, Unmap::Forbidden, Durability::Cached);
        let mut flight = Flight::new(op, 0, &file);
        assert_eq!(
            fallocate_mode(flight.call(&file)),
            libc::FALLOC_FL_ZERO_RANGE
        );
        let full = Next::End(Err(IoError::Os(libc::ENOSPC)));
        assert_eq!(flight.answer(-libc::ENOSPC, &mut file), full);
        assert!(file.zeroes, "a full disk says nothing about what it can do");
    }

    #[test]
    fn a_discard_has_no_second_way() {
        let rig = rig();
        for (kind, errno) in [
            (FileKind::Regular, libc::EOPNOTSUPP),
            (FileKind::Block { sector_size: 512 }, libc::EOPNOTSUPP),
            (FileKind::Block { sector_size: 512 }, libc::ENOTTY),
        ] {
            let mut file = file(kind);
            let mut flight = Flight::new(rig.discard_op(0, 4096, Durability::Cached), 0, &file);
            let end = Next::End(Err(IoError::Unsupported));
            assert_eq!(flight.answer(-errno, &mut file), end);
        }
    }

    #[test]
    fn a_discard_reaches_whole_sectors_and_smaller_zeroes_are_written() {
        let rig = rig();
        let file = file(FileKind::Block { sector_size: 4096 });
        let flight = Flight::new(rig.discard_op(5, 30 * 512, Durability::Cached), 0, &file);
        let Some(Call::Discard { offset, len }) = flight.call(&file) else {
            panic!("a discard")
        };
        assert_eq!((offset, len), (4096, 12288));
        let op = rig.zero_op(5, 30 * 512, Unmap::Allowed, Durability::Cached);
        assert_eq!(
            transfer(Flight::new(op, 0, &file).call(&file)),
            (5 * 512, 30 * 512, 1)
        );
    }

    #[test]
    fn what_is_durable_says_so_to_the_kernel() {
        let rig = rig();
        let file = file(FileKind::Regular);
        for (durability, expected) in [
            (Durability::Cached, 0),
            (Durability::Durable, libc::RWF_DSYNC),
        ] {
            let op = rig.write_op(0, &[(0, 512)], durability);
            let call = Flight::new(op, 0, &file).call(&file);
            assert!(matches!(call, Some(Call::Write { flags, .. }) if flags == expected));
        }
        let flush = Flight::new(rig.flush_op(), 0, &file).call(&file);
        assert!(matches!(flush, Some(Call::Sync)));
    }
}
