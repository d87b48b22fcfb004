//! What the device must hold.

use std::ops::Range;

/// A part of the device, byte for byte.
///
/// # Invariants
/// The part is of whole sectors, and `unsure` has one entry for each.
#[derive(Clone, Debug)]
pub struct Model {
    start: u64,
    bytes: Vec<u8>,
    /// Sectors that were discarded: they hold what they held, or zeroes.
    unsure: Vec<bool>,
}

/// A sector that holds something else than the model says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the device is {got:#04x} and must be {expected:#04x}")]
pub struct Mismatch {
    /// The first byte that differs.
    pub at: u64,
    /// What it must be.
    pub expected: u8,
    /// What was read.
    pub got: u8,
}

impl Model {
    /// The bytes `area` of a device that is all zeroes; `area` is of whole sectors.
    #[must_use]
    pub fn zeroed(area: &Range<u64>) -> Self {
        let len = (area.end - area.start) as usize;
        Self {
            start: area.start,
            bytes: vec![0; len],
            unsure: vec![false; len / SECTOR],
        }
    }

    /// The part of the device it knows, in bytes.
    #[must_use]
    pub fn area(&self) -> Range<u64> {
        self.start..self.start + self.bytes.len() as u64
    }

    /// Notes a write, from byte `start` of the device on.
    pub fn write(&mut self, start: u64, data: &[u8]) {
        let at = (start - self.start) as usize;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        self.unsure[at / SECTOR..(at + data.len()) / SECTOR].fill(false);
    }

    /// Notes a discard of these bytes of the device.
    pub fn discard(&mut self, range: &Range<u64>) {
        let sectors = |at: u64| (at - self.start) as usize / SECTOR;
        let discarded = sectors(range.start)..sectors(range.end);
        self.unsure[discarded].fill(true);
    }

    /// Checks what was read, from byte `start` of the device on. A sector that was discarded is
    /// known again: reads of it must agree from now on.
    ///
    /// # Errors
    /// The first byte that is wrong.
    pub fn check(&mut self, start: u64, data: &[u8]) -> Result<(), Mismatch> {
        let first = (start - self.start) as usize / SECTOR;
        for (index, got) in data.chunks_exact(SECTOR).enumerate() {
            let sector = first + index;
            let expected = &mut self.bytes[sector * SECTOR..][..SECTOR];
            if expected == got {
                self.unsure[sector] = false;
            } else if self.unsure[sector] && got.iter().all(|&byte| byte == 0) {
                expected.fill(0);
                self.unsure[sector] = false;
            } else if let Some(byte) = (0..SECTOR).find(|&byte| expected[byte] != got[byte]) {
                return Err(Mismatch {
                    at: self.start + (sector * SECTOR + byte) as u64,
                    expected: expected[byte],
                    got: got[byte],
                });
            }
        }
        Ok(())
    }
}

const SECTOR: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_differs_is_found() {
        let mut model = Model::zeroed(&(4096..8192));
        model.write(4608, &[7; 512]);
        let mut data = [0; 1024];
        data[512..].fill(7);
        assert_eq!(model.check(4096, &data), Ok(()));
        data[700] = 8;
        let mismatch = Mismatch {
            at: 4796,
            expected: 7,
            got: 8,
        };
        assert_eq!(model.check(4096, &data), Err(mismatch));
    }

    #[test]
    fn a_discarded_sector_is_old_or_zero_and_then_stays_so() {
        let mut model = Model::zeroed(&(0..2048));
        model.write(0, &[1; 2048]);
        model.discard(&(512..1536));
        let mut data = [1; 2048];
        data[512..1024].fill(0);
        assert_eq!(model.check(0, &data), Ok(()));
        assert!(model.check(0, &[1; 2048]).is_err(), "512..1024 was zero");
        data[1024..1536].fill(0);
        assert!(model.check(0, &data).is_err(), "1024..1536 was old");
        model.discard(&(0..512));
        data[..512].fill(2);
        assert!(
            model.check(0, &data[..512]).is_err(),
            "neither old nor zero"
        );
    }
}
