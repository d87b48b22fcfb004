//! What Cloud Hypervisor sends, message by message, as virtio-devices/src/vhost_user/blk.rs and
//! vu_common_ctrl.rs have it: handshake, activation, hot-plug, pause, reset, reconnection and
//! migration.
//!
//! It speaks through the vhost crate, which sets NEED_REPLY on every message once REPLY_ACK is
//! negotiated, on those with an answer of their own too.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vublk::fds::borrow;
use vublk_tests::frontend::{
    DirtyLog, FrontEnd, GuestRam, LOG_ALL, Layout, NEED_REPLY, Options, Outcome, PAGE, Served,
    VERSION, code, region_payload, words,
};

/// blk.rs: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, DISCARD,
/// WRITE_ZEROES, MQ; mod.rs, DEFAULT_VIRTIO_FEATURES: INDIRECT_DESC, VERSION_1, ORDER_PLATFORM and
/// more; EVENT_IDX is left out, since the driver of this test does not use it.
const AVAILABLE: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 26
    | 1 << 28
    | 1 << 30
    | 1 << 32
    | 1 << 35
    | 1 << 36
    | 1 << 38;
/// CONFIG, MQ, CONFIGURE_MEM_SLOTS, REPLY_ACK, INFLIGHT_SHMFD, LOG_SHMFD, BACKEND_REQ.
const PROTOCOL: u64 = 1 << 9 | 1 | 1 << 15 | 1 << 3 | 1 << 12 | 1 << 1 | 1 << 5;
const QUEUES: u16 = 2;

struct CloudHypervisor {
    front_end: FrontEnd,
    acked: u64,
    protocol: u64,
}

impl CloudHypervisor {
    /// Blk::new: negotiate_features_vhost_user, the number of queues, the configuration.
    fn new(served: &Served, config_offset: u32) -> Outcome<CloudHypervisor> {
        let options = Options {
            vrings: QUEUES,
            size: 128,
            features: 0,
        };
        let front_end = FrontEnd::silent(served.connect()?, options)?;
        let peer = &front_end.peer;
        peer.tell(code::SET_OWNER, &[], &[])?;
        let acked = peer.ask_number(code::GET_FEATURES)? & AVAILABLE;
        let protocol = peer.ask_number(code::GET_PROTOCOL_FEATURES)? & PROTOCOL;
        peer.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let queues = peer.ask_eagerly(code::GET_QUEUE_NUM, &[])?;
        assert!(u64::from_ne_bytes(queues.as_slice().try_into()?) >= u64::from(QUEUES));
        let request = [words(&[config_offset, 60, 1]), vec![0; 60]].concat();
        let config = peer.ask_eagerly(code::GET_CONFIG, &request)?;
        assert_eq!(config.len(), 72);
        assert_eq!(
            config.get(12..20),
            Some(&(4_u64 << 20 >> 9).to_le_bytes()[..])
        );
        Ok(CloudHypervisor {
            front_end,
            acked,
            protocol,
        })
    }

    /// setup_vhost_user; every message is acknowledged.
    fn activate(&self) -> Outcome {
        let peer = &self.front_end.peer;
        // What the guest's driver acknowledged: it does not know the log's bit.
        let acked = self.acked & !LOG_ALL;
        peer.confirm(code::SET_FEATURES, &acked.to_ne_bytes(), &[])?;
        self.front_end.share_memory()?;
        for (index, vring) in (0_u32..).zip(&self.front_end.vrings) {
            let size = u32::from(vring.ring.size());
            peer.confirm(code::SET_VRING_NUM, &words(&[index, size]), &[])?;
        }
        for (index, vring) in (0_u32..).zip(&self.front_end.vrings) {
            let file = u64::from(index).to_ne_bytes();
            let base = u32::from(vring.ring.next_avail());
            peer.confirm(code::SET_VRING_ADDR, &vring.addr_payload(index), &[])?;
            peer.confirm(code::SET_VRING_BASE, &words(&[index, base]), &[])?;
            peer.confirm(code::SET_VRING_CALL, &file, &[borrow(&vring.call)])?;
            peer.confirm(code::SET_VRING_KICK, &file, &[borrow(&vring.kick)])?;
        }
        self.enable(1)?;
        let (_ours, theirs) = UnixStream::pair()?;
        Ok(peer.confirm(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?)
    }

    fn enable(&self, enable: u32) -> Outcome {
        for index in 0..u32::from(QUEUES) {
            let payload = words(&[index, enable]);
            self.front_end
                .peer
                .confirm(code::SET_VRING_ENABLE, &payload, &[])?;
        }
        Ok(())
    }

    /// update_log_base: a new log with a byte for every eight pages up to the last address, which
    /// is no whole number of words, and an answer that describes it.
    fn update_log_base(&self) -> Outcome<DirtyLog> {
        let end = self.front_end.ram.layout().size;
        let log = DirtyLog::new(end + 64 * PAGE, 0)?;
        let size = (end - 1) / (PAGE * 8) + 1;
        let payload = [size.to_ne_bytes(), 0_u64.to_ne_bytes()].concat();
        let peer = &self.front_end.peer;
        peer.send(
            code::SET_LOG_BASE,
            VERSION | NEED_REPLY,
            &payload,
            &[log.fd()],
        )?;
        assert_eq!(peer.reply_to(code::SET_LOG_BASE)?.payload, payload);
        Ok(log)
    }

    /// set_vring_logging: without logging there is no address to log at.
    fn set_vring_logging(&mut self, log_used: bool) -> Outcome {
        let FrontEnd { peer, vrings, .. } = &mut self.front_end;
        for (index, vring) in (0_u32..).zip(vrings) {
            vring.log_used = log_used;
            let mut payload = vring.addr_payload(index);
            if !log_used {
                payload.truncate(payload.len() - 8);
                payload.extend([0; 8]);
            }
            peer.confirm(code::SET_VRING_ADDR, &payload, &[])?;
        }
        Ok(())
    }

    /// start_dirty_log.
    fn start_dirty_log(&mut self) -> Outcome<DirtyLog> {
        let log = self.update_log_base()?;
        let acked = (self.acked | LOG_ALL).to_ne_bytes();
        self.front_end
            .peer
            .confirm(code::SET_FEATURES, &acked, &[])?;
        self.set_vring_logging(true)?;
        Ok(log)
    }

    /// stop_dirty_log: the vrings first, then the feature.
    fn stop_dirty_log(&mut self) -> Outcome {
        self.set_vring_logging(false)?;
        let acked = (self.acked & !LOG_ALL).to_ne_bytes();
        Ok(self
            .front_end
            .peer
            .confirm(code::SET_FEATURES, &acked, &[])?)
    }

    /// reset_vhost_user.
    fn reset(&self) -> Outcome {
        for index in 0..u32::from(QUEUES) {
            let peer = &self.front_end.peer;
            peer.confirm(code::SET_VRING_ENABLE, &words(&[index, 0]), &[])?;
            let base = peer.ask_eagerly(code::GET_VRING_BASE, &words(&[index, 0]))?;
            assert_eq!(base.get(..4), Some(&index.to_ne_bytes()[..]));
        }
        Ok(())
    }
}

#[test]
fn cloud_hypervisor_boots_plugs_pauses_and_resets() -> Outcome {
    let served = Served::start()?;
    // The offset of version 46, and the one of today.
    for config_offset in [0x100, 0] {
        let mut ch = CloudHypervisor::new(&served, config_offset)?;
        ch.activate()?;
        ch.front_end.verify(110)?;

        let payload = [words(&[32, 1, 1]), vec![0]].concat();
        ch.front_end.peer.confirm(code::SET_CONFIG, &payload, &[])?;
        ch.front_end.verify(111)?;

        // add_memory_region.
        let more = GuestRam::at(Layout {
            guest: 1 << 32,
            size: 1 << 20,
            offset: 0,
        })?;
        let region = [vec![0; 8], region_payload(more.numbers())].concat();
        ch.front_end
            .peer
            .confirm(code::ADD_MEM_REG, &region, &[more.fd()])?;
        ch.front_end.verify(112)?;

        // pause_vhost_user and resume_vhost_user: only the enabling changes.
        ch.enable(0)?;
        ch.enable(1)?;
        ch.front_end.verify(113)?;

        ch.reset()?;
        for vring in &mut ch.front_end.vrings {
            vring.ring.start_over()?;
        }
        ch.activate()?;
        ch.front_end.verify(114)?;
    }
    served.stop()
}

#[test]
fn cloud_hypervisor_comes_back_without_asking_again() -> Outcome {
    let served = Served::start()?;
    let mut ch = CloudHypervisor::new(&served, 0)?;
    ch.activate()?;
    ch.front_end.verify(115)?;
    // reinitialize_vhost_user: the protocol features of the first connection are set without
    // GET_PROTOCOL_FEATURES, and the rings go on.
    ch.front_end.peer = served.connect()?;
    let peer = &ch.front_end.peer;
    peer.tell(code::SET_OWNER, &[], &[])?;
    peer.ask_number(code::GET_FEATURES)?;
    peer.tell(code::SET_PROTOCOL_FEATURES, &ch.protocol.to_ne_bytes(), &[])?;
    ch.activate()?;
    ch.front_end.verify(116)?;
    served.stop()
}

/// Every pass takes a whole log away and copies what it says, while the next one fills.
#[test]
fn cloud_hypervisor_copies_pass_by_pass_and_pauses() -> Outcome {
    let served = Served::start()?;
    let mut ch = CloudHypervisor::new(&served, 0)?;
    assert_ne!(ch.acked & LOG_ALL, 0, "MigrationNotSupported otherwise");
    assert_ne!(ch.protocol & 1 << 1, 0, "and without LOG_SHMFD");
    ch.activate()?;
    ch.front_end.verify(160)?;
    for round in 0..2 {
        let mut log = ch.start_dirty_log()?;
        log.take()?;
        let mut changed = Vec::new();
        for pass in 0..4_u16 {
            let index = pass % QUEUES;
            ch.front_end.read(index, u64::from(pass), 512)?;
            // dirty_log: the old one is complete when the new one is answered.
            let next = ch.update_log_base()?;
            let vring = ch.front_end.vring(index)?;
            let [_, status, data] = vring.places(0);
            let read = [vring.ring.used_addr(), status, data].map(|guest| guest / PAGE);
            changed.extend(read);
            ch.front_end.assert_marked(&log.take()?, &changed);
            ch.front_end.read(index, u64::from(pass), 512)?;
            assert_eq!(log.take()?, [0_u64; 0], "nobody marks it any more");
            (log, changed) = (next, read.to_vec());
        }
        // The last pass: the guest is paused, and then nothing changes.
        ch.enable(0)?;
        let last = ch.update_log_base()?;
        ch.front_end.peer.still_served()?;
        ch.front_end.assert_marked(&last.take()?, &[]);
        // The migration fails, and the guest goes on here.
        ch.stop_dirty_log()?;
        ch.enable(1)?;
        ch.front_end.verify(161 + round)?;
        assert_eq!(last.take()?, [0_u64; 0], "the log was given back");
    }
    ch.reset()?;
    served.stop()
}
