//! After warm-up a request allocates nothing: counted by the global allocator.
#![expect(
    unsafe_code,
    reason = "a counting allocator stands in for the system's"
)]

#[cfg(test)]
#[path = "suite/guest.rs"]
#[expect(dead_code, reason = "shared with the suite, which uses all of it")]
mod guest;

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    use iov_iter::{Area, Chain, ChainFault, MemoryNeeds, Stability};

    use crate::guest::{Desc, Guest, INDIRECT, LIMITS, WRITE, link};

    struct Counting;

    thread_local! {
        static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    }

    // SAFETY: everything is passed on to the system's allocator as it came.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
            // SAFETY: the caller keeps `alloc`'s promises.
            unsafe { System.alloc(layout) }
        }

        unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
            // SAFETY: the caller keeps `realloc`'s promises.
            unsafe { System.realloc(at, layout, size) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            // SAFETY: the caller keeps `dealloc`'s promises.
            unsafe { System.dealloc(at, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    const RING: u64 = 0x10_0000;
    const RING_SIZE: u16 = 2048;
    const LENGTHS: [usize; 3] = [3, 130, 1026];

    /// Writes a read of `len` descriptors, at one index or in a table; the head.
    fn request(guest: &Guest, len: usize, index: u16, indirect: bool) -> u16 {
        let data = (0..len as u64 - 2).map(|i| (0x1000 + i * 1024, 512, WRITE));
        let buffers: Vec<_> = [(0x200, 16, 0)]
            .into_iter()
            .chain(data)
            .chain([(0x300, 1, WRITE)])
            .collect();
        let mut descs = link(&buffers);
        let at = RING + u64::from(index) * 16;
        if indirect {
            let table = 0x20_0003 + u64::from(index) * 16;
            guest.descriptors(table, &descs);
            guest.descriptors(at, &[Desc::new(table, (len * 16) as u32, INDIRECT, 0)]);
        } else {
            descs.iter_mut().for_each(|desc| desc.next += index);
            guest.descriptors(at, &descs);
        }
        index
    }

    fn serve(guest: &Guest, ring: &Area, head: u16, needs: &MemoryNeeds) -> usize {
        let chain = Chain::walk(&guest.view, ring, RING_SIZE, head, &LIMITS).unwrap();
        let (mut source, mut dest, hold) = chain.split();
        let status = dest.take_last_byte().unwrap();
        let mut header = [0; 16];
        source.copy_from_full(&hold, &mut header).unwrap();
        let at = dest.save();
        let held = dest.extract(hold, usize::MAX, needs).unwrap();
        let len = held.len();
        let hold = held.land(len);
        dest.restore(at).unwrap();
        let mut tail = dest.split(100).unwrap();
        assert_eq!(tail.zero(&hold, 1), 1);
        status.write(&hold, 0);
        len
    }

    #[test]
    fn a_hundred_thousand_requests_allocate_nothing() {
        let guest = Guest::new(&[(0, 0x40_0000)]);
        let ring = guest.ring(RING, RING_SIZE);
        let stable = MemoryNeeds {
            stability: Stability::Stable,
            ..MemoryNeeds::NONE
        };
        let mut heads = Vec::new();
        for (i, len) in LENGTHS.into_iter().enumerate() {
            let index = [0, 8, 256][i];
            heads.push((len, request(&guest, len, index, false)));
            heads.push((len, request(&guest, len, 1900 + i as u16, true)));
            // Far enough apart that their tables do not overlap.
            assert!(len * 16 <= 0x1_0000);
        }
        for (len, head) in &heads {
            let (len, head) = (*len, *head);
            // The tables of the indirect ones overlap: each is written anew for its turn.
            if head >= 1900 {
                request(&guest, len, head, true);
            }
            let bytes = (len - 2) * 512;
            assert_eq!(serve(&guest, &ring, head, &MemoryNeeds::NONE), bytes);
            assert_eq!(serve(&guest, &ring, head, &stable), bytes);
            let before = ALLOCATIONS.get();
            let rounds = 300_000 / len;
            for _ in 0..rounds {
                assert_eq!(serve(&guest, &ring, head, &MemoryNeeds::NONE), bytes);
            }
            for _ in 0..100 {
                assert_eq!(serve(&guest, &ring, head, &stable), bytes);
            }
            assert_eq!(ALLOCATIONS.get() - before, 0, "{len} descriptors at {head}");
        }
        assert_eq!(guest.view.holds(), 0);
    }

    #[test]
    fn a_hundred_requests_in_flight_allocate_nothing_the_second_time() {
        let guest = Guest::new(&[(0, 0x40_0000)]);
        let ring = guest.ring(RING, RING_SIZE);
        let head = request(&guest, 1026, 0, false);
        let mut in_flight = Vec::with_capacity(100);
        let mut counts = [0; 2];
        for count in &mut counts {
            let before = ALLOCATIONS.get();
            for _ in 0..100 {
                let chain = Chain::walk(&guest.view, &ring, RING_SIZE, head, &LIMITS).unwrap();
                let (source, mut dest, hold) = chain.split();
                let held = dest.extract(hold, usize::MAX, &MemoryNeeds::NONE).unwrap();
                in_flight.push((source, dest, held));
            }
            assert_eq!(guest.view.holds(), 100);
            in_flight.clear();
            *count = ALLOCATIONS.get() - before;
        }
        assert!(counts[0] >= 200, "the allocator counts");
        assert_eq!((counts[1], guest.view.holds()), (0, 0));
    }

    #[test]
    fn broken_chains_allocate_nothing_either() {
        let guest = Guest::new(&[(0, 0x40_0000)]);
        let ring = guest.ring(RING, RING_SIZE);
        let mut buffers = vec![(0x1000, 16, WRITE); 300];
        buffers.extend([(0x2000, 16, 0), (0x3000, 1, WRITE)]);
        guest.descriptors(RING, &link(&buffers));
        let mut before = 0;
        for round in 0..10_000 {
            if round == 1 {
                before = ALLOCATIONS.get();
            }
            let broken = Chain::walk(&guest.view, &ring, RING_SIZE, 0, &LIMITS).unwrap_err();
            assert_eq!(broken.fault, ChainFault::ReadableAfterWritable);
            broken.status.unwrap().write(&broken.hold, 1);
        }
        assert_eq!(ALLOCATIONS.get() - before, 0);
    }
}
