//! The request suite: what each request turns into, and how it ends.

use std::cell::RefCell;

use blockdev::{
    Access, Caching, DiscardLimits, Durability, Extent, MayUnmap, Sector, Unmap, WriteZeroesLimits,
};
use iov_iter::{Chain, ChainLimits, DirtyLog, Hold, IovIter, MemoryNeeds, Source};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_SECURE_ERASE,
};

use super::features::bit;
use super::*;
use crate::limits::{MAX_RANGES, MAX_REQUEST_BYTES, MAX_SEGMENTS};
use crate::testing::{Descriptor, DriverRing, Ram};
use crate::vring::Used;

/// Nothing is logged.
const NO_LOG: Option<&iov_iter::SharedLog> = None;

const LIMITS: ChainLimits = ChainLimits {
    max_segments: MAX_SEGMENTS,
    max_bytes: u32::MAX as u64,
};
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where the buffers start; the ring is below.
const BUFFERS: u64 = 0x10000;
/// What guest memory holds before a request writes to it.
const STALE: u8 = 0x5a;

fn profile() -> Profile {
    Profile {
        capacity: Sector(2048),
        block_size: 512,
        access: Access::ReadWrite,
        caching: Caching::Volatile,
        memory: MemoryNeeds::NONE,
        discard: Some(DiscardLimits {
            max_sectors: 1024,
            alignment_sectors: 1,
        }),
        write_zeroes: Some(WriteZeroesLimits {
            max_sectors: 512,
            may_unmap: MayUnmap::Yes,
        }),
    }
}

fn driver() -> Driver {
    let features = bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
    Driver {
        features,
        cache: WriteCache::Writeback,
    }
}

/// A request in guest memory: readable bytes, cut where the list says, then writable room.
struct Guest {
    ram: Ram,
    ring: DriverRing,
    dest: Vec<(u64, u32)>,
}

impl Guest {
    fn new(source: &[&[u8]], dest: &[u32]) -> Guest {
        let ram = Ram::new(64 << 20);
        let ring = DriverRing::new(0, 256);
        let count = source.len() + dest.len();
        let mut at = BUFFERS;
        let mut dests = Vec::new();
        for index in 0..count {
            let (len, flags) = match source.get(index) {
                Some(bytes) => {
                    ram.write(at, bytes);
                    (u32::try_from(bytes.len()).unwrap(), 0)
                }
                None => {
                    let len = dest[index - source.len()];
                    ram.write(at, &vec![STALE; len as usize]);
                    dests.push((at, len));
                    (len, WRITE)
                }
            };
            let next = if index + 1 < count { NEXT } else { 0 };
            let descriptor = Descriptor {
                guest: at,
                len,
                flags: flags | next,
                next: u16::try_from(index + 1).unwrap(),
            };
            ring.put_descriptor(&ram, u16::try_from(index).unwrap(), descriptor);
            // Gaps between the buffers, so that none runs into the next.
            at += u64::from(len) + 64;
        }
        Guest {
            ram,
            ring,
            dest: dests,
        }
    }

    fn walk(&self) -> (IovIter<Source>, IovIter<iov_iter::Dest>, Hold) {
        let table = &self.ring.areas(&self.ram).desc;
        Chain::walk(&self.ram.view, table, self.ring.size, 0, &LIMITS)
            .unwrap()
            .split()
    }

    /// All writable bytes, in order.
    fn written(&self) -> Vec<u8> {
        self.dest
            .iter()
            .flat_map(|(at, len)| self.ram.read(*at, *len as usize))
            .collect()
    }

    fn parse(&self) -> Result<(Request, Header, IovIter<Source>, Hold), Malformed> {
        let (mut source, dest, hold) = self.walk();
        let (request, header, hold) = Request::parse(0, &mut source, dest, hold)?;
        Ok((request, header, source, hold))
    }

    /// Parses and admits; the request is answered with the status if it is refused, OK if not.
    fn admit(&self, profile: &Profile, driver: Driver) -> (Result<Admitted, Status>, Vec<Range>) {
        let (mut request, header, mut source, hold) = self.parse().unwrap();
        let mut ranges = Vec::new();
        let len = request.dest().count();
        let admitted = header.admit(&mut source, len, &hold, profile, driver, &mut ranges);
        let status = admitted.as_ref().err().copied().unwrap_or(Status::Ok);
        let used = request.finish(hold, len, status, NO_LOG);
        assert_eq!(
            used.len as usize,
            self.written().len(),
            "the whole chain is reported"
        );
        assert_eq!(self.written().last(), Some(&status.byte()));
        (admitted, ranges)
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

fn extent(sector: u64, len: u64) -> Extent {
    Extent::new(Sector(sector), len, profile().capacity).unwrap()
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn reads_are_admitted_inside_the_device() {
    for (sector, len, admitted) in [
        (0, 512, Ok(Admitted::Read(extent(0, 512)))),
        (2047, 512, Ok(Admitted::Read(extent(2047, 512)))),
        (2048, 0, Ok(Admitted::Nothing)),
        (2048, 512, Err(Status::IoErr)),
        (2047, 1024, Err(Status::IoErr)),
        (2049, 0, Err(Status::IoErr)),
        (0, 511, Err(Status::IoErr)),
        (0, 513, Err(Status::IoErr)),
        // A sector whose byte offset does not fit 64 bits wraps to zero in a careless shift.
        (1 << 55, 512, Err(Status::IoErr)),
        (u64::MAX, 512, Err(Status::IoErr)),
    ] {
        let guest = Guest::new(&[&header(IN, sector)], &[len, 1]);
        let found = guest.admit(&profile(), driver()).0;
        assert_eq!(found, admitted, "{len} bytes at sector {sector}");
    }
}

#[test]
fn a_request_may_have_the_most_bytes_and_no_more() {
    let big = Profile {
        capacity: Sector(1 << 30),
        ..profile()
    };
    let guest = Guest::new(&[&header(IN, 0)], &[MAX_REQUEST_BYTES, 1]);
    assert!(matches!(
        guest.admit(&big, driver()).0,
        Ok(Admitted::Read(_))
    ));
    let guest = Guest::new(&[&header(IN, 0)], &[MAX_REQUEST_BYTES, 512, 1]);
    let (mut request, header, mut source, hold) = guest.parse().unwrap();
    let len = request.dest().count();
    let found = header.admit(&mut source, len, &hold, &big, driver(), &mut Vec::new());
    assert_eq!(found, Err(Status::IoErr));
    request.abandon(hold, NO_LOG);
}

#[test]
fn what_is_beyond_the_most_bytes_is_not_zeroed() {
    let guest = Guest::new(&[&header(99, 0)], &[MAX_REQUEST_BYTES, 512, 1]);
    let (request, _, _, hold) = guest.parse().unwrap();
    assert_eq!(
        request.finish(hold, 0, Status::Unsupp, NO_LOG),
        Used { head: 0, len: 0 }
    );
    let written = guest.written();
    assert_eq!(written.last(), Some(&2));
    assert!(
        written[..written.len() - 1]
            .iter()
            .all(|byte| *byte == STALE)
    );
}

#[test]
fn a_request_has_to_fit_the_block_size() {
    let big_blocks = Profile {
        block_size: 4096,
        ..profile()
    };
    let guest = Guest::new(&[&header(IN, 8)], &[4096, 1]);
    assert_eq!(
        guest.admit(&big_blocks, driver()).0,
        Ok(Admitted::Read(extent(8, 4096)))
    );
    for (sector, len) in [(1, 4096), (8, 512)] {
        let guest = Guest::new(&[&header(IN, sector)], &[len, 1]);
        assert_eq!(guest.admit(&big_blocks, driver()).0, Err(Status::IoErr));
    }
}

#[test]
fn writes_are_durable_when_the_cache_is_off() {
    let guest = Guest::new(&[&header(OUT, 4), &[7; 1024]], &[1]);
    let at = extent(4, 1024);
    let cached = guest.admit(&profile(), driver()).0;
    assert_eq!(cached, Ok(Admitted::Write(at, Durability::Cached)));
    let through = Driver {
        cache: WriteCache::Writethrough,
        ..driver()
    };
    let durable = guest.admit(&profile(), through).0;
    assert_eq!(durable, Ok(Admitted::Write(at, Durability::Durable)));
    let uncached = Profile {
        caching: Caching::None,
        ..profile()
    };
    let nothing_to_flush = guest.admit(&uncached, through).0;
    assert_eq!(
        nothing_to_flush,
        Ok(Admitted::Write(at, Durability::Cached))
    );
}

#[test]
fn a_read_only_device_refuses_everything_that_writes() {
    let read_only = Profile {
        access: Access::ReadOnly,
        ..profile()
    };
    for (kind, payload) in [
        (OUT, [7; 16]),
        (DISCARD, range(0, 1, 0)),
        (WRITE_ZEROES, range(0, 1, 0)),
    ] {
        let guest = Guest::new(&[&header(kind, 0), &payload], &[1]);
        assert_eq!(
            guest.admit(&read_only, driver()).0,
            Err(Status::IoErr),
            "type {kind}"
        );
    }
    let guest = Guest::new(&[&header(IN, 0)], &[512, 1]);
    assert!(guest.admit(&read_only, driver()).0.is_ok());
}

#[test]
fn a_flush_is_carried_out_where_it_means_something() {
    let guest = Guest::new(&[&header(FLUSH, 0)], &[1]);
    assert_eq!(guest.admit(&profile(), driver()).0, Ok(Admitted::Flush));
    let uncached = Profile {
        caching: Caching::None,
        ..profile()
    };
    assert_eq!(guest.admit(&uncached, driver()).0, Ok(Admitted::Nothing));
}

#[test]
fn unknown_types_are_unsupported_and_zeroed() {
    for kind in [
        2,
        3,
        5,
        9,
        10,
        12,
        VIRTIO_BLK_T_SECURE_ERASE,
        0x8000_0000,
        u32::MAX,
    ] {
        let guest = Guest::new(&[&header(kind, 0)], &[30, 3]);
        let (mut request, header, mut source, hold) = guest.parse().unwrap();
        assert_eq!(header.kind, Kind::Unsupported(kind));
        let len = request.dest().count();
        let mut ranges = Vec::new();
        let found = header.admit(&mut source, len, &hold, &profile(), driver(), &mut ranges);
        assert_eq!(found, Err(Status::Unsupp));
        assert_eq!(
            request.finish(hold, 0, Status::Unsupp, NO_LOG),
            Used { head: 0, len: 33 }
        );
        assert_eq!(guest.written(), [&[0; 32][..], &[2]].concat());
    }
}

#[test]
fn ranges_are_judged_by_what_was_offered() {
    let ok = Ok(Admitted::Ranges(RangeOp::Discard, Durability::Cached));
    let zeroes = Ok(Admitted::Ranges(RangeOp::WriteZeroes, Durability::Cached));
    let (io, unsupp) = (Err(Status::IoErr), Err(Status::Unsupp));
    for (kind, range, expected) in [
        (DISCARD, range(0, 1024, 0), &ok),
        (DISCARD, range(0, 1025, 0), &io),
        (DISCARD, range(2047, 1, 0), &ok),
        (DISCARD, range(2047, 2, 0), &io),
        (DISCARD, range(u64::MAX, 1, 0), &io),
        (DISCARD, range(0, 1, 1), &unsupp),
        (DISCARD, range(0, 1, 2), &unsupp),
        (WRITE_ZEROES, range(0, 512, 0), &zeroes),
        (WRITE_ZEROES, range(0, 513, 0), &io),
        (WRITE_ZEROES, range(0, 1, 1), &zeroes),
        (WRITE_ZEROES, range(0, 1, 2), &unsupp),
        (WRITE_ZEROES, range(0, 1, 3), &unsupp),
        (WRITE_ZEROES, range(0, u32::MAX, 0), &io),
    ] {
        let guest = Guest::new(&[&header(kind, 0), &range], &[1]);
        assert_eq!(
            &guest.admit(&profile(), driver()).0,
            expected,
            "{kind}: {range:?}"
        );
    }
    let guest = Guest::new(
        &[&header(WRITE_ZEROES, 0), &range(8, 2, 1), &range(4, 1, 0)],
        &[1],
    );
    let ranges = guest.admit(&profile(), driver()).1;
    let expected = [
        Range {
            at: extent(8, 1024),
            unmap: Unmap::Allowed,
        },
        Range {
            at: extent(4, 512),
            unmap: Unmap::Forbidden,
        },
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn a_list_of_ranges_has_a_limit_and_whole_entries() {
    let one = range(0, 1, 0);
    let list = one.repeat(MAX_RANGES as usize);
    let guest = Guest::new(&[&header(DISCARD, 0), &list], &[1]);
    let (admitted, ranges) = guest.admit(&profile(), driver());
    assert!(admitted.is_ok());
    assert_eq!(ranges.len(), MAX_RANGES as usize);
    for wrong in [
        &[&list[..], &one].concat()[..],
        &[],
        &one[..15],
        &[&one[..], &[0]].concat(),
    ] {
        let guest = Guest::new(&[&header(DISCARD, 0), wrong], &[1]);
        assert_eq!(
            guest.admit(&profile(), driver()).0,
            Err(Status::IoErr),
            "{} bytes",
            wrong.len()
        );
    }
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let bare = Driver {
        features: 0,
        ..driver()
    };
    for kind in [DISCARD, WRITE_ZEROES] {
        let guest = Guest::new(&[&header(kind, 0), &range(0, 1, 0)], &[1]);
        assert_eq!(guest.admit(&profile(), bare).0, Err(Status::Unsupp));
    }
}

#[test]
fn the_serial_fills_what_room_there_is() {
    let serial = *b"a serial of 20 bytes";
    for room in [0, 1, 19, 20, 21, 512] {
        let guest = Guest::new(&[&header(GET_ID, 0)], &[room, 1]);
        let (mut request, header, _, hold) = guest.parse().unwrap();
        assert_eq!(header.kind, Kind::GetId);
        let moved = request.identify(&hold, &serial);
        assert_eq!(
            request.finish(hold, moved, Status::Ok, NO_LOG).len,
            room + 1
        );
        let mut expected: Vec<u8> = serial.to_vec();
        expected.resize(room as usize, 0);
        expected.push(0);
        assert_eq!(guest.written(), expected, "{room} bytes of room");
    }
}

#[test]
fn a_failed_read_is_zeroed_from_where_it_stopped() {
    let guest = Guest::new(&[&header(IN, 0)], &[512, 512, 1]);
    let (request, _, _, hold) = guest.parse().unwrap();
    assert_eq!(
        request.finish(hold, 700, Status::IoErr, NO_LOG),
        Used { head: 0, len: 1025 }
    );
    assert_eq!(
        guest.written(),
        [&[STALE; 700][..], &[0; 324], &[1]].concat()
    );
}

#[test]
fn a_chain_without_room_for_a_status_is_malformed() {
    let guest = Guest::new(&[&header(IN, 0)], &[]);
    assert!(matches!(guest.parse(), Err(Malformed { status: None, .. })));
    let guest = Guest::new(&[&header(IN, 0)[..15]], &[512, 1]);
    match guest.parse() {
        Err(Malformed {
            status: Some(status),
            hold,
        }) => status.write(&hold, 1),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        guest.written(),
        [&[STALE; 512][..], &[1]].concat(),
        "nothing but the status"
    );
}

#[test]
#[should_panic(expected = "without an answer")]
#[cfg(debug_assertions)]
fn a_request_cannot_be_dropped() {
    let guest = Guest::new(&[&header(IN, 0)], &[512, 1]);
    let (request, ..) = guest.parse().unwrap();
    drop(request);
}

/// Remembers what is marked, and what the memory held at that moment.
struct Witness<'a> {
    guest: &'a Guest,
    marks: RefCell<Vec<(u64, u64)>>,
    seen: RefCell<Vec<u8>>,
}

impl<'a> Witness<'a> {
    fn new(guest: &'a Guest) -> Witness<'a> {
        Witness {
            guest,
            marks: RefCell::default(),
            seen: RefCell::default(),
        }
    }

    /// The bytes that were marked, as runs in order.
    fn marked(&self) -> Vec<(u64, u64)> {
        let mut bytes: Vec<u64> = self
            .marks
            .borrow()
            .iter()
            .flat_map(|&(at, len)| at..at + len)
            .collect();
        bytes.sort_unstable();
        bytes.dedup();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for byte in bytes {
            match runs.last_mut() {
                Some((at, len)) if *at + *len == byte => *len += 1,
                _ => runs.push((byte, 1)),
            }
        }
        runs
    }

    /// What a request with these writable buffers has to mark.
    fn all(&self) -> Vec<(u64, u64)> {
        let dest = self.guest.dest.iter();
        dest.map(|&(at, len)| (at, u64::from(len))).collect()
    }
}

impl DirtyLog for Witness<'_> {
    fn mark(&self, guest: u64, len: u64) {
        self.marks.borrow_mut().push((guest, len));
        *self.seen.borrow_mut() = self.guest.written();
    }
}

#[test]
fn everything_a_request_wrote_is_marked_after_it_was_written() {
    let kinds = [
        (VIRTIO_BLK_T_IN, vec![512, 1024, 1]),
        (VIRTIO_BLK_T_IN, vec![513]),
        (VIRTIO_BLK_T_FLUSH, vec![1]),
        (VIRTIO_BLK_T_FLUSH, vec![7, 3]),
        (VIRTIO_BLK_T_GET_ID, vec![20, 1]),
        (VIRTIO_BLK_T_GET_ID, vec![5, 70]),
        (99, vec![4096, 4097]),
    ];
    for (kind, dest) in kinds {
        for (moved, status) in [(0, Status::IoErr), (300, Status::IoErr), (0, Status::Ok)] {
            let guest = Guest::new(&[&header(kind, 0)], &dest);
            let (request, _, _, hold) = guest.parse().unwrap();
            let witness = Witness::new(&guest);
            let _ = request.finish(hold, moved, status, Some(&witness));
            assert_eq!(witness.marked(), witness.all(), "{kind} {dest:?} {moved}");
            assert_eq!(*witness.seen.borrow(), guest.written(), "marked too early");
        }
    }
}

#[test]
fn only_the_status_of_an_oversized_request_is_marked() {
    let guest = Guest::new(&[&header(VIRTIO_BLK_T_IN, 0)], &[16 << 20, 512, 1]);
    let (request, _, _, hold) = guest.parse().unwrap();
    let witness = Witness::new(&guest);
    let _ = request.finish(hold, 0, Status::IoErr, Some(&witness));
    assert_eq!(witness.marked(), witness.all()[2..]);
}

#[test]
fn the_serial_in_an_oversized_request_is_marked() {
    let guest = Guest::new(&[&header(VIRTIO_BLK_T_GET_ID, 0)], &[16 << 20, 512, 1]);
    let (mut request, _, _, hold) = guest.parse().unwrap();
    let moved = request.identify(&hold, b"a serial of 20 bytes");
    assert_eq!(moved, 20);
    let witness = Witness::new(&guest);
    let _ = request.finish(hold, moved, Status::Ok, Some(&witness));
    assert!(
        witness
            .marks
            .borrow()
            .contains(&(guest.dest[0].0, 16 << 20))
    );
}

#[test]
fn what_a_device_may_have_written_for_an_abandoned_request_is_marked() {
    let guest = Guest::new(&[&header(VIRTIO_BLK_T_IN, 0)], &[512, 1024, 1]);
    let (request, _, _, hold) = guest.parse().unwrap();
    let witness = Witness::new(&guest);
    request.abandon(hold, Some(&witness));
    assert_eq!(witness.marked(), witness.all());
}

#[test]
fn an_abandoned_request_writes_nothing() {
    let guest = Guest::new(&[&header(IN, 0)], &[512, 1]);
    let (request, _, _, hold) = guest.parse().unwrap();
    assert_eq!(guest.ram.view.holds(), 1);
    request.abandon(hold, NO_LOG);
    assert_eq!(guest.ram.view.holds(), 0);
    assert_eq!(guest.written(), [STALE; 513]);
}

/// Cuts bytes into parts at the given places.
fn cut(bytes: &[u8], cuts: &[prop::sample::Index]) -> Vec<Vec<u8>> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places
        .windows(2)
        .map(|pair| bytes[pair[0]..pair[1]].to_vec())
        .collect()
}

proptest! {
    /// Header, payload and status may lie in any descriptors (virtio 2.7.4.3): how the bytes are
    /// cut changes nothing.
    #[test]
    fn any_layout_is_understood(
        kind in prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, 99]),
        sector in 0_u64..2100,
        payload in 0_usize..5,
        source_cuts: [prop::sample::Index; 4],
        dest_cuts: [prop::sample::Index; 3],
    ) {
        let mut source = header(kind, sector).to_vec();
        let mut room = 1;
        match kind {
            OUT => source.extend(vec![9; payload * 512]),
            _ => room += payload * 512,
        }
        let source = cut(&source, &source_cuts);
        let source: Vec<&[u8]> = source.iter().map(Vec::as_slice).collect();
        let room = cut(&vec![0; room], &dest_cuts);
        let room: Vec<u32> = room.iter().map(|part| u32::try_from(part.len()).unwrap()).collect();
        let found = Guest::new(&source, &room).admit(&profile(), driver()).0;
        let fits = sector + payload as u64 <= 2048;
        let expected = match (kind, fits, payload) {
            (IN | OUT, false, _) => Err(Status::IoErr),
            (IN | OUT, true, 0) => Ok(Admitted::Nothing),
            (IN, true, _) => Ok(Admitted::Read(extent(sector, payload as u64 * 512))),
            (OUT, true, _) => {
                Ok(Admitted::Write(extent(sector, payload as u64 * 512), Durability::Cached))
            }
            (FLUSH, ..) => Ok(Admitted::Flush),
            (GET_ID, ..) => Ok(Admitted::Identify),
            _ => Err(Status::Unsupp),
        };
        prop_assert_eq!(found, expected);
    }
}
