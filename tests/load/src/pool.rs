//! The pages that are kept filled with known sectors.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::error::{LoadError, Wrong};
use crate::pages::Pages;
use crate::pattern::{SECTOR_BYTES, Stamp};

const PAGE_BYTES: usize = 4096;
/// How often a place for a read is drawn before none is taken.
const DRAWS: usize = 8;

/// What is known of one sector's worth of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Never read into.
    Empty,
    /// A read is in flight.
    Busy,
    /// Filled with a known sector, and since when.
    Filled { sector: u64, since: Instant },
}

/// A read into the pool.
#[derive(Debug)]
pub(crate) struct PoolRead {
    /// Its place in the pool, in sectors.
    slots: Range<usize>,
    /// The first sector it reads.
    pub(crate) sector: u64,
}

impl PoolRead {
    pub(crate) fn count(&self) -> usize {
        self.slots.len()
    }
}

/// Pages, each sector of them empty, busy or filled.
#[derive(Debug)]
pub(crate) struct Pool {
    pages: Pages,
    slots: Vec<Slot>,
    next: usize,
}

impl Pool {
    pub(crate) fn new(pages: usize) -> Result<Self, LoadError> {
        let sectors = pages * (PAGE_BYTES / SECTOR_BYTES);
        Ok(Self {
            pages: Pages::new(sectors).map_err(LoadError::system("map the pages"))?,
            slots: vec![Slot::Empty; sectors],
            next: 0,
        })
    }

    /// Takes a random place for `count` sectors from `sector` on, and its address; nothing when
    /// other reads stand wherever was looked.
    pub(crate) fn begin(
        &mut self,
        random: &mut fastrand::Rng,
        sector: u64,
        count: usize,
    ) -> Option<(PoolRead, *mut u8)> {
        for _ in 0..DRAWS {
            let first = random.usize(..=self.slots.len() - count);
            let slots = first..first + count;
            let place = self.slots.get_mut(slots.clone())?;
            if place.iter().all(|slot| *slot != Slot::Busy) {
                place.fill(Slot::Busy);
                let address = self.pages.address(first, count);
                return Some((PoolRead { slots, sector }, address));
            }
        }
        None
    }

    /// Checks what a read has brought; its sectors are watched from now on.
    pub(crate) fn finish(&mut self, read: PoolRead) -> Result<(), LoadError> {
        let since = Instant::now();
        for (slot, sector) in read.slots.zip(read.sector..) {
            let expected = known(sector);
            self.pages.check(slot, expected).map_err(|word| {
                let page = slot * SECTOR_BYTES / PAGE_BYTES;
                LoadError::WrongData {
                    what: format!("page {page}, just read"),
                    wrong: Wrong { expected, word },
                }
            })?;
            if let Some(state) = self.slots.get_mut(slot) {
                *state = Slot::Filled { sector, since };
            }
        }
        Ok(())
    }

    /// Checks the next `count` sectors of the pool and returns whether that was the last of them.
    pub(crate) fn check_next(&mut self, count: usize) -> Result<bool, LoadError> {
        let end = self.slots.len().min(self.next + count);
        for slot in self.next..end {
            self.check(slot)?;
        }
        let is_round = end == self.slots.len();
        self.next = if is_round { 0 } else { end };
        Ok(is_round)
    }

    /// Checks every sector of the pool.
    pub(crate) fn check_all(&mut self) -> Result<(), LoadError> {
        self.next = 0;
        self.check_next(self.slots.len()).map(drop)
    }

    fn check(&self, slot: usize) -> Result<(), LoadError> {
        let (sector, since) = match self.slots.get(slot) {
            Some(&Slot::Filled { sector, since }) => (sector, since),
            Some(Slot::Empty | Slot::Busy) | None => return Ok(()),
        };
        let expected = known(sector);
        let offset = slot * SECTOR_BYTES;
        self.pages
            .check(slot, expected)
            .map_err(|word| LoadError::StalePage {
                page: offset / PAGE_BYTES,
                offset: offset % PAGE_BYTES,
                age: Duration::from_millis(
                    since.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
                ),
                wrong: Wrong { expected, word },
            })
    }
}

/// What a known sector holds: nobody writes it after the disk was prepared.
fn known(sector: u64) -> Stamp {
    Stamp {
        sector,
        generation: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays the disk.
    fn deliver(pool: &mut Pool, read: &PoolRead) {
        for (slot, sector) in read.slots.clone().zip(read.sector..) {
            pool.pages.fill(slot, known(sector));
        }
    }

    #[test]
    fn what_was_read_is_watched_for_ever() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut pool = Pool::new(16).unwrap();
        pool.check_all().unwrap();
        let (read, _) = pool.begin(&mut random, 1000, 64).unwrap();
        let slots = read.slots.clone();
        // While a read is in flight its memory may hold anything.
        pool.check_all().unwrap();
        deliver(&mut pool, &read);
        pool.finish(read).unwrap();
        pool.check_all().unwrap();
        for slot in slots.clone() {
            let sector = 1000 + u64::try_from(slot - slots.start).unwrap();
            pool.pages.fill(slot, known(sector + 1));
            let error = pool.check_all().unwrap_err();
            assert!(matches!(error, LoadError::StalePage { .. }), "{error}");
            pool.pages.fill(slot, known(sector));
        }
        pool.check_all().unwrap();
    }

    #[test]
    fn a_read_that_brings_another_sector_is_wrong_at_once() {
        let mut random = fastrand::Rng::with_seed(6);
        let mut pool = Pool::new(16).unwrap();
        let (read, _) = pool.begin(&mut random, 1000, 8).unwrap();
        deliver(&mut pool, &read);
        pool.pages.fill(read.slots.end - 1, known(2000));
        let error = pool.finish(read).unwrap_err();
        assert!(matches!(error, LoadError::WrongData { .. }), "{error}");
    }

    #[test]
    fn reads_in_flight_never_overlap() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut pool = Pool::new(16).unwrap();
        let reads: Vec<PoolRead> = (0..40)
            .filter_map(|_| Some(pool.begin(&mut random, 0, 8)?.0))
            .collect();
        assert!(reads.len() > 5);
        let mut seen = std::collections::BTreeSet::new();
        assert!(
            reads
                .into_iter()
                .flat_map(|read| read.slots)
                .all(|slot| seen.insert(slot))
        );
    }

    #[test]
    fn a_round_checks_every_slot_once() {
        let mut pool = Pool::new(2).unwrap();
        let rounds: Vec<bool> = (0..6).map(|_| pool.check_next(6).unwrap()).collect();
        assert_eq!(rounds, [false, false, true, false, false, true]);
    }
}
