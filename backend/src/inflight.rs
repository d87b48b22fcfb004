//! The chains of one vring that were taken and not yet answered.

use thiserror::Error;

/// More chains are in flight than the vring has descriptors. Every chain has at least one of its
/// own (virtio 2.7.13.1), so the driver offered some that we still have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a chain is offered while {0} are in flight, as many as the ring has descriptors")]
pub struct TooMany(pub u16);

/// The chains of one vring that were taken and not yet answered.
#[derive(Debug)]
pub struct Inflight {
    limit: u16,
    entered: u16,
}

impl Inflight {
    /// Nothing in flight, of a vring with `size` entries.
    #[must_use]
    pub fn new(size: u16) -> Inflight {
        Inflight {
            limit: size,
            entered: 0,
        }
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
    pub fn enter(&mut self) -> Result<(), TooMany> {
        if self.entered >= self.limit {
            return Err(TooMany(self.limit));
        }
        self.entered += 1;
        Ok(())
    }

    /// A chain was answered or abandoned.
    #[inline]
    pub fn leave(&mut self) {
        debug_assert!(self.entered > 0, "a chain came back that was never taken");
        self.entered = self.entered.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_in_flight_as_the_ring_has_descriptors() {
        let mut inflight = Inflight::new(2);
        assert_eq!([inflight.enter(), inflight.enter()], [Ok(()), Ok(())]);
        assert_eq!(inflight.enter(), Err(TooMany(2)));
        assert_eq!(inflight.count(), 2);
        inflight.leave();
        assert_eq!(inflight.enter(), Ok(()));
    }
}
