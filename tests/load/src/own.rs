//! The sectors that one process has for itself, and what it wrote to them.

use std::ops::Range;

use crate::error::{LoadError, Wrong};
use crate::pages::Pages;
use crate::pattern::Stamp;

/// How often a place for a request is drawn before none is taken.
const DRAWS: usize = 8;

/// What is known of one sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sector {
    /// The generation that was acknowledged last.
    generation: u64,
    /// Whether a request is in flight.
    is_busy: bool,
}

/// A part of the disk with one writer, which knows the generation of every sector.
#[derive(Debug)]
pub(crate) struct Own {
    start: u64,
    sectors: Vec<Sector>,
}

/// The sectors of a request, counted within the part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run(Range<usize>);

impl Run {
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

impl Own {
    /// The part of `count` sectors from `start` on, all of generation 0.
    pub(crate) fn new(start: u64, count: usize) -> Self {
        let sector = Sector {
            generation: 0,
            is_busy: false,
        };
        Self {
            start,
            sectors: vec![sector; count],
        }
    }

    /// Whether the process has no sectors of its own and only reads.
    pub(crate) fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The first sector of a run, on the disk.
    pub(crate) fn sector(&self, run: &Run) -> u64 {
        self.stamp(run.0.start, 0).sector
    }

    /// Takes `count` sectors at random; nothing when requests in flight stand wherever was looked.
    pub(crate) fn begin(&mut self, random: &mut fastrand::Rng, count: usize) -> Option<Run> {
        (0..DRAWS).find_map(|_| {
            let first = random.usize(..=self.sectors.len() - count);
            self.take(first..first + count)
        })
    }

    /// Takes all sectors in turn, in runs of at most `count`, once nothing is in flight.
    pub(crate) fn runs(&self, count: usize) -> impl Iterator<Item = Run> + use<> {
        let end = self.sectors.len();
        (0..end)
            .step_by(count)
            .map(move |first| Run(first..end.min(first + count)))
    }

    /// Marks a run busy, unless a part of it is.
    pub(crate) fn take_run(&mut self, run: &Run) -> bool {
        self.take(run.0.clone()).is_some()
    }

    fn take(&mut self, range: Range<usize>) -> Option<Run> {
        let sectors = self.sectors.get_mut(range.clone())?;
        if sectors.iter().any(|sector| sector.is_busy) {
            return None;
        }
        for sector in sectors {
            sector.is_busy = true;
        }
        Some(Run(range))
    }

    /// Fills a buffer with the next generation of a run.
    pub(crate) fn fill_next(&self, run: &Run, buffer: &mut Pages, first: usize) {
        for (slot, index) in (first..).zip(run.0.clone()) {
            buffer.fill(slot, self.stamp(index, 1));
        }
    }

    /// A write was acknowledged.
    pub(crate) fn written(&mut self, run: &Run) {
        for sector in self.sectors.get_mut(run.0.clone()).into_iter().flatten() {
            sector.generation += 1;
            sector.is_busy = false;
        }
    }

    /// Compares a buffer with the generations that were acknowledged.
    pub(crate) fn read_back(
        &mut self,
        run: &Run,
        buffer: &Pages,
        first: usize,
    ) -> Result<(), LoadError> {
        for (slot, index) in (first..).zip(run.0.clone()) {
            let expected = self.stamp(index, 0);
            buffer
                .check(slot, expected)
                .map_err(|word| LoadError::WrongData {
                    what: format!("sector {} of its own, read back", expected.sector),
                    wrong: Wrong { expected, word },
                })?;
        }
        for sector in self.sectors.get_mut(run.0.clone()).into_iter().flatten() {
            sector.is_busy = false;
        }
        Ok(())
    }

    fn stamp(&self, index: usize, later: u64) -> Stamp {
        let generation = self
            .sectors
            .get(index)
            .map_or(0, |sector| sector.generation);
        Stamp {
            sector: (self.start..).nth(index).unwrap_or(u64::MAX),
            generation: generation + later,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_must_be_read_back() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut own = Own::new(5000, 64);
        let mut buffer = Pages::new(16).unwrap();
        let run = own.begin(&mut random, 8).unwrap();
        assert!(!own.take_run(&run));
        own.fill_next(&run, &mut buffer, 4);
        own.written(&run);
        assert!(own.take_run(&run));
        own.read_back(&run, &buffer, 4).unwrap();
        // The disk loses the second write to these sectors.
        assert!(own.take_run(&run));
        own.written(&run);
        let error = own.read_back(&run, &buffer, 4).unwrap_err();
        assert!(matches!(error, LoadError::WrongData { .. }), "{error}");
    }

    #[test]
    fn the_runs_cover_every_sector_once() {
        let own = Own::new(0, 100);
        let runs: Vec<Run> = own.runs(32).collect();
        assert_eq!(runs.iter().map(Run::count).sum::<usize>(), 100);
        assert_eq!(runs.last(), Some(&Run(96..100)));
        assert_eq!(own.sector(&Run(96..100)), 96);
    }
}
