//! Requests that wait for a bounce buffer.

use iov_iter::{DirtyLog, Hold, IovIter, Source};

use super::{Path, Step};
use crate::blk::{Admitted, Request};
use crate::vring::Used;
use crate::worker::attachment::Lent;

/// A request that waits for a bounce buffer. It keeps guest addresses, not pointers.
#[derive(Debug)]
pub(in crate::worker) struct Parked {
    pub(super) vring: usize,
    pub(super) request: Request,
    pub(super) source: IovIter<Source>,
    pub(super) admitted: Admitted,
    pub(super) hold: Hold,
}

impl<L: DirtyLog> Path<L> {
    /// Tries the request that has been parked the longest again: its vring, and how it ended if it
    /// did. None when nothing is parked or the buffers do not reach yet.
    pub(in crate::worker) fn retry_parked(
        &mut self,
        lent: &mut Lent<'_>,
    ) -> Option<(usize, Option<Used>)> {
        let Parked {
            vring,
            request,
            source,
            admitted,
            hold,
        } = self.parked.pop_front()?;
        let waiting = self.parked.len();
        match self.launch(vring, request, source, admitted, hold, lent) {
            Step::Ended(used) => Some((vring, Some(used))),
            Step::Underway if self.parked.len() > waiting => {
                self.parked.rotate_right(1);
                None
            }
            Step::Underway => Some((vring, None)),
        }
    }

    /// Gives up what is parked of one vring; says how many requests that were.
    pub(in crate::worker) fn abandon_parked(&mut self, vring: usize) -> usize {
        let waiting = self.parked.len();
        for _ in 0..waiting {
            match self.parked.pop_front() {
                Some(parked) if parked.vring == vring => {
                    self.counters.abandoned.add(1);
                    parked.request.abandon(parked.hold, self.dirty());
                }
                Some(other) => self.parked.push_back(other),
                None => {}
            }
        }
        waiting - self.parked.len()
    }
}
