//! Where a request's data lies in its slot.

use std::ops::Range;

use fastrand::Rng;

/// What the pieces of a request's data are aligned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Address and length of each piece are multiples of 512.
    Sectors,
    /// Any address, any length.
    Anywhere,
}

/// The pieces of one request: in the device's order, with gaps, and shuffled in memory.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    parts: Vec<Range<usize>>,
    span: usize,
}

/// The slot that requests of up to `len` bytes need.
#[must_use]
pub fn slot_bytes(len: usize) -> usize {
    len + (MAX_PIECES + 1) * MAX_GAP
}

impl Layout {
    pub(super) fn random(rng: &mut Rng, placement: Placement, len: usize) -> Self {
        let unit = match placement {
            Placement::Sectors => 512,
            Placement::Anywhere => 1,
        };
        let mut cuts = vec![0, len];
        for _ in 1..rng.usize(1..=MAX_PIECES) {
            cuts.push(rng.usize(0..=len / unit) * unit);
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut parts: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
        let mut order: Vec<_> = (0..parts.len()).collect();
        rng.shuffle(&mut order);
        let mut end = 0;
        for index in order {
            let start = end + rng.usize(0..=MAX_GAP / unit) * unit;
            end = start + parts[index].len();
            parts[index] = start..end;
        }
        Self {
            parts,
            span: end + MAX_GAP,
        }
    }

    /// The pieces as parts of the slot, in the device's order.
    pub(super) fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// The bytes of the slot that pieces and gaps take, with a gap at the end.
    pub(super) fn span(&self) -> usize {
        self.span
    }

    /// The request's data, cut into what goes to each part.
    pub(super) fn pieces<'d>(
        &self,
        data: &'d [u8],
    ) -> impl Iterator<Item = (&Range<usize>, &'d [u8])> {
        let mut rest = data;
        self.parts.iter().map(move |part| {
            let (piece, after) = rest.split_at(part.len());
            rest = after;
            (part, piece)
        })
    }

    /// The request's data out of a copy of the slot.
    pub(super) fn gather(&self, span: &[u8]) -> Vec<u8> {
        let pieces = self.parts.iter().map(|part| &span[part.clone()]);
        pieces.flatten().copied().collect()
    }

    /// The first byte in a gap that is no longer `canary`.
    pub(super) fn first_stray(&self, span: &[u8], canary: u8) -> Option<usize> {
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort_unstable_by_key(|part| part.start);
        let mut end = 0;
        for part in parts {
            let gap = end..part.start;
            if let Some(at) = gap.clone().find(|&at| span[at] != canary) {
                return Some(at);
            }
            end = part.end;
        }
        (end..span.len()).find(|&at| span[at] != canary)
    }
}

const MAX_PIECES: usize = 4;

const MAX_GAP: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_data_and_never_overlap() {
        let mut rng = Rng::with_seed(1);
        for round in 0..2000 {
            let placement = [Placement::Sectors, Placement::Anywhere][round % 2];
            let len = rng.usize(1..=64) * 512;
            let layout = Layout::random(&mut rng, placement, len);
            assert!(layout.span() <= slot_bytes(len));
            let data: Vec<u8> = (0..len).map(|_| rng.u8(1..)).collect();
            let mut span = vec![0; layout.span()];
            for (part, piece) in layout.pieces(&data) {
                assert!(span[part.clone()].iter().all(|&byte| byte == 0));
                span[part.clone()].copy_from_slice(piece);
                let whole = |at: usize| at.is_multiple_of(512);
                let aligned = whole(part.start) && whole(part.len());
                assert!(aligned || placement == Placement::Anywhere);
            }
            assert_eq!(layout.gather(&span), data);
            assert_eq!(layout.first_stray(&span, 0), None);
            span[layout.span() - 1] = 9;
            assert_eq!(layout.first_stray(&span, 0), Some(layout.span() - 1));
        }
    }
}
