//! The walk against an oracle: random chains, most of them valid, one property flipped.
//!
//! The oracle reads guest memory through the files, a byte range at a time, follows the chain
//! first and judges it afterwards.

use iov_iter::{Area, Chain, ChainFault, ChainLimits, Dest, IovIter, Plain, Source};
use proptest::prelude::*;

use crate::guest::{Desc, Guest, INDIRECT, NEXT, WRITE};

const SIZE: u16 = 32;
const RING: u64 = 0x1000;
const LIMITS: ChainLimits = ChainLimits {
    max_segments: 24,
    max_bytes: 0x2000,
};

/// Two neighbours, a hole, and one apart.
const REGIONS: [(u64, u64); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x2_0000, 0x8000)];
const TABLES: [u64; 3] = [0x2_0003, 0x7f38, 0x2_1000];

/// A chain as a driver means it.
#[derive(Clone, Debug)]
struct Plan {
    buffers: Vec<(u64, u32, bool)>,
    /// How many of the descriptors are in the ring; the rest are in an indirect table.
    direct: usize,
    /// Which table.
    table: usize,
    /// Where descriptors lie in their table: a permutation by sorting.
    order: Vec<u32>,
    flip: Flip,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug)]
enum Flip {
    Nothing,
    Head(u16),
    Next(usize, u16),
    Address(usize, u64),
    Length(usize, u32),
    Direction(usize),
    Flags(usize, u16),
    TableLength(u32),
    TableAddress(u64),
}

fn buffer() -> impl Strategy<Value = (u64, u32)> {
    let mapped = prop_oneof![
        3 => (0_u64..0xf000, 0_u32..0x200),
        1 => (0x7f00_u64..0x8100, 1_u32..0x200),
        3 => (0x2_0000_u64..0x2_7000, 0_u32..0x200),
    ];
    mapped.prop_map(|(at, len)| (at, len))
}

fn flip() -> impl Strategy<Value = Flip> {
    let at = 0_usize..24;
    let next = prop_oneof![0_u16..SIZE, any::<u16>()];
    let address = prop_oneof![
        any::<u64>(),
        0xff00_u64..0x1_0100,
        0x1_ff00_u64..0x2_0100,
        0x2_7f00_u64..0x2_8100,
    ];
    prop_oneof![
        6 => Just(Flip::Nothing),
        1 => any::<u16>().prop_map(Flip::Head),
        2 => (at.clone(), next).prop_map(|(i, next)| Flip::Next(i, next)),
        2 => (at.clone(), address.clone()).prop_map(|(i, to)| Flip::Address(i, to)),
        2 => (at.clone(), any::<u32>()).prop_map(|(i, len)| Flip::Length(i, len)),
        2 => at.clone().prop_map(Flip::Direction),
        2 => (at, 0_u16..8).prop_map(|(i, flags)| Flip::Flags(i, flags)),
        1 => (0_u32..0x300).prop_map(Flip::TableLength),
        1 => address.prop_map(Flip::TableAddress),
    ]
}

prop_compose! {
    fn plan()(
        source in prop::collection::vec(buffer(), 0..13),
        dest in prop::collection::vec(buffer(), 0..14),
        direct in 0_usize..30,
        table in 0_usize..3,
        order in prop::collection::vec(any::<u32>(), usize::from(SIZE)),
        flip in flip(),
    ) -> Plan {
        let source = source.into_iter().map(|(at, len)| (at, len, false));
        let dest = dest.into_iter().map(|(at, len)| (at, len, true));
        let mut buffers: Vec<_> = source.chain(dest).collect();
        if buffers.is_empty() {
            buffers.push((0x4000, 16, false));
        }
        Plan { buffers, direct, table, order, flip }
    }
}

impl Plan {
    /// Writes the descriptors; the head.
    fn write(&self, guest: &Guest) -> u16 {
        let count = self.buffers.len();
        let direct = self.direct.min(count);
        let indirect = count - direct;
        // An indirect descriptor takes one of the ring's.
        let in_ring = direct + usize::from(indirect > 0);
        let places = permutation(&self.order);
        let place = |i: usize| {
            if i < in_ring {
                places[i]
            } else {
                (i - in_ring) as u16
            }
        };

        let mut descs: Vec<(usize, Desc)> = Vec::new();
        for (i, &(at, len, writable)) in self.buffers.iter().enumerate() {
            // In its own table, a descriptor's neighbour is the next one there.
            let index = if i < direct { i } else { i + 1 };
            let last = i + 1 == count;
            let mut flags = if writable { WRITE } else { 0 };
            flags |= if last { 0 } else { NEXT };
            let next = if last { 0 } else { place(index + 1) };
            descs.push((index, Desc::new(at, len, flags, next)));
        }
        let mut table = TABLES[self.table];
        let mut table_len = (indirect * 16) as u32;
        match self.flip {
            Flip::TableLength(len) => table_len = len,
            Flip::TableAddress(at) => table = at,
            Flip::Nothing | Flip::Head(_) => {}
            Flip::Next(i, next) => change(&mut descs, i, |d| d.next = next),
            Flip::Address(i, at) => change(&mut descs, i, |d| d.addr = at),
            Flip::Length(i, len) => change(&mut descs, i, |d| d.len = len),
            Flip::Direction(i) => change(&mut descs, i, |d| d.flags ^= WRITE),
            Flip::Flags(i, flags) => change(&mut descs, i, |d| d.flags = flags),
        }
        for (index, desc) in &descs {
            let slot = u64::from(place(*index)) * 16;
            let base = if *index < in_ring {
                RING
            } else {
                TABLES[self.table]
            };
            guest.write(base + slot, &desc.bytes());
        }
        if indirect > 0 {
            let refers = Desc::new(table, table_len, INDIRECT, 0);
            guest.write(RING + u64::from(place(direct)) * 16, &refers.bytes());
        }
        if let Flip::Head(head) = self.flip {
            head
        } else {
            place(0)
        }
    }
}

fn change(descs: &mut [(usize, Desc)], i: usize, change: impl Fn(&mut Desc)) {
    let len = descs.len();
    change(&mut descs[i % len].1);
}

fn permutation(keys: &[u32]) -> Vec<u16> {
    let mut places: Vec<u16> = (0..SIZE).collect();
    places.sort_by_key(|place| (keys[usize::from(*place)], *place));
    places
}

/// What a walk found, in a form to compare.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Whole {
        source: Vec<(u64, u32)>,
        dest: Vec<(u64, u32)>,
    },
    Broken {
        fault: ChainFault,
        status: Option<u64>,
    },
}

/// Memory as the oracle sees it: byte by byte.
struct Oracle<'a> {
    guest: &'a Guest,
}

impl Oracle<'_> {
    fn is_mapped(at: u64) -> bool {
        REGIONS
            .iter()
            .any(|(start, size)| at.checked_sub(*start).is_some_and(|o| o < *size))
    }

    fn region(at: u64) -> Option<usize> {
        REGIONS
            .iter()
            .position(|(start, size)| at.checked_sub(*start).is_some_and(|o| o < *size))
    }

    fn read(&self, at: u64) -> Option<Desc> {
        let all = (0..16).all(|i| at.checked_add(i).is_some_and(Self::is_mapped));
        let bytes = all.then(|| self.guest.read(at, 16))?;
        let (addr, rest) = bytes.split_at(8);
        Some(Desc {
            addr: u64::from_le_bytes(addr.try_into().unwrap()),
            len: u32::from_le_bytes(rest[..4].try_into().unwrap()),
            flags: u16::from_le_bytes(rest[4..6].try_into().unwrap()),
            next: u16::from_le_bytes(rest[6..].try_into().unwrap()),
        })
    }

    /// The data descriptors met, and what stopped the walk before its end.
    fn follow(&self, head: u16) -> (Vec<Desc>, Option<ChainFault>) {
        let mut met = Vec::new();
        if head >= SIZE {
            return (met, Some(ChainFault::HeadOutOfRange { head, size: SIZE }));
        }
        let (mut base, mut size, mut index, mut steps) = (RING, u32::from(SIZE), head, 0);
        loop {
            if steps == size {
                return (met, Some(ChainFault::Cycle { size }));
            }
            steps += 1;
            let at = base.wrapping_add(u64::from(index) * 16);
            let Some(desc) = self.read(at) else {
                return (met, Some(ChainFault::IndirectUnmapped { guest: at }));
            };
            if desc.flags & INDIRECT != 0 {
                let Desc { addr, len, .. } = desc;
                let fault = if base != RING {
                    ChainFault::IndirectNested
                } else if desc.flags & NEXT != 0 {
                    ChainFault::IndirectNext
                } else if len == 0 || len % 16 != 0 || len / 16 > 65536 {
                    ChainFault::IndirectLength { len }
                } else if !Self::is_mapped(addr) {
                    ChainFault::IndirectUnmapped { guest: addr }
                } else {
                    (base, size, index, steps) = (addr, len / 16, 0, 0);
                    continue;
                };
                return (met, Some(fault));
            }
            met.push(desc);
            if desc.flags & NEXT == 0 {
                return (met, None);
            }
            index = desc.next;
            if u32::from(index) >= size {
                return (met, Some(ChainFault::NextOutOfRange { next: index, size }));
            }
        }
    }

    fn judge(&self, head: u16) -> Found {
        let (met, stopped) = self.follow(head);
        let (mut source, mut dest) = (Vec::new(), Vec::new());
        let (mut fault, mut status) = (None, None);
        let (mut count, mut bytes, mut crossings) = (0, 0, 0);
        for desc in met.iter().filter(|desc| desc.len > 0) {
            let writable = desc.flags & WRITE != 0;
            let mut note = |new: ChainFault| {
                fault.get_or_insert(new);
            };
            count += 1;
            bytes += u64::from(desc.len);
            if count > LIMITS.max_segments {
                note(ChainFault::TooManySegments {
                    limit: LIMITS.max_segments,
                });
            }
            if bytes > LIMITS.max_bytes {
                note(ChainFault::TooManyBytes {
                    limit: LIMITS.max_bytes,
                });
            }
            if !writable && !dest.is_empty() {
                note(ChainFault::ReadableAfterWritable);
            }
            let (parts, whole) = Self::parts(desc.addr, desc.len);
            let crossed = parts.len().saturating_sub(1);
            if !whole {
                note(ChainFault::Unmapped {
                    guest: desc.addr,
                    len: desc.len,
                });
            }
            let last = desc.addr.wrapping_add(u64::from(desc.len) - 1);
            status = (writable && whole).then_some(last);
            if fault.is_none() {
                if writable { &mut dest } else { &mut source }.extend(parts);
            } else if writable && !whole {
                // What was mapped of it counts as dest for the order of what follows.
                dest.extend(parts);
            }
            crossings += if whole { crossed } else { 0 };
            if crossings > REGIONS.len() {
                fault.get_or_insert(ChainFault::TooManySegments { limit: 24 });
            }
        }
        match fault.or(stopped) {
            None => Found::Whole { source, dest },
            Some(fault) => Found::Broken {
                fault,
                status: status.filter(|_| stopped.is_none()),
            },
        }
    }

    /// The range cut where regions end, and whether all of it is mapped.
    fn parts(at: u64, len: u32) -> (Vec<(u64, u32)>, bool) {
        let mut parts: Vec<(u64, u32)> = Vec::new();
        let mut last = None;
        for i in 0..u64::from(len) {
            let region = at.checked_add(i).and_then(Self::region);
            if region.is_none() {
                return (parts, false);
            }
            match parts.last_mut() {
                Some(part) if region == last => part.1 += 1,
                _ => parts.push((at + i, 1)),
            }
            last = region;
        }
        (parts, true)
    }
}

/// The general walk, which finds the same as the short one where that finds anything.
fn walk(guest: &Guest, ring: &Area, head: u16) -> Found {
    let found = walk_lists(guest, ring, head);
    if let Some((plain, hold)) = Plain::walk(&guest.view, ring, SIZE, head, &LIMITS) {
        assert_eq!((plain.head, guest.view.holds()), (head, 1));
        let (source, dest) = plain.into_iters();
        assert_eq!(whole(&source, &dest), found);
        drop(hold);
    }
    found
}

fn whole(source: &IovIter<Source>, dest: &IovIter<Dest>) -> Found {
    Found::Whole {
        source: source.segments().map(|s| (s.guest, s.len)).collect(),
        dest: dest.segments().map(|s| (s.guest, s.len)).collect(),
    }
}

fn walk_lists(guest: &Guest, ring: &Area, head: u16) -> Found {
    match Chain::walk(&guest.view, ring, SIZE, head, &LIMITS) {
        Ok(chain) => {
            let (source, dest, _hold) = chain.split();
            whole(&source, &dest)
        }
        Err(broken) => {
            let status = broken.status.map(|status| status.guest());
            Found::Broken {
                fault: broken.fault,
                status,
            }
        }
    }
}

#[test]
fn the_walk_finds_what_the_oracle_finds() {
    let guest = Guest::new(&REGIONS);
    let ring = guest.ring(RING, SIZE);
    let (mut whole, mut broken) = (0_u32, 0_u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 4096,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let counts = std::cell::Cell::new((0_u32, 0_u32));
    runner
        .run(&plan(), |plan| {
            let head = plan.write(&guest);
            let expected = Oracle { guest: &guest }.judge(head);
            let found = walk(&guest, &ring, head);
            let (whole, broken) = counts.get();
            counts.set(match &found {
                Found::Whole { .. } => (whole + 1, broken),
                Found::Broken { .. } => (whole, broken + 1),
            });
            prop_assert_eq!(found, expected);
            prop_assert_eq!(guest.view.holds(), 0);
            Ok(())
        })
        .unwrap();
    (whole, broken) = (whole + counts.get().0, broken + counts.get().1);
    // A generator that makes one kind only would prove nothing.
    assert!(
        whole > 500 && broken > 500,
        "{whole} whole, {broken} broken"
    );
}
