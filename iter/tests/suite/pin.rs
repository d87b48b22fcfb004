//! Pins: what is extracted with a slot, and that each hold gives its slot back once.

use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{
    Dest, Held, Hold, HoldFlags, IovIter, MemoryNeeds, PinnedRegion, Pools, Segment, Source,
    Stability, View,
};

use super::guest::Guest;

/// Slots of 64 KiB.
const SHIFT: u32 = 16;
const SLOT: u64 = 1 << SHIFT;

/// Guest addresses and lengths.
type Ranges = &'static [(u64, u32)];

/// Two neighbours, the first of three slots and a page, and one further off.
const REGIONS: [(u64, u64); 3] = [
    (0, 3 * SLOT + 4096),
    (3 * SLOT + 4096, 2 * SLOT),
    (1 << 30, SLOT),
];

fn pinned(guest: &Guest, region: usize, first: u16) -> PinnedRegion {
    let region = Arc::clone(&guest.table.regions()[region]);
    PinnedRegion::new(region, first, SHIFT).unwrap()
}

/// The slot that these ranges are extracted with.
fn slot(view: &Rc<View>, ranges: &[(u64, u32)], needs: &MemoryNeeds) -> Option<u16> {
    let mut iter = IovIter::<Source>::guest(view, ranges).unwrap();
    let held = iter.extract(view.hold(), usize::MAX, needs).unwrap();
    let slot = held.slot();
    let flags = held.hold().flags();
    assert_eq!(flags.contains(HoldFlags::PINNED), slot.is_some());
    assert!(flags.contains(HoldFlags::REFFED));
    assert_eq!(view.pinned(), usize::from(slot.is_some()));
    drop(held);
    assert_eq!(view.pinned(), 0);
    slot
}

#[test]
fn one_run_inside_one_slot_is_pinned_and_nothing_else() {
    let guest = Guest::new(&REGIONS);
    let view = &guest.view;
    let none = MemoryNeeds::NONE;
    assert_eq!(
        slot(view, &[(0, 4096)], &none),
        None,
        "nothing is registered"
    );
    assert!(!view.has_pins());
    view.set_pins(&[pinned(&guest, 0, 7), pinned(&guest, 2, 100)]);
    assert!(view.has_pins());
    const END: u64 = 3 * SLOT + 4096;
    const FAR: u64 = 1 << 30;
    let cases: [(Ranges, Option<u16>); 13] = [
        (&[(0, 1)], Some(7)),
        (&[(0, 1 << 16)], Some(7)),
        (&[(SLOT - 1, 1)], Some(7)),
        (&[(SLOT - 1, 2)], None),
        (&[(SLOT, 512)], Some(8)),
        (&[(END - 512, 512)], Some(10)),
        (&[(END - 512, 1024)], None),
        (&[(END, 512)], None),
        (&[(FAR, 1 << 16)], Some(100)),
        (&[(0, 512), (512, 512)], Some(7)),
        (&[(0, 512), (1024, 512)], None),
        (&[(SLOT - 512, 512), (SLOT, 512)], None),
        (&[(0, 512), (FAR, 512)], None),
    ];
    for (ranges, expected) in cases {
        assert_eq!(slot(view, ranges, &none), expected, "{ranges:x?}");
    }
    let stable = MemoryNeeds {
        stability: Stability::Stable,
        ..none
    };
    assert_eq!(slot(view, &[(0, 512)], &stable), None, "it is bounced");
    let aligned = MemoryNeeds {
        address_align: 512,
        ..none
    };
    assert_eq!(slot(view, &[(8, 512)], &aligned), None, "it is bounced");
    assert_eq!(slot(view, &[(512, 512)], &aligned), Some(7));
    view.set_pins(&[]);
    assert_eq!(slot(view, &[(0, 512)], &none), None);
}

#[test]
fn a_single_segment_in_place_is_pinned_alike() {
    let guest = Guest::new(&REGIONS);
    let view = &guest.view;
    view.set_pins(&[pinned(&guest, 0, 7)]);
    let mut hold = Some(view.hold());
    // Each takes the hold of the one before, with the slot that has to be given back.
    for (region, offset, len, expected) in [
        (0, SLOT - 512, 512, Some(7)),
        (0, SLOT - 512, 1024, None),
        (0, SLOT, 4096, Some(8)),
        (0, 2 * SLOT, 1 << 16, Some(9)),
        (1, 0, 512, None),
    ] {
        let segment = Segment {
            guest: REGIONS[region].0 + offset,
            offset,
            region: region as u32,
            len,
        };
        let needs = MemoryNeeds::NONE;
        let held = Held::<Dest>::in_place(hold.take().unwrap(), &segment, &needs).unwrap();
        assert_eq!(held.slot(), expected, "{segment:x?}");
        assert_eq!(view.pinned(), usize::from(expected.is_some()));
        hold = Some(held.land(0));
    }
    drop(hold);
    assert_eq!((view.pinned(), view.holds()), (0, 0));
}

#[test]
fn a_part_is_pinned_by_where_it_starts() {
    let guest = Guest::new(&REGIONS);
    let view = &guest.view;
    view.set_pins(&[pinned(&guest, 0, 0)]);
    let mut iter = IovIter::<Dest>::guest(view, &[(SLOT - 4096, 8192)]).unwrap();
    let first = iter.extract(view.hold(), 4096, &MemoryNeeds::NONE).unwrap();
    assert_eq!(first.slot(), Some(0));
    let hold = first.land(4096);
    assert_eq!(view.pinned(), 1, "a landed hold keeps what it has");
    // The next part takes the same hold, which gives back the slot of the first.
    let second = iter.extract(hold, 4096, &MemoryNeeds::NONE).unwrap();
    assert_eq!(second.slot(), Some(1));
    assert_eq!(view.pinned(), 1);
    drop(second);
    assert_eq!((view.pinned(), view.holds()), (0, 0));
}

#[test]
fn a_slot_stays_with_what_is_left_after_a_short_transfer() {
    let guest = Guest::new(&REGIONS);
    let view = &guest.view;
    view.set_pins(&[pinned(&guest, 0, 0)]);
    let mut iter = IovIter::<Dest>::guest(view, &[(0, 8192)]).unwrap();
    let mut held = iter.extract(view.hold(), 8192, &MemoryNeeds::NONE).unwrap();
    held.advance(512);
    assert_eq!((held.slot(), held.vectors().len()), (Some(0), 1));
    let hold: Hold = held.land(512);
    assert!(hold.flags().contains(HoldFlags::PINNED));
}

#[test]
fn the_same_numbers_in_another_table_are_another_region() {
    let guest = Guest::new(&REGIONS);
    let other = Guest::new(&REGIONS);
    let pins = [pinned(&guest, 0, 0), pinned(&guest, 2, 4)];
    assert!(pins[0].is_of(&guest.table) && !pins[0].is_of(&other.table));
    other.view.set_pins(&pins);
    assert!(!other.view.has_pins());
    // A table that shares the region has its slots, at another index.
    let smaller = guest
        .table
        .without_region(0, REGIONS[0].1, super::guest::FRONT_END_BASE)
        .unwrap();
    let view = View::new(Arc::new(smaller), Pools::new(1 << 20));
    view.set_pins(&pins);
    assert_eq!(slot(&view, &[(1 << 30, 512)], &MemoryNeeds::NONE), Some(4));
    assert_eq!(
        slot(&view, &[(REGIONS[1].0, 512)], &MemoryNeeds::NONE),
        None
    );
}

#[test]
fn slots_cover_the_region_and_no_more() {
    let guest = Guest::new(&REGIONS);
    let pin = pinned(&guest, 0, 20);
    assert_eq!(pin.slots(), 20..24);
    let bytes: Vec<_> = pin.slots().map(|slot| pin.bytes_of(slot)).collect();
    let expected = [
        0..SLOT,
        SLOT..2 * SLOT,
        2 * SLOT..3 * SLOT,
        3 * SLOT..3 * SLOT + 4096,
    ];
    assert_eq!(bytes, expected);
    let region = || Arc::clone(&guest.table.regions()[0]);
    assert_eq!(
        PinnedRegion::new(region(), 0, 30).unwrap().slots(),
        0..1,
        "a slot may be longer than its region"
    );
    assert!(PinnedRegion::new(region(), u16::MAX - 4, SHIFT).is_some());
    assert!(PinnedRegion::new(region(), u16::MAX - 3, SHIFT).is_none());
    assert!(PinnedRegion::new(region(), 0, 1).is_none(), "too many");
}
