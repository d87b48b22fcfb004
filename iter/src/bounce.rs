//! Bounce buffers: aligned, private memory from a fixed budget.
//!
//! They mend memory that a device cannot take as it lies, or give it data that does not change
//! under its computation. They never read-modify-write a block: what is misaligned on the device
//! stays misaligned.

use std::fmt;
use std::rc::Rc;

use crate::kind::Kind;
use crate::private::PrivateMemory;

/// One worker's bounce buffers, recycled by size class.
pub(crate) struct BouncePool {
    budget: usize,
    allocated: usize,
    in_use: usize,
    buffers: Vec<Option<Buffer>>,
    /// Places in `buffers` without a buffer.
    vacant: Vec<u32>,
    /// Idle buffers of each class.
    idle: [Vec<u32>; CLASSES],
}

struct Buffer {
    memory: Rc<PrivateMemory>,
    class: usize,
    /// Where what a device reads into the buffer goes in the end.
    landing: Option<Kind>,
}

impl BouncePool {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            budget,
            allocated: 0,
            in_use: 0,
            buffers: Vec::new(),
            vacant: Vec::new(),
            idle: [const { Vec::new() }; CLASSES],
        }
    }

    /// Takes a buffer of at least `len` bytes: its index, or nothing when the budget is used up
    /// or `len` is beyond the largest class.
    pub(crate) fn take(&mut self, len: usize) -> Option<u32> {
        let class = (0..CLASSES).find(|class| len <= size_of_class(*class))?;
        let idle = self.idle.get_mut(class)?.pop();
        let slot = idle.or_else(|| self.allocate(class))?;
        self.in_use += size_of_class(class);
        Some(slot)
    }

    /// Gives the buffer `slot` back.
    pub(crate) fn give(&mut self, slot: u32) {
        drop(self.take_landing(slot));
        let Some(class) = self.buffer(slot).map(|buffer| buffer.class) else {
            return;
        };
        self.in_use -= size_of_class(class);
        if let Some(idle) = self.idle.get_mut(class) {
            idle.push(slot);
        }
    }

    /// The memory of the buffer `slot`.
    pub(crate) fn memory(&self, slot: u32) -> Option<Rc<PrivateMemory>> {
        self.buffer(slot).map(|buffer| Rc::clone(&buffer.memory))
    }

    /// Notes where the contents of the buffer `slot` go in the end.
    pub(crate) fn set_landing(&mut self, slot: u32, landing: Kind) {
        if let Some(Some(buffer)) = self.buffers.get_mut(slot as usize) {
            buffer.landing = Some(landing);
        }
    }

    /// Where the contents of the buffer `slot` go, if they go anywhere; asked once.
    pub(crate) fn take_landing(&mut self, slot: u32) -> Option<Kind> {
        self.buffers
            .get_mut(slot as usize)?
            .as_mut()?
            .landing
            .take()
    }

    pub(crate) fn in_use(&self) -> usize {
        self.in_use
    }

    pub(crate) fn allocated(&self) -> usize {
        self.allocated
    }

    fn buffer(&self, slot: u32) -> Option<&Buffer> {
        self.buffers.get(slot as usize)?.as_ref()
    }

    #[cold]
    fn allocate(&mut self, class: usize) -> Option<u32> {
        let size = size_of_class(class);
        if size > self.budget - self.in_use {
            return None;
        }
        self.shrink_to(self.budget - size);
        let memory = match PrivateMemory::new(size) {
            Ok(memory) => Rc::new(memory),
            Err(error) => {
                log::warn!("no memory for a bounce buffer of {size} bytes: {error}");
                return None;
            }
        };
        self.allocated += size;
        let buffer = Some(Buffer {
            memory,
            class,
            landing: None,
        });
        if let Some(slot) = self.vacant.pop() {
            *self.buffers.get_mut(slot as usize)? = buffer;
            return Some(slot);
        }
        let slot = u32::try_from(self.buffers.len()).ok()?;
        self.buffers.push(buffer);
        Some(slot)
    }

    /// Frees idle buffers, largest first, until no more than `limit` bytes are allocated.
    fn shrink_to(&mut self, limit: usize) {
        for class in (0..CLASSES).rev() {
            while self.allocated > limit {
                let Some(slot) = self.idle.get_mut(class).and_then(Vec::pop) else {
                    break;
                };
                if let Some(place) = self.buffers.get_mut(slot as usize) {
                    *place = None;
                }
                self.vacant.push(slot);
                self.allocated -= size_of_class(class);
            }
        }
    }
}

impl fmt::Debug for BouncePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BouncePool")
            .field("budget", &self.budget)
            .field("allocated", &self.allocated)
            .field("in_use", &self.in_use)
            .finish_non_exhaustive()
    }
}

fn size_of_class(class: usize) -> usize {
    SMALLEST << class
}

/// The smallest buffer, in bytes: a page.
const SMALLEST: usize = 4096;
/// From one page to 16 MiB, by doubling.
const CLASSES: usize = 13;
