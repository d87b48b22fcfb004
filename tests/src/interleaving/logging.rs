//! The dirty log, and the copy of guest memory that follows by it.

use super::World;
use super::memory::END;
use crate::frontend::{DirtyLog, Outcome};

impl World {
    /// Starts to log, swaps the log, or stops.
    pub(super) fn change_log(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        self.settle(dice.bool())?;
        let fresh = DirtyLog::new(END, 4096 * dice.u64(0..2))?;
        let Some(old) = self.log.take() else {
            self.note("start logging");
            self.front.start_logging(&fresh, 0)?;
            // Everything is copied once, from the moment at which all changes are logged.
            self.memory.copy_all()?;
            self.log = Some(fresh);
            return Ok(());
        };
        if dice.u8(0..3) == 0 {
            self.note("stop logging");
            self.front.stop_logging(0)?;
        } else {
            self.note("swap the log");
            self.front.set_log(&fresh)?;
            self.counts.swaps += 1;
            self.log = Some(fresh);
        }
        self.give_back(old)
    }

    /// Copies what the log has.
    pub(super) fn observe(&mut self) -> Outcome {
        if let Some(log) = &self.log {
            let pages = log.take()?;
            self.counts.pages += pages.len() as u64;
            self.memory.copy_pages(&pages)?;
        }
        Ok(())
    }

    /// Takes the last of a log that the daemon must not write to any more.
    pub(super) fn give_back(&mut self, log: DirtyLog) -> Outcome {
        let pages = log.take()?;
        self.memory.copy_pages(&pages)?;
        self.old_logs.push(log);
        Ok(())
    }

    /// Whether nobody wrote to a log that was given back.
    pub(super) fn check_old_logs(&self) -> Outcome {
        for log in &self.old_logs {
            let pages = log.take()?;
            if !pages.is_empty() {
                return Err(format!("pages {pages:?} were marked in a log given back").into());
            }
        }
        Ok(())
    }

    /// Stops every vring and compares the copy with memory, as a migration does at its end; then
    /// the guest goes on here after all.
    pub(super) fn cut_over(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        self.settle(dice.bool())?;
        for vring in 0..self.slots.len() {
            self.stop(vring)?;
            self.settle(dice.bool())?;
        }
        if self.log.is_some() {
            self.compare()?;
        }
        for vring in 0..self.slots.len() {
            if dice.u8(0..4) > 0 {
                self.start(vring)?;
            }
        }
        Ok(())
    }

    /// Copies what is left in the log, and compares all of memory: every vring is stopped.
    pub(super) fn compare(&mut self) -> Outcome {
        self.note("compare");
        self.observe()?;
        let rings = || self.front.vrings.iter().map(|vring| &vring.ring);
        self.memory
            .check_copy(|page| rings().any(|ring| ring.pages_of_driver().contains(&page)))?;
        self.counts.compared += 1;
        Ok(())
    }
}
