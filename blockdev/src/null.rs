//! The device that stores nothing.

use std::io;
use std::os::fd::BorrowedFd;

use iov_iter::MemoryNeeds;

use crate::completion::{Completion, IoError};
use crate::device::{
    Abort, BlockDevice, Caching, Capabilities, Channel, DiscardLimits, MayUnmap, RegisteredBuffers,
    WriteZeroesLimits,
};
use crate::geometry::{Access, Geometry, is_block_size};
use crate::op::{Op, Tag};
use crate::open::OpenError;
use crate::ring::Ring;

/// A device whose ops all succeed at once and touch nothing.
#[derive(Debug)]
pub(crate) struct NullDevice {
    geometry: Geometry,
}

impl NullDevice {
    pub(crate) fn new(size: u64, block_size: u32) -> Result<Self, OpenError> {
        Ok(Self {
            geometry: flat_geometry("null", size, block_size)?,
        })
    }
}

impl BlockDevice for NullDevice {
    fn name(&self) -> String {
        "null".to_owned()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            discard: Some(DiscardLimits {
                max_sectors: u32::MAX,
                alignment_sectors: 1,
            }),
            write_zeroes: Some(WriteZeroesLimits {
                max_sectors: u32::MAX,
                may_unmap: MayUnmap::Yes,
            }),
            memory: MemoryNeeds::NONE,
            caching: Caching::None,
            abort: Abort::Impossible,
            buffers: RegisteredBuffers::Unused,
        }
    }

    fn open_channel(&self, _ring: &mut Ring) -> Result<Box<dyn Channel>, OpenError> {
        Ok(Box::new(NullChannel {
            geometry: self.geometry,
        }))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry)
    }
}

#[derive(Debug)]
struct NullChannel {
    geometry: Geometry,
}

impl Channel for NullChannel {
    fn prep(&mut self, ring: &mut Ring, tag: Tag, op: Op) {
        let (moved, outcome) = self.perform(&op);
        ring.complete(Completion {
            tag,
            op,
            moved,
            outcome,
        });
    }

    fn now(&mut self, op: &Op) -> Option<(u32, Result<(), IoError>)> {
        Some(self.perform(op))
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn collect(&mut self, _ring: &mut Ring) {}
}

impl NullChannel {
    fn perform(&self, op: &Op) -> (u32, Result<(), IoError>) {
        let outcome = op.check(&self.geometry);
        let moved = if outcome.is_ok() { op.payload() } else { 0 };
        (u32::try_from(moved).unwrap_or(u32::MAX), outcome)
    }
}

/// The geometry of a device that is nothing but a size.
pub(crate) fn flat_geometry(name: &str, size: u64, block_size: u32) -> Result<Geometry, OpenError> {
    if !is_block_size(block_size) {
        return Err(OpenError::BlockSize { given: block_size });
    }
    if size < u64::from(block_size) {
        return Err(OpenError::TooSmall {
            name: name.to_owned(),
            size,
            block_size,
        });
    }
    Ok(Geometry::flat(size, block_size, Access::ReadWrite))
}
