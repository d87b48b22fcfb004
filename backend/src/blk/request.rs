//! A virtio-blk request (virtio 5.2.6), from its chain to its used element.

#![deny(
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use blockdev::{Access, Caching, Durability, Extent, IoError, Sector};
use iov_iter::{Data, Dest, DirtyLog, Hold, IovIter, Line, Plain, Source, StatusSlot};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::features::bit;
use super::room::Room;
use super::{Profile, Range, SERIAL_BYTES, WriteCache, ranges};
use crate::failpoint::{reached, skips};
use crate::limits::MAX_REQUEST_BYTES;
use crate::vring::Used;

/// Bytes of the status.
const STATUS_BYTES: u32 = 1;
/// Bytes of the header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// The status byte (virtio 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed, or against the rules.
    IoErr,
    /// Not a thing this device does.
    Unsupp,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Device to memory.
    In,
    /// Memory to device.
    Out,
    /// Make earlier writes durable.
    Flush,
    /// The serial.
    GetId,
    /// Give up ranges.
    Discard,
    /// Zero ranges.
    WriteZeroes,
    /// A type this device does not know.
    Unsupported(u32),
}

/// The two requests that carry ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeOp {
    /// DISCARD.
    Discard,
    /// WRITE_ZEROES.
    WriteZeroes,
}

/// A request's header, copied out of guest memory once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it asks for.
    pub kind: Kind,
    /// Where a transfer starts.
    pub sector: Sector,
}

/// What a request turned out to be once it was found to be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Read the extent.
    Read(Extent),
    /// Write the extent.
    Write(Extent, Durability),
    /// Flush the device.
    Flush,
    /// Answer with the serial.
    Identify,
    /// Carry out the ranges, one after another.
    Ranges(RangeOp, Durability),
    /// Nothing is left to do.
    Nothing,
}

/// A chain that is no request: without a header, or without a byte for the status.
#[derive(Debug)]
pub struct Malformed {
    /// Where a status can still be written.
    pub status: Option<StatusSlot>,
    /// What keeps the status byte mapped.
    pub hold: Hold,
}

/// Writes the status byte of a chain that is refused before it is a request, and marks it in the
/// dirty log if there is one.
pub fn refuse<L: DirtyLog>(slot: &StatusSlot, hold: &Hold, status: Status, log: Option<&L>) {
    slot.write(hold, status.byte());
    if let Some(log) = log {
        log.mark(slot.guest(), STATUS_BYTES.into());
    }
}

/// A request that is owed an answer.
///
/// It has two ends: [`finish`](Self::finish), the only way to a used element, and
/// [`abandon`](Self::abandon), for a front end that is gone. Dropping it any other way panics where
/// debug assertions are on.
#[derive(Debug)]
#[must_use = "a request is owed an answer"]
pub struct Request {
    head: u16,
    room: Room,
    status: StatusSlot,
    writable: u32,
    owed: Owed,
}

impl Request {
    /// Reads the header and finds the status byte, in whatever descriptors they lie. The header is
    /// consumed from `source`: what is left of it is payload.
    ///
    /// # Errors
    /// A chain that is too short for either.
    pub fn parse(
        head: u16,
        source: &mut IovIter<Source>,
        mut dest: IovIter<Dest>,
        hold: Hold,
    ) -> Result<(Request, Header, Hold), Malformed> {
        let writable = u32::try_from(dest.count()).unwrap_or(u32::MAX);
        let Some(status) = dest.take_last_byte() else {
            return Err(Malformed { status: None, hold });
        };
        let mut raw = [0; HEADER_BYTES];
        if source.copy_from(&hold, &mut raw) != HEADER_BYTES {
            return Err(Malformed {
                status: Some(status),
                hold,
            });
        }
        let request = Request {
            head,
            room: Room::lists(dest),
            status,
            writable,
            owed: Owed::new(),
        };
        Ok((request, Header::parse(u128::from_le_bytes(raw)), hold))
    }

    /// As [`parse`](Self::parse), for a chain of the common shape whose header was read already.
    #[inline]
    pub fn plain(plain: &Plain) -> Request {
        let (room, len) = match plain.data {
            Data::From(_) => (None, 0),
            Data::Into(segment) => (Some(segment), segment.len),
        };
        Request {
            head: plain.head,
            room: Room::plain(room),
            status: plain.status,
            writable: len.saturating_add(STATUS_BYTES),
            owed: Owed::new(),
        }
    }

    /// The bytes of guest memory it may write, the status byte left out.
    pub fn dest(&mut self) -> &mut IovIter<Dest> {
        self.room.iter()
    }

    /// Answers with the serial, as much of it as there is room for.
    /// Returns how many bytes were written.
    pub fn identify(&mut self, hold: &Hold, serial: &[u8; SERIAL_BYTES]) -> usize {
        self.dest().copy_to(hold, serial)
    }

    /// Ends the request with a status.
    ///
    /// `moved` is how many bytes of its memory were written already. All beyond them become zero,
    /// so that the whole chain can be reported as written: a driver may ignore what lies beyond the
    /// used length, and the status is the last byte (virtio 2.7.8.2, 2.7.8.3). A chain beyond
    /// [`MAX_REQUEST_BYTES`] is not worth that: it gets its status, and nothing is reported.
    ///
    /// With a `log`, everything that was written is marked in it: all of the memory, since the
    /// device may have written to what it says it did not reach, and the status.
    #[inline(always)]
    pub fn finish<L: DirtyLog>(
        mut self,
        hold: Hold,
        moved: usize,
        status: Status,
        log: Option<&L>,
    ) -> Used {
        self.owed.settle();
        // Taken apart no further: what it has is long, and would be moved.
        let (head, writable) = (self.head, self.writable);
        if writable > MAX_REQUEST_BYTES + STATUS_BYTES {
            refuse(&self.status, &hold, status, log);
            if let Some(log) = log.filter(|_| moved > 0) {
                mark(&self.room, &self.status, log);
            }
            return Used { head, len: 0 };
        }
        self.room.zero_after(moved, &hold);
        self.status.write(&hold, status.byte());
        reached("landed");
        if let Some(log) = log {
            mark(&self.room, &self.status, log);
        }
        reached("marked");
        drop(hold);
        Used {
            head,
            len: writable,
        }
    }

    /// Ends the request without an answer: its front end is gone, or will ask again. What the
    /// device may have written is marked in the `log` all the same, if there is one.
    pub fn abandon<L: DirtyLog>(self, hold: Hold, log: Option<&L>) {
        let Request {
            room, status, owed, ..
        } = self;
        owed.settle();
        if let Some(log) = log {
            mark(&room, &status, log);
        }
        drop(hold);
    }
}

/// Marks all that a request may have written. The addresses are those the chain was walked with:
/// the driver may have changed its descriptors since.
#[inline]
fn mark<L: DirtyLog>(room: &Room, slot: &StatusSlot, log: &L) {
    if skips("skip-marks") {
        return;
    }
    room.mark(log);
    log.mark(slot.guest(), STATUS_BYTES.into());
}

impl Header {
    /// The header of a chain of the common shape, copied out of guest memory, and the cache line
    /// it came from; nothing if it has another length, or if the memory is gone.
    #[inline]
    pub fn of(plain: &Plain, hold: &Hold) -> Option<(Header, Line)> {
        let (raw, line) = plain.header.load::<u128>(hold)?;
        Some((Header::parse(u128::from_le(raw)), line))
    }

    /// `raw` is a little-endian structure: type (32 bits), reserved (32), sector (64).
    fn parse(raw: u128) -> Header {
        let kind = u32::try_from(raw & u128::from(u32::MAX)).unwrap_or(u32::MAX);
        let sector = u64::try_from(raw >> 64).unwrap_or(u64::MAX);
        Header {
            kind: Kind::from(kind),
            sector: Sector(sector),
        }
    }

    /// Whether the device may do what is asked, and what that is.
    ///
    /// `source` is the payload of a request that carries one; ranges are read into `ranges`.
    ///
    /// # Errors
    /// The status the request is refused with (virtio 5.2.6.2).
    pub fn admit(
        &self,
        source: &mut IovIter<Source>,
        dest_len: usize,
        hold: &Hold,
        profile: &Profile,
        driver: Driver,
        ranges: &mut Vec<Range>,
    ) -> Result<Admitted, Status> {
        let durability = durability(profile, driver);
        let ranged = |op: RangeOp, feature: u32, source: &mut IovIter<Source>, ranges: &mut _| {
            if driver.features & bit(feature) == 0 {
                return Err(Status::Unsupp);
            }
            writable(profile)?;
            ranges::parse(op, source, hold, profile, ranges)?;
            Ok(Admitted::Ranges(op, durability))
        };
        match self.kind {
            Kind::In => self.admit_read(dest_len, profile),
            Kind::Out => self.admit_write(source.count(), profile, driver),
            Kind::Flush => match profile.caching {
                Caching::Volatile => Ok(Admitted::Flush),
                Caching::None => Ok(Admitted::Nothing),
            },
            Kind::GetId => Ok(Admitted::Identify),
            Kind::Discard => ranged(RangeOp::Discard, VIRTIO_BLK_F_DISCARD, source, ranges),
            Kind::WriteZeroes => ranged(
                RangeOp::WriteZeroes,
                VIRTIO_BLK_F_WRITE_ZEROES,
                source,
                ranges,
            ),
            Kind::Unsupported(_) => Err(Status::Unsupp),
        }
    }

    /// As [`admit`](Self::admit), for an IN of `len` bytes.
    ///
    /// # Errors
    /// As `admit`.
    #[inline]
    pub fn admit_read(&self, len: usize, profile: &Profile) -> Result<Admitted, Status> {
        let extent = self.transfer(len, profile)?;
        Ok(extent.map_or(Admitted::Nothing, Admitted::Read))
    }

    /// As [`admit`](Self::admit), for an OUT of `len` bytes.
    ///
    /// # Errors
    /// As `admit`.
    #[inline]
    pub fn admit_write(
        &self,
        len: usize,
        profile: &Profile,
        driver: Driver,
    ) -> Result<Admitted, Status> {
        writable(profile)?;
        let extent = self.transfer(len, profile)?;
        let durability = durability(profile, driver);
        Ok(extent.map_or(Admitted::Nothing, |at| Admitted::Write(at, durability)))
    }

    /// The extent of a transfer; none for one of no bytes that is otherwise in order.
    fn transfer(&self, len: usize, profile: &Profile) -> Result<Option<Extent>, Status> {
        let len = u32::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_REQUEST_BYTES);
        let len = len.ok_or(Status::IoErr)?;
        let at = Extent::new(self.sector, u64::from(len), profile.capacity)
            .ok()
            .filter(|at| at.is_aligned(profile.block_size))
            .ok_or(Status::IoErr)?;
        Ok((len > 0).then_some(at))
    }
}

/// What the driver of a vring negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// The features it acknowledged.
    pub features: u64,
    /// The write cache it gets.
    pub cache: WriteCache,
}

impl Status {
    /// The byte the driver reads.
    #[must_use]
    pub fn byte(self) -> u8 {
        let status = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoErr => VIRTIO_BLK_S_IOERR,
            Status::Unsupp => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

impl From<&IoError> for Status {
    fn from(error: &IoError) -> Status {
        match error {
            IoError::Unsupported => Status::Unsupp,
            IoError::Os(_)
            | IoError::Short { .. }
            | IoError::Misaligned { .. }
            | IoError::OutOfRange
            | IoError::ReadOnly
            | IoError::Aborted => Status::IoErr,
        }
    }
}

impl From<u32> for Kind {
    fn from(code: u32) -> Kind {
        match code {
            VIRTIO_BLK_T_IN => Kind::In,
            VIRTIO_BLK_T_OUT => Kind::Out,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            other => Kind::Unsupported(other),
        }
    }
}

/// When a change of this driver's counts as done.
#[inline]
fn durability(profile: &Profile, driver: Driver) -> Durability {
    match (driver.cache, profile.caching) {
        (WriteCache::Writethrough, Caching::Volatile) => Durability::Durable,
        (WriteCache::Writeback, _) | (_, Caching::None) => Durability::Cached,
    }
}

fn writable(profile: &Profile) -> Result<(), Status> {
    match profile.access {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => Err(Status::IoErr),
    }
}

/// The debt of an answer: a request that is dropped without one is a bug, and debug builds say so.
#[derive(Debug)]
struct Owed(());

impl Owed {
    fn new() -> Owed {
        Owed(())
    }

    fn settle(self) {
        std::mem::forget(self);
    }
}

#[cfg(debug_assertions)]
impl Drop for Owed {
    #[expect(
        clippy::panic,
        reason = "a lost request is a bug of ours; release builds carry on"
    )]
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("a request was dropped without an answer");
        }
    }
}
