//! Any descriptor table: the walk, both iterators, their copies and extractions.
//!
//! The input: the head, the ring's size as a power of two, what the device needs of memory, the
//! limit of segments; then guest memory from address zero on, where the descriptor table is. Two
//! regions lie next to each other, a third one far away.
#![no_main]

use std::rc::Rc;
use std::sync::Arc;

use iov_iter::{
    Area, BrokenChain, Chain, ChainLimits, Dest, Direction, Hold, IovIter, MemoryNeeds,
    MemoryTable, Plain, Pools, RegionSpec, Stability, View, ledger,
};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::Bytes;

const REGION: u64 = 64 << 10;
const FAR: u64 = 1 << 32;
const REGIONS: usize = 3;
/// Bytes of the input that become guest memory at most.
const WRITTEN: usize = 16 << 10;

thread_local! {
    static VIEW: Rc<View> = {
        let region = |guest_addr| {
            let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&file, REGION).expect("a memfd of 64 KiB");
            let front_end_addr = guest_addr;
            RegionSpec { guest_addr, size: REGION, front_end_addr, mmap_offset: 0, file }
        };
        let specs = vec![region(0), region(REGION), region(FAR)];
        let table = MemoryTable::new(specs).expect("three regions");
        View::new(Arc::new(table), Pools::new(1 << 20))
    };
}

fuzz_target!(|data: &[u8]| {
    VIEW.with(|view| run(view, data));
});

fn run(view: &Rc<View>, data: &[u8]) {
    let Some((&[head, size, needs, limit], memory)) = data.split_first_chunk::<4>() else {
        return;
    };
    fill(view, memory);
    let size = 1_u16 << (size % 9);
    let table = view
        .table()
        .area(0, usize::from(size) * 16, 16)
        .expect("it is in the region");
    let limits = ChainLimits {
        max_segments: u32::from(limit) + 1,
        max_bytes: u64::from(u32::MAX),
    };
    match walk(view, &table, size, u16::from(head), &limits) {
        Ok(chain) => use_up(chain, needs, &limits),
        Err(broken) => {
            assert_eq!(view.holds(), 1);
            if let Some(status) = broken.status {
                status.write(&broken.hold, 1);
            }
        }
    }
    assert_eq!(view.holds(), 0, "every hold is given back");
    assert_eq!(ledger::outstanding(), 0);
    assert_eq!(view.pools().bounce_in_use(), 0);
}

fn walk(
    view: &Rc<View>,
    table: &Area,
    size: u16,
    head: u16,
    limits: &ChainLimits,
) -> Result<Chain, BrokenChain> {
    if let Some((plain, _hold)) = Plain::walk(view, table, size, head, limits) {
        let (source, dest) = plain.into_iters();
        check_sums(&source);
        check_sums(&dest);
    }
    let chain = Chain::walk(view, table, size, head, limits)?;
    assert_eq!(chain.head(), head);
    assert!(head < size);
    Ok(chain)
}

/// What a device does with a chain: read a header, set the status aside, move data, answer.
fn use_up(chain: Chain, needs: u8, limits: &ChainLimits) {
    let (mut source, mut dest, hold) = chain.split();
    let segments = source.segments().count() + dest.segments().count();
    assert!(
        segments <= limits.max_segments as usize + REGIONS,
        "one more for each border at most"
    );
    check_sums(&source);
    check_sums(&dest);

    let mut header = [0; 16];
    let start = source.save();
    let copied = source.copy_from(&hold, &mut header);
    assert_eq!(copied, 16.min(copied + source.count()));
    source.restore(start).expect("the cursor is its own");
    source.advance(copied);

    let status = dest.take_last_byte();
    let needs = MemoryNeeds {
        address_align: 1 << (needs & 15).min(12),
        len_align: 1 << ((needs >> 4) & 3),
        stability: if needs & 0x80 == 0 {
            Stability::AsIs
        } else {
            Stability::Stable
        },
    };
    let all = source.count();
    let hold = match source.extract(hold, all, &needs) {
        Ok(held) => {
            assert_eq!(held.len(), all);
            held.into_hold()
        }
        Err(error) => error.hold,
    };
    let hold = fill_dest(&mut dest, hold, &needs);
    let rest = dest.count();
    assert_eq!(dest.zero(&hold, rest), rest);
    if let Some(status) = status {
        status.write(&hold, 0);
    }
}

fn fill_dest(dest: &mut IovIter<Dest>, hold: Hold, needs: &MemoryNeeds) -> Hold {
    let part = dest.count() / 2;
    match dest.extract(hold, part, needs) {
        Ok(mut held) => {
            let moved = held.len() / 2;
            held.advance(moved);
            for slice in held.slices() {
                slice.copy_from(&vec![0x5a_u8; slice.len()]);
            }
            assert_eq!(held.moved(), moved);
            held.land(part)
        }
        Err(error) => error.hold,
    }
}

fn check_sums<D: Direction>(iter: &IovIter<D>) {
    let sum: u64 = iter.segments().map(|segment| u64::from(segment.len)).sum();
    assert_eq!(sum, iter.count() as u64);
    assert!(iter.segments().all(|segment| segment.len > 0));
    assert!(iter.npages(usize::MAX) <= iter.count() * 2);
}

/// Guest memory is what the input says, and zero where it says nothing.
fn fill(view: &Rc<View>, memory: &[u8]) {
    let memory = memory.get(..WRITTEN).unwrap_or(memory);
    for (place, region) in view.table().regions().iter().enumerate() {
        let whole = region.slice(0, REGION as usize).expect("the whole region");
        whole.copy_from(&[0_u8; REGION as usize]);
        if place == 0 {
            whole.write_slice(memory, 0).expect("it fits");
        }
    }
}
