//! Chains of the common shape, and those that only look like one.

use iov_iter::{Area, Chain, ChainLimits, Data, Held, HoldFlags, MemoryNeeds, Plain, Stability};

use crate::guest::{Desc, Guest, INDIRECT, NEXT, WRITE};

const SIZE: u16 = 8;
const RING: u64 = 0x1000;
const TABLE: u64 = 0x2008;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x4000;
const STATUS: u64 = 0x3fff;
const LIMITS: ChainLimits = ChainLimits {
    max_segments: 8,
    max_bytes: 1 << 32,
};

/// Two regions next to each other.
fn guest() -> (Guest, Area) {
    let guest = Guest::new(&[(0, 0x10000), (0x10000, 0x1000)]);
    let ring = guest.ring(RING, SIZE);
    (guest, ring)
}

fn read() -> [Desc; 3] {
    [
        Desc::new(HEADER, 16, NEXT, 1),
        Desc::new(DATA, 4096, NEXT | WRITE, 2),
        Desc::new(STATUS, 1, WRITE, 0),
    ]
}

fn write() -> [Desc; 3] {
    let [header, data, status] = read();
    [
        header,
        Desc {
            flags: NEXT,
            ..data
        },
        status,
    ]
}

/// What the short walk makes of a chain, once the general one agreed.
fn walk(guest: &Guest, ring: &Area, limits: &ChainLimits) -> Option<Plain> {
    let (plain, hold) = Plain::walk(&guest.view, ring, SIZE, 0, limits)?;
    assert_eq!(guest.view.holds(), 1);
    let chain = Chain::walk(&guest.view, ring, SIZE, 0, limits).expect("the general walk agrees");
    let (source, dest, other) = chain.split();
    let (own_source, own_dest) = plain.into_iters();
    assert!(own_source.segments().eq(source.segments()));
    assert!(own_dest.segments().eq(dest.segments()));
    assert_eq!(own_source.count(), source.count());
    assert_eq!(own_dest.count(), dest.count());
    drop((hold, other));
    assert_eq!(guest.view.holds(), 0);
    Some(plain)
}

#[test]
fn reads_and_writes_are_recognized_direct_and_indirect() {
    let (guest, ring) = guest();
    for (descs, is_read) in [(read(), true), (write(), false)] {
        for indirect in [false, true] {
            if indirect {
                guest.descriptors(TABLE, &descs);
                guest.descriptors(RING, &[Desc::new(TABLE, 48, INDIRECT, 0)]);
            } else {
                guest.descriptors(RING, &descs);
            }
            let plain = walk(&guest, &ring, &LIMITS).expect("the common shape");
            assert_eq!((plain.head, plain.header.guest), (0, HEADER));
            assert_eq!(plain.status.guest(), STATUS);
            let (data, is_into) = match plain.data {
                Data::Into(data) => (data, true),
                Data::From(data) => (data, false),
            };
            assert_eq!(is_into, is_read);
            assert_eq!((data.guest, data.len), (DATA, 4096));
        }
    }
}

#[test]
fn whatever_is_not_quite_of_the_shape_is_left_to_the_general_walk() {
    type Change = fn(&mut [Desc; 3]);
    let changes: &[(&str, Change)] = &[
        ("no data", |descs| descs[0].next = 2),
        ("a header to write", |descs| descs[0].flags |= WRITE),
        ("an empty header", |descs| descs[0].len = 0),
        ("empty data", |descs| descs[1].len = 0),
        ("a status of two bytes", |descs| descs[2].len = 2),
        ("a status to read", |descs| descs[2].flags = 0),
        ("more after the status", |descs| descs[2].flags |= NEXT),
        ("a table for data", |descs| descs[1].flags |= INDIRECT),
        ("an unknown flag", |descs| descs[1].flags |= 1 << 9),
        ("no such descriptor", |descs| descs[1].next = SIZE),
        ("a cycle", |descs| descs[1].next = 0),
        ("data across a border", |descs| {
            descs[1].addr = 0x10000 - 512
        }),
        ("data that is not mapped", |descs| descs[1].addr = 0x20000),
        ("a header that is not mapped", |descs| {
            descs[0].addr = 0x20000
        }),
        ("a status that is not mapped", |descs| {
            descs[2].addr = u64::MAX
        }),
    ];
    let (guest, ring) = guest();
    for (what, change) in changes {
        let mut descs = read();
        change(&mut descs);
        guest.descriptors(RING, &descs);
        assert!(walk(&guest, &ring, &LIMITS).is_none(), "{what}");
        guest.descriptors(TABLE, &descs);
        guest.descriptors(RING, &[Desc::new(TABLE, 48, INDIRECT, 0)]);
        assert!(walk(&guest, &ring, &LIMITS).is_none(), "{what}, indirect");
        assert_eq!(guest.view.holds(), 0);
    }
    guest.descriptors(RING, &read());
    for limits in [(2, 1 << 20), (8, 4112)] {
        let (max_segments, max_bytes) = limits;
        let limits = ChainLimits {
            max_segments,
            max_bytes,
        };
        assert!(walk(&guest, &ring, &limits).is_none(), "{limits:?}");
    }
    let exact = ChainLimits {
        max_segments: 3,
        max_bytes: 4113,
    };
    assert!(walk(&guest, &ring, &exact).is_some());
}

#[test]
fn memory_is_held_in_place_only_as_the_device_needs_it() {
    let (guest, ring) = guest();
    guest.descriptors(RING, &read());
    let needs = |address_align, len_align, stability| MemoryNeeds {
        address_align,
        len_align,
        stability,
    };
    for (needs, shift, fits) in [
        (MemoryNeeds::NONE, 0, true),
        (needs(4096, 4096, Stability::AsIs), 0, true),
        (needs(512, 1, Stability::AsIs), 256, false),
        (needs(256, 1, Stability::AsIs), 256, true),
        (needs(1, 8192, Stability::AsIs), 0, false),
        (needs(1, 1, Stability::Stable), 0, false),
    ] {
        let mut descs = read();
        descs[1].addr += shift;
        guest.descriptors(RING, &descs);
        let (plain, hold) = Plain::walk(&guest.view, &ring, SIZE, 0, &LIMITS).unwrap();
        let Data::Into(data) = plain.data else {
            panic!("a read")
        };
        match Held::<iov_iter::Dest>::in_place(hold, &data, &needs) {
            Ok(held) => {
                assert!(fits, "{needs:?}");
                assert_eq!((held.len(), held.vectors().len()), (4096, 1));
                assert_eq!(held.hold().flags(), HoldFlags::REFFED);
            }
            Err(hold) => {
                assert!(!fits, "{needs:?}");
                assert_eq!(hold.flags(), HoldFlags::REFFED);
            }
        }
        assert_eq!(guest.view.holds(), 0);
    }
}
