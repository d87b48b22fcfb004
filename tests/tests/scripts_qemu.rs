//! What QEMU 10 sends, message by message, as hw/virtio/vhost-user.c, hw/virtio/vhost.c and
//! hw/block/vhost-user-blk.c have it: handshake, first I/O, a change of memory, stop and reset,
//! migrations, and coming back to a daemon with requests in flight.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use blockdev::fault::FaultPlan;
use blockdev::open;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;
use vublk_tests::frontend::{
    Descriptor, DirtyLog, FrontEnd, GuestRam, InflightFile, Kind, LOG_ALL, Layout, NO_FD, Options,
    Outcome, PAGE, Peer, ServeOptions, Served, Vring, code, region_payload, words,
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
    /// The in-flight region it keeps from one daemon to the next.
    inflight: Option<InflightFile>,
    /// The log of a migration that is under way.
    log: Option<DirtyLog>,
    /// The notifier QEMU listens on itself while the guest has its interrupt masked.
    masked: EventFd,
    features: u64,
    /// What it believes the daemon has of its memory: unchanged regions are not sent again.
    shared: bool,
}

impl Qemu {
    fn connect(served: &Served) -> Outcome<Qemu> {
        let options = Options {
            vrings: QUEUES,
            size: 128,
            features: 0,
        };
        let mut qemu = Qemu {
            front_end: FrontEnd::silent(served.connect()?, options)?,
            inflight: None,
            log: None,
            masked: EventFd::new(EFD_NONBLOCK)?,
            features: 0,
            shared: false,
        };
        qemu.init()?;
        Ok(qemu)
    }

    /// vhost_dev_init: vhost_user_backend_init, then the owner, features and notifiers.
    fn init(&mut self) -> Outcome {
        let Qemu {
            front_end, masked, ..
        } = self;
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
            peer.tell(code::SET_VRING_CALL, &file, &[borrow(masked)])?;
            peer.tell(code::SET_VRING_ERR, &file, &[borrow(&vring.err)])?;
        }
        // vhost_user_get_config: offset 0, a size that follows from the features, no flags, room
        // for the answer behind the header.
        let header = words(&[0, 60, 0]);
        let request = [header.clone(), vec![0; 60]].concat();
        let config = peer.ask(code::GET_CONFIG, &request)?;
        assert_eq!(config.len(), 72, "the size has to be that of the request");
        assert!(config.starts_with(&header));
        self.features = features;
        self.shared = false;
        Ok(())
    }

    /// vhost_user_blk_start: the in-flight region, vhost_dev_start, and the unmasking. Whatever
    /// says that something is logged is acknowledged.
    fn start(&mut self, base: u16) -> Outcome {
        // vhost_dev_prepare_inflight, vhost_dev_get_inflight, vhost_dev_set_inflight.
        self.set_features()?;
        let peer = &self.front_end.peer;
        let inflight = match self.inflight.take() {
            Some(kept) => kept,
            None => InflightFile::get(peer, QUEUES, 128)?,
        };
        inflight.tell(peer)?;
        self.inflight = Some(inflight);

        self.set_features()?;
        // With CONFIGURE_MEM_SLOTS there is no SET_MEM_TABLE, only differences.
        let unshared = !std::mem::replace(&mut self.shared, true);
        let front_end = &self.front_end;
        let peer = &front_end.peer;
        if unshared {
            let region = [vec![0; 8], region_payload(front_end.ram.numbers())].concat();
            peer.confirm(code::ADD_MEM_REG, &region, &[front_end.ram.fd()])?;
        }
        for (index, vring) in (0_u32..).zip(&front_end.vrings) {
            let file = u64::from(index).to_ne_bytes();
            let size = u32::from(vring.ring.size());
            peer.tell(code::SET_VRING_NUM, &words(&[index, size]), &[])?;
            peer.tell(code::SET_VRING_BASE, &words(&[index, u32::from(base)]), &[])?;
            self.set_vring_addr(index, vring)?;
            peer.tell(code::SET_VRING_KICK, &file, &[borrow(&vring.kick)])?;
        }
        // Until now the vrings could not say what they change.
        if self.log.is_some() {
            self.set_log(self.front_end.ram.layout().size)?;
        }
        let peer = &self.front_end.peer;
        for index in 0..u32::from(QUEUES) {
            peer.confirm(code::SET_VRING_ENABLE, &words(&[index, 1]), &[])?;
        }
        // The guest's own notifiers replace the masked ones only now, on running rings.
        for (index, vring) in (0_u64..).zip(&self.front_end.vrings) {
            peer.tell(
                code::SET_VRING_CALL,
                &index.to_ne_bytes(),
                &[borrow(&vring.call)],
            )?;
        }
        peer.still_served()?;
        Ok(())
    }

    /// vhost_dev_set_features: acknowledged only while something is logged.
    fn set_features(&self) -> Outcome {
        let peer = &self.front_end.peer;
        let acked = self.features | PROTOCOL_FEATURES;
        let code = code::SET_FEATURES;
        match self.log {
            Some(_) => peer.confirm(code, &(acked | LOG_ALL).to_ne_bytes(), &[])?,
            None => peer.tell(code, &acked.to_ne_bytes(), &[])?,
        }
        Ok(())
    }

    /// vhost_virtqueue_set_addr: likewise.
    fn set_vring_addr(&self, index: u32, vring: &Vring) -> Outcome {
        let peer = &self.front_end.peer;
        let payload = vring.addr_payload(index);
        if vring.log_used {
            peer.confirm(code::SET_VRING_ADDR, &payload, &[])?;
        } else {
            peer.tell(code::SET_VRING_ADDR, &payload, &[])?;
        }
        Ok(())
    }

    /// vhost_dev_log_resize: a log for everything below `end`, in 64-bit words. What comes out of
    /// the old one is copied (vhost_log_put), and only after the daemon has answered.
    fn set_log(&mut self, end: u64) -> Outcome<Vec<u64>> {
        let log = DirtyLog::new(end, 0)?;
        let peer = &self.front_end.peer;
        peer.tell(code::SET_LOG_BASE, &log.payload(), &[log.fd()])?;
        // QEMU looks at nothing but the code.
        peer.reply_to(code::SET_LOG_BASE)?;
        match self.log.replace(log) {
            Some(old) => old.take(),
            None => Ok(Vec::new()),
        }
    }

    /// vhost_dev_set_log, on running vrings.
    fn tell_log(&mut self, log_used: bool) -> Outcome {
        self.set_features()?;
        for vring in &mut self.front_end.vrings {
            vring.log_used = log_used;
        }
        for (index, vring) in (0_u32..).zip(&self.front_end.vrings) {
            self.set_vring_addr(index, vring)?;
        }
        Ok(())
    }

    /// vhost_migration_log(true).
    fn migration_begins(&mut self) -> Outcome {
        self.set_log(self.front_end.ram.layout().size)?;
        self.tell_log(true)
    }

    /// vhost_migration_log(false): nothing is acknowledged, and the log is given back at once.
    fn migration_ends(&mut self) -> Outcome<DirtyLog> {
        let log = self.log.take().ok_or("no migration")?;
        self.tell_log(false)?;
        Ok(log)
    }

    /// The pages that were marked since the last time (vhost_log_sync).
    fn marked(&self) -> Outcome<Vec<u64>> {
        self.log.as_ref().ok_or("no migration")?.take()
    }

    /// The pages that the used rings begin in.
    fn used_rings(&self) -> Vec<u64> {
        let vrings = self.front_end.vrings.iter();
        vrings.map(|vring| vring.ring.used_addr() / PAGE).collect()
    }

    /// The pages that reading a sector over a vring changes.
    fn read_changes(&mut self, index: u16) -> Outcome<Vec<u64>> {
        let vring = self.front_end.vring(index)?;
        let [_, status, data] = vring.places(0);
        let used = vring.ring.used_addr();
        Ok([used, status, data].map(|guest| guest / PAGE).to_vec())
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
    let Qemu {
        front_end,
        inflight,
        ..
    } = &mut qemu;
    // vhost_user_blk_reset: the next start asks for another region.
    *inflight = None;
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

/// A dimm that comes and goes.
fn dimm() -> Outcome<(GuestRam, Vec<u8>)> {
    let dimm = GuestRam::at(Layout {
        guest: 1 << 32,
        size: 1 << 20,
        offset: 0,
    })?;
    let region = [vec![0; 8], region_payload(dimm.numbers())].concat();
    Ok((dimm, region))
}

#[test]
fn qemu_migrates_and_gives_up_and_migrates() -> Outcome {
    let served = Served::start()?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    qemu.front_end.verify(120)?;
    for round in 0..3 {
        qemu.migration_begins()?;
        qemu.marked()?;
        for index in 0..QUEUES {
            qemu.front_end.read(index, 0, 512)?;
            let changes = qemu.read_changes(index)?;
            qemu.front_end.assert_marked(&qemu.marked()?, &changes);
        }
        qemu.front_end.verify(121)?;
        // Whoever migrates changes his mind.
        let old = qemu.migration_ends()?;
        qemu.front_end.peer.still_served()?;
        old.take()?;
        qemu.front_end.verify(122 + round)?;
        assert_eq!(old.take()?, [0_u64; 0], "it was given back");
    }
    qemu.stop()?;
    served.stop()
}

/// vhost_commit: a log that has to grow does so before the memory, and shrinks after it.
#[test]
fn qemu_changes_memory_while_it_migrates() -> Outcome {
    let served = Served::start()?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    qemu.migration_begins()?;
    for seed in 0..3 {
        let (dimm, region) = dimm()?;
        qemu.front_end.verify(130 + seed)?;
        let Layout { guest, size, .. } = dimm.layout();
        let before = qemu.marked()?;
        assert!(before.contains(&(qemu.front_end.vring(0)?.places(0)[2] / PAGE)));
        qemu.set_log(guest + size)?;
        qemu.front_end
            .peer
            .confirm(code::ADD_MEM_REG, &region, &[dimm.fd()])?;
        qemu.marked()?;
        let into = guest + 3 * PAGE;
        read_into(&mut qemu.front_end, into)?;
        assert!(qemu.marked()?.contains(&(into / PAGE)));
        qemu.front_end
            .peer
            .confirm(code::REM_MEM_REG, &region, &[])?;
        qemu.front_end.read(1, 0, 512)?;
        // What was marked in the larger one is not lost with it.
        let taken = qemu.set_log(qemu.front_end.ram.layout().size)?;
        let changes = qemu.read_changes(1)?;
        qemu.front_end.assert_marked(&taken, &changes);
        // Every log begins with the used rings: what was marked of them before is not in it.
        let used = qemu.used_rings();
        assert_eq!(qemu.marked()?, used);
        qemu.front_end.read(0, 0, 512)?;
        let changes = qemu.read_changes(0)?;
        qemu.front_end.assert_marked(&qemu.marked()?, &changes);
    }
    qemu.stop()?;
    served.stop()
}

/// Reads a sector over the first vring to a guest address.
fn read_into(front_end: &mut FrontEnd, guest: u64) -> Outcome {
    let ram = front_end.ram.clone();
    let vring = front_end.vring(0)?;
    let [header, status, _] = vring.places(0);
    ram.write(header, &Kind::In.header(0))?;
    let chain = [
        Descriptor::source(header, 16),
        Descriptor::dest(guest, 512),
        Descriptor::dest(status, 1),
    ];
    vring.ring.offer_chain(0, &chain)?;
    vring.kick.write(1)?;
    assert_eq!(front_end.wait(0, 0)?, 0);
    Ok(())
}

/// A guest that reboots, or is stopped and goes on, while it is migrated: vrings start with
/// LOG_ALL, and their log comes after their kick.
#[test]
fn qemu_stops_and_starts_while_it_migrates() -> Outcome {
    let served = Served::start()?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    qemu.migration_begins()?;
    qemu.front_end.verify(140)?;
    let bases = qemu.stop()?;
    // vhost_dev_stop gives the log back, and says nothing of it.
    let given_back = qemu.log.replace(DirtyLog::new(PAGE, 0)?);
    let given_back = given_back.ok_or("no migration")?;
    let last = given_back.take()?;
    let used = qemu.front_end.vring(1)?.ring.used_addr() / PAGE;
    assert!(last.contains(&used), "the last used elements too");
    qemu.start(u16::try_from(bases.first().copied().unwrap_or(0))?)?;
    qemu.front_end.verify(141)?;
    // Between the kicks and the next log no vring does more than publish its used ring.
    assert_eq!(given_back.take()?, qemu.used_rings());
    let marked = qemu.marked()?;
    for index in 0..QUEUES {
        let changes = qemu.read_changes(index)?;
        assert!(changes.iter().all(|page| marked.contains(page)));
    }
    // The migration is over while the guest is stopped: the next start says so.
    qemu.stop()?;
    qemu.log = None;
    for vring in &mut qemu.front_end.vrings {
        vring.log_used = false;
    }
    let base = qemu.front_end.vring(0)?.ring.next_avail();
    qemu.start(base)?;
    qemu.front_end.verify(142)?;
    served.stop()
}

#[test]
fn qemu_comes_back_with_what_was_in_flight() -> Outcome {
    let (device, handle) = open::fault(FaultPlan::benign(4 << 20, 512, 7))?;
    let served = Served::start_with(&ServeOptions {
        storage: Some(device),
        ..ServeOptions::default()
    })?;
    let mut qemu = Qemu::connect(&served)?;
    qemu.start(0)?;
    for round in 0..3 {
        qemu.front_end.verify(150 + round)?;
        handle.stick();
        let data = [u8::try_from(round)?; 4096];
        let heads = (0..3)
            .map(|place| {
                let sector = u64::from(place) * 8;
                qemu.front_end.submit(1, place, (Kind::Out, sector), &data)
            })
            .collect::<Outcome<Vec<u16>>>()?;
        while handle.stuck_now() < 3 {
            std::thread::yield_now();
        }
        let (nobody, _) = UnixStream::pair()?;
        qemu.front_end.peer = Peer::new(nobody)?;
        handle.release();
        qemu.front_end.peer = served.connect()?;
        qemu.init()?;
        // virtio_queue_restore_last_avail_idx: it believes that nothing is in flight.
        let base = qemu.front_end.vring(1)?.ring.used_index()?;
        qemu.start(base)?;
        for head in heads {
            assert_eq!(qemu.front_end.wait(1, head)?, 0);
        }
        assert_eq!(qemu.front_end.read(1, 16, 4096)?, data);
    }
    qemu.stop()?;
    served.stop()
}
