//! Rings and chains that are wrong in every way: each ends in a failed request or a stopped ring,
//! and the same daemon then serves a front end that behaves.

use blockdev::open;
use vublk_tests::frontend::{
    DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, FrontEnd, Kind, Options, Outcome,
    ServeOptions, Served, code, words,
};

use rustix::event::{PollFd, PollFlags, poll};
use vublk::fds::borrow;

/// The status bytes (virtio 5.2.6).
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte is before the device writes it.
const UNTOUCHED: u8 = 0xff;

/// What a wrong chain comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is used, and its status byte is this.
    Status(u8),
    /// The ring stops, and err is signalled.
    Stopped,
}

/// Places of a request's parts.
#[derive(Clone, Copy)]
struct Places {
    header: u64,
    status: u64,
    data: u64,
}

/// Descriptors of a chain, to be linked one to the next.
type Build = fn(Places) -> Vec<Descriptor>;

const fn d(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

fn src(addr: u64, len: u32) -> Descriptor {
    Descriptor::source(addr, len)
}

fn dst(addr: u64, len: u32) -> Descriptor {
    Descriptor::dest(addr, len)
}

/// A driver that lies, and what its lie is called.
type Lie = (&'static str, fn(&mut FrontEnd, Places) -> Outcome);

/// An address in no region.
const NOWHERE: u64 = 0xdead_0000_0000;

/// Chains for a request of one sector; the header is that of an IN of sector 0.
const READS: &[(&str, Build, End)] = &[
    (
        "a good one",
        |p| vec![src(p.header, 16), dst(p.data, 512), dst(p.status, 1)],
        End::Status(OK),
    ),
    (
        "a header in three parts",
        |p| {
            let parts = [src(p.header, 1), src(p.header + 1, 7), src(p.header + 8, 8)];
            [parts.to_vec(), vec![dst(p.data, 512), dst(p.status, 1)]].concat()
        },
        End::Status(OK),
    ),
    (
        "empty descriptors in between",
        |p| {
            let empty = src(p.data, 0);
            vec![
                src(p.header, 16),
                empty,
                dst(p.data, 512),
                dst(p.data, 0),
                dst(p.status, 1),
            ]
        },
        End::Status(OK),
    ),
    (
        "no data, only a status",
        |p| vec![src(p.header, 16), dst(p.status, 1)],
        End::Status(OK),
    ),
    (
        "half a sector",
        |p| vec![src(p.header, 16), dst(p.data, 256), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "dest before source",
        |p| vec![dst(p.data, 512), src(p.header, 16), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "a short header",
        |p| vec![src(p.header, 15), dst(p.data, 512), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "no header",
        |p| vec![dst(p.data, 512), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "nothing to write",
        |p| vec![src(p.header, 16)],
        End::Status(UNTOUCHED),
    ),
    (
        "nothing at all",
        |p| vec![src(p.header, 0)],
        End::Status(UNTOUCHED),
    ),
    (
        "data in no region",
        |p| vec![src(p.header, 16), dst(NOWHERE, 512), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "data that wraps around",
        |p| vec![src(p.header, 16), dst(u64::MAX - 10, 512), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "a header in no region",
        |p| vec![src(NOWHERE, 16), dst(p.data, 512), dst(p.status, 1)],
        End::Status(IOERR),
    ),
    (
        "a status in no region",
        |p| vec![src(p.header, 16), dst(p.data, 512), dst(NOWHERE, 1)],
        End::Status(UNTOUCHED),
    ),
    (
        "5 GiB of data",
        |p| {
            vec![
                src(p.header, 16),
                dst(p.data, u32::MAX),
                dst(p.data, 1 << 30),
                dst(p.status, 1),
            ]
        },
        End::Status(IOERR),
    ),
    (
        "an indirect table of half a descriptor",
        |p| vec![d(p.data, 24, DESC_INDIRECT, 0)],
        End::Status(UNTOUCHED),
    ),
    (
        "an empty indirect table",
        |p| vec![d(p.data, 0, DESC_INDIRECT, 0)],
        End::Status(UNTOUCHED),
    ),
    (
        "an indirect table in no region",
        |_| vec![d(NOWHERE, 48, DESC_INDIRECT, 0)],
        End::Status(UNTOUCHED),
    ),
    (
        "an indirect table that goes on",
        |p| vec![d(p.data, 48, DESC_INDIRECT, 0), dst(p.status, 1)],
        End::Status(UNTOUCHED),
    ),
];

/// A front end with one ring, and where its first request's parts are.
fn attach(served: &Served) -> Outcome<(FrontEnd, Places)> {
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let [header, status, data] = front_end.vring(0)?.places(0);
    front_end.ram.write(header, &Kind::In.header(0))?;
    front_end.ram.write(status, &[UNTOUCHED])?;
    Ok((
        front_end,
        Places {
            header,
            status,
            data,
        },
    ))
}

/// Kicks, and waits for what the chain comes to.
fn end_of(front_end: &mut FrontEnd, places: Places, used: u16) -> Outcome<End> {
    let vring = front_end.vring(0)?;
    vring.kick.write(1)?;
    let (call, err) = (borrow(&vring.call), borrow(&vring.err));
    loop {
        if vring.ring.used_index()? == used {
            while vring.ring.take_used()?.is_some() {}
            let status = front_end.ram.read(places.status, 1)?;
            return Ok(End::Status(status.first().copied().unwrap_or(UNTOUCHED)));
        }
        let mut polled = [
            PollFd::new(&call, PollFlags::IN),
            PollFd::new(&err, PollFlags::IN),
        ];
        poll(&mut polled, None)?;
        if vring.err.read().is_ok() {
            return Ok(End::Stopped);
        }
        let _ = vring.call.read();
    }
}

fn behaves_next(served: &Served, seed: u64) -> Outcome {
    FrontEnd::start(served.connect()?, Options::default())?.verify(seed)
}

#[test]
fn every_wrong_chain_fails_alone() -> Outcome {
    let served = Served::start()?;
    for (seed, (name, build, end)) in (0..).zip(READS) {
        let (mut front_end, places) = attach(&served)?;
        front_end.vring(0)?.ring.offer_chain(0, &build(places))?;
        assert_eq!(end_of(&mut front_end, places, 1)?, *end, "{name}");
        // The ring goes on with the next request.
        front_end.verify(seed)?;
    }
    behaves_next(&served, 60)?;
    served.stop()
}

#[test]
fn chains_that_do_not_end_fail_alone() -> Outcome {
    let served = Served::start()?;
    let cases: [Lie; 3] = [
        ("a chain that leaves its ring", |front_end, p| {
            let ring = &mut front_end.vring(0)?.ring;
            ring.put(0, d(p.header, 16, DESC_NEXT, 16))?;
            ring.offer(0)
        }),
        ("a chain that comes back to itself", |front_end, p| {
            let ring = &mut front_end.vring(0)?.ring;
            ring.put(0, d(p.header, 16, DESC_NEXT, 1))?;
            ring.put(1, d(p.data, 512, DESC_NEXT | DESC_WRITE, 1))?;
            ring.offer(0)
        }),
        ("a table in a table", |front_end, p| {
            let nested = d(p.data, 48, DESC_INDIRECT, 0);
            front_end.ram.write(p.data, &nested.bytes())?;
            front_end
                .vring(0)?
                .ring
                .offer_chain(0, &[d(p.data, 16, DESC_INDIRECT, 0)])
        }),
    ];
    for (seed, (name, misbehave)) in (0..).zip(cases) {
        let (mut front_end, places) = attach(&served)?;
        misbehave(&mut front_end, places)?;
        assert_eq!(
            end_of(&mut front_end, places, 1)?,
            End::Status(UNTOUCHED),
            "{name}"
        );
        front_end.verify(seed)?;
    }
    served.stop()
}

#[test]
fn rings_that_lie_about_themselves_stop() -> Outcome {
    let served = Served::start()?;
    let cases: [Lie; 3] = [
        ("more heads than the ring has", |front_end, _| {
            front_end.vring(0)?.ring.set_avail_index(17)
        }),
        ("an avail index that went back", |front_end, _| {
            front_end.vring(0)?.ring.set_avail_index(u16::MAX)
        }),
        ("a head that is none", |front_end, _| {
            front_end.vring(0)?.ring.offer(16)
        }),
    ];
    for (seed, (name, misbehave)) in (0..).zip(cases) {
        let (mut front_end, places) = attach(&served)?;
        misbehave(&mut front_end, places)?;
        assert_eq!(end_of(&mut front_end, places, 1)?, End::Stopped, "{name}");
        // The session goes on, and the ring can be started again.
        front_end.peer.still_served()?;
        front_end.peer.vring_base(0)?;
        front_end.vring(0)?.ring.set_avail_index(0)?;
        front_end.start_vring(0, 0)?;
        front_end.verify(seed)?;
    }
    behaves_next(&served, 61)?;
    served.stop()
}

#[test]
fn the_same_head_twice_is_two_requests() -> Outcome {
    let served = Served::start()?;
    let (mut front_end, places) = attach(&served)?;
    let vring = front_end.vring(0)?;
    let chain = [
        src(places.header, 16),
        dst(places.data, 512),
        dst(places.status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    vring.ring.offer(0)?;
    assert_eq!(end_of(&mut front_end, places, 2)?, End::Status(OK));
    served.stop()
}

#[test]
fn requests_that_cannot_be_carried_out_get_their_status() -> Outcome {
    let served = Served::start()?;
    let sectors = 4_u64 << 20 >> 9;
    let cases = [
        (Kind::In as u32, sectors, IOERR),
        (Kind::Out as u32, sectors, IOERR),
        (Kind::In as u32, u64::MAX, IOERR),
        (Kind::In as u32, 1 << 55, IOERR),
        (Kind::In as u32, sectors - 1, OK),
        (2, 0, UNSUPP),
        (0xffff_ffff, 0, UNSUPP),
    ];
    for (kind, sector, status) in cases {
        let (mut front_end, places) = attach(&served)?;
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        front_end.ram.write(places.header, &header)?;
        let data = if kind == Kind::Out as u32 { src } else { dst };
        let chain = [
            src(places.header, 16),
            data(places.data, 512),
            dst(places.status, 1),
        ];
        front_end.vring(0)?.ring.offer_chain(0, &chain)?;
        assert_eq!(
            end_of(&mut front_end, places, 1)?,
            End::Status(status),
            "{kind} {sector}"
        );
        front_end.verify(70)?;
    }
    served.stop()
}

/// An IN of `bytes` bytes whose data lies in `segments` descriptors of one indirect table, all
/// over the same memory.
fn many_segments(front_end: &mut FrontEnd, segments: u64, bytes: u32) -> Outcome<End> {
    let [header, status, data] = front_end.vring(0)?.places(0);
    let [table, _, _] = front_end.vring(0)?.places(2);
    front_end.ram.write(header, &Kind::In.header(0))?;
    front_end.ram.write(status, &[UNTOUCHED])?;
    let count = segments + 2;
    for place in 0..count {
        let next = u16::try_from(place + 1)?;
        let entry = match place {
            0 => d(header, 16, DESC_NEXT, next),
            _ if place + 1 == count => d(status, 1, DESC_WRITE, 0),
            _ => d(data, bytes, DESC_NEXT | DESC_WRITE, next),
        };
        front_end.ram.write(table + place * 16, &entry.bytes())?;
    }
    let len = u32::try_from(count * 16)?;
    let used = front_end.vring(0)?.ring.used_index()?.wrapping_add(1);
    let chain = [d(table, len, DESC_INDIRECT, 0)];
    front_end.vring(0)?.ring.offer_chain(0, &chain)?;
    let places = Places {
        header,
        status,
        data,
    };
    end_of(front_end, places, used)
}

#[test]
fn segments_and_bytes_are_taken_at_the_limit_and_refused_one_beyond() -> Outcome {
    let storage = open::memory(64 << 20, 512)?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(storage),
        ..ServeOptions::default()
    })?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    assert_eq!(
        many_segments(&mut front_end, 1024, 512)?,
        End::Status(OK),
        "1026 segments"
    );
    assert_eq!(
        many_segments(&mut front_end, 1025, 512)?,
        End::Status(IOERR),
        "1027 segments"
    );
    // 1024 times 16 KiB are the 16 MiB a request may move.
    assert_eq!(
        many_segments(&mut front_end, 1024, 16 << 10)?,
        End::Status(OK),
        "16 MiB"
    );
    let beyond = many_segments(&mut front_end, 1024, (16 << 10) + 512)?;
    assert_eq!(beyond, End::Status(IOERR), "more than 16 MiB");
    front_end.verify(71)?;
    served.stop()
}

#[test]
fn rings_in_impossible_places_are_refused() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let good = front_end.vring(0)?.addr_payload(0);
    let end = front_end.ram.front_end(front_end.ram.layout().size);
    front_end
        .peer
        .confirm(code::SET_VRING_NUM, &words(&[0, 16]), &[])?;
    for part in 0..3_usize {
        // Outside, across the end, misaligned, at the end of the address space.
        for address in [
            0,
            end,
            end - 16,
            front_end.ram.front_end(4097),
            u64::MAX - 15,
        ] {
            let mut bad = good.clone();
            bad[8 + part * 8..16 + part * 8].copy_from_slice(&address.to_ne_bytes());
            let refused = front_end.peer.refused(code::SET_VRING_ADDR, &bad, &[])?;
            assert!(refused, "part {part} at {address:#x}");
        }
    }
    front_end.start_vring(0, 0)?;
    front_end.verify(72)?;
    served.stop()
}

#[test]
fn random_descriptor_tables_are_survived() -> Outcome {
    let served = Served::start()?;
    let mut random = fastrand::Rng::with_seed(0xc4a1);
    for _ in 0..200 {
        let (mut front_end, places) = attach(&served)?;
        for index in 0..16 {
            let addr = match random.u8(..4) {
                0 => random.u64(..),
                1 => places.header,
                2 => places.status,
                _ => places.data + random.u64(..4096),
            };
            let descriptor = d(addr, random.u32(..2048), random.u16(..8), random.u16(..20));
            front_end.vring(0)?.ring.put(index, descriptor)?;
        }
        let vring = front_end.vring(0)?;
        for _ in 0..random.usize(1..16) {
            vring.ring.offer(random.u16(..17))?;
        }
        vring.kick.write(1)?;
        // Whatever came of it, the ring stops when it is told to.
        front_end.peer.vring_base(0)?;
    }
    behaves_next(&served, 62)?;
    served.stop()
}
