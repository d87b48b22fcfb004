//! The device that keeps its blocks in memory.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iov_iter::MemoryNeeds;

use crate::completion::{Completion, IoError};
use crate::device::{
    Abort, BlockDevice, Caching, Capabilities, Channel, DiscardLimits, MayUnmap, RegisteredBuffers,
    WriteZeroesLimits,
};
use crate::geometry::{Extent, Geometry};
use crate::null::flat_geometry;
use crate::op::{Op, Tag, Unmap};
use crate::open::OpenError;
use crate::ring::Ring;
use crate::store::Store;

/// Blocks in anonymous memory, shared by all channels.
#[derive(Debug)]
pub(crate) struct MemoryDevice {
    store: Arc<Store>,
    geometry: Geometry,
}

impl MemoryDevice {
    pub(crate) fn new(size: u64, block_size: u32) -> Result<Self, OpenError> {
        let geometry = flat_geometry("memory", size, block_size)?;
        Ok(Self {
            store: Arc::new(Store::new(size)?),
            geometry,
        })
    }
}

impl BlockDevice for MemoryDevice {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            discard: Some(DiscardLimits {
                max_sectors: MAX_SECTORS,
                alignment_sectors: 8,
            }),
            write_zeroes: Some(WriteZeroesLimits {
                max_sectors: MAX_SECTORS,
                may_unmap: MayUnmap::Yes,
            }),
            memory: MemoryNeeds::NONE,
            caching: Caching::None,
            abort: Abort::Impossible,
            buffers: RegisteredBuffers::Unused,
        }
    }

    fn open_channel(&self, _ring: &mut Ring) -> Result<Box<dyn Channel>, OpenError> {
        let store = Arc::clone(&self.store);
        Ok(Box::new(MemoryChannel {
            store,
            geometry: self.geometry,
        }))
    }

    fn refresh(&self) -> io::Result<Geometry> {
        Ok(self.geometry)
    }
}

#[derive(Debug)]
struct MemoryChannel {
    store: Arc<Store>,
    geometry: Geometry,
}

impl Channel for MemoryChannel {
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

impl MemoryChannel {
    fn perform(&self, op: &Op) -> (u32, Result<(), IoError>) {
        let result = op
            .check(&self.geometry)
            .and_then(|()| perform(&self.store, op));
        match result {
            Ok(moved) => (moved, Ok(())),
            Err(error) => (0, Err(error)),
        }
    }
}

/// Does an op on a store; gives the bytes that moved.
pub(crate) fn perform(store: &Store, op: &Op) -> Result<u32, IoError> {
    match op {
        Op::Read { at, into } => all(*at, store.read(at.offset(), into.slices())),
        Op::Write { at, from, .. } => all(*at, store.write(at.offset(), from.slices())),
        Op::Flush { .. } => Ok(0),
        Op::Discard { at, .. }
        | Op::WriteZeroes {
            at,
            unmap: Unmap::Allowed,
            ..
        } => {
            store.forget(*at);
            Ok(0)
        }
        Op::WriteZeroes {
            at,
            unmap: Unmap::Forbidden,
            ..
        } => {
            store.zero(*at);
            Ok(0)
        }
    }
}

/// A copy either moved the whole extent or failed.
fn all(at: Extent, moved: u64) -> Result<u32, IoError> {
    let want = u32::try_from(at.len()).unwrap_or(u32::MAX);
    let got = u32::try_from(moved).unwrap_or(u32::MAX);
    if got == want {
        Ok(got)
    } else {
        Err(IoError::Short { want, got })
    }
}

/// The longest discard or write-zeroes, in sectors: 64 MiB. They run on the worker's thread, where
/// more would keep other requests waiting for tens of milliseconds.
const MAX_SECTORS: u32 = 128 * 1024;
