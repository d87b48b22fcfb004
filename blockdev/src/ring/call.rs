//! One system call of an op in flight, as plain numbers: what both engines execute.

#![expect(
    unsafe_code,
    reason = "a call carries raw vectors to the thread that executes it"
)]

use std::io;
use std::os::fd::RawFd;

use libc::{c_int, iovec};

/// Memory for one call. The ring's slot owns it and gives it back only after the call returned.
#[derive(Clone, Copy, Debug)]
pub(super) enum Vectors {
    /// One run of memory, by value: nothing has to stay where it is but the memory itself.
    One(iovec),
    /// One run that lies in this slot of the ring's registered buffers. What has no such buffers
    /// takes it as any other.
    Fixed(iovec, u16),
    /// Several; the array lives on the heap, in the slot's op, or in a static.
    Many(*const iovec, u32),
}

impl Vectors {
    /// As [`new`](Self::new); one vector lies in `slot`, if there is one.
    pub(super) fn in_slot(left: &[iovec], slot: Option<u16>) -> Self {
        match (left, slot) {
            ([one], Some(slot)) => Self::Fixed(*one, slot),
            _ => Self::new(left),
        }
    }

    /// As much of `left` as one call takes.
    pub(super) fn new(left: &[iovec]) -> Self {
        match left {
            [] => Self::Many(std::ptr::null(), 0),
            [one] => Self::One(*one),
            many => {
                let count = many.len().min(MAX_VECTORS);
                Self::Many(many.as_ptr(), u32::try_from(count).unwrap_or(u32::MAX))
            }
        }
    }
}

/// What to call. Offsets and lengths are in bytes; the kernel takes them as signed numbers, and an
/// offset beyond 2^63 is refused by it with EINVAL.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    /// preadv2.
    Read { memory: Vectors, offset: u64 },
    /// pwritev2; `flags` is zero or RWF_DSYNC.
    Write {
        memory: Vectors,
        offset: u64,
        flags: c_int,
    },
    /// fdatasync.
    Sync,
    /// fallocate.
    Fallocate { mode: c_int, offset: u64, len: u64 },
    /// ioctl(BLKDISCARD).
    Discard { offset: u64, len: u64 },
}

// SAFETY: the pointers lead to memory that the ring's slot owns and that no thread but the
// executing one touches as Rust memory; the slot lives until the call's result came back.
unsafe impl Send for Call {}

impl Call {
    /// Executes the call on this thread and gives what the kernel answered: a count, or the
    /// negative errno.
    ///
    /// # Safety
    /// The memory and the array it points to must stay valid until this returns.
    pub(super) unsafe fn execute(&self, fd: RawFd) -> i32 {
        match self {
            Self::Read { memory, offset } => {
                let (vectors, count) = parts(memory);
                // SAFETY: the caller keeps array and memory valid; `One` lives in `self`.
                let got = unsafe { libc::preadv2(fd, vectors, count, signed(*offset), 0) };
                answer(i64::try_from(got).unwrap_or(i64::MAX))
            }
            Self::Write {
                memory,
                offset,
                flags,
            } => {
                let (vectors, count) = parts(memory);
                // SAFETY: as above.
                let got = unsafe { libc::pwritev2(fd, vectors, count, signed(*offset), *flags) };
                answer(i64::try_from(got).unwrap_or(i64::MAX))
            }
            // SAFETY: no memory is passed.
            Self::Sync => answer(i64::from(unsafe { libc::fdatasync(fd) })),
            Self::Fallocate { mode, offset, len } => {
                // SAFETY: no memory is passed.
                let done = unsafe { libc::fallocate(fd, *mode, signed(*offset), signed(*len)) };
                answer(i64::from(done))
            }
            Self::Discard { offset, len } => {
                let range = [*offset, *len];
                // SAFETY: BLKDISCARD reads two u64 from the pointer, which is a local array.
                let done = unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) };
                answer(i64::from(done))
            }
        }
    }
}

/// The array and its length, as the system calls take them.
fn parts(memory: &Vectors) -> (*const iovec, c_int) {
    match memory {
        Vectors::One(vector) | Vectors::Fixed(vector, _) => (vector, 1),
        Vectors::Many(vectors, count) => (*vectors, c_int::try_from(*count).unwrap_or(c_int::MAX)),
    }
}

/// The kernel's `loff_t`; what does not fit becomes negative and is refused there. It must not be
/// -1, which asks preadv2 for the file's position.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MIN)
}

/// A system call's return value in io_uring's form. No call moves 2^31 bytes or more.
fn answer(result: i64) -> i32 {
    if result >= 0 {
        return i32::try_from(result).unwrap_or(i32::MAX);
    }
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
        .saturating_neg()
}

/// UIO_MAXIOV: the most vectors one call takes.
pub(super) const MAX_VECTORS: usize = 1024;

/// `_IO(0x12, 119)` of linux/fs.h; the same number on every architecture this runs on.
const BLKDISCARD: libc::Ioctl = 0x1277;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn an_offset_the_kernel_cannot_count_is_refused() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let mut buffer = [0u8; 64];
        let memory = Vectors::One(iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        });
        for offset in [1 << 63, u64::MAX - 511, u64::MAX] {
            let calls = [
                Call::Read { memory, offset },
                Call::Write {
                    memory,
                    offset,
                    flags: 0,
                },
                Call::Fallocate {
                    mode: libc::FALLOC_FL_KEEP_SIZE,
                    offset,
                    len: 512,
                },
            ];
            for call in calls {
                // SAFETY: the memory is a local that outlives the call.
                let res = unsafe { call.execute(file.as_raw_fd()) };
                // The file is open for reading only, which the kernel may notice first.
                assert!(
                    [-libc::EINVAL, -libc::EBADF].contains(&res),
                    "{call:?}: {res}"
                );
            }
            // SAFETY: as above.
            let res = unsafe { Call::Read { memory, offset }.execute(file.as_raw_fd()) };
            assert_eq!(res, -libc::EINVAL);
        }
    }
}
