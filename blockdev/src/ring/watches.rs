//! The eventfds a ring watches.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// A watched eventfd; made by [`super::Ring::watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// Who is told that a watched fd is readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The ring's user, by its token.
    User(u32),
    /// The ring itself: its helper threads finished something.
    Helpers,
}

/// One watched fd. It is the ring's own duplicate: nothing the caller closes can pull it away.
#[derive(Debug)]
pub(super) struct Watched {
    fd: OwnedFd,
    pub(super) target: Target,
    /// `unwatch` was called; the kernel's last word about the fd is still to come.
    pub(super) ending: bool,
}

impl Watched {
    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// All of them, by index. A generation tells a reused index from what was there before.
#[derive(Debug, Default)]
pub(super) struct Watches {
    entries: Vec<(u32, Option<Watched>)>,
    free: Vec<u32>,
}

impl Watches {
    /// Adds an fd; `None` when there are more of them than an index can count.
    pub(super) fn insert(&mut self, fd: OwnedFd, target: Target) -> Option<Watch> {
        let watched = Watched {
            fd,
            target,
            ending: false,
        };
        if let Some(index) = self.free.pop() {
            let (generation, entry) = self.entries.get_mut(index as usize)?;
            *entry = Some(watched);
            return Some(Watch {
                index,
                generation: *generation,
            });
        }
        let index = u32::try_from(self.entries.len()).ok()?;
        self.entries.push((0, Some(watched)));
        Some(Watch {
            index,
            generation: 0,
        })
    }

    pub(super) fn get_mut(&mut self, watch: Watch) -> Option<&mut Watched> {
        match self.entries.get_mut(watch.index as usize) {
            Some((generation, entry)) if *generation == watch.generation => entry.as_mut(),
            Some(_) | None => None,
        }
    }

    /// Forgets an fd and closes the ring's duplicate of it.
    pub(super) fn remove(&mut self, watch: Watch) -> Option<Watched> {
        let (generation, entry) = self.entries.get_mut(watch.index as usize)?;
        if *generation != watch.generation {
            return None;
        }
        let watched = entry.take()?;
        *generation = generation.wrapping_add(1) & GENERATION_MASK;
        self.free.push(watch.index);
        Some(watched)
    }
}

/// Generations have 24 bits: what `user_data` has room for beside kind and index.
pub(super) const GENERATION_MASK: u32 = (1 << 24) - 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn some_fd() -> OwnedFd {
        std::io::stdin().as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_reused_index_is_not_taken_for_its_predecessor() {
        let mut watches = Watches::default();
        let first = watches.insert(some_fd(), Target::User(1)).unwrap();
        assert!(watches.remove(first).is_some());
        assert!(watches.remove(first).is_none());
        let second = watches.insert(some_fd(), Target::User(2)).unwrap();
        assert_eq!(first.index, second.index);
        assert!(watches.get_mut(first).is_none());
        assert_eq!(watches.get_mut(second).unwrap().target, Target::User(2));
    }
}
