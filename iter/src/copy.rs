//! Copies between an iterator and the daemon's memory, all through one walker.

use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::VolatileSlice;

use crate::direction::{Dest, Direction, Source};
use crate::error::IterError;
use crate::hold::Hold;
use crate::iov::IovIter;
use crate::kind::Kind;
use crate::memory::MemoryTable;

impl IovIter<Source> {
    /// Copies to `buf` and advances; the bytes copied.
    ///
    /// Fewer than `buf` holds if fewer remain, or if the memory faulted or is not of `hold`'s
    /// table. What was copied is read from guest memory once: the guest may change its own copy,
    /// never this one.
    pub fn copy_from(&mut self, hold: &Hold, buf: &mut [u8]) -> usize {
        let want = buf.len();
        let done = self.walk(hold, want, |memory, done| {
            let Some(buf) = buf.get_mut(done..) else {
                return 0;
            };
            memory.copy_to(buf)
        });
        // Without it the compiler could read guest memory again in place of `buf`.
        compiler_fence(Ordering::SeqCst);
        done
    }

    /// As [`copy_from`](Self::copy_from), all of `buf` or nothing as far as the position goes.
    ///
    /// # Errors
    /// [`IterError::Short`]; the position is as before, the copied part of `buf` is not.
    pub fn copy_from_full(&mut self, hold: &Hold, buf: &mut [u8]) -> Result<(), IterError> {
        let at = self.save();
        let want = buf.len();
        let done = self.copy_from(hold, buf);
        self.complete_or_return(at, done, want)
    }
}

impl IovIter<Dest> {
    /// Copies `buf` to the memory and advances; the bytes copied.
    ///
    /// Fewer than `buf` holds if fewer remain, or if the memory faulted or is not of `hold`'s
    /// table.
    pub fn copy_to(&mut self, hold: &Hold, buf: &[u8]) -> usize {
        self.walk(hold, buf.len(), |memory, done| {
            let len = memory.len();
            let Some(buf) = buf.get(done..).and_then(|rest| rest.get(..len)) else {
                return 0;
            };
            memory.copy_from(buf);
            len
        })
    }

    /// As [`copy_to`](Self::copy_to), all of `buf` or nothing as far as the position goes.
    ///
    /// # Errors
    /// [`IterError::Short`]; the position is as before, but the memory may have changed and is
    /// to be logged all the same.
    pub fn copy_to_full(&mut self, hold: &Hold, buf: &[u8]) -> Result<(), IterError> {
        let at = self.save();
        let done = self.copy_to(hold, buf);
        self.complete_or_return(at, done, buf.len())
    }

    /// Writes `n` zero bytes and advances; the bytes written, fewer as for
    /// [`copy_to`](Self::copy_to).
    pub fn zero(&mut self, hold: &Hold, n: usize) -> usize {
        self.walk(hold, n, |memory, _| {
            let mut done = 0;
            while done < memory.len() {
                let len = ZEROES.len().min(memory.len() - done);
                let (Ok(place), Some(zeroes)) = (memory.subslice(done, len), ZEROES.get(..len))
                else {
                    break;
                };
                place.copy_from(zeroes);
                done += len;
            }
            done
        })
    }
}

impl<D: Direction> IovIter<D> {
    /// The one walker: calls `step` for each run of memory among the next `n` bytes with the run
    /// and the bytes done before it, and advances by what `step` says it processed. A run that is
    /// processed in part, or whose region a SIGBUS hit, ends the walk.
    pub(crate) fn walk<F>(&mut self, hold: &Hold, n: usize, step: F) -> usize
    where
        F: FnMut(VolatileSlice<'_>, usize) -> usize,
    {
        let n = n.min(self.count);
        let done = match &self.kind {
            Kind::Guest(_) => self.walk_segments(hold.view().table(), n, step),
            Kind::Lent { keeper, .. } => self.walk_segments(keeper.view().table(), n, step),
            Kind::Private { .. } => self.walk_private(n, step),
            Kind::Sink => n,
        };
        self.advance(done)
    }

    #[inline]
    fn walk_segments<F>(&self, table: &MemoryTable, n: usize, mut step: F) -> usize
    where
        F: FnMut(VolatileSlice<'_>, usize) -> usize,
    {
        let mut done = 0;
        for part in self.parts(n) {
            let Some((memory, region)) = table.resolve(&part) else {
                break;
            };
            let processed = step(memory, done);
            if region.poisoned() {
                break;
            }
            done += processed;
            if processed < part.size() {
                break;
            }
        }
        done
    }

    fn walk_private<F>(&self, n: usize, mut step: F) -> usize
    where
        F: FnMut(VolatileSlice<'_>, usize) -> usize,
    {
        let place = self.private_place().filter(|_| n > 0);
        place
            .and_then(|(memory, at)| memory.slice(at, n))
            .map_or(0, |memory| step(memory, 0))
    }

    fn complete_or_return(
        &mut self,
        at: crate::Cursor,
        done: usize,
        want: usize,
    ) -> Result<(), IterError> {
        if done == want {
            return Ok(());
        }
        self.restore(at)?;
        Err(IterError::Short { want, done })
    }
}

static ZEROES: [u8; 4096] = [0; 4096];
