//! What a request's memory costs: walk, copy, extract.
//!
//! `cargo bench -p iov-iter`. Figures are per request, or per copied block.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark whose set-up fails has nothing to measure"
)]

#[path = "../tests/suite/guest.rs"]
#[expect(dead_code, reason = "shared with the suite, which uses all of it")]
mod guest;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use iov_iter::{Area, Chain, Dest, IovIter, MemoryNeeds, Source, Stability};

use crate::guest::{Desc, Guest, INDIRECT, LIMITS, WRITE, link};

const RING: u64 = 0x10_0000;
const TABLE: u64 = 0x20_0000;
const SIZE: u16 = 1024;

/// A guest with a read of `segments` descriptors at head 0, and the same indirectly at 1023.
fn guest(segments: u64, regions: u64) -> (Guest, Area) {
    // As a PC has it: low memory, and the rest above 4 GiB; here, in as many regions as asked.
    let high = (1..regions).map(|i| ((1 << 32) + i * 0x20_0000, 0x20_0000));
    let guest = Guest::new(&[(0, 0x40_0000)].into_iter().chain(high).collect::<Vec<_>>());
    let base = if regions > 1 {
        (1 << 32) + (regions - 1) * 0x20_0000
    } else {
        0x1000
    };
    let data = (0..segments - 2).map(|i| (base + i * 0x2000, 4096, WRITE));
    let buffers: Vec<_> = [(0x200, 16, 0)]
        .into_iter()
        .chain(data)
        .chain([(0x300, 1, WRITE)])
        .collect();
    let descs = link(&buffers);
    guest.descriptors(RING, &descs);
    guest.descriptors(TABLE, &descs);
    let refers = Desc::new(TABLE, (segments * 16) as u32, INDIRECT, 0);
    guest.descriptors(RING + 1023 * 16, &[refers]);
    let ring = guest.ring(RING, SIZE);
    (guest, ring)
}

fn walk(c: &mut Criterion) {
    let mut group = c.benchmark_group("walk");
    for (name, segments, regions, head) in [
        ("3 direct", 3, 1, 0),
        ("3 indirect", 3, 1, 1023),
        ("3 direct, 3 regions", 3, 3, 0),
        ("3 direct, 509 regions", 3, 509, 0),
        ("128 direct", 128, 1, 0),
        ("128 indirect", 128, 1, 1023),
    ] {
        let (guest, ring) = guest(segments, regions);
        group.bench_function(name, |b| {
            b.iter(|| {
                let chain = Chain::walk(&guest.view, &ring, SIZE, black_box(head), &LIMITS);
                let (source, dest, hold) = chain.unwrap().split();
                black_box((&source, &dest, &hold));
            });
        });
    }
    group.finish();
}

fn copy(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    let guest = Guest::new(&[(0, 0x80_0000)]);
    let hold = guest.view.hold();
    let mut buf = vec![1_u8; 128 << 10];
    for (len, parts) in [
        (16_u64, 1_u64),
        (4096, 1),
        (4096, 8),
        (128 << 10, 1),
        (128 << 10, 32),
    ] {
        let part = len / parts;
        let ranges: Vec<_> = (0..parts)
            .map(|i| (0x1000 + i * 0x4000, part as u32))
            .collect();
        let ranges = if parts == 1 {
            vec![(0x1000, len as u32)]
        } else {
            ranges
        };
        let name = format!("{len} bytes in {parts}");
        let buf = &mut buf[..len as usize];
        group.throughput(Throughput::Bytes(len));
        let mut dest = IovIter::<Dest>::guest(&guest.view, &ranges).unwrap();
        group.bench_function(BenchmarkId::new("to", &name), |b| {
            b.iter(|| {
                let done = dest.copy_to(&hold, buf);
                dest.revert(black_box(done)).unwrap();
            });
        });
        let mut source = IovIter::<Source>::guest(&guest.view, &ranges).unwrap();
        group.bench_function(BenchmarkId::new("from", &name), |b| {
            b.iter(|| {
                let done = source.copy_from(&hold, buf);
                source.revert(black_box(done)).unwrap();
            });
        });
    }
    group.finish();
}

fn extract(c: &mut Criterion) {
    let mut group = c.benchmark_group("extract");
    let stable = MemoryNeeds {
        stability: Stability::Stable,
        ..MemoryNeeds::NONE
    };
    for (name, segments, needs) in [
        ("1 segment", 3, MemoryNeeds::NONE),
        ("1 segment, bounced", 3, stable),
        ("126 segments", 128, MemoryNeeds::NONE),
    ] {
        let (guest, ring) = guest(segments, 1);
        let chain = Chain::walk(&guest.view, &ring, SIZE, 0, &LIMITS).unwrap();
        let (_, mut dest, hold) = chain.split();
        let _status = dest.take_last_byte().unwrap();
        let mut hold = Some(hold);
        group.bench_function(name, |b| {
            b.iter(|| {
                let held = dest
                    .extract(hold.take().unwrap(), usize::MAX, &needs)
                    .unwrap();
                let len = held.len();
                hold = Some(black_box(held).land(len));
                dest.revert(len).unwrap();
            });
        });
    }
    group.finish();
}

/// All a 4 KiB read does here, from its head to the dropped hold.
fn request(c: &mut Criterion) {
    let (guest, ring) = guest(3, 3);
    c.bench_function("request/4 KiB read", |b| {
        b.iter(|| {
            let chain = Chain::walk(&guest.view, &ring, SIZE, black_box(0), &LIMITS).unwrap();
            let (mut source, mut dest, hold) = chain.split();
            let status = dest.take_last_byte().unwrap();
            let mut header = [0; 16];
            source.copy_from_full(&hold, &mut header).unwrap();
            let held = dest.extract(hold, usize::MAX, &MemoryNeeds::NONE).unwrap();
            black_box((&header, held.vectors()));
            let hold = held.land(4096);
            status.write(&hold, 0);
        });
    });
}

criterion_group!(benches, walk, copy, extract, request);
criterion_main!(benches);
