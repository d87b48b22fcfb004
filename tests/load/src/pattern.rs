//! What a sector holds: its own number, a generation, and words that follow from both.

use std::fmt;

/// Bytes in a sector.
pub(crate) const SECTOR_BYTES: usize = 512;
/// 64-bit words in a sector.
pub(crate) const SECTOR_WORDS: usize = SECTOR_BYTES / 8;

/// What a sector is meant to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The sector's number on the disk.
    pub(crate) sector: u64,
    /// How often its owner wrote it; the prepared contents are generation 0.
    pub(crate) generation: u64,
}

impl Stamp {
    /// The words of the sector: number, generation, and a sequence that both of them start, which
    /// stands for a checksum: a word of another sector or of another time does not fit.
    pub(crate) fn words(self) -> impl Iterator<Item = u64> {
        let mut state = mixed(self.sector ^ mixed(self.generation));
        let rest = std::iter::repeat_with(move || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state
        });
        [self.sector, self.generation]
            .into_iter()
            .chain(rest)
            .take(SECTOR_WORDS)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sector {} of generation {}",
            self.sector, self.generation
        )
    }
}

/// Spreads every bit of `value` over all of the result.
fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_tells_sectors_and_generations_apart() {
        let stamp = |sector, generation| Stamp { sector, generation };
        let one: Vec<u64> = stamp(7, 3).words().collect();
        assert_eq!(one.len(), SECTOR_WORDS);
        for other in [stamp(8, 3), stamp(7, 4), stamp(3, 7), stamp(7, 0)] {
            let same = one.iter().zip(other.words()).skip(2);
            assert_eq!(same.filter(|(a, b)| *a == b).count(), 0, "{other}");
        }
    }
}
