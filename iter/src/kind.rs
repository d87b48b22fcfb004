//! The kinds of memory an iterator runs over, and the list of segments most of them are.

use std::fmt;
use std::ops::Deref;
use std::rc::Rc;

use crate::hold::Hold;
use crate::pools::{Pools, Recycled};
use crate::private::PrivateMemory;
use crate::segment::Segment;

/// What an iterator runs over.
///
/// There is no kind for a pipe (a bounce buffer, copied at completion, is one) and none for a page
/// cache (there is no cache).
pub(crate) enum Kind {
    /// Guest memory, kept by the request's hold: one segment or many.
    Guest(List),
    /// Segments that someone else's hold keeps, as when one request becomes several transfers.
    Lent { list: List, keeper: Rc<Hold> },
    /// The daemon's own memory, from byte `start` on.
    Private {
        memory: Rc<PrivateMemory>,
        start: usize,
    },
    /// Nothing: swallows what is copied to it.
    Sink,
}

impl Kind {
    /// Whether the memory is a guest's, and so a change of it is to be logged.
    #[inline]
    pub(crate) fn is_guest_memory(&self) -> bool {
        match self {
            Self::Guest(_) | Self::Lent { .. } => true,
            Self::Private { .. } | Self::Sink => false,
        }
    }

    /// The segments, of kinds that have any.
    #[inline]
    pub(crate) fn list(&self) -> Option<&List> {
        match self {
            Self::Guest(list) | Self::Lent { list, .. } => Some(list),
            Self::Private { .. } | Self::Sink => None,
        }
    }

    #[inline]
    pub(crate) fn list_mut(&mut self) -> Option<&mut List> {
        match self {
            Self::Guest(list) | Self::Lent { list, .. } => Some(list),
            Self::Private { .. } | Self::Sink => None,
        }
    }

    /// The same kind of memory over another part: `list` for kinds that have one, and for private
    /// memory everything from byte `moved` on.
    pub(crate) fn over(&self, list: List, moved: usize) -> Self {
        match self {
            Self::Guest(_) => Self::Guest(list),
            Self::Lent { keeper, .. } => Self::Lent {
                list,
                keeper: Rc::clone(keeper),
            },
            Self::Private { memory, start } => Self::Private {
                memory: Rc::clone(memory),
                start: start.saturating_add(moved),
            },
            Self::Sink => Self::Sink,
        }
    }

    /// The name of the kind, for logs.
    fn name(&self) -> &'static str {
        match self {
            Self::Guest(_) => "guest",
            Self::Lent { .. } => "lent",
            Self::Private { .. } => "private",
            Self::Sink => "sink",
        }
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let segments = self.list().map_or(0, |list| list.len());
        write!(f, "{}[{segments}]", self.name())
    }
}

/// A list of non-empty segments: one or two in place, more in a recycled vector.
pub(crate) enum List {
    /// Most requests: a header, a data segment, or both, with no vector to load.
    Few {
        items: [Segment; FEW],
        len: usize,
    },
    Many(Recycled<Segment>),
}

impl List {
    #[inline]
    pub(crate) const fn new() -> Self {
        Self::Few {
            items: [Segment::NOWHERE; FEW],
            len: 0,
        }
    }

    /// A list of one or two.
    #[inline]
    pub(crate) fn of(segments: &[Segment]) -> Self {
        let mut list = Self::new();
        for segment in segments {
            list.push_within(*segment);
        }
        list
    }

    #[inline]
    pub(crate) fn push(&mut self, pools: &Rc<Pools>, segment: Segment) {
        if let Self::Few { items, len } = self {
            if let Some(place) = items.get_mut(*len) {
                *place = segment;
                *len += 1;
                return;
            }
            // Out of line without the segment: passed to a call, it would be built in memory
            // for every push, which doubles a walk's time.
            self.spill(pools);
        }
        if let Self::Many(items) = self {
            items.push(segment);
        }
    }

    #[cold]
    fn spill(&mut self, pools: &Rc<Pools>) {
        let mut items = Recycled::take(pools, FEW + 1);
        for item in self.iter() {
            items.push(*item);
        }
        *self = Self::Many(items);
    }

    /// Takes off everything from byte `skip` of segment `index` on.
    pub(crate) fn cut(&mut self, index: usize, skip: u32) -> Self {
        let tail = self.tail(index, skip);
        self.truncate(index, skip);
        tail
    }

    /// A copy of everything from byte `skip` of segment `index` on.
    fn tail(&self, index: usize, skip: u32) -> Self {
        let mut tail = match self {
            Self::Many(items) if items.len().saturating_sub(index) > FEW => {
                Self::Many(Recycled::take(items.pools(), items.len() - index))
            }
            Self::Many(_) | Self::Few { .. } => Self::new(),
        };
        let first = self
            .get(index)
            .map(|s| s.part(skip, s.size()))
            .filter(|s| s.len > 0);
        let rest = self.get(index + 1..).unwrap_or_default();
        for segment in first.iter().chain(rest) {
            tail.push_within(*segment);
        }
        tail
    }

    /// As [`push`](Self::push), into a list made large enough.
    fn push_within(&mut self, segment: Segment) {
        match self {
            Self::Few { items, len } => {
                if let Some(place) = items.get_mut(*len) {
                    *place = segment;
                    *len += 1;
                }
            }
            Self::Many(items) => items.push(segment),
        }
    }

    /// Keeps what is before byte `skip` of segment `index`.
    pub(crate) fn truncate(&mut self, index: usize, skip: u32) {
        if let Some(segment) = self.get_mut(index) {
            segment.len = segment.len.min(skip);
        }
        let keep = index + usize::from(skip > 0);
        match self {
            Self::Few { len, .. } => *len = keep.min(*len),
            Self::Many(items) => items.truncate(keep),
        }
    }

    /// Takes the last byte off; the segment of that byte.
    #[inline]
    pub(crate) fn take_last_byte(&mut self) -> Option<Segment> {
        let last = match self {
            Self::Few { items, len } => items.get_mut(len.checked_sub(1)?)?,
            Self::Many(items) => items.last_mut()?,
        };
        let skip = last.len.checked_sub(1)?;
        let byte = last.part(skip, 1);
        last.len = skip;
        if skip == 0 {
            match self {
                Self::Few { len, .. } => *len -= 1,
                Self::Many(items) => items.truncate(items.len() - 1),
            }
        }
        Some(byte)
    }

    fn get_mut(&mut self, index: usize) -> Option<&mut Segment> {
        match self {
            Self::Few { items, len } => items.get_mut(..*len)?.get_mut(index),
            Self::Many(items) => items.get_mut(index),
        }
    }
}

impl Deref for List {
    type Target = [Segment];

    #[inline]
    fn deref(&self) -> &[Segment] {
        match self {
            Self::Few { items, len } => items.get(..*len).unwrap_or_default(),
            Self::Many(items) => items,
        }
    }
}

/// Segments a list holds in place.
const FEW: usize = 2;
