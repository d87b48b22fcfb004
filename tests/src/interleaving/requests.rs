//! Requests: what they ask for, and what may come of them.

use super::World;
use super::sectors::SECTOR;
use super::world::{AREA, CHAIN, SLOTS};
use crate::frontend::{Descriptor, Kind, Outcome, wait_readable};

/// The serial that [`Served`](crate::frontend::Served) gives its device.
const SERIAL: &[u8; 20] = b"vublk-test\0\0\0\0\0\0\0\0\0\0";
/// Tries to read a sector from storage that fails now and then.
const TRIES: usize = 100;

/// A piece of a request's data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) region: usize,
    guest: u64,
    len: usize,
}

/// A request that is owed an answer.
#[derive(Debug)]
pub(super) struct Request {
    kind: Kind,
    sector: usize,
    /// What is to be written, or what lies where something is to be read to.
    data: Vec<u8>,
    pieces: Vec<Piece>,
    /// Some of its memory was not mapped when it was made available.
    unmapped: bool,
    /// Some of its memory was mapped or removed since.
    pub(super) unsettled: bool,
    /// Storage was told to give up what it had.
    pub(super) aborted: bool,
}

impl Request {
    /// Sectors that nobody else may use meanwhile.
    fn sectors(&self) -> std::ops::Range<usize> {
        let count = match self.kind {
            Kind::In | Kind::Out => self.data.len() / SECTOR,
            Kind::Flush | Kind::GetId => 0,
        };
        self.sector..self.sector + count
    }

    pub(super) fn touches(&self, region: usize) -> bool {
        self.pieces.iter().any(|piece| piece.region == region)
    }

    /// Bytes of it that the device may write.
    fn writable(&self) -> u32 {
        let data = match self.kind {
            Kind::In | Kind::GetId => self.data.len(),
            Kind::Out | Kind::Flush => 0,
        };
        u32::try_from(data + 1).unwrap_or(u32::MAX)
    }
}

impl World {
    /// Makes a few requests available, and kicks.
    pub(super) fn submit(&mut self, dice: &mut fastrand::Rng) -> Outcome {
        let vring = dice.usize(0..self.slots.len());
        for _ in 0..dice.u8(1..=6) {
            let free = self.slots[vring].iter().position(Option::is_none);
            let Some(slot) = free else { break };
            let kind = match dice.u8(0..20) {
                0..9 => Kind::In,
                9..18 => Kind::Out,
                18 => Kind::Flush,
                _ => Kind::GetId,
            };
            let largest = if dice.u8(0..8) == 0 { 120 } else { 16 };
            let len = match kind {
                Kind::In | Kind::Out => SECTOR * dice.usize(1..=largest),
                Kind::Flush => 0,
                Kind::GetId => dice.usize(1..64),
            };
            let count = len.div_ceil(SECTOR);
            let sector = dice.usize(0..=self.sectors.count() - count);
            let data = match kind {
                Kind::Out => (0..len).map(|_| dice.u8(..)).collect(),
                Kind::In | Kind::Flush | Kind::GetId => vec![dice.u8(1..); len],
            };
            let pieces = self.pieces(dice, (vring, slot), len);
            let request = Request {
                kind,
                sector,
                data,
                unmapped: pieces
                    .iter()
                    .any(|piece| !self.memory.is_mapped(piece.region)),
                pieces,
                unsettled: self.pending.is_some(),
                aborted: false,
            };
            if self.is_taken(&request) {
                continue;
            }
            self.offer(vring, slot, request)?;
        }
        self.front.vrings[vring].kick.write(1)?;
        Ok(())
    }

    /// Whether a request in flight has some of these sectors.
    fn is_taken(&self, request: &Request) -> bool {
        let wanted = request.sectors();
        let others = self.slots.iter().flatten().flatten();
        others
            .map(Request::sectors)
            .any(|taken| wanted.start < taken.end && taken.start < wanted.end)
    }

    /// Up to four pieces at any addresses, in any regions, none over another.
    fn pieces(&self, dice: &mut fastrand::Rng, place: (usize, usize), len: usize) -> Vec<Piece> {
        let mut next: Vec<u64> = (0..self.memory.count())
            .map(|region| self.area(region, place) + dice.u64(0..512))
            .collect();
        let only = dice.u8(0..3) > 0;
        let mut left = len;
        let mut pieces = Vec::new();
        while left > 0 {
            let take = match pieces.len() {
                3.. => left,
                _ if dice.u8(0..3) == 0 => left,
                _ => dice.usize(1..=left),
            };
            // Most requests have none of the memory that is gone, as a driver's have.
            let mut region = dice.usize(0..next.len());
            if only && !self.memory.is_mapped(region) {
                region = 0;
            }
            pieces.push(Piece {
                region,
                guest: next[region],
                len: take,
            });
            next[region] += take as u64 + dice.u64(0..512);
            left -= take;
        }
        pieces
    }

    /// Where a slot's data lies in a region.
    fn area(&self, region: usize, (vring, slot): (usize, usize)) -> u64 {
        if region == 0 {
            let [_, _, data] = self.front.vrings[vring].places(u16::try_from(slot).unwrap_or(0));
            return data;
        }
        let number = (vring * usize::from(SLOTS) + slot) as u64;
        self.memory.start(region) + number * AREA
    }

    fn offer(&mut self, vring: usize, slot: usize, request: Request) -> Outcome {
        let slot_number = u16::try_from(slot)?;
        let [header, status, _] = self.front.vrings[vring].places(slot_number);
        let sector = u64::try_from(request.sector)?;
        self.memory.write(header, &request.kind.header(sector))?;
        self.memory.write(status, &[0xff])?;
        self.fill(&request, None)?;
        let mut chain = vec![Descriptor::source(header, 16)];
        for piece in &request.pieces {
            let len = u32::try_from(piece.len)?;
            chain.push(match request.kind {
                Kind::Out => Descriptor::source(piece.guest, len),
                Kind::In | Kind::Flush | Kind::GetId => Descriptor::dest(piece.guest, len),
            });
        }
        chain.push(Descriptor::dest(status, 1));
        self.trace.push(format!(
            "vring {vring} slot {slot}: {:?} of {} at {} in {:?}",
            request.kind,
            request.data.len(),
            request.sector,
            request.pieces
        ));
        let ring = &mut self.front.vrings[vring].ring;
        ring.offer_chain(slot_number * CHAIN, &chain)?;
        self.slots[vring][slot] = Some(request);
        Ok(())
    }

    /// Writes a request's data to its pieces, or to those of one region.
    pub(super) fn fill(&mut self, request: &Request, only: Option<usize>) -> Outcome {
        let mut rest = request.data.as_slice();
        for piece in &request.pieces {
            let (bytes, after) = rest.split_at(piece.len);
            rest = after;
            if only.is_none_or(|region| region == piece.region) {
                self.memory.write(piece.guest, bytes)?;
            }
        }
        Ok(())
    }

    /// Takes what every vring has used.
    pub(super) fn reap_all(&mut self) -> Outcome {
        (0..self.slots.len()).try_for_each(|vring| self.reap(vring))
    }

    /// Takes what a vring has used, and checks it.
    pub(super) fn reap(&mut self, vring: usize) -> Outcome {
        while let Some((head, len)) = self.front.vrings[vring].ring.take_used()? {
            let slot = usize::try_from(head)? / usize::from(CHAIN);
            let waiting = self.slots[vring].get_mut(slot).and_then(Option::take);
            let request =
                waiting.ok_or_else(|| format!("vring {vring}: head {head} came twice"))?;
            self.answered(vring, slot, &request, len)
                .map_err(|error| format!("vring {vring} slot {slot}, {request:?}: {error}"))?;
        }
        Ok(())
    }

    fn answered(&mut self, vring: usize, slot: usize, request: &Request, len: u32) -> Outcome {
        let [_, status, _] = self.front.vrings[vring].places(u16::try_from(slot)?);
        let status = self.memory.read(status, 1)?;
        self.trace.push(format!(
            "vring {vring} slot {slot}: status {status:?}, {len} bytes"
        ));
        let mut data = Vec::new();
        for piece in &request.pieces {
            data.extend(self.memory.read(piece.guest, piece.len)?);
        }
        let strange = request.unmapped || request.unsettled;
        if status == [0] {
            self.counts.done += 1;
            if request.unmapped && !request.unsettled {
                return Err("it was done in memory that is not mapped".into());
            }
            if len != request.writable() {
                return Err(format!("{len} bytes were reported").into());
            }
            return match request.kind {
                Kind::In => self.sectors.read(request.sector, &data),
                Kind::Out => {
                    self.sectors.written(request.sector, &request.data);
                    Ok(())
                }
                Kind::Flush => Ok(()),
                Kind::GetId if is_serial(&data) => Ok(()),
                Kind::GetId => Err(format!("the serial is {data:?}").into()),
            };
        }
        self.counts.failed += 1;
        let by_storage = (self.faulty || request.aborted) && request.kind != Kind::GetId;
        if status != [1] || !(by_storage || strange) {
            return Err(format!("its status is {status:?}").into());
        }
        match (request.kind, len) {
            // Nothing was reported of a chain that is not all in memory.
            (_, 0) if strange => {}
            (_, len) if len != request.writable() => {
                return Err(format!("{len} bytes were reported").into());
            }
            (Kind::In, _) => return self.sectors.read_in_part(request.sector, &data),
            (Kind::Out, _) => self.sectors.maybe_written(request.sector, &request.data),
            (Kind::Flush | Kind::GetId, _) => {}
        }
        Ok(())
    }

    /// Reads the whole device, from storage that may fail now and then.
    pub(super) fn read_all(&mut self) -> Outcome {
        for sector in (0..self.sectors.count()).step_by(64) {
            let mut tries = 0;
            let failed = self.counts.failed;
            loop {
                let before = self.counts.failed;
                let request = Request {
                    kind: Kind::In,
                    sector,
                    data: vec![0xa5; 64 * SECTOR],
                    pieces: vec![Piece {
                        region: 0,
                        guest: self.area(0, (0, 0)),
                        len: 64 * SECTOR,
                    }],
                    unmapped: false,
                    unsettled: false,
                    aborted: false,
                };
                self.offer(0, 0, request)?;
                self.front.vrings[0].kick.write(1)?;
                while self.outstanding(0) > 0 {
                    wait_readable(&self.front.vrings[0].call)?;
                    self.reap(0)?;
                }
                tries += 1;
                if self.counts.failed == before {
                    break;
                }
                if tries == TRIES {
                    let failed = self.counts.failed - failed;
                    return Err(format!("sector {sector} failed {failed} times").into());
                }
            }
        }
        Ok(())
    }
}

fn is_serial(data: &[u8]) -> bool {
    let wanted = SERIAL.iter().copied().chain(std::iter::repeat(0));
    data.iter().copied().eq(wanted.take(data.len()))
}
