//! What QEMU 10 sends, message by message, as hw/virtio/vhost-user.c, hw/virtio/vhost.c and
//! hw/block/vhost-user-blk.c have it: handshake, first I/O, a change of memory, stop and reset.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;
use vublk_tests::frontend::{
    FrontEnd, GuestRam, Kind, Layout, NO_FD, Options, Outcome, Served, code, region_payload, words,
};

/// The virtio-blk bits of `user_feature_bits` in vhost-user-blk.c, with MQ.
const BLK: u64 =
    1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14;
/// The ring bits of the same list: INDIRECT_DESC, EVENT_IDX, VERSION_1. EVENT_IDX is left to a
/// guest that wants it; this driver does not.
const RING: u64 = 1 << 28 | 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const QUEUES: u16 = 2;

struct Qemu {
    front_end: FrontEnd,
    /// The notifier QEMU listens on itself while the guest has its interrupt masked.
    masked: EventFd,
    features: u64,
    /// What it believes the daemon has of its memory: unchanged regions are not sent again.
    shared: bool,
}

impl Qemu {
    /// vhost_dev_init: vhost_user_backend_init, then the owner, features and notifiers.
    fn connect(served: &Served) -> Outcome<Qemu> {
        let options = Options {
            vrings: QUEUES,
            size: 128,
            features: 0,
        };
        let front_end = FrontEnd::silent(served.connect()?, options)?;
        let masked = EventFd::new(EFD_NONBLOCK)?;
        let peer = &front_end.peer;
        let offered = peer.ask_number(code::GET_FEATURES)?;
        assert_ne!(offered & PROTOCOL_FEATURES, 0);
        let protocol = peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
        assert_ne!(protocol & 1 << 9, 0, "vhost-user-blk wants CONFIG");
        peer.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let queues = peer.ask_number(code::GET_QUEUE_NUM)?;
        assert!(
            queues >= u64::from(QUEUES),
            "num-queues is refused otherwise"
        );
        assert!(peer.ask_number(code::GET_MAX_MEM_SLOTS)? >= 8);
        // vhost_setup_backend_channel: one end of a socketpair, acknowledged.
        let (_ours, theirs) = UnixStream::pair()?;
        peer.confirm(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        peer.tell(code::SET_OWNER, &[], &[])?;
        let features = peer.ask_number(code::GET_FEATURES)? & (BLK | RING);
        for (index, vring) in (0_u64..).zip(&front_end.vrings) {
            let file = index.to_ne_bytes();
            peer.tell(code::SET_VRING_CALL, &file, &[borrow(&masked)])?;
            peer.tell(code::SET_VRING_ERR, &file, &[borrow(&vring.err)])?;
        }
        // vhost_user_get_config: offset 0, a size that follows from the features, no flags, room
        // for the answer behind the header.
        let header = words(&[0, 60, 0]);
        let request = [header.clone(), vec![0; 60]].concat();
        let config = peer.ask(code::GET_CONFIG, &request)?;
        assert_eq!(config.len(), 72, "the size has to be that of the request");
        assert!(config.starts_with(&header));
        Ok(Qemu {
            front_end,
            masked,
            features,
            shared: false,
        })
    }

    /// vhost_dev_start, and the unmasking that vhost_user_blk_start ends with.
    fn start(&mut self, base: u16) -> Outcome {
        let Qemu {
            front_end,
            features,
            shared,
            ..
        } = self;
        let peer = &front_end.peer;
        let acked = (*features | PROTOCOL_FEATURES).to_ne_bytes();
        peer.tell(code::SET_FEATURES, &acked, &[])?;
        // With CONFIGURE_MEM_SLOTS there is no SET_MEM_TABLE, only differences.
        if !std::mem::replace(shared, true) {
            let region = [vec![0; 8], region_payload(front_end.ram.numbers())].concat();
            peer.confirm(code::ADD_MEM_REG, &region, &[front_end.ram.fd()])?;
        }
        for (index, vring) in (0_u32..).zip(&front_end.vrings) {
            let file = u64::from(index).to_ne_bytes();
            let size = u32::from(vring.ring.size());
            peer.tell(code::SET_VRING_NUM, &words(&[index, size]), &[])?;
            peer.tell(code::SET_VRING_BASE, &words(&[index, u32::from(base)]), &[])?;
            peer.tell(code::SET_VRING_ADDR, &vring.addr_payload(index), &[])?;
            peer.tell(code::SET_VRING_KICK, &file, &[borrow(&vring.kick)])?;
        }
        for index in 0..u32::from(QUEUES) {
            peer.confirm(code::SET_VRING_ENABLE, &words(&[index, 1]), &[])?;
        }
        // The guest's own notifiers replace the masked ones only now, on running rings.
        for (index, vring) in (0_u64..).zip(&front_end.vrings) {
            peer.tell(
                code::SET_VRING_CALL,
                &index.to_ne_bytes(),
                &[borrow(&vring.call)],
            )?;
        }
        peer.still_served()?;
        Ok(())
    }

    /// vhost_dev_stop, and the masking of the guest's notifiers. Where each ring stopped.
    fn stop(&mut self) -> Outcome<Vec<u32>> {
        let peer = &self.front_end.peer;
        for index in 0..u32::from(QUEUES) {
            peer.confirm(code::SET_VRING_ENABLE, &words(&[index, 0]), &[])?;
        }
        let mut bases = Vec::new();
        for index in 0..u32::from(QUEUES) {
            bases.push(peer.vring_base(index)?);
        }
        for index in 0..u64::from(QUEUES) {
            peer.tell(
                code::SET_VRING_CALL,
                &index.to_ne_bytes(),
                &[borrow(&self.masked)],
            )?;
        }
        Ok(bases)
    }
}

#[test]
fn qemu_boots_changes_memory_stops_and_resets() -> Outcome {
    let served = Served::start()?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    qemu.front_end.verify(100)?;

    // vhost_user_blk_set_config: the driver switches the write cache off and on.
    for writeback in [0, 1] {
        let payload = [words(&[32, 1, 0]), vec![writeback]].concat();
        qemu.front_end
            .peer
            .confirm(code::SET_CONFIG, &payload, &[])?;
        qemu.front_end.verify(101)?;
    }

    // vhost_commit: a dimm comes and goes.
    let dimm = GuestRam::at(Layout {
        guest: 1 << 32,
        size: 1 << 20,
        offset: 0,
    })?;
    let region = [vec![0; 8], region_payload(dimm.numbers())].concat();
    qemu.front_end
        .peer
        .confirm(code::ADD_MEM_REG, &region, &[dimm.fd()])?;
    qemu.front_end.verify(102)?;
    qemu.front_end
        .peer
        .confirm(code::REM_MEM_REG, &region, &[])?;
    qemu.front_end.verify(103)?;

    // The guest is stopped and goes on: each ring where it was.
    let bases = qemu.stop()?;
    let rings = qemu
        .front_end
        .vrings
        .iter()
        .map(|vring| u32::from(vring.ring.next_avail()));
    assert_eq!(bases, rings.collect::<Vec<_>>());
    assert_eq!(bases.first(), bases.last(), "verify uses every ring alike");
    let base = u16::try_from(bases.first().copied().unwrap_or(0))?;
    qemu.start(base)?;
    qemu.front_end.verify(104)?;

    // The guest reboots: RESET_DEVICE asks for no answer, the rings start over with empty
    // indices, and the memory is not sent again.
    qemu.stop()?;
    qemu.front_end.peer.tell(code::RESET_DEVICE, &[], &[])?;
    let Qemu { front_end, .. } = &mut qemu;
    for vring in &mut front_end.vrings {
        vring.ring.start_over()?;
    }
    qemu.start(0)?;
    qemu.front_end.verify(105)?;
    qemu.stop()?;
    served.stop()
}

#[test]
fn a_guest_without_interrupts_has_no_call() -> Outcome {
    let served = Served::start()?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    // vhost_virtqueue_start: VIRTIO_NO_VECTOR, a call without a descriptor.
    qemu.front_end
        .peer
        .tell(code::SET_VRING_CALL, &NO_FD.to_ne_bytes(), &[])?;
    let head = qemu.front_end.submit(0, 0, (Kind::Out, 1), &[1; 512])?;
    let ring = &mut qemu.front_end.vring(0)?.ring;
    let used = loop {
        match ring.take_used()? {
            Some(used) => break used,
            None => std::thread::yield_now(),
        }
    };
    assert_eq!(used.0, u32::from(head));
    served.stop()
}

#[test]
fn qemu_killed_is_replaced_by_another() -> Outcome {
    let served = Served::start()?;
    for seed in 0..5 {
        let mut qemu = Qemu::connect(&served)?;
        qemu.start(0)?;
        qemu.front_end.verify(seed)?;
        // Requests may be in flight when it dies.
        qemu.front_end.submit(0, 1, (Kind::In, seed), &[0; 4096])?;
        drop(qemu);
    }
    served.stop()
}
