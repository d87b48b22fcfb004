//! Every kind of memory under every operation: its edges, its flags, its hold.

use std::rc::Rc;

use iov_iter::{
    Dest, Direction, ExtractErrorKind, IovIter, IterError, MemoryNeeds, PrivateMemory, Source,
};

use crate::guest::Guest;

const SIZE: u64 = 0x2_0000;

/// The kinds, each with `len` bytes of memory.
fn kinds<D: Direction>(guest: &Guest, len: u32) -> Vec<(&'static str, IovIter<D>)> {
    let one = IovIter::guest(&guest.view, &[(0x100, len)]).unwrap();
    let half = len / 2;
    let parts = [(0x100, half), (0x8000, 0), (0x3000, len - half)];
    let two = IovIter::guest(&guest.view, &parts).unwrap();
    let bytes: Vec<_> = (0..u64::from(len)).map(|i| (0x4000 + 3 * i, 1)).collect();
    let many = IovIter::guest(&guest.view, &bytes).unwrap();
    let keeper = Rc::new(guest.view.hold());
    let segments: Vec<_> = two.segments().collect();
    let lent = IovIter::lent(&keeper, &segments).unwrap();
    let mut kinds = vec![("one", one), ("two", two), ("many", many), ("lent", lent)];
    if len > 0 {
        let memory = Rc::new(PrivateMemory::new(len as usize).unwrap());
        kinds.push(("private", IovIter::private(memory)));
    }
    kinds
}

fn with_sink(guest: &Guest, len: u32) -> Vec<(&'static str, IovIter<Dest>)> {
    let mut kinds = kinds(guest, len);
    kinds.push(("sink", IovIter::sink(len as usize)));
    kinds
}

#[test]
fn what_must_be_logged_follows_from_kind_and_direction() {
    let guest = Guest::new(&[(0, SIZE)]);
    for (name, iter) in kinds::<Source>(&guest, 8) {
        assert!(!iter.must_log(), "{name}");
        assert_eq!(iter.will_pin(), name != "private", "{name}");
    }
    for (name, iter) in with_sink(&guest, 8) {
        let guest_memory = !["private", "sink"].contains(&name);
        assert_eq!(
            (iter.must_log(), iter.will_pin()),
            (guest_memory, guest_memory),
            "{name}"
        );
        assert_eq!(iter.segments().count() > 0, guest_memory, "{name}");
    }
}

#[test]
fn bytes_go_in_and_come_out() {
    let guest = Guest::new(&[(0, SIZE)]);
    let hold = guest.view.hold();
    let data: Vec<u8> = (1..=200).collect();
    for (name, mut dest) in kinds::<Dest>(&guest, 200) {
        assert_eq!(dest.copy_to(&hold, &data[..7]), 7, "{name}");
        dest.copy_to_full(&hold, &data[7..]).unwrap();
        assert_eq!((dest.count(), dest.copy_to(&hold, &[1])), (0, 0), "{name}");
        dest.revert(200).unwrap();
        let mut source = kinds::<Source>(&guest, 200);
        let at = source.iter().position(|(other, _)| *other == name).unwrap();
        let (_, mut source) = source.swap_remove(at);
        if name != "private" {
            let mut back = vec![0; 201];
            assert_eq!(source.copy_from(&hold, &mut back), 200, "{name}");
            assert_eq!((&back[..200], back[200]), (&data[..], 0), "{name}");
        }
        assert_eq!(dest.zero(&hold, 150), 150, "{name}");
        assert_eq!((dest.count(), dest.zero(&hold, 51)), (50, 50), "{name}");
        source.revert(200 - source.count()).unwrap();
        let mut back = vec![9; 200];
        source.copy_from_full(&hold, &mut back).unwrap();
        assert_eq!(back, vec![0; 200], "{name}");
    }
}

#[test]
fn private_memory_is_shared_with_its_owner() {
    let guest = Guest::new(&[(0, SIZE)]);
    let memory = Rc::new(PrivateMemory::new(100).unwrap());
    let mut dest = IovIter::<Dest>::private(Rc::clone(&memory));
    dest.advance(40);
    let mut tail = dest.split(30).unwrap();
    dest.copy_to_full(&guest.view.hold(), &[1; 30]).unwrap();
    tail.copy_to_full(&guest.view.hold(), &[2; 30]).unwrap();
    let mut bytes = [7; 110];
    assert_eq!(memory.read(0, &mut bytes), 100);
    assert_eq!(
        bytes,
        *[[0; 40].as_slice(), &[1; 30], &[2; 30], &[7; 10]].concat()
    );
    assert_eq!(
        (
            memory.len(),
            memory.write(95, &[3; 10]),
            memory.write(200, &[3])
        ),
        (100, 5, 0)
    );
    assert!(PrivateMemory::new(0).is_err());
}

#[test]
fn a_sink_swallows_and_gives_no_memory() {
    let guest = Guest::new(&[(0, SIZE)]);
    let hold = guest.view.hold();
    let mut sink = IovIter::sink(100);
    assert_eq!(sink.copy_to(&hold, &[1; 30]), 30);
    assert_eq!(
        (sink.zero(&hold, 30), sink.count(), sink.single_seg_count()),
        (30, 40, 40)
    );
    assert!(sink.take_last_byte().is_none());
    let refused = sink.extract(hold, 10, &MemoryNeeds::NONE).unwrap_err();
    assert_eq!((refused.kind, sink.count()), (ExtractErrorKind::Sink, 40));
}

#[test]
fn nothing_remains_and_every_operation_says_so() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut all = with_sink(&guest, 0);
    // Not empty from the start, but emptied: consumed, and hidden.
    for (name, mut iter) in with_sink(&guest, 24) {
        let mut hidden = with_sink(&guest, 24)
            .into_iter()
            .find(|(other, _)| *other == name)
            .unwrap();
        iter.advance(24);
        hidden.1.truncate(0);
        all.extend([(name, iter), hidden]);
    }
    assert_eq!(all.len(), 5 + 2 * 6);
    for (name, mut iter) in all {
        let hold = guest.view.hold();
        assert_eq!(
            (iter.count(), iter.advance(usize::MAX), iter.advance(0)),
            (0, 0, 0),
            "{name}"
        );
        assert_eq!(
            (iter.npages(usize::MAX), iter.alignment()),
            (0, 0),
            "{name}"
        );
        assert_eq!(
            (iter.gap_alignment(), iter.single_seg_count()),
            (0, 0),
            "{name}"
        );
        assert!(iter.is_aligned(u64::MAX, u64::MAX), "{name}");
        assert_eq!(
            (iter.copy_to(&hold, &[1; 8]), iter.zero(&hold, 8)),
            (0, 0),
            "{name}"
        );
        assert_eq!(
            (iter.copy_to(&hold, &[]), iter.zero(&hold, 0)),
            (0, 0),
            "{name}"
        );
        assert_eq!(iter.copy_to_full(&hold, &[]), Ok(()), "{name}");
        let short = Err(IterError::Short { want: 1, done: 0 });
        assert_eq!(iter.copy_to_full(&hold, &[1]), short, "{name}");
        iter.revert(0).unwrap();
        iter.reexpand(0).unwrap();
        iter.restore(iter.save()).unwrap();
        let refused = iter
            .extract(hold, usize::MAX, &MemoryNeeds::NONE)
            .unwrap_err();
        let expected = if name == "sink" {
            ExtractErrorKind::Sink
        } else {
            ExtractErrorKind::Empty
        };
        assert_eq!(refused.kind, expected, "{name}");
        let tail = iter.split(0).unwrap();
        assert_eq!((iter.count(), tail.count()), (0, 0), "{name}");
    }
}

#[test]
fn numbers_too_large_for_anything_are_refused_or_clamped() {
    let guest = Guest::new(&[(0, SIZE)]);
    for (name, mut iter) in with_sink(&guest, 100) {
        iter.advance(10);
        let past = IterError::RevertPastStart {
            by: usize::MAX,
            consumed: 10,
        };
        assert_eq!(iter.revert(usize::MAX), Err(past), "{name}");
        let past = IterError::ExpandPastEnd {
            count: usize::MAX,
            left: 90,
        };
        assert_eq!(iter.reexpand(usize::MAX), Err(past), "{name}");
        let past = IterError::SplitPastEnd {
            at: usize::MAX,
            count: 90,
        };
        assert_eq!(iter.split(usize::MAX).err(), Some(past), "{name}");
        iter.truncate(usize::MAX);
        assert_eq!((iter.count(), iter.advance(usize::MAX)), (90, 90), "{name}");
        iter.revert(100).unwrap();
        assert_eq!(iter.zero(&guest.view.hold(), usize::MAX), 100, "{name}");
    }
}

#[test]
fn a_cursor_belongs_to_one_iterator() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut all = kinds::<Source>(&guest, 10);
    let cursors: Vec<_> = all.iter().map(|(_, iter)| iter.save()).collect();
    for (i, (name, iter)) in all.iter_mut().enumerate() {
        iter.advance(3);
        for (j, cursor) in cursors.iter().enumerate() {
            let expected = if i == j {
                Ok(())
            } else {
                Err(IterError::ForeignCursor)
            };
            assert_eq!(iter.restore(*cursor), expected, "{name} with {j}");
        }
        assert_eq!(iter.count(), 10, "{name}");
    }
}

#[test]
fn memory_that_is_not_mapped_is_refused_at_construction() {
    let guest = Guest::new(&[(0, SIZE)]);
    for (at, len) in [
        (SIZE, 1),
        (SIZE - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
    ] {
        let refused = IovIter::<Dest>::guest(&guest.view, &[(0, 1), (at, len)]);
        assert_eq!(refused.err(), Some(IterError::Unmapped { guest: at, len }));
    }
    let whole = IovIter::<Dest>::guest(&guest.view, &[(0, 16)]).unwrap();
    let segment = whole.segments().next().unwrap();
    let keeper = Rc::new(guest.view.hold());
    let forged = [
        iov_iter::Segment {
            offset: SIZE - 15,
            ..segment
        },
        iov_iter::Segment {
            region: 1,
            ..segment
        },
        iov_iter::Segment {
            guest: 1,
            ..segment
        },
        iov_iter::Segment {
            offset: u64::MAX,
            guest: u64::MAX,
            ..segment
        },
    ];
    for segment in forged {
        let refused = IovIter::<Dest>::lent(&keeper, &[segment]);
        assert!(
            matches!(refused.err(), Some(IterError::Unmapped { .. })),
            "{segment:?}"
        );
    }
}

#[test]
fn a_hold_on_another_table_reaches_nothing() {
    let (guest, other) = (Guest::new(&[(0, SIZE)]), Guest::new(&[(0x1000, SIZE)]));
    let wrong = other.view.hold();
    let mut dest = IovIter::<Dest>::guest(&guest.view, &[(0x2000, 8), (0x3000, 1)]).unwrap();
    assert_eq!(
        (dest.copy_to(&wrong, &[1; 9]), dest.zero(&wrong, 9)),
        (0, 0)
    );
    let refused = dest.extract(wrong, 9, &MemoryNeeds::NONE).unwrap_err();
    assert_eq!((refused.kind, dest.count()), (ExtractErrorKind::Faulted, 9));
    dest.take_last_byte().unwrap().write(&refused.hold, 1);
    assert_eq!(other.read(0x2000, 0x1001), vec![0; 0x1001]);
    // Lent segments have their own keeper, so any hold does.
    let keeper = Rc::new(guest.view.hold());
    let segments: Vec<_> = dest.segments().collect();
    let mut lent = IovIter::<Dest>::lent(&keeper, &segments).unwrap();
    assert_eq!(lent.copy_to(&refused.hold, &[5; 8]), 8);
    assert_eq!(guest.read(0x2000, 8), [5; 8]);
}

#[test]
fn lent_memory_outlives_its_lender_in_an_extraction() {
    let (guest, other) = (Guest::new(&[(0, SIZE)]), Guest::new(&[(0, SIZE)]));
    let keeper = Rc::new(guest.view.hold());
    let plain = IovIter::<Dest>::guest(&guest.view, &[(0x2000, 8)]).unwrap();
    let segments: Vec<_> = plain.segments().collect();
    let mut lent = IovIter::<Dest>::lent(&keeper, &segments).unwrap();
    let held = lent
        .extract(other.view.hold(), 8, &MemoryNeeds::NONE)
        .unwrap();
    drop((keeper, lent));
    assert_eq!((guest.view.holds(), other.view.holds()), (1, 1));
    held.slices().for_each(|slice| slice.copy_from(&[6_u8; 8]));
    drop(held.land(8));
    assert_eq!(guest.read(0x2000, 8), [6; 8]);
    assert_eq!((guest.view.holds(), other.view.holds()), (0, 0));
}

#[test]
fn a_single_segment_and_a_gap_as_the_kernel_counts_them() {
    let guest = Guest::new(&[(0, SIZE)]);
    let parts = [(0x1000, 0x200), (0x1400, 0x600), (0x3001, 2)];
    let mut iter = IovIter::<Source>::guest(&guest.view, &parts).unwrap();
    assert_eq!((iter.single_seg_count(), iter.npages(9)), (0x200, 3));
    assert_eq!(iter.gap_alignment(), 0x1200 | 0x1400 | 0x1a00 | 0x3001);
    assert_eq!(
        iter.alignment(),
        0x1000 | 0x200 | 0x1400 | 0x600 | 0x3001 | 2
    );
    iter.advance(0x1ff);
    iter.truncate(0x10);
    assert_eq!((iter.single_seg_count(), iter.npages(9)), (1, 2));
    assert_eq!(iter.alignment(), 0x11ff | 1 | 0x1400 | 0xf);
    iter.advance(1);
    assert_eq!((iter.single_seg_count(), iter.gap_alignment()), (0xf, 0));
    assert!(iter.is_aligned(0x3ff, 0) && !iter.is_aligned(0, 1));
}

#[test]
fn iterators_say_what_they_are_in_logs() {
    let guest = Guest::new(&[(0, SIZE)]);
    let mut iter = IovIter::<Dest>::guest(&guest.view, &[(0, 8), (0x100, 8)]).unwrap();
    iter.advance(3);
    assert_eq!(format!("{iter:?}"), "dest guest[2]: 13 left after 3 of 16");
    assert_eq!(
        format!("{:?}", guest.view.hold()),
        "Hold(HoldFlags(REFFED))"
    );
}
