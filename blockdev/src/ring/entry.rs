//! Entries of io_uring's queues: what goes in, and what a completion is about.

use std::os::fd::RawFd;

use io_uring::{opcode, squeue, types};

use super::call::{Call, Vectors};
use super::files::File;
use super::watches::GENERATION_MASK;

/// The submission entry for a call; `None` for those the helper threads make.
pub(super) fn entry(file: &File, call: &Call) -> Option<squeue::Entry> {
    let (fd, fixed) = match file.fixed {
        Some(fixed) => (
            types::Fd(i32::try_from(fixed).ok()?),
            squeue::Flags::FIXED_FILE,
        ),
        None => (types::Fd(file.raw()), squeue::Flags::empty()),
    };
    let entry = match call {
        Call::Read {
            memory: Vectors::One(one),
            offset,
        } => {
            let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
            opcode::Read::new(fd, one.iov_base.cast(), len)
                .offset(*offset)
                .build()
        }
        Call::Read {
            memory: Vectors::Fixed(one, slot),
            offset,
        } => {
            let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
            let read = opcode::ReadFixed::new(fd, one.iov_base.cast(), len, *slot);
            read.offset(*offset).build()
        }
        Call::Read {
            memory: Vectors::Many(vectors, count),
            offset,
        } => opcode::Readv::new(fd, *vectors, *count)
            .offset(*offset)
            .build(),
        Call::Write {
            memory: Vectors::One(one),
            offset,
            flags,
        } => {
            let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
            let write = opcode::Write::new(fd, one.iov_base.cast(), len);
            write.offset(*offset).rw_flags(*flags).build()
        }
        Call::Write {
            memory: Vectors::Fixed(one, slot),
            offset,
            flags,
        } => {
            let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
            let write = opcode::WriteFixed::new(fd, one.iov_base.cast(), len, *slot);
            write.offset(*offset).rw_flags(*flags).build()
        }
        Call::Write {
            memory: Vectors::Many(vectors, count),
            offset,
            flags,
        } => {
            let write = opcode::Writev::new(fd, *vectors, *count);
            write.offset(*offset).rw_flags(*flags).build()
        }
        Call::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Fallocate { .. } | Call::Discard { .. } => return None,
    };
    Some(entry.flags(fixed))
}

/// Adds one to an eventfd without ever waiting for its reader.
pub(super) fn notify_entry(fd: RawFd) -> squeue::Entry {
    let bytes = (&raw const ONE).cast::<u8>();
    opcode::Write::new(types::Fd(fd), bytes, 8)
        .rw_flags(libc::RWF_NOWAIT)
        .build()
}

/// What a completion is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Call = 1,
    Watch = 2,
    Cancel = 3,
    Notify = 4,
}

/// `user_data`: the kind in the top byte, a generation in 24 bits, an index in 32.
pub(super) fn pack(kind: Kind, generation: u32, index: u32) -> u64 {
    (kind as u64) << 56 | u64::from(generation) << 32 | u64::from(index)
}

pub(super) fn unpack(user_data: u64) -> (Option<Kind>, u32, u32) {
    let kind = match user_data >> 56 {
        1 => Some(Kind::Call),
        2 => Some(Kind::Watch),
        3 => Some(Kind::Cancel),
        4 => Some(Kind::Notify),
        _ => None,
    };
    let generation = (user_data >> 32) as u32 & GENERATION_MASK;
    (kind, generation, user_data as u32)
}

/// What is written to an eventfd: one event.
static ONE: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_comes_back_as_it_went() {
        for kind in [Kind::Call, Kind::Watch, Kind::Cancel, Kind::Notify] {
            for (generation, index) in [(0, 0), (1, u32::MAX), ((1 << 24) - 1, 7)] {
                let user_data = pack(kind, generation, index);
                assert_eq!(unpack(user_data), (Some(kind), generation, index));
            }
        }
        assert_eq!(unpack(0).0, None);
    }
}
