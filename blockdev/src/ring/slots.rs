//! The slots: one op each, by tag.

use super::flight::Flight;
use super::watches::GENERATION_MASK;
use crate::op::Tag;

/// Every op in flight. Grows to the highest tag seen and never shrinks, so a worker that has warmed
/// up allocates nothing here.
///
/// Growing moves the ops. The kernel never sees an op itself, only the memory it holds and its
/// array of vectors, and both are on the heap or the guest's.
#[derive(Debug, Default)]
pub(super) struct Slots {
    entries: Vec<Slot>,
    taken: usize,
}

#[derive(Debug, Default)]
struct Slot {
    /// Counts the ops this slot has had; a completion of an earlier one is recognized by it.
    generation: u32,
    flight: Option<Flight>,
}

impl Slots {
    /// Puts an op into the slot of its tag; gives it back when the tag is taken.
    #[expect(
        clippy::result_large_err,
        reason = "the op comes back by value and is never lost"
    )]
    pub(super) fn insert(&mut self, tag: Tag, flight: Flight) -> Result<(), Flight> {
        let index = tag.0 as usize;
        if index >= self.entries.len() {
            self.entries.resize_with(index + 1, Slot::default);
        }
        match self.entries.get_mut(index) {
            Some(slot) if slot.flight.is_none() => {
                slot.flight = Some(flight);
                self.taken += 1;
                Ok(())
            }
            Some(_) | None => Err(flight),
        }
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut Flight> {
        self.entries.get_mut(index as usize)?.flight.as_mut()
    }

    /// Takes the op out; the slot is free.
    pub(super) fn remove(&mut self, index: u32) -> Option<Flight> {
        let slot = self.entries.get_mut(index as usize)?;
        let flight = slot.flight.take()?;
        slot.generation = slot.generation.wrapping_add(1) & GENERATION_MASK;
        self.taken -= 1;
        Some(flight)
    }

    pub(super) fn generation(&self, index: u32) -> u32 {
        self.entries
            .get(index as usize)
            .map_or(0, |slot| slot.generation)
    }

    /// Whether a completion with this generation is about the op that is in the slot now.
    pub(super) fn is_current(&self, index: u32, generation: u32) -> bool {
        self.generation(index) == generation
    }

    /// Ops in slots.
    pub(super) fn len(&self) -> usize {
        self.taken
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Flight> {
        self.entries
            .iter_mut()
            .filter_map(|slot| slot.flight.as_mut())
    }
}
