//! The two traits every device implements.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use iov_iter::MemoryNeeds;

use crate::completion::IoError;
use crate::geometry::Geometry;
use crate::op::{Op, Tag};
use crate::open::OpenError;
use crate::ring::Ring;

/// Something that stores blocks.
///
/// It is shared by all workers and does no I/O itself: each worker opens a [`Channel`] into it on
/// its own thread, over its own [`Ring`].
pub trait BlockDevice: Send + Sync + Debug {
    /// What logs call it: the path, `memory`, `null`.
    fn name(&self) -> String;

    /// Size, block size and access, as they are now.
    fn geometry(&self) -> Geometry;

    /// What it can do. Does not change while the device lives.
    fn capabilities(&self) -> Capabilities;

    /// Opens one worker's path into the device. Called on that worker's thread; the channel is only
    /// ever used with the ring it was opened with and is dropped before it.
    ///
    /// # Errors
    /// When the device has no means left for another channel (descriptors, threads).
    fn open_channel(&self, ring: &mut Ring) -> Result<Box<dyn Channel>, OpenError>;

    /// Asks for the size again, after the image was resized. Ops that ended beyond a new, smaller
    /// size fail with [`crate::IoError::OutOfRange`].
    ///
    /// # Errors
    /// When the size cannot be read; the geometry stays as it was.
    fn refresh(&self) -> io::Result<Geometry>;

    /// Takes the storage, so that nothing else serves it until [`release`](Self::release), and
    /// makes sure that what others wrote to it before is seen. Does not wait for whoever has it,
    /// but may take as long as storage takes. Devices that nobody else can open always have it.
    ///
    /// # Errors
    /// When the storage does not answer as it should.
    fn claim(&self) -> io::Result<Claim> {
        Ok(Claim::Held)
    }

    /// Gives the storage back, with all that completed visible to whoever takes it next. Called
    /// when nothing is in flight.
    ///
    /// # Errors
    /// When completed writes did not become stable; the storage is given back all the same.
    fn release(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes every write that completed before stable, as a flush on a channel does.
    ///
    /// # Errors
    /// The kernel's.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What became of an attempt to take the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is ours.
    Held,
    /// It is ours as far as can be known: the file system has no locks.
    Unguarded,
    /// Somebody else has it, or the kernel still works for somebody who was killed.
    Busy,
}

/// One worker's path into a device.
pub trait Channel {
    /// Takes the op; exactly one [`crate::Completion`] with this tag follows from [`Ring::reap`].
    /// Never fails and never blocks: an error is a completion.
    ///
    /// Nothing reaches the kernel before [`Ring::submit`]. The tag must be free; ops of one batch
    /// may complete in any order, and overlapping ones may take effect in any order.
    fn prep(&mut self, ring: &mut Ring, tag: Tag, op: Op);

    /// Does an op at once: the bytes that moved, and how it ended. `None`, without having done
    /// anything, from devices whose ops take time: those go to [`prep`](Self::prep).
    fn now(&mut self, _op: &Op) -> Option<(u32, Result<(), IoError>)> {
        None
    }

    /// Takes an op back. Its completion still comes: with [`crate::IoError::Aborted`] and without
    /// effect on the device, or as it was, if that was too late. Devices with
    /// [`Abort::Impossible`] do nothing.
    fn abort(&mut self, _ring: &mut Ring, _tag: Tag) {}

    /// An eventfd to watch, when this channel completes ops on threads of its own.
    fn event(&self) -> Option<BorrowedFd<'_>>;

    /// Moves what its threads finished into the ring. Called when `event` was readable.
    fn collect(&mut self, ring: &mut Ring);
}

/// What a device can do beyond reading and writing.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// Limits of discard, or `None` when it is not supported.
    pub discard: Option<DiscardLimits>,
    /// Limits of write-zeroes, or `None` when it is not supported.
    pub write_zeroes: Option<WriteZeroesLimits>,
    /// What memory must look like to be handed to [`Channel::prep`].
    pub memory: MemoryNeeds,
    /// Whether a flush has anything to do.
    pub caching: Caching,
    /// Whether ops in flight can be taken back.
    pub abort: Abort,
    /// Whether registered buffers make it any faster.
    pub buffers: RegisteredBuffers,
}

/// Whether a device's I/O can use buffers that are registered with its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisteredBuffers {
    /// The ring does its I/O.
    Used,
    /// It moves data in another way.
    Unused,
}

/// Limits of one discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardLimits {
    /// The longest range, in sectors.
    pub max_sectors: u32,
    /// What ranges should be aligned to for space to come free, in sectors.
    pub alignment_sectors: u32,
}

/// Limits of one write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteZeroesLimits {
    /// The longest range, in sectors.
    pub max_sectors: u32,
    /// Whether [`crate::Unmap::Allowed`] can give space back.
    pub may_unmap: MayUnmap,
}

/// Whether a write-zeroes that allows it gives space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayUnmap {
    /// It does where it can.
    Yes,
    /// It never does.
    No,
}

/// Whether a completed write can still be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// A write that is not durable may be lost until a flush.
    Volatile,
    /// A completed write is as stable as it will ever be.
    None,
}

/// Whether a device can end what it has in flight early, without it taking effect later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// What the kernel has cannot be called back.
    Impossible,
    /// It can.
    Possible,
}
