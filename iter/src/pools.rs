//! A worker's pools: vectors and bounce buffers that are used again instead of allocated.

use std::cell::{RefCell, RefMut};
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;

use crate::bounce::BouncePool;
use crate::segment::Segment;

/// What one worker's requests recycle: segment lists, I/O vectors, bounce buffers.
///
/// After warm-up nothing is allocated, also for chains of 1026 segments: each list is taken from
/// one of two sizes and goes back to it.
pub struct Pools {
    segments: Recycler<Segment>,
    vectors: Recycler<libc::iovec>,
    bounce: RefCell<BouncePool>,
}

impl Pools {
    /// Pools with at most `bounce_budget` bytes of bounce buffers.
    pub fn new(bounce_budget: usize) -> Rc<Self> {
        Rc::new(Self {
            segments: Recycler::new(),
            vectors: Recycler::new(),
            bounce: RefCell::new(BouncePool::new(bounce_budget)),
        })
    }

    /// Bytes of bounce buffers in use now.
    pub fn bounce_in_use(&self) -> usize {
        self.bounce.borrow().in_use()
    }

    /// Bytes of bounce buffers that exist, in use or idle; never above the budget.
    pub fn bounce_allocated(&self) -> usize {
        self.bounce.borrow().allocated()
    }

    pub(crate) fn bounce(&self) -> RefMut<'_, BouncePool> {
        self.bounce.borrow_mut()
    }
}

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools")
            .field("bounce", &*self.bounce.borrow())
            .finish_non_exhaustive()
    }
}

/// A list from a worker's pool, which it goes back to when dropped.
pub(crate) struct Recycled<T: Recyclable> {
    items: Vec<T>,
    pools: Rc<Pools>,
}

impl<T: Recyclable> Recycled<T> {
    /// An empty list with room for `len` items, if that is not beyond the larger size.
    pub(crate) fn take(pools: &Rc<Pools>, len: usize) -> Self {
        let items = T::recycler(pools).take(len);
        Self {
            items,
            pools: Rc::clone(pools),
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, item: T) {
        if self.items.len() == self.items.capacity() && self.items.len() < LARGE {
            self.enlarge();
        }
        self.items.push(item);
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.items.truncate(len);
    }

    pub(crate) fn last_mut(&mut self) -> Option<&mut T> {
        self.items.last_mut()
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.items.get_mut(index)
    }

    pub(crate) fn pools(&self) -> &Rc<Pools> {
        &self.pools
    }

    /// Moves to the larger size, instead of growing the smaller one into a third.
    #[cold]
    fn enlarge(&mut self) {
        let recycler = T::recycler(&self.pools);
        let mut items = recycler.take(LARGE);
        items.extend_from_slice(&self.items);
        recycler.give(std::mem::replace(&mut self.items, items));
    }
}

impl<T: Recyclable> Deref for Recycled<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items
    }
}

impl<T: Recyclable> Drop for Recycled<T> {
    fn drop(&mut self) {
        T::recycler(&self.pools).give(std::mem::take(&mut self.items));
    }
}

/// What has a recycler in [`Pools`].
pub(crate) trait Recyclable: Copy {
    fn recycler(pools: &Pools) -> &Recycler<Self>;
}

impl Recyclable for Segment {
    fn recycler(pools: &Pools) -> &Recycler<Self> {
        &pools.segments
    }
}

impl Recyclable for libc::iovec {
    fn recycler(pools: &Pools) -> &Recycler<Self> {
        &pools.vectors
    }
}

/// Idle lists of two sizes.
pub(crate) struct Recycler<T> {
    small: RefCell<Vec<Vec<T>>>,
    large: RefCell<Vec<Vec<T>>>,
}

impl<T> Recycler<T> {
    fn new() -> Self {
        Self {
            small: RefCell::default(),
            large: RefCell::default(),
        }
    }

    fn take(&self, len: usize) -> Vec<T> {
        let (idle, capacity) = if len <= SMALL {
            (&self.small, SMALL)
        } else {
            (&self.large, LARGE.max(len))
        };
        let idle = idle.borrow_mut().pop();
        idle.unwrap_or_else(|| Vec::with_capacity(capacity))
    }

    fn give(&self, mut items: Vec<T>) {
        items.clear();
        let idle = if items.capacity() < LARGE {
            &self.small
        } else {
            &self.large
        };
        idle.borrow_mut().push(items);
    }
}

/// Items in a list of the smaller size: Linux guests ask for up to 128 segments by default.
const SMALL: usize = 130;
/// Items in a list of the larger size: 1026 descriptors, and room for region crossings.
const LARGE: usize = 1088;
