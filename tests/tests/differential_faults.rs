//! Where the stock daemon of the rust-vmm crates and ours differ, with the same device in both.
//! Each test states what the stock daemon does and what ours does; the numbers are those of the
//! project's list of the crates' faults at these versions.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::blk::{BlkDevice, BlkOptions};
use vublk::fds::borrow;
use vublk::hosted::{HostError, HostOptions, Hosted};
use vublk::worker::DeviceId;
use vublk_tests::frontend::{
    Descriptor, DirtyLog, FrontEnd, GuestRam, Kind, Layout, NO_FD, Options, Outcome, PAGE,
    PeerError, ServeOptions, Served, Stock, code, region_payload, wait_readable, words,
};

/// Guest address of a region that is added later.
const HIGH: u64 = 64 << 20;
/// The end of the guest memory that the log has bits for.
const LOGGED: u64 = 128 << 20;

/// Does the same with both daemons: what came out with the stock daemon, and with ours.
fn both<T>(act: impl Fn(&mut FrontEnd) -> Outcome<T>) -> Outcome<[T; 2]> {
    each(|front_end, _| act(front_end))
}

/// Which daemon it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Stock,
    Ours,
}

/// As [`both`], for what has to know which of them it is done with.
fn each<T>(act: impl Fn(&mut FrontEnd, Side) -> Outcome<T>) -> Outcome<[T; 2]> {
    let options = ServeOptions {
        workers: 1,
        ..ServeOptions::default()
    };
    let stock = Stock::start(&options)?;
    let mut front_end = FrontEnd::start(stock.connect()?, Options::default())?;
    let with_stock = act(&mut front_end, Side::Stock)?;
    drop(front_end);
    // It may have ended with the message that it did not like.
    let _ = stock.left();

    let served = Served::start_with(&options)?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    let with_ours = act(&mut front_end, Side::Ours)?;
    drop(front_end);
    served.stop()?;
    Ok([with_stock, with_ours])
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It was acknowledged, or answered.
    Taken,
    /// It was refused, and the connection goes on.
    Refused,
    /// The connection was closed, whatever was said before.
    Closed,
}

fn fate(front_end: &FrontEnd, sent: Result<(), PeerError>) -> Outcome<Fate> {
    let fate = match sent {
        Ok(()) => Fate::Taken,
        Err(PeerError::Refused(_)) => Fate::Refused,
        Err(PeerError::Gone) => return Ok(Fate::Closed),
        Err(error) => return Err(error.into()),
    };
    match front_end.peer.still_served() {
        Ok(()) => Ok(fate),
        Err(PeerError::Gone) => Ok(Fate::Closed),
        Err(error) => Err(error.into()),
    }
}

/// Has everything logged, used rings too, in a log of this much memory.
fn start_logging(front_end: &mut FrontEnd) -> Outcome<DirtyLog> {
    let log = DirtyLog::new(LOGGED, 0)?;
    front_end.start_logging(&log, 0)?;
    log.take()?;
    Ok(log)
}

/// Reads a sector to a guest address outside of the front end's own memory.
fn read_to(front_end: &mut FrontEnd, address: u64) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    ram.write(header, &Kind::In.header(0))?;
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::dest(address, 512),
        Descriptor::dest(status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    vring.kick.write(1)?;
    match front_end.wait(0, 0)? {
        0 => Ok(()),
        status => Err(format!("status {status}").into()),
    }
}

/// Reads a sector into the first vring's data, and says which of these were marked: the page of
/// the data, the page of the status, and the page of the used ring.
fn marked_by_read(front_end: &mut FrontEnd, log: &DirtyLog) -> Outcome<[bool; 3]> {
    log.take()?;
    front_end.read(0, 0, 512)?;
    settle(front_end)?;
    let vring = front_end.vring(0)?;
    let [_, status, data] = vring.places(0);
    let used = vring.ring.used_addr();
    let pages = log.take()?;
    Ok([data, status, used].map(|address| pages.contains(&(address / PAGE))))
}

/// Waits for one more request. What the daemon does after a used index, marks, calls and the
/// suppression of kicks, it did for the requests before that when its thread comes to the next.
fn settle(front_end: &mut FrontEnd) -> Outcome {
    front_end.submit(0, 1, (Kind::Flush, 0), &[])?;
    if is_used(front_end, PATIENCE)? {
        Ok(())
    } else {
        Err("a flush was not used for a long time".into())
    }
}

/// Whether all that was made available is used before long.
fn is_used(front_end: &mut FrontEnd, within: Duration) -> Outcome<bool> {
    let before = Instant::now();
    let ring = &front_end.vring(0)?.ring;
    while ring.used_index()? != ring.next_avail() {
        if before.elapsed() > within {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// Waits until the stock daemon took the first vring's kick, and did what it brought. Ours leaves
/// the counter as it is.
fn rest(front_end: &mut FrontEnd) -> Outcome {
    let kick = &front_end.vring(0)?.kick;
    kick.write(1)?;
    let fd = borrow(kick);
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let before = Instant::now();
    while poll(&mut polled, Some(&Timespec::default()))? > 0 {
        assert!(before.elapsed() < PATIENCE, "a kick is not taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    // The thread answers the second of these after it served the vring.
    front_end.stop_logging(0)?;
    front_end.stop_logging(0)
}

impl Side {
    /// How long to wait for what the stock daemon does not do and ours does.
    fn patience(self) -> Duration {
        match self {
            Side::Stock => A_WHILE,
            Side::Ours => PATIENCE,
        }
    }
}

/// How long to wait for what has to come.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait for what must not come.
const A_WHILE: Duration = Duration::from_millis(300);

#[test]
fn what_both_log_is_the_same() -> Outcome {
    let marked = both(|front_end| {
        let log = start_logging(front_end)?;
        marked_by_read(front_end, &log)
    })?;
    assert_eq!(marked, [[true; 3]; 2]);
    Ok(())
}

#[test]
fn fault_1_a_region_that_is_added_is_not_logged() -> Outcome {
    let [stock, ours] = both(|front_end| {
        let log = start_logging(front_end)?;
        let more = GuestRam::at(Layout {
            guest: HIGH,
            size: 1 << 20,
            offset: 0,
        })?;
        let region = [vec![0; 8], region_payload(more.numbers())].concat();
        let peer = &front_end.peer;
        peer.confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
        read_to(front_end, HIGH + 2 * PAGE)?;
        settle(front_end)?;
        Ok(log.take()?.contains(&(HIGH / PAGE + 2)))
    })?;
    assert_eq!((stock, ours), (false, true));
    Ok(())
}

#[test]
fn fault_2_a_new_table_ends_all_logging() -> Outcome {
    let [stock, ours] = both(|front_end| {
        let log = start_logging(front_end)?;
        front_end.share_memory()?;
        marked_by_read(front_end, &log)
    })?;
    assert_eq!((stock, ours), ([false; 3], [true; 3]));
    Ok(())
}

#[test]
fn fault_3_logging_goes_on_when_it_is_switched_off() -> Outcome {
    let [stock, ours] = both(|front_end| {
        let log = start_logging(front_end)?;
        front_end.stop_logging(0)?;
        marked_by_read(front_end, &log)
    })?;
    // What the device itself marks ends: it knows the features. The ring is the host's.
    assert_eq!((stock, ours), ([false, false, true], [false; 3]));
    Ok(())
}

#[test]
fn fault_4_the_used_ring_is_logged_unasked_and_where_it_is() -> Outcome {
    let not_asked = both(|front_end| {
        let log = start_logging(front_end)?;
        front_end.log_used_rings(false)?;
        marked_by_read(front_end, &log)
    })?;
    assert_eq!(not_asked, [[true, true, true], [true, true, false]]);

    let elsewhere = both(|front_end| {
        let log = start_logging(front_end)?;
        let vring = front_end.vring(0)?;
        let mut payload = vring.addr_payload(0);
        // log_guest_addr is the last field; it need not be in memory.
        payload.truncate(payload.len() - 8);
        payload.extend(HIGH.to_ne_bytes());
        front_end
            .peer
            .confirm(code::SET_VRING_ADDR, &payload, &[])?;
        log.take()?;
        front_end.read(0, 0, 512)?;
        settle(front_end)?;
        let pages = log.take()?;
        let used = front_end.vring(0)?.ring.used_addr() / PAGE;
        Ok([used, HIGH / PAGE].map(|page| pages.contains(&page)))
    })?;
    assert_eq!(elsewhere, [[true, false], [false, true]]);
    Ok(())
}

#[test]
fn fault_5_in_flight_tracking_ends_the_connection() -> Outcome {
    let fates = both(|front_end| {
        let mut payload = vec![0; 16];
        payload.extend(1_u16.to_ne_bytes());
        payload.extend(16_u16.to_ne_bytes());
        payload.resize(24, 0);
        let asked = front_end
            .peer
            .ask_file(code::GET_INFLIGHT_FD, &payload, &[])
            .map(drop);
        fate(front_end, asked)
    })?;
    assert_eq!(fates, [Fate::Closed, Fate::Taken]);
    Ok(())
}

#[test]
fn fault_6_it_can_be_owned_once() -> Outcome {
    let fates = both(|front_end| {
        let owned = front_end.peer.confirm(code::SET_OWNER, &[], &[]);
        fate(front_end, owned)
    })?;
    assert_eq!(fates, [Fate::Closed, Fate::Taken]);
    Ok(())
}

#[test]
fn fault_7_a_kick_that_is_replaced_is_never_heard() -> Outcome {
    let heard = each(|front_end, side| {
        let kick = EventFd::new(EFD_NONBLOCK)?;
        if side == Side::Stock {
            rest(front_end)?;
        }
        front_end
            .peer
            .confirm(code::SET_VRING_KICK, &[0; 8], &[borrow(&kick)])?;
        front_end.vring(0)?.kick = kick;
        front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
        is_used(front_end, side.patience())
    })?;
    assert_eq!(heard, [false, true]);
    Ok(())
}

#[test]
fn fault_8_a_ring_without_a_kick_never_starts() -> Outcome {
    let served = each(|front_end, side| {
        let base = front_end.peer.vring_base(0)?;
        let peer = &front_end.peer;
        peer.confirm(code::SET_VRING_BASE, &words(&[0, base]), &[])?;
        peer.confirm(code::SET_VRING_KICK, &NO_FD.to_ne_bytes(), &[])?;
        peer.confirm(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])?;
        front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
        is_used(front_end, side.patience())
    })?;
    assert_eq!(served, [false, true]);
    Ok(())
}

#[test]
fn fault_9_a_size_that_no_ring_has_is_taken_and_forgotten() -> Outcome {
    let fates = both(|front_end| {
        front_end.peer.vring_base(0)?;
        let size = words(&[0, 24]);
        let sent = front_end.peer.confirm(code::SET_VRING_NUM, &size, &[]);
        fate(front_end, sent)
    })?;
    assert_eq!(fates, [Fate::Taken, Fate::Refused]);
    Ok(())
}

#[test]
fn fault_11_messages_it_does_not_know_end_the_connection() -> Outcome {
    let event = EventFd::new(EFD_NONBLOCK)?;
    let fates = both(|front_end| {
        let sent = front_end
            .peer
            .confirm(code::SET_LOG_FD, &[], &[borrow(&event)]);
        fate(front_end, sent)
    })?;
    assert_eq!(fates, [Fate::Closed, Fate::Taken]);
    Ok(())
}

#[test]
fn fault_13_protocol_features_that_nobody_offered_are_taken() -> Outcome {
    let fates = both(|front_end| {
        let offered = front_end.peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
        let payload = (offered | 1 << 40).to_ne_bytes();
        let peer = &front_end.peer;
        let sent = peer.confirm(code::SET_PROTOCOL_FEATURES, &payload, &[]);
        fate(front_end, sent)
    })?;
    assert_eq!(fates, [Fate::Taken, Fate::Refused]);
    Ok(())
}

#[test]
fn fault_17_more_queues_than_a_mask_has_bits_cannot_be_hosted() -> Outcome {
    for (queues, hosted) in [(64, true), (65, false)] {
        let options = BlkOptions {
            serial: String::new(),
            num_queues: queues,
        };
        let storage = blockdev::open::memory(1 << 20, 512)?;
        let device = BlkDevice::new(DeviceId(0), storage, &options)?;
        match Hosted::new(device.into(), HostOptions::default()) {
            Ok(_) => assert!(hosted),
            Err(HostError::Queues(65)) => assert!(!hosted),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[test]
fn fault_20_a_region_that_starts_inside_a_page_cannot_be_mapped() -> Outcome {
    let fates = both(|front_end| {
        let file = File::from(memfd_create("unaligned", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, 8192)?;
        let region = region_payload([HIGH, 4096, HIGH, 512]);
        let payload = [vec![0; 8], region].concat();
        let sent = front_end
            .peer
            .confirm(code::ADD_MEM_REG, &payload, &[file.as_fd()]);
        fate(front_end, sent)
    })?;
    assert_eq!(fates, [Fate::Closed, Fate::Taken]);
    Ok(())
}

#[test]
fn fault_21_reset_owner_takes_the_features_away() -> Outcome {
    let fates = both(|front_end| {
        front_end.peer.confirm(code::RESET_OWNER, &[], &[])?;
        let payload = words(&[0, 1]);
        let sent = front_end.peer.tell(code::SET_VRING_ENABLE, &payload, &[]);
        fate(front_end, sent)
    })?;
    assert_eq!(fates, [Fate::Closed, Fate::Taken]);
    Ok(())
}

#[test]
fn a_driver_that_wants_no_calls_is_called_all_the_same() -> Outcome {
    let called = each(|front_end, side| {
        front_end.vring(0)?.ring.set_avail_flags(1)?;
        // Ours is called once for having been set.
        settle(front_end)?;
        let _ = front_end.vring(0)?.call.read();
        front_end.submit(0, 0, (Kind::In, 0), &[0; 512])?;
        settle(front_end)?;
        let call = &front_end.vring(0)?.call;
        Ok(match side {
            // It may have used both before it calls.
            Side::Stock => wait_readable(call).is_ok(),
            Side::Ours => call.read().is_ok(),
        })
    })?;
    assert_eq!(called, [true, false]);
    Ok(())
}
