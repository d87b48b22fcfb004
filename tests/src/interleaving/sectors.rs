//! What the sectors of a device may hold.

use crate::frontend::Outcome;

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;

/// What every sector may hold: one content, or several after a write that failed.
#[derive(Debug)]
pub struct Sectors(Vec<Vec<Vec<u8>>>);

impl Sectors {
    /// Sectors of zeroes.
    #[must_use]
    pub fn new(count: usize) -> Sectors {
        Sectors(vec![vec![vec![0; SECTOR]]; count])
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// A write was answered: this is what they hold.
    pub fn written(&mut self, first: usize, data: &[u8]) {
        for (sector, bytes) in self.0.iter_mut().skip(first).zip(data.chunks(SECTOR)) {
            *sector = vec![bytes.to_vec()];
        }
    }

    /// A write failed: any of its bytes may have been written.
    pub fn maybe_written(&mut self, first: usize, data: &[u8]) {
        for (sector, bytes) in self.0.iter_mut().skip(first).zip(data.chunks(SECTOR)) {
            sector.push(bytes.to_vec());
        }
    }

    /// A read was answered: it has to be what they may hold, and is what they do hold.
    ///
    /// # Errors
    /// When it is not.
    pub fn read(&mut self, first: usize, data: &[u8]) -> Outcome {
        self.check(first, data, false)?;
        self.written(first, data);
        Ok(())
    }

    /// A read failed: every byte of it is what it may be, or zero.
    ///
    /// # Errors
    /// When one is not.
    pub fn read_in_part(&self, first: usize, data: &[u8]) -> Outcome {
        self.check(first, data, true)
    }

    fn check(&self, first: usize, data: &[u8], or_zero: bool) -> Outcome {
        for (at, &byte) in data.iter().enumerate() {
            let held = self.0.get(first + at / SECTOR).ok_or("beyond the end")?;
            let may_be = held.iter().any(|bytes| bytes[at % SECTOR] == byte);
            if !(may_be || or_zero && byte == 0) {
                let sector = first + at / SECTOR;
                let (offset, wanted) = (at % SECTOR, held.len());
                return Err(format!(
                    "sector {sector}, byte {offset} is {byte:#x}, which is none of the {wanted} \
                     it may be"
                )
                .into());
            }
        }
        Ok(())
    }
}
