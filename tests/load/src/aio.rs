#![expect(
    unsafe_code,
    reason = "the kernel's asynchronous I/O is reached by raw system calls"
)]
//! Many requests in flight on one file, by io_submit and io_getevents.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::Duration;

/// The direction of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// From the disk into memory.
    Read,
    /// From memory to the disk.
    Write,
}

impl Command {
    /// IOCB_CMD_PREAD and IOCB_CMD_PWRITE of linux/aio_abi.h.
    fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }
}

/// struct iocb of linux/aio_abi.h, little-endian.
#[repr(C)]
#[derive(Debug, Default)]
struct ControlBlock {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    descriptor: u32,
    address: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_descriptor: u32,
}

/// struct io_event of linux/aio_abi.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    /// The number the request was submitted with.
    pub(crate) tag: usize,
    /// Bytes moved, or a negative error number.
    pub(crate) result: i64,
}

/// A queue of requests.
#[derive(Debug)]
pub(crate) struct Queue {
    context: libc::c_ulong,
    events: Vec<Event>,
}

impl Queue {
    /// A queue for up to `depth` requests in flight.
    pub(crate) fn new(depth: usize) -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes one word, to `context`.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            context,
            events: vec![Event::default(); depth],
        })
    }

    /// Submits a request.
    ///
    /// # Safety
    /// `length` bytes at `address` stay mapped, and are neither written (`Write`) nor read or
    /// written (`Read`), until `reap` has returned the completion with this tag.
    pub(crate) unsafe fn submit(
        &mut self,
        command: Command,
        file: &File,
        address: *mut u8,
        length: usize,
        offset: u64,
        tag: usize,
    ) -> io::Result<()> {
        let wide = |value: usize| u64::try_from(value).map_err(io::Error::other);
        let mut block = ControlBlock {
            data: wide(tag)?,
            opcode: command.code(),
            descriptor: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
            address: wide(address.expose_provenance())?,
            length: wide(length)?,
            offset: i64::try_from(offset).map_err(io::Error::other)?,
            ..ControlBlock::default()
        };
        let mut list = [&raw mut block];
        // SAFETY: the kernel reads the list and the block during the call and copies both. What the
        // block points to is the caller's promise.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                1_usize,
                list.as_mut_ptr(),
            )
        };
        if result == 1 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// What completed, after waiting for at least one completion but no longer than `limit`.
    pub(crate) fn reap(&mut self, limit: Duration) -> io::Result<Vec<Completion>> {
        let mut limit = libc::timespec {
            tv_sec: limit.as_secs().try_into().map_err(io::Error::other)?,
            tv_nsec: limit.subsec_nanos().into(),
        };
        let room = self.events.len();
        // SAFETY: the kernel writes at most `room` events to the vector that has so many, and
        // reads `limit` during the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1_usize,
                room,
                self.events.as_mut_ptr(),
                &raw mut limit,
            )
        };
        let Ok(count) = usize::try_from(result) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                return Ok(Vec::new());
            }
            return Err(error);
        };
        let completed = self.events.iter().take(count);
        completed
            .map(|event| {
                let tag = usize::try_from(event.data).map_err(io::Error::other)?;
                Ok(Completion {
                    tag,
                    result: event.result,
                })
            })
            .collect()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: io_destroy waits for every request, so that no memory is touched after it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context, ptr::null::<u8>()) };
    }
}
