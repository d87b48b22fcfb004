//! Guest memory that comes and goes under a session.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Duration;

use blockdev::fault::FaultPlan;
use blockdev::open;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vublk_tests::frontend::{
    Descriptor, FrontEnd, GuestRam, Kind, Layout, Options, Outcome, ServeOptions, Served, code,
    region_payload, words,
};

/// Where regions that are added lie.
const HIGH: u64 = 1 << 40;

/// The payload of ADD_MEM_REG and REM_MEM_REG.
fn single(region: [u64; 4]) -> Vec<u8> {
    [vec![0; 8], region_payload(region)].concat()
}

/// A whole OUT of one sector whose data is at `data`; its status.
fn write_from(front_end: &mut FrontEnd, sector: u64, data: u64) -> Outcome<u8> {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    ram.write(header, &Kind::Out.header(sector))?;
    ram.write(status, &[0xff])?;
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::source(data, 512),
        Descriptor::dest(status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    vring.kick.write(1)?;
    front_end.wait(0, 0)
}

#[test]
fn a_region_is_usable_from_its_answer_until_its_removal() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let more = GuestRam::at(Layout {
        guest: HIGH,
        size: 8192,
        offset: 4096,
    })?;
    more.write(HIGH + 512, &[0x42; 512])?;
    for _ in 0..3 {
        assert_ne!(
            write_from(&mut front_end, 9, HIGH + 512)?,
            0,
            "not mapped is an I/O error"
        );
        let region = single(more.numbers());
        front_end
            .peer
            .confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
        assert_eq!(write_from(&mut front_end, 9, HIGH + 512)?, 0);
        assert_eq!(front_end.read(0, 9, 512)?, [0x42; 512]);
        assert!(
            front_end
                .peer
                .refused(code::ADD_MEM_REG, &region, &[more.fd()])?
        );
        // A descriptor may come with a removal, and its offset means nothing.
        let [guest, size, front, _] = more.numbers();
        let removal = single([guest, size, front, 77]);
        front_end
            .peer
            .confirm(code::REM_MEM_REG, &removal, &[more.fd()])?;
        assert!(front_end.peer.refused(code::REM_MEM_REG, &removal, &[])?);
    }
    front_end.verify(20)?;
    served.stop()
}

#[test]
fn a_removal_waits_for_the_request_that_uses_earlier_memory() -> Outcome {
    let (storage, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    let options = ServeOptions {
        storage: Some(storage),
        ..ServeOptions::default()
    };
    let served = Served::start_with(&options)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let more = GuestRam::at(Layout {
        guest: HIGH,
        size: 4096,
        offset: 0,
    })?;
    let region = single(more.numbers());
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
    handle.stick();
    let head = front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?;
    while handle.stuck_now() == 0 {
        std::thread::yield_now();
    }
    // An addition does not wait for it.
    let other = GuestRam::at(Layout {
        guest: HIGH * 2,
        size: 4096,
        offset: 0,
    })?;
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &single(other.numbers()), &[other.fd()])?;
    front_end.peer.send(code::REM_MEM_REG, 0x9, &region, &[])?;
    let stream = front_end.peer.stream().try_clone()?;
    let mut polled = [PollFd::new(&stream, PollFlags::IN)];
    let a_while = Timespec::try_from(Duration::from_millis(100))?;
    assert_eq!(
        poll(&mut polled, Some(&a_while))?,
        0,
        "it is answered too early"
    );
    handle.release();
    assert_eq!(front_end.peer.reply_to(code::REM_MEM_REG)?.payload, [0; 8]);
    assert_eq!(front_end.wait(0, head)?, 0);
    front_end.verify(21)?;
    served.stop()
}

#[test]
fn a_front_end_that_leaves_while_it_waits_is_noticed() -> Outcome {
    let (storage, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    let options = ServeOptions {
        storage: Some(storage),
        ..ServeOptions::default()
    };
    let served = Served::start_with(&options)?;
    for message in [
        code::GET_VRING_BASE,
        code::RESET_DEVICE,
        code::SET_MEM_TABLE,
    ] {
        let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
        handle.stick();
        front_end.submit(0, 0, (Kind::In, 0), &[1; 512])?;
        while handle.stuck_now() == 0 {
            std::thread::yield_now();
        }
        let payload = if message == code::RESET_DEVICE {
            vec![]
        } else {
            words(&[0, 0])
        };
        front_end.peer.tell(message, &payload, &[])?;
        let used = front_end.vring(0)?.ring.used_addr();
        let FrontEnd { peer, ram, .. } = front_end;
        // Half a hang-up is one: it leaves this end to see that the daemon has noticed.
        peer.stream().shutdown(Shutdown::Write)?;
        assert!(peer.closed()?);
        // The next one is not served before the request of the last one came back.
        let next = served.connect()?;
        next.tell(code::GET_FEATURES, &[], &[])?;
        let mut polled = [PollFd::new(next.stream(), PollFlags::IN)];
        let a_while = Timespec::try_from(Duration::from_millis(100))?;
        assert_eq!(
            poll(&mut polled, Some(&a_while))?,
            0,
            "it is served too early"
        );
        handle.release();
        next.reply_to(code::GET_FEATURES)?;
        // Nobody is told of what was abandoned: the memory may be used for something else by now.
        assert_eq!(ram.load(used + 2)?, 0);
        FrontEnd::start(next, Options::default())?.verify(22)?;
    }
    served.stop()
}

#[test]
fn a_table_is_replaced_under_a_running_ring() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let more = GuestRam::at(Layout {
        guest: HIGH,
        size: 4096,
        offset: 0,
    })?;
    more.write(HIGH, &[0x17; 512])?;
    for _ in 0..5 {
        front_end.verify(23)?;
        let mut payload = words(&[2, 0]);
        payload.extend(region_payload(more.numbers()));
        payload.extend(region_payload(front_end.ram.numbers()));
        let fds = [more.fd(), front_end.ram.fd()];
        front_end
            .peer
            .confirm(code::SET_MEM_TABLE, &payload, &fds)?;
        assert_eq!(write_from(&mut front_end, 1, HIGH)?, 0);
        front_end.share_memory()?;
        assert_ne!(write_from(&mut front_end, 1, HIGH)?, 0);
    }
    served.stop()
}

#[test]
fn a_ring_whose_memory_is_taken_away_stops_alone() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    front_end.verify(24)?;
    front_end
        .peer
        .confirm(code::SET_MEM_TABLE, &words(&[0, 0]), &[])?;
    vublk_tests::frontend::wait_readable(&front_end.vring(0)?.err)?;
    let base = front_end.peer.vring_base(0)?;
    front_end.share_memory()?;
    front_end.start_vring(0, u16::try_from(base)?)?;
    front_end.verify(25)?;
    served.stop()
}

#[test]
fn regions_end_at_the_limit() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let pages = 509;
    let many = GuestRam::at(Layout {
        guest: HIGH,
        size: pages * 4096,
        offset: 0,
    })?;
    let page = |n: u64| {
        let [guest, _, front, _] = many.numbers();
        single([guest + n * 4096, 4096, front + n * 4096, n * 4096])
    };
    // One region is the rings' own.
    for n in 0..pages - 1 {
        front_end
            .peer
            .confirm(code::ADD_MEM_REG, &page(n), &[many.fd()])?;
    }
    assert!(
        front_end
            .peer
            .refused(code::ADD_MEM_REG, &page(pages - 1), &[many.fd()])?
    );
    let last = HIGH + (pages - 2) * 4096;
    many.write(last, &[0x61; 512])?;
    assert_eq!(write_from(&mut front_end, 2, last)?, 0);
    // A buffer that crosses from one region into the next is one buffer.
    assert_eq!(write_from(&mut front_end, 2, HIGH + 4096 - 256)?, 0);
    front_end.peer.confirm(code::REM_MEM_REG, &page(0), &[])?;
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &page(pages - 1), &[many.fd()])?;
    front_end.verify(26)?;
    served.stop()
}

#[test]
fn memory_that_cannot_be_is_refused() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let more = GuestRam::at(Layout {
        guest: HIGH,
        size: 8192,
        offset: 0,
    })?;
    let null = std::fs::File::open("/dev/null")?;
    let (pipe, _writer) = std::io::pipe()?;
    let good = more.numbers();
    let [guest, size, front, _] = good;
    let cases = [
        [guest, 0, front, 0],
        [guest, size, front, 4096],
        [guest, size + 1, front, 0],
        [u64::MAX - 4096, size, front, 0],
        [guest, size, u64::MAX - 4096, 0],
        [guest, size, front, u64::MAX - 4096],
        [0, size, front, 0],
        [guest, size, front_end.ram.front_end(0), 0],
    ];
    for region in cases {
        let refused = front_end
            .peer
            .refused(code::ADD_MEM_REG, &single(region), &[more.fd()])?;
        assert!(refused, "{region:x?}");
    }
    for fd in [null.as_fd(), pipe.as_fd()] {
        assert!(
            front_end
                .peer
                .refused(code::ADD_MEM_REG, &single(good), &[fd])?
        );
    }
    let two = [more.fd(), more.fd()];
    assert!(
        front_end
            .peer
            .refused(code::ADD_MEM_REG, &single(good), &two)?
    );
    assert!(
        front_end
            .peer
            .refused(code::ADD_MEM_REG, &single(good), &[])?
    );
    front_end
        .peer
        .confirm(code::ADD_MEM_REG, &single(good), &[more.fd()])?;
    front_end.verify(27)?;
    served.stop()
}

#[test]
fn memory_that_is_truncated_costs_only_its_own_session() -> Outcome {
    let served = Served::start()?;
    let other = Served::start()?;
    let mut bystander = FrontEnd::start(other.connect()?, Options::default())?;
    for bytes in [0, 4096] {
        let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
        front_end.verify(28)?;
        // The driver's own mapping would fault too, so it only kicks from now on.
        front_end.submit(0, 0, (Kind::Out, 0), &[1; 512])?;
        front_end.ram.truncate(bytes)?;
        front_end.vring(0)?.kick.write(1)?;
        assert!(front_end.peer.closed()?);
        FrontEnd::start(served.connect()?, Options::default())?.verify(29)?;
    }
    bystander.verify(30)?;
    other.stop()?;
    served.stop()
}
