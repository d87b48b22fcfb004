#![expect(
    unsafe_code,
    reason = "virtio-driver takes the addresses of a request's data as raw vectors"
)]
//! One vring of the front end.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue, iovec};

use super::{Connection, Disk, DriverError, refused};

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The slot it was made with.
    pub slot: u32,
    /// 0, or a negative errno for the status it came back with.
    pub result: i32,
}

/// One vring, its kick and its call, and the slots for its data.
///
/// Data is only ever copied in and out: the back end may touch it at any time.
pub struct Queue {
    vring: VirtioBlkQueue<'static, u32>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    index: usize,
    connection: Arc<Connection>,
}

impl Queue {
    pub(super) fn new(
        connection: &Arc<Connection>,
        index: usize,
        vring: VirtioBlkQueue<'static, u32>,
    ) -> Self {
        Self {
            vring,
            kick: connection.transport.get_submission_notifier(index),
            call: connection.transport.get_completion_fd(index),
            index,
            connection: Arc::clone(connection),
        }
    }

    /// What the device told at connection.
    #[must_use]
    pub fn disk(&self) -> Disk {
        self.connection.disk
    }

    /// Copies `data` to a slot, from byte `at` of the slot on.
    ///
    /// # Errors
    /// `NoSuchSlot`.
    pub fn put(&self, slot: u32, at: usize, data: &[u8]) -> Result<(), DriverError> {
        let range = at..at + data.len();
        let memory = self.connection.memory.slice(self.index, slot, &range)?;
        memory.copy_from(data);
        Ok(())
    }

    /// Copies a part of a slot, from byte `at` of the slot on, to `data`.
    ///
    /// # Errors
    /// `NoSuchSlot`.
    pub fn get(&self, slot: u32, at: usize, data: &mut [u8]) -> Result<(), DriverError> {
        let range = at..at + data.len();
        let memory = self.connection.memory.slice(self.index, slot, &range)?;
        memory.copy_to(data);
        Ok(())
    }

    /// Queues a read of the device, from byte `offset` on, to these parts of the slot.
    ///
    /// # Errors
    /// `Refused` when the vring is full or the offset is no multiple of 512, `NoSuchSlot`.
    pub fn read(
        &mut self,
        slot: u32,
        offset: u64,
        parts: &[Range<usize>],
    ) -> Result<(), DriverError> {
        let queued = if let [part] = parts {
            let vector = self.vector(slot, part)?;
            // SAFETY: `Memory::slice` checked the range, which stays mapped as long as
            // `connection`; this process only touches it through volatile copies.
            unsafe {
                self.vring
                    .read_raw(offset, vector.iov_base.cast(), vector.iov_len, slot)
            }
        } else {
            let vectors = self.vectors(slot, parts)?;
            // SAFETY: as above for what the vectors name; they live through the call.
            unsafe {
                self.vring
                    .readv(offset, vectors.as_ptr(), vectors.len(), slot)
            }
        };
        queued.map_err(refused("queue a read"))
    }

    /// Queues a write of these parts of the slot to the device, from byte `offset` on.
    ///
    /// # Errors
    /// `Refused` when the vring is full or the offset is no multiple of 512, `NoSuchSlot`.
    pub fn write(
        &mut self,
        slot: u32,
        offset: u64,
        parts: &[Range<usize>],
    ) -> Result<(), DriverError> {
        let queued = if let [part] = parts {
            let vector = self.vector(slot, part)?;
            // SAFETY: as for `read`.
            unsafe {
                self.vring
                    .write_raw(offset, vector.iov_base.cast(), vector.iov_len, slot)
            }
        } else {
            let vectors = self.vectors(slot, parts)?;
            // SAFETY: as for `read`.
            unsafe {
                self.vring
                    .writev(offset, vectors.as_ptr(), vectors.len(), slot)
            }
        };
        queued.map_err(refused("queue a write"))
    }

    /// Queues a FLUSH.
    ///
    /// # Errors
    /// `Refused` when the vring is full.
    pub fn flush(&mut self, slot: u32) -> Result<(), DriverError> {
        self.vring.flush(slot).map_err(refused("queue a flush"))
    }

    /// Queues a DISCARD of `len` bytes from byte `offset` on.
    ///
    /// # Errors
    /// `Refused` when the vring is full or the range is not of whole sectors.
    pub fn discard(&mut self, slot: u32, offset: u64, len: u64) -> Result<(), DriverError> {
        self.vring
            .discard(offset, len, slot)
            .map_err(refused("queue a discard"))
    }

    /// Queues a WRITE_ZEROES of `len` bytes from byte `offset` on, with or without the unmap flag.
    ///
    /// # Errors
    /// `Refused` when the vring is full or the range is not of whole sectors.
    pub fn write_zeroes(
        &mut self,
        slot: u32,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> Result<(), DriverError> {
        self.vring
            .write_zeroes(offset, len, unmap, slot)
            .map_err(refused("queue a write of zeroes"))
    }

    /// Kicks the back end if it wants to be told of what was queued since the last kick.
    ///
    /// # Errors
    /// `Refused` when the eventfd cannot be written.
    #[inline]
    pub fn kick(&mut self) -> Result<(), DriverError> {
        // Without EVENT_IDX the driver reads the used ring's flags with no full fence after its
        // store of avail.idx; the kick would be lost here, not in the back end.
        fence(Ordering::SeqCst);
        if self.vring.avail_notif_needed() {
            self.kick.notify().map_err(refused("kick"))?;
        }
        Ok(())
    }

    /// Kicks the back end whatever it wants.
    ///
    /// # Errors
    /// `Refused` when the eventfd cannot be written.
    pub fn kick_anyway(&mut self) -> Result<(), DriverError> {
        self.kick.notify().map_err(refused("kick"))
    }

    /// Asks the back end for calls, or asks it to leave them out.
    ///
    /// Without EVENT_IDX, call this before the first request only: the driver has no full fence
    /// between this store and its next look at the used ring.
    pub fn set_calls(&mut self, wanted: bool) {
        self.vring.set_used_notif_enabled(wanted);
    }

    /// The next request that came back, if there is one.
    #[inline]
    pub fn completion(&mut self) -> Option<Done> {
        let done = self.vring.completions().next()?;
        Some(Done {
            slot: done.context,
            result: done.ret,
        })
    }

    /// Whether a request came back that `completion` did not take yet.
    #[must_use]
    pub fn has_completion(&mut self) -> bool {
        self.vring.completions().has_next()
    }

    /// Sleeps until the back end calls; false when it did not for as long as `limit`.
    ///
    /// # Errors
    /// `Refused` when the eventfd cannot be waited for or read.
    pub fn wait(&self, limit: Duration) -> Result<bool, DriverError> {
        wait_any(std::slice::from_ref(self), limit)
    }

    /// Takes the call, if there is one.
    fn take_call(&self) -> Result<(), DriverError> {
        match self.call.read() {
            Ok(_) => Ok(()),
            // The back end may have made the eventfd non-blocking, for it is shared.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(refused("read the call")(error)),
        }
    }

    fn vector(&self, slot: u32, part: &Range<usize>) -> Result<iovec, DriverError> {
        let memory = self.connection.memory.slice(self.index, slot, part)?;
        Ok(iovec {
            iov_base: memory.ptr_guard_mut().as_ptr().cast(),
            iov_len: memory.len(),
        })
    }

    fn vectors(&self, slot: u32, parts: &[Range<usize>]) -> Result<Vec<iovec>, DriverError> {
        parts.iter().map(|part| self.vector(slot, part)).collect()
    }
}

/// Sleeps until the back end calls on one of the queues; false when it did not for as long as
/// `limit`.
///
/// # Errors
/// `Refused` when an eventfd cannot be waited for or read.
pub fn wait_any(queues: &[Queue], limit: Duration) -> Result<bool, DriverError> {
    let limit = Timespec::try_from(limit).ok();
    let mut fds: Vec<_> = queues
        .iter()
        .map(|queue| PollFd::from_borrowed_fd(queue.call.as_fd(), PollFlags::IN))
        .collect();
    loop {
        match poll(&mut fds, limit.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(refused("wait for a call")(errno.into())),
        }
    }
    for (queue, fd) in queues.iter().zip(&fds) {
        if !fd.revents().is_empty() {
            queue.take_call()?;
        }
    }
    Ok(true)
}
