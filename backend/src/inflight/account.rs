//! One started vring's account of its chains in flight.

use thiserror::Error;

use super::{QueueRegion, Recovered};

/// A chain that cannot be in flight. Every chain has at least one descriptor of its own (virtio
/// 2.7.13.1), so the driver offers what it does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EnterError {
    /// As many are in flight as the ring has descriptors.
    #[error("a chain is offered while {0} are in flight, as many as the ring has descriptors")]
    TooMany(u16),
    /// The ring has no such descriptor.
    #[error("head {head} is offered in a ring of {size}")]
    NoSuchHead {
        /// The head.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A chain with this head is in flight, and is recorded under it.
    #[error("head {0} is offered while it is in flight")]
    Twice(u16),
}

/// The chains of one vring that were taken and not yet answered, with a record that outlives the
/// daemon where the front end asked for one.
#[derive(Debug)]
pub struct Inflight {
    limit: u16,
    entered: u16,
    record: Option<Record>,
}

#[derive(Debug)]
struct Record {
    region: QueueRegion,
    counter: u64,
    /// The head that was linked most recently.
    last: u16,
    /// Heads whose used elements were written since the last batch was published.
    batch: Vec<u16>,
}

impl Inflight {
    /// Nothing in flight and nothing recorded, of a vring with `size` entries.
    #[must_use]
    pub fn new(size: u16) -> Inflight {
        Inflight {
            limit: size,
            entered: 0,
            record: None,
        }
    }

    /// Goes on with what an earlier daemon recorded, given the used index in guest memory. The
    /// heads are in flight, and have to be done again in this order.
    #[must_use]
    pub fn recover(size: u16, region: QueueRegion, used: u16) -> (Inflight, Vec<u16>) {
        let Recovered { heads, counter } = region.recover(used);
        let inflight = Inflight {
            limit: size,
            entered: u16::try_from(heads.len()).unwrap_or(size),
            record: Some(Record {
                last: region.last(),
                region,
                counter,
                batch: Vec::with_capacity(size.into()),
            }),
        };
        (inflight, heads)
    }

    /// Whether there is a record that outlives the daemon.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.record.is_some()
    }

    /// Chains in flight.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.entered
    }

    /// Enters a chain, right when it was popped and before anything can refuse it.
    ///
    /// # Errors
    /// The driver offers what it does not have.
    #[inline]
    pub fn enter(&mut self, head: u16) -> Result<(), EnterError> {
        if self.entered >= self.limit {
            return Err(EnterError::TooMany(self.limit));
        }
        if head >= self.limit {
            let size = self.limit;
            return Err(EnterError::NoSuchHead { head, size });
        }
        if let Some(record) = &mut self.record {
            if !record.region.enter(head, record.counter) {
                return Err(EnterError::Twice(head));
            }
            record.counter = record.counter.wrapping_add(1);
        }
        self.entered += 1;
        Ok(())
    }

    /// The used element of a chain was written; the driver sees it with the next batch.
    #[inline]
    pub fn used(&mut self, head: u16) {
        if let Some(record) = &mut self.record {
            record.batch.push(head);
        }
    }

    /// The batch is about to be published: a successor can find out what belongs to it.
    #[inline]
    pub fn link(&mut self) {
        if let Some(record) = &mut self.record {
            record.region.link(&record.batch, record.last);
        }
    }

    /// The batch has been published, up to the used index `used`.
    #[inline]
    pub fn clear(&mut self, used: u16) {
        if let Some(record) = &mut self.record {
            record.last = record.region.clear(&record.batch, record.last);
            record.batch.clear();
            record.region.close(used);
        }
    }

    /// A chain was answered, or abandoned: then it stays recorded.
    #[inline]
    pub fn leave(&mut self) {
        debug_assert!(self.entered > 0, "a chain came back that was never taken");
        self.entered = self.entered.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::Region;
    use super::*;

    #[test]
    fn as_many_are_in_flight_as_the_ring_has_descriptors() {
        let mut inflight = Inflight::new(2);
        assert_eq!([inflight.enter(0), inflight.enter(1)], [Ok(()), Ok(())]);
        assert_eq!(inflight.enter(1), Err(EnterError::TooMany(2)));
        assert_eq!(inflight.count(), 2);
        inflight.leave();
        assert_eq!(
            inflight.enter(2),
            Err(EnterError::NoSuchHead { head: 2, size: 2 })
        );
        assert_eq!(inflight.enter(0), Ok(()));
    }

    #[test]
    fn a_head_is_recorded_once() {
        let region = Region::allocate(1, 8).unwrap();
        let (mut inflight, _) = Inflight::recover(8, region.queue(0, 8).unwrap(), 0);
        assert_eq!(inflight.enter(3), Ok(()));
        assert_eq!(inflight.enter(3), Err(EnterError::Twice(3)));
        inflight.used(3);
        inflight.link();
        inflight.leave();
        inflight.clear(1);
        assert_eq!(inflight.enter(3), Ok(()));
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Enter(u16),
        Link(u16),
        Publish(u16),
        Clear(u16),
        Close(u16),
    }
    use Step::{Clear, Close, Enter, Link, Publish};

    /// Chains are answered in batches of 1, 2 and 1, out of order; chain 0 is the first to be
    /// linked and again the last.
    const STEPS: [Step; 23] = [
        Enter(0),
        Enter(5),
        Enter(2),
        Link(0),
        Publish(1),
        Clear(0),
        Close(1),
        Enter(7),
        Link(7),
        Link(5),
        Publish(3),
        Clear(7),
        Clear(5),
        Close(3),
        Enter(0),
        Link(2),
        Publish(4),
        Clear(2),
        Close(4),
        Link(0),
        Publish(5),
        Clear(0),
        Close(5),
    ];

    /// Everything a daemon does to a region, one store after the other, cut off after each.
    /// After every step a successor comes and has to find exactly
    /// what was taken and not published.
    #[test]
    fn a_successor_finds_what_was_taken_and_not_published_after_every_step() {
        for cut in 0..=STEPS.len() {
            let shared = Region::allocate(2, 8).unwrap();
            let ring = shared.queue(1, 8).unwrap();
            let first = ring.recover(0);
            assert_eq!((first.heads, first.counter), (vec![], 1));
            let (mut counter, mut used) = (first.counter, 0);
            let (mut taken, mut linked) = (vec![], vec![]);
            let (mut last, mut next) = (ring.last(), HashMap::new());
            for &step in &STEPS[..cut] {
                match step {
                    Enter(head) => {
                        assert!(ring.enter(head, counter));
                        counter += 1;
                        taken.push(head);
                    }
                    Link(head) => {
                        ring.link(&[head], last);
                        next.insert(head, last);
                        last = head;
                        linked.push(head);
                    }
                    Publish(index) => {
                        used = index;
                        taken.retain(|head| !linked.contains(head));
                        linked.clear();
                    }
                    Clear(head) => {
                        ring.clear(&[head], next[&head]);
                    }
                    Close(index) => ring.close(index),
                }
            }
            // Twice: a successor may be killed before it does anything.
            for successor in 0..2 {
                let found = shared.queue(1, 8).unwrap().recover(used);
                assert_eq!(found.heads, taken, "after {cut} steps, daemon {successor}");
            }
            let other = shared.queue(0, 8).unwrap().recover(0);
            assert_eq!(
                other.heads,
                Vec::<u16>::new(),
                "the other vring has nothing in flight"
            );
        }
    }

    #[test]
    fn a_ring_of_another_size_is_another_ring() {
        let shared = Region::allocate(1, 16).unwrap();
        let (mut large, _) = Inflight::recover(16, shared.queue(0, 16).unwrap(), 0);
        for head in [3, 12] {
            large.enter(head).unwrap();
        }
        let (small, heads) = Inflight::recover(8, shared.queue(0, 8).unwrap(), 0);
        assert_eq!((small.count(), heads), (0, vec![]));
        let (large, heads) = Inflight::recover(16, shared.queue(0, 16).unwrap(), 0);
        assert_eq!((large.count(), heads), (0, vec![]), "no head comes back");
    }

    #[test]
    fn what_is_forgotten_is_not_done_again() {
        let shared = Region::allocate(2, 16).unwrap();
        let (mut inflight, _) = Inflight::recover(16, shared.queue(1, 16).unwrap(), 0);
        inflight.enter(3).unwrap();
        shared.forget();
        let (inflight, heads) = Inflight::recover(16, shared.queue(1, 16).unwrap(), 0);
        assert_eq!((inflight.count(), heads), (0, vec![]));
    }

    #[test]
    fn nothing_in_a_region_makes_a_successor_spin_or_take_too_many() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2000 {
            let shared = Region::allocate(1, 16).unwrap();
            for at in 0..(16 + 16 * 16) / 8 {
                shared.scribble(at * 8, random.u64(..) & random.u64(..) & random.u64(..));
            }
            let used = random.u16(..);
            let (mut inflight, heads) = Inflight::recover(16, shared.queue(0, 16).unwrap(), used);
            assert!(heads.len() <= 16 && heads.iter().all(|&head| head < 16));
            assert_eq!(usize::from(inflight.count()), heads.len());
            for head in heads {
                inflight.used(head);
                inflight.leave();
            }
            inflight.link();
            inflight.clear(used.wrapping_add(1));
            let again = shared.queue(0, 16).unwrap().recover(used.wrapping_add(1));
            assert_eq!(again.heads, Vec::<u16>::new());
        }
    }
}
