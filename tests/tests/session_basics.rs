//! What a front end and the daemon agree on, and who may come when.

use std::os::fd::AsFd;

use blockdev::Engine;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vublk_tests::frontend::{
    FrontEnd, Kind, NEED_REPLY, Options, Outcome, ServeOptions, Served, VERSION, code,
    wait_readable, words,
};

#[test]
fn a_front_end_reads_what_it_wrote() -> Outcome {
    let served = Served::start()?;
    let options = Options {
        vrings: 3,
        ..Options::default()
    };
    FrontEnd::start(served.connect()?, options)?.verify(1)?;
    served.stop()
}

#[test]
fn a_front_end_is_served_without_io_uring() -> Outcome {
    let options = ServeOptions {
        engine: Engine::Threads,
        workers: 3,
        ..ServeOptions::default()
    };
    let served = Served::start_with(&options)?;
    let vrings = Options {
        vrings: 4,
        ..Options::default()
    };
    for seed in 2..5 {
        let mut front_end = FrontEnd::start(served.connect()?, vrings)?;
        front_end.verify(seed)?;
        front_end.peer.vring_base(0)?;
    }
    served.stop()
}

#[test]
fn the_numbers_are_those_of_the_limits() -> Outcome {
    let served = Served::start()?;
    let peer = served.connect()?;
    let offered = peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
    // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE,
    // CONFIGURE_MEM_SLOTS, DEVICE_STATE.
    let bits = [0, 1, 3, 5, 9, 12, 13, 15, 19];
    assert_eq!(offered, bits.iter().map(|bit| 1 << bit).sum::<u64>());
    peer.tell(code::SET_PROTOCOL_FEATURES, &offered.to_ne_bytes(), &[])?;
    assert_eq!(peer.ask_number(code::GET_QUEUE_NUM)?, 256);
    assert_eq!(peer.ask_number(code::GET_MAX_MEM_SLOTS)?, 509);
    served.stop()
}

#[test]
fn an_answer_is_owed_only_once_reply_ack_is_negotiated() -> Outcome {
    let served = Served::start()?;
    let peer = served.connect()?;
    // Without REPLY_ACK the flag means nothing: the next reply is that of GET_FEATURES.
    peer.send(code::SET_OWNER, VERSION | NEED_REPLY, &[], &[])?;
    peer.send(code::SET_OWNER, VERSION | NEED_REPLY, &[], &[])?;
    peer.still_served()?;
    // The message that negotiates it is the first that is acknowledged, as the vhost crate's
    // front end expects; GET_PROTOCOL_FEATURES need not have been asked.
    peer.confirm(
        code::SET_PROTOCOL_FEATURES,
        &(1_u64 << 3).to_ne_bytes(),
        &[],
    )?;
    peer.confirm(code::SET_OWNER, &[], &[])?;
    assert!(peer.refused(code::SET_FEATURES, &u64::MAX.to_ne_bytes(), &[])?);
    assert!(peer.refused(code::SET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes(), &[])?);
    peer.tell(code::SET_FEATURES, &u64::MAX.to_ne_bytes(), &[])?;
    peer.still_served()?;
    served.stop()
}

#[test]
fn config_is_read_as_real_front_ends_read_it() -> Outcome {
    let served = Served::start()?;
    let front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let peer = &front_end.peer;
    let whole = peer.config(0, 60)?;
    let (capacity, _) = whole.split_at(8);
    assert_eq!(
        capacity,
        (4_u64 << 20 >> 9).to_le_bytes(),
        "capacity in sectors"
    );
    assert_eq!(
        whole.get(34..36),
        Some(&4_u16.to_le_bytes()[..]),
        "num_queues is the option"
    );
    assert_eq!(
        peer.config(0x100, 60)?,
        whole,
        "the offset old Cloud Hypervisors count from"
    );
    assert_eq!(peer.config(8, 4)?.as_slice(), &whole[8..12]);
    assert_eq!(peer.config(0, 256)?.get(..60), Some(whole.as_slice()));
    for (offset, size) in [(0, 0), (0, 257), (u32::MAX, 2)] {
        let refused = peer.ask(code::GET_CONFIG, &words(&[offset, size, 0]))?;
        assert!(refused.is_empty(), "no payload says no: {offset} {size}");
    }
    peer.still_served()?;
    served.stop()
}

#[test]
fn only_the_writeback_byte_is_written_and_a_reset_takes_it_back() -> Outcome {
    let served = Served::start()?;
    let front_end = FrontEnd::attach(served.connect()?, Options::default())?;
    let peer = &front_end.peer;
    let set = |offset: u32, bytes: &[u8]| {
        let size = u32::try_from(bytes.len())?;
        let payload = [words(&[offset, size, 0]), bytes.to_vec()].concat();
        Outcome::Ok(peer.refused(code::SET_CONFIG, &payload, &[])?)
    };
    assert!(!set(32, &[0])?);
    assert_eq!(peer.config(32, 1)?, [0]);
    assert!(set(32, &[2])?, "writeback is 0 or 1");
    assert!(set(0, &[0; 8])?, "the capacity is not the driver's");
    assert!(set(32, &[1, 1])?, "num_queues follows it");
    assert_eq!(peer.config(32, 1)?, [0]);
    peer.confirm(code::RESET_DEVICE, &[], &[])?;
    assert_eq!(peer.config(32, 1)?, [1]);
    served.stop()
}

#[test]
fn what_is_not_negotiated_is_refused() -> Outcome {
    let served = Served::start()?;
    let reply_ack = (1_u64 << 3).to_ne_bytes();
    let peer = served.connect()?;
    peer.confirm(code::SET_PROTOCOL_FEATURES, &reply_ack, &[])?;
    let region = vec![0; 40];
    for (code, payload) in [
        (code::ADD_MEM_REG, region.as_slice()),
        (code::REM_MEM_REG, &region),
        (code::SET_CONFIG, &words(&[32, 0, 0])),
        (code::RESET_DEVICE, &[]),
    ] {
        assert!(peer.refused(code, payload, &[])?, "{code}");
    }
    let (socket, _) = std::os::unix::net::UnixStream::pair()?;
    assert!(peer.refused(code::SET_BACKEND_REQ_FD, &[], &[socket.as_fd()])?);
    let refused = peer.ask(code::GET_CONFIG, &words(&[0, 8, 0]))?;
    assert!(refused.is_empty());
    drop(peer);
    // A reply that is a number cannot say no; only the end of the connection can.
    for code in [
        code::GET_QUEUE_NUM,
        code::GET_MAX_MEM_SLOTS,
        code::GET_INFLIGHT_FD,
    ] {
        let peer = served.connect()?;
        peer.confirm(code::SET_PROTOCOL_FEATURES, &reply_ack, &[])?;
        peer.tell(code, &[], &[])?;
        assert!(peer.closed()?, "{code}");
    }
    FrontEnd::start(served.connect()?, Options::default())?.verify(2)?;
    served.stop()
}

#[test]
fn the_front_end_of_another_project_is_served() -> Outcome {
    let served = Served::start()?;
    // Memory and rings are ours, the protocol is the vhost crate's.
    let mut ours = FrontEnd::attach(served.connect()?, Options::default())?;
    let ram = ours.ram.clone();
    drop(std::mem::replace(&mut ours.peer, served.connect()?));
    let stream = ours.peer.stream().try_clone()?;
    let mut front_end = Frontend::from_stream(stream, 1);
    front_end.set_owner()?;
    let offered = front_end.get_features()?;
    assert_ne!(
        offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
        0
    );
    let protocol = front_end.get_protocol_features()?;
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front_end.set_protocol_features(protocol)?;
    assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    assert_eq!(front_end.get_queue_num()?, 256);
    assert_eq!(front_end.get_max_mem_slots()?, 509);
    let (_, config) = front_end.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60])?;
    assert_eq!(config.len(), 60);
    front_end.set_features(offered & (1 << 32 | 1 << 30))?;
    let [guest_phys_addr, memory_size, userspace_addr, mmap_offset] = ram.numbers();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr,
        memory_size,
        userspace_addr,
        mmap_offset,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&ram.fd()),
    };
    front_end.set_mem_table(&[region])?;
    let vring = ours.vring(0)?;
    let [desc_table_addr, used_ring_addr, avail_ring_addr] = vring.ring.addresses();
    front_end.set_vring_num(0, vring.ring.size())?;
    let addresses = VringConfigData {
        queue_max_size: vring.ring.size(),
        queue_size: vring.ring.size(),
        flags: 0,
        desc_table_addr,
        used_ring_addr,
        avail_ring_addr,
        log_addr: None,
    };
    front_end.set_vring_addr(0, &addresses)?;
    front_end.set_vring_base(0, 0)?;
    front_end.set_vring_call(0, &vring.call)?;
    front_end.set_vring_kick(0, &vring.kick)?;
    front_end.set_vring_enable(0, true)?;
    ours.verify(3)?;
    front_end.set_vring_enable(0, false)?;
    assert_eq!(
        front_end.get_vring_base(0)?,
        u32::from(ours.vring(0)?.ring.next_avail())
    );
    served.stop()
}

#[test]
fn the_serial_is_read_over_a_session() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    assert_eq!(front_end.request(0, (Kind::GetId, 0), &[0xee; 20])?, 0);
    let [_, _, bytes] = front_end.vring(0)?.places(0);
    assert_eq!(
        front_end.ram.read(bytes, 20)?,
        b"vublk-test\0\0\0\0\0\0\0\0\0\0"
    );
    served.stop()
}

#[test]
fn a_call_comes_for_a_request_that_never_reached_the_device() -> Outcome {
    let served = Served::start()?;
    let mut front_end = FrontEnd::start(served.connect()?, Options::default())?;
    // A call is signalled once when its vring starts.
    wait_readable(&front_end.vring(0)?.call)?;
    // The second one finds a worker that has been asleep.
    for _ in 0..2 {
        let head = front_end.submit(0, 0, (Kind::Flush, 0), &[])?;
        wait_readable(&front_end.vring(0)?.call)?;
        let used = front_end.vring(0)?.ring.take_used()?;
        assert_eq!(used, Some((u32::from(head), 1)));
    }
    served.stop()
}
