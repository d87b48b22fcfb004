//! Holds: what keeps a request's memory valid, from the walk to the end of the request.

use std::fmt;
use std::rc::Rc;

use bitflags::bitflags;

use crate::kind::Kind;
use crate::private::PrivateMemory;
use crate::view::View;

bitflags! {
    /// What a [`Hold`] holds, for statistics and tests; never needed to release it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HoldFlags: u8 {
        /// The memory table stays mapped. Always set.
        const REFFED = 1 << 0;
        /// A slot of registered pages stays in place too.
        const PINNED = 1 << 1;
        /// A bounce buffer is in use.
        const BOUNCED = 1 << 2;
    }
}

/// Keeps the memory of one request valid: the memory table, and what its extraction added.
///
/// It is not `Clone`, and dropping it is the only cleanup there is: it gives back a bounce buffer
/// or a slot if there is one, and then its count on the (worker, memory table) pair.
#[must_use = "a request's memory is valid only as long as its hold lives"]
pub struct Hold {
    view: Rc<View>,
    extra: Extra,
}

/// What a hold owes besides its count on the table.
#[expect(
    dead_code,
    reason = "shared owners are kept to be dropped, not to be read"
)]
pub(crate) enum Extra {
    Nothing,
    /// A buffer of the view's pool, by its index there.
    Bounce(u32),
    /// A slot of registered buffers that all of the memory lies in.
    Pinned(u16),
    /// The daemon's own memory, which the extracted vectors point to.
    Private(Rc<PrivateMemory>),
    /// The hold of whoever lent the segments.
    Lent(Rc<Hold>),
}

impl Hold {
    pub(crate) fn new(view: Rc<View>) -> Self {
        view.add_hold();
        #[cfg(debug_assertions)]
        crate::ledger::acquire();
        Self {
            view,
            extra: Extra::Nothing,
        }
    }

    /// The view whose table this keeps mapped.
    #[inline]
    pub fn view(&self) -> &Rc<View> {
        &self.view
    }

    /// What is held.
    pub fn flags(&self) -> HoldFlags {
        match &self.extra {
            Extra::Nothing | Extra::Private(_) | Extra::Lent(_) => HoldFlags::REFFED,
            Extra::Pinned(_) => HoldFlags::REFFED | HoldFlags::PINNED,
            Extra::Bounce(_) => HoldFlags::REFFED | HoldFlags::BOUNCED,
        }
    }

    /// Adds what an extraction uses, and gives back what an earlier one used.
    #[inline]
    pub(crate) fn set_extra(&mut self, extra: Extra) {
        self.give_back();
        if let Extra::Pinned(_) = extra {
            self.view.pins().add_hold();
        }
        self.extra = extra;
    }

    /// The slot of registered buffers that the memory lies in, if it is pinned.
    #[inline]
    pub(crate) fn slot(&self) -> Option<u16> {
        match &self.extra {
            Extra::Pinned(slot) => Some(*slot),
            Extra::Nothing | Extra::Bounce(_) | Extra::Private(_) | Extra::Lent(_) => None,
        }
    }

    /// The bounce buffer's memory, if there is one.
    pub(crate) fn bounce(&self) -> Option<Rc<PrivateMemory>> {
        match &self.extra {
            Extra::Bounce(slot) => self.view.pools().bounce().memory(*slot),
            Extra::Nothing | Extra::Pinned(_) | Extra::Private(_) | Extra::Lent(_) => None,
        }
    }

    /// The bounce buffer's memory and where its contents go, if there is one and they do.
    #[inline]
    pub(crate) fn take_landing(&self) -> Option<(Rc<PrivateMemory>, Kind)> {
        match &self.extra {
            Extra::Bounce(slot) => {
                let mut bounce = self.view.pools().bounce();
                let landing = bounce.take_landing(*slot)?;
                Some((bounce.memory(*slot)?, landing))
            }
            Extra::Nothing | Extra::Pinned(_) | Extra::Private(_) | Extra::Lent(_) => None,
        }
    }

    #[inline]
    fn give_back(&mut self) {
        match &self.extra {
            Extra::Nothing => {}
            Extra::Pinned(_) => {
                self.extra = Extra::Nothing;
                self.view.pins().remove_hold();
            }
            Extra::Bounce(_) | Extra::Private(_) | Extra::Lent(_) => self.give_back_extra(),
        }
    }

    #[cold]
    fn give_back_extra(&mut self) {
        match std::mem::replace(&mut self.extra, Extra::Nothing) {
            Extra::Bounce(slot) => self.view.pools().bounce().give(slot),
            Extra::Nothing | Extra::Pinned(_) | Extra::Private(_) | Extra::Lent(_) => {}
        }
    }
}

impl Drop for Hold {
    #[inline]
    fn drop(&mut self) {
        // What was added goes before the count on the table it was added over.
        self.give_back();
        self.view.remove_hold();
        #[cfg(debug_assertions)]
        crate::ledger::release();
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.flags()).finish()
    }
}
