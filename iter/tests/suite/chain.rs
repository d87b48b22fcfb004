//! The walk, case by case: what a driver may do, what it may not, and where a status still goes.

use iov_iter::{Area, BrokenChain, Chain, ChainFault, ChainLimits, Dest, IovIter, Segment, Source};

use crate::guest::{Desc, Guest, INDIRECT, LIMITS, NEXT, WRITE, link};

const RING: u64 = 0x1000;
const TABLE: u64 = 0x3_0000;
const END: u64 = 0x10_0000;
const SIZE: u16 = 16;

struct Driver {
    guest: Guest,
    ring: Area,
    limits: ChainLimits,
}

type Ranges = Vec<(u64, u32)>;

impl Driver {
    fn new() -> Self {
        Self::over(&[(0, END)])
    }

    fn over(regions: &[(u64, u64)]) -> Self {
        let guest = Guest::new(regions);
        let ring = guest.ring(RING, SIZE);
        Self {
            guest,
            ring,
            limits: LIMITS,
        }
    }

    fn direct(&self, descs: &[Desc]) -> Result<(Ranges, Ranges), BrokenChain> {
        self.guest.descriptors(RING, descs);
        self.walk(0)
    }

    fn indirect(&self, at: u64, descs: &[Desc]) -> Result<(Ranges, Ranges), BrokenChain> {
        self.guest.descriptors(at, descs);
        let len = (descs.len() * 16) as u32;
        self.direct(&[Desc::new(at, len, INDIRECT, 0)])
    }

    fn walk(&self, head: u16) -> Result<(Ranges, Ranges), BrokenChain> {
        let chain = Chain::walk(&self.guest.view, &self.ring, SIZE, head, &self.limits)?;
        assert_eq!((chain.head(), self.guest.view.holds()), (head, 1));
        let (source, dest, hold) = chain.split();
        let parts = (
            ranges(source.segments(), &source),
            ranges(dest.segments(), &dest),
        );
        drop(hold);
        assert_eq!(self.guest.view.holds(), 0);
        Ok(parts)
    }
}

trait Count {
    fn bytes(&self) -> usize;
}

impl Count for IovIter<Source> {
    fn bytes(&self) -> usize {
        self.count()
    }
}

impl Count for IovIter<Dest> {
    fn bytes(&self) -> usize {
        self.count()
    }
}

fn ranges(segments: impl Iterator<Item = Segment>, iter: &impl Count) -> Ranges {
    let ranges: Ranges = segments.map(|s| (s.guest, s.len)).collect();
    let sum: usize = ranges.iter().map(|(_, len)| *len as usize).sum();
    assert_eq!(sum, iter.bytes());
    ranges
}

/// The fault, and where a status can still be written.
fn broken(walked: Result<(Ranges, Ranges), BrokenChain>) -> (ChainFault, Option<u64>) {
    let BrokenChain {
        fault,
        status,
        hold,
    } = walked.unwrap_err();
    assert_eq!(hold.view().holds(), 1);
    (fault, status.map(|status| status.guest()))
}

#[test]
fn the_common_shapes() {
    let driver = Driver::new();
    let read = link(&[(0x4000, 16, 0), (0x5000, 4096, WRITE), (0x4010, 1, WRITE)]);
    let expected = (vec![(0x4000, 16)], vec![(0x5000, 4096), (0x4010, 1)]);
    assert_eq!(driver.direct(&read).unwrap(), expected);
    assert_eq!(driver.indirect(TABLE, &read).unwrap(), expected);
    let write = link(&[
        (0x4000, 16, 0),
        (0x5000, 512, 0),
        (0x6000, 512, 0),
        (0x4010, 1, WRITE),
    ]);
    let expected = (
        vec![(0x4000, 16), (0x5000, 512), (0x6000, 512)],
        vec![(0x4010, 1)],
    );
    assert_eq!(driver.direct(&write).unwrap(), expected);
    assert_eq!(driver.indirect(TABLE, &write).unwrap(), expected);
    let flush = link(&[(0x4000, 16, 0), (0x4010, 1, WRITE)]);
    assert_eq!(
        driver.direct(&flush).unwrap(),
        (vec![(0x4000, 16)], vec![(0x4010, 1)])
    );
}

#[test]
fn descriptors_in_any_order_of_the_table() {
    let driver = Driver::new();
    let mut descs = [Desc::new(0, 0, 0, 0); 16];
    descs[15] = Desc::new(0x4000, 16, NEXT, 3);
    descs[3] = Desc::new(0x5000, 7, NEXT | WRITE, 14);
    descs[14] = Desc::new(0x6000, 1, WRITE, 15);
    driver.guest.descriptors(RING, &descs);
    let expected = (vec![(0x4000, 16)], vec![(0x5000, 7), (0x6000, 1)]);
    assert_eq!(driver.walk(15).unwrap(), expected);
}

#[test]
fn a_chain_as_long_as_the_ring_is_whole_and_a_longer_one_a_cycle() {
    let driver = Driver::new();
    let mut descs = link(&[(0x4000, 1, 0); 16]);
    let (source, dest) = driver.direct(&descs).unwrap();
    assert_eq!((source.len(), dest.len()), (16, 0));
    descs[15].flags |= NEXT;
    descs[15].next = 0;
    assert_eq!(
        broken(driver.direct(&descs)),
        (ChainFault::Cycle { size: 16 }, None)
    );
    // A descriptor that is its own next, and dest, so that the order is kept.
    let itself = [Desc::new(0x4000, 1, NEXT | WRITE, 0)];
    assert_eq!(
        broken(driver.direct(&itself)),
        (ChainFault::Cycle { size: 16 }, None)
    );
    let itself = [Desc::new(0x4000, 1, NEXT | WRITE, 0), Desc::new(0, 0, 0, 0)];
    assert_eq!(
        broken(driver.indirect(TABLE, &itself)),
        (ChainFault::Cycle { size: 2 }, None)
    );
}

#[test]
fn indices_outside_of_their_table() {
    let driver = Driver::new();
    let (fault, status) = broken(driver.walk(16));
    assert_eq!(
        (fault, status),
        (ChainFault::HeadOutOfRange { head: 16, size: 16 }, None)
    );
    assert!(matches!(
        broken(driver.walk(u16::MAX)).0,
        ChainFault::HeadOutOfRange { .. }
    ));
    let descs = [Desc::new(0x4000, 16, NEXT | WRITE, 16)];
    let out_of_range = |size| (ChainFault::NextOutOfRange { next: 16, size }, None);
    assert_eq!(broken(driver.direct(&descs)), out_of_range(16));
    assert_eq!(broken(driver.indirect(TABLE, &descs)), out_of_range(1));
}

#[test]
fn a_ring_area_shorter_than_the_ring_is_never_left() {
    let mut driver = Driver::new();
    driver.guest.descriptors(RING, &link(&[(0x4000, 1, 0); 16]));
    driver.ring = driver.guest.ring(RING, 8);
    let (fault, status) = broken(driver.walk(0));
    assert_eq!(
        (fault, status),
        (ChainFault::NextOutOfRange { next: 8, size: 16 }, None)
    );
}

#[test]
fn readable_after_writable_is_refused_and_still_answered() {
    let driver = Driver::new();
    let descs = link(&[(0x4000, 16, WRITE), (0x5000, 8, 0), (0x6000, 3, WRITE)]);
    let expected = (ChainFault::ReadableAfterWritable, Some(0x6002));
    assert_eq!(broken(driver.direct(&descs)), expected);
    assert_eq!(broken(driver.indirect(TABLE, &descs)), expected);
    // Its last byte is the driver's own: nothing to answer with.
    let descs = link(&[(0x4000, 16, WRITE), (0x5000, 8, 0)]);
    assert_eq!(
        broken(driver.direct(&descs)),
        (ChainFault::ReadableAfterWritable, None)
    );
}

#[test]
fn the_status_of_a_broken_chain_is_written_where_it_says() {
    let driver = Driver::new();
    let descs = link(&[(0x4000, 16, WRITE), (0x5000, 8, 0), (0x6000, 3, WRITE)]);
    let BrokenChain { status, hold, .. } = driver.direct(&descs).unwrap_err();
    status.unwrap().write(&hold, 0xee);
    assert_eq!(driver.guest.read(0x6000, 4), [0, 0, 0xee, 0]);
}

#[test]
fn unmapped_buffers_are_named_and_still_answered() {
    let driver = Driver::new();
    for (guest, len) in [(END, 1), (END - 1, 2), (u64::MAX, 2), (1 << 40, 1 << 31)] {
        let fault = ChainFault::Unmapped { guest, len };
        let descs = link(&[(0x4000, 16, 0), (guest, len, WRITE), (0x6000, 1, WRITE)]);
        assert_eq!(broken(driver.direct(&descs)), (fault, Some(0x6000)));
        let at_the_end = link(&[(0x4000, 16, 0), (guest, len, WRITE)]);
        assert_eq!(broken(driver.direct(&at_the_end)), (fault, None));
    }
}

#[test]
fn empty_descriptors_are_skipped() {
    let driver = Driver::new();
    // An empty one has no address to be wrong and no place to be out of order.
    let descs = link(&[
        (1 << 50, 0, WRITE),
        (0x4000, 16, 0),
        (0, 0, WRITE),
        (0x5000, 2, 0),
        (0x6000, 1, WRITE),
        (1 << 50, 0, 0),
    ]);
    let expected = (vec![(0x4000, 16), (0x5000, 2)], vec![(0x6000, 1)]);
    assert_eq!(driver.direct(&descs).unwrap(), expected);
    let nothing = link(&[(0, 0, 0), (0, 0, WRITE)]);
    assert_eq!(driver.direct(&nothing).unwrap(), (vec![], vec![]));
}

#[test]
fn a_buffer_across_adjacent_regions_becomes_one_segment_each() {
    let regions = [
        (0, 0x8000),
        (0x8000, 0x1000),
        (0x9000, 0x8000),
        (0x2_0000, 0x1000),
    ];
    let driver = Driver::over(&regions);
    let descs = link(&[(0x7ff0, 16, 0), (0x7ff0, 0x1020, WRITE), (0x8fff, 2, WRITE)]);
    let dest = vec![
        (0x7ff0, 0x10),
        (0x8000, 0x1000),
        (0x9000, 0x10),
        (0x8fff, 1),
        (0x9000, 1),
    ];
    assert_eq!(driver.direct(&descs).unwrap(), (vec![(0x7ff0, 16)], dest));
    // Where the regions do not touch, the buffer ends in a hole.
    let hole = link(&[(0x1_0ff0, 0x20, WRITE), (0x4000, 1, WRITE)]);
    let fault = ChainFault::Unmapped {
        guest: 0x1_0ff0,
        len: 0x20,
    };
    assert_eq!(broken(driver.direct(&hole)), (fault, Some(0x4000)));
}

#[test]
fn a_status_at_the_far_side_of_a_border() {
    let driver = Driver::over(&[(0, 0x8000), (0x8000, 0x8000)]);
    let descs = link(&[(0x4000, 1, WRITE), (0x5000, 1, 0), (0x7ff0, 0x11, WRITE)]);
    let expected = (ChainFault::ReadableAfterWritable, Some(0x8000));
    assert_eq!(broken(driver.direct(&descs)), expected);
}

#[test]
fn limits_at_and_beyond() {
    let mut driver = Driver::new();
    driver.limits.max_segments = 5;
    let buffers = |n: usize| {
        let mut buffers = vec![(0x4000, 1, 0); n - 1];
        buffers.push((0x5000, 1, WRITE));
        link(&buffers)
    };
    assert!(driver.direct(&buffers(5)).is_ok());
    let fault = ChainFault::TooManySegments { limit: 5 };
    assert_eq!(broken(driver.direct(&buffers(6))), (fault, Some(0x5000)));

    driver.limits = ChainLimits {
        max_segments: 1026,
        max_bytes: 0x8000,
    };
    let bytes = |len| link(&[(0x4000, 16, 0), (0x8000, len, WRITE), (0x5000, 1, WRITE)]);
    assert!(driver.direct(&bytes(0x8000 - 17)).is_ok());
    let fault = ChainFault::TooManyBytes { limit: 0x8000 };
    assert_eq!(
        broken(driver.direct(&bytes(0x8000 - 16))),
        (fault, Some(0x5000))
    );
}

#[test]
fn a_chain_above_four_gib_is_broken_though_every_part_of_it_is_mapped() {
    let driver = Driver::over(&[(0, 0x10_0000), (1 << 32, 3 << 30)]);
    let part = (1 << 32, 3 << 30, WRITE);
    let fault = ChainFault::TooManyBytes { limit: 1 << 32 };
    let descs = link(&[(0x4000, 16, 0), part, part, (0x5000, 1, WRITE)]);
    assert_eq!(broken(driver.direct(&descs)), (fault, Some(0x5000)));
    let whole = (1 << 32, 1 << 30, WRITE);
    let (_, dest) = driver.direct(&link(&[part, whole])).unwrap();
    assert_eq!(dest.len(), 2);
    assert_eq!(
        broken(driver.direct(&link(&[part, whole, (0x5000, 1, WRITE)]))).0,
        fault
    );
}

#[test]
fn the_segments_of_an_indirect_chain_at_the_real_limit() {
    let driver = Driver::new();
    let buffers = |n: usize| {
        let data = (0..n as u64 - 2).map(|i| (0x8000 + i * 16, 16, WRITE));
        link(
            &[(0x4000, 16, 0)]
                .into_iter()
                .chain(data)
                .chain([(0x5000, 1, WRITE)])
                .collect::<Vec<_>>(),
        )
    };
    let (source, dest) = driver.indirect(TABLE, &buffers(1026)).unwrap();
    assert_eq!((source.len(), dest.len()), (1, 1025));
    assert_eq!(
        (dest[0], dest[1023], dest[1024]),
        ((0x8000, 16), (0xbff0, 16), (0x5000, 1))
    );
    let fault = ChainFault::TooManySegments { limit: 1026 };
    assert_eq!(
        broken(driver.indirect(TABLE, &buffers(1027))),
        (fault, Some(0x5000))
    );
}

#[test]
fn crossings_are_bounded_by_the_regions_not_by_the_descriptors() {
    let regions: Vec<_> = (0..8).map(|i| (i * 0x8000, 0x8000)).collect();
    let mut driver = Driver::over(&regions);
    driver.limits.max_segments = 4;
    // Each crosses all eight regions; a driver's own buffers cross each border once.
    let all = (0x4000, 0x3_8000, WRITE);
    assert_eq!(driver.direct(&link(&[all])).unwrap().1.len(), 8);
    let fault = ChainFault::TooManySegments { limit: 4 };
    assert_eq!(
        broken(driver.direct(&link(&[all, all]))),
        (fault, Some(0x3_bfff))
    );
}

#[test]
fn indirect_tables_of_wrong_length() {
    let driver = Driver::over(&[(0, 0x20_0000)]);
    driver
        .guest
        .descriptors(TABLE, &link(&[(0x4000, 16, 0), (0x5000, 1, WRITE)]));
    let walk = |len| driver.direct(&[Desc::new(TABLE, len, INDIRECT, 0)]);
    for len in [0, 1, 15, 17, 31, 33, 16 * 65537, u32::MAX, u32::MAX - 15] {
        assert_eq!(
            broken(walk(len)),
            (ChainFault::IndirectLength { len }, None)
        );
    }
    for len in [32, 48, 16 * 65536] {
        assert_eq!(walk(len).unwrap(), (vec![(0x4000, 16)], vec![(0x5000, 1)]));
    }
    let too_short = ChainFault::NextOutOfRange { next: 1, size: 1 };
    assert_eq!(broken(walk(16)), (too_short, None));
}

#[test]
fn what_an_indirect_descriptor_may_not_be() {
    let driver = Driver::new();
    let inner = link(&[(0x4000, 16, 0), (0x5000, 1, WRITE)]);
    let nested = [inner[0], Desc::new(TABLE, 16, INDIRECT, 0)];
    assert_eq!(
        broken(driver.indirect(TABLE, &nested)),
        (ChainFault::IndirectNested, None)
    );
    driver.guest.descriptors(TABLE, &inner);
    let with_next = [
        Desc::new(TABLE, 32, INDIRECT | NEXT, 1),
        Desc::new(0x6000, 1, WRITE, 0),
    ];
    assert_eq!(
        broken(driver.direct(&with_next)),
        (ChainFault::IndirectNext, None)
    );
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors_and_say_write() {
    let driver = Driver::new();
    driver
        .guest
        .descriptors(TABLE, &link(&[(0x5000, 8, 0), (0x6000, 1, WRITE)]));
    let head = Desc::new(0x4000, 16, NEXT, 1);
    // The WRITE flag says nothing on a descriptor that refers to a table.
    for flags in [INDIRECT, INDIRECT | WRITE] {
        let walked = driver
            .direct(&[head, Desc::new(TABLE, 32, flags, 0)])
            .unwrap();
        assert_eq!(walked, (vec![(0x4000, 16), (0x5000, 8)], vec![(0x6000, 1)]));
    }
    let dest_first = Desc {
        flags: NEXT | WRITE,
        ..head
    };
    let walked = driver.direct(&[dest_first, Desc::new(TABLE, 32, INDIRECT, 0)]);
    assert_eq!(
        broken(walked),
        (ChainFault::ReadableAfterWritable, Some(0x6000))
    );
}

#[test]
fn an_indirect_table_at_any_address_and_across_regions() {
    let driver = Driver::over(&[(0, 0x8000), (0x8000, 0x8000), (0x1_0000, 0x8000)]);
    let buffers: Vec<_> = (0..2100_u64).map(|i| (0x4000 + i, 1, WRITE)).collect();
    let mut limits = driver.limits;
    limits.max_segments = 4000;
    let driver = Driver { limits, ..driver };
    // From inside the first region to inside the third, and every offset inside a descriptor.
    for shift in 0..16 {
        let descs = link(&buffers);
        let (source, dest) = driver.indirect(0x7ff0 + shift, &descs).unwrap();
        assert!(source.is_empty());
        assert!(
            dest.iter()
                .zip(&buffers)
                .all(|(got, want)| *got == (want.0, want.1))
        );
        assert_eq!(dest.len(), buffers.len());
    }
    for shift in 1..16 {
        let descs = link(&[(0x4000, 16, 0), (0x5000, 1, WRITE)]);
        let walked = driver.indirect(0x3000 + shift, &descs).unwrap();
        assert_eq!(walked, (vec![(0x4000, 16)], vec![(0x5000, 1)]));
    }
}

#[test]
fn an_indirect_table_that_is_not_mapped_where_it_is_read() {
    let driver = Driver::new();
    let whole = Desc::new(END, 32, INDIRECT, 0);
    let fault = ChainFault::IndirectUnmapped { guest: END };
    assert_eq!(broken(driver.direct(&[whole])), (fault, None));
    // Half of the second descriptor lies beyond memory; the first alone is a chain.
    let at = END - 24;
    driver
        .guest
        .write(at, &Desc::new(0x4000, 16, WRITE, 0).bytes());
    let table = Desc::new(at, 32, INDIRECT, 0);
    assert_eq!(
        driver.direct(&[table]).unwrap(),
        (vec![], vec![(0x4000, 16)])
    );
    driver
        .guest
        .write(at, &Desc::new(0x4000, 16, WRITE | NEXT, 1).bytes());
    let fault = ChainFault::IndirectUnmapped { guest: at + 16 };
    assert_eq!(broken(driver.direct(&[table])), (fault, None));
    let wrapping = Desc::new(u64::MAX - 7, 32, INDIRECT, 0);
    let fault = ChainFault::IndirectUnmapped {
        guest: u64::MAX - 7,
    };
    assert_eq!(broken(driver.direct(&[wrapping])), (fault, None));
}

#[test]
fn the_first_fault_is_the_one_named() {
    let driver = Driver::new();
    let descs = [
        Desc::new(0x4000, 1, WRITE | NEXT, 1),
        Desc::new(0x5000, 1, NEXT, 99),
    ];
    assert_eq!(
        broken(driver.direct(&descs)),
        (ChainFault::ReadableAfterWritable, None)
    );
}

#[test]
fn what_the_driver_changes_after_the_walk_changes_nothing() {
    let driver = Driver::new();
    let descs = link(&[(0x4000, 16, 0), (0x5000, 8, WRITE), (0x6000, 1, WRITE)]);
    driver.guest.descriptors(RING, &descs);
    let view = &driver.guest.view;
    let chain = Chain::walk(view, &driver.ring, SIZE, 0, &LIMITS).unwrap();
    driver
        .guest
        .descriptors(RING, &link(&[(1 << 50, 1, WRITE), (1 << 51, 1, 0)]));
    let (_, mut dest, hold) = chain.split();
    dest.copy_to_full(&hold, b"12345678").unwrap();
    assert_eq!(driver.guest.read(0x5000, 8), b"12345678");
}
