//! The same front ends, message by message, against the stock daemon of the rust-vmm crates and
//! against ours, with the same device in both. Every reply, every status, every byte that was read
//! and every page that was marked is the same, but for what [`DIFFER`] names.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use vublk::fds::borrow;
use vublk_tests::frontend::{
    Answer, DirtyLog, FrontEnd, GuestRam, Kind, Layout, NEED_REPLY, Options, Outcome, PAGE, Peer,
    PeerError, ServeOptions, Served, Stock, VERSION, code, region_payload, words,
};

const QUEUES: u16 = 2;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL.
const LOG_ALL: u64 = 1 << 26;

/// What may differ: the line, and why.
const DIFFER: [(&str, &str); 2] = [
    (
        "GET_PROTOCOL_FEATURES",
        "the stock daemon has no in-flight tracking and tells a device of no way to announce \
         anything (faults 5 and 10)",
    ),
    (
        "GET_QUEUE_NUM",
        "the stock daemon has the queues its device was made with (fault 17)",
    ),
];

/// What a front end saw, line by line.
#[derive(Debug, Default)]
struct Seen(Vec<(String, String)>);

impl Seen {
    fn note(&mut self, what: impl Into<String>, seen: impl Debug) {
        self.0.push((what.into(), format!("{seen:?}")));
    }
}

/// A front end that writes down what it sees.
struct Script {
    front_end: FrontEnd,
    seen: Seen,
    /// Whether every message asks for an answer.
    eager: bool,
    /// The protocol features that both daemons have.
    protocol: u64,
    features: u64,
    log_used: bool,
}

impl Script {
    fn new(peer: Peer, eager: bool) -> Outcome<Script> {
        let options = Options {
            vrings: QUEUES,
            size: 128,
            features: 0,
        };
        Ok(Script {
            front_end: FrontEnd::silent(peer, options)?,
            seen: Seen::default(),
            eager,
            protocol: 0,
            features: 0,
            log_used: false,
        })
    }

    /// Sends a message that has an answer of its own.
    fn ask(&mut self, name: &str, code: u32, payload: &[u8]) -> Outcome<Vec<u8>> {
        let flags = VERSION | if self.eager { NEED_REPLY } else { 0 };
        self.front_end.peer.send(code, flags, payload, &[])?;
        let answer = self.front_end.peer.reply()?;
        self.seen.note(name, &answer);
        Ok(answer.payload)
    }

    fn number(&mut self, name: &str, code: u32) -> Outcome<u64> {
        let payload = self.ask(name, code, &[])?;
        Ok(u64::from_ne_bytes(payload.as_slice().try_into()?))
    }

    /// Sends a message that has none; with `ack` it asks to be acknowledged.
    fn send(
        &mut self,
        name: &str,
        (code, ack): (u32, bool),
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Outcome {
        Ok(Script::deliver(
            &self.front_end.peer,
            &mut self.seen,
            name,
            (code, ack || self.eager),
            payload,
            fds,
        )?)
    }

    fn deliver(
        peer: &Peer,
        seen: &mut Seen,
        name: &str,
        (code, ack): (u32, bool),
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), PeerError> {
        if ack {
            peer.send(code, VERSION | NEED_REPLY, payload, fds)?;
            let answer: Answer = peer.reply()?;
            seen.note(name, answer);
        } else {
            peer.tell(code, payload, fds)?;
        }
        Ok(())
    }

    /// Something for every vring, in one message each.
    fn for_vrings(
        &mut self,
        name: &str,
        (code, ack): (u32, bool),
        payload: impl Fn(u32) -> Vec<u8>,
    ) -> Outcome {
        for index in 0..u32::from(QUEUES) {
            self.send(name, (code, ack), &payload(index), &[])?;
        }
        Ok(())
    }

    /// A kick, call or err for every vring.
    fn events(&mut self, name: &str, code: u32) -> Outcome {
        let eager = self.eager;
        let Script {
            front_end, seen, ..
        } = self;
        for (index, vring) in (0_u64..).zip(&front_end.vrings) {
            let event = match code {
                code::SET_VRING_KICK => &vring.kick,
                code::SET_VRING_CALL => &vring.call,
                _ => &vring.err,
            };
            let file = index.to_ne_bytes();
            let fds = [borrow(event)];
            Script::deliver(&front_end.peer, seen, name, (code, eager), &file, &fds)?;
        }
        Ok(())
    }

    /// SET_VRING_ADDR of every vring.
    fn addresses(&mut self, ack: bool) -> Outcome {
        for index in 0..QUEUES {
            let log_used = self.log_used;
            let vring = self.front_end.vring(index)?;
            vring.log_used = log_used;
            let payload = vring.addr_payload(index.into());
            self.send("SET_VRING_ADDR", (code::SET_VRING_ADDR, ack), &payload, &[])?;
        }
        Ok(())
    }

    fn set_features(&mut self, ack: bool) -> Outcome {
        let acked = (self.features | PROTOCOL_FEATURES).to_ne_bytes();
        self.send("SET_FEATURES", (code::SET_FEATURES, ack), &acked, &[])
    }

    fn set_config(&mut self, writeback: u8) -> Outcome {
        let payload = [words(&[32, 1, 0]), vec![writeback]].concat();
        self.send("SET_CONFIG", (code::SET_CONFIG, true), &payload, &[])
    }

    fn get_config(&mut self, offset: u32, size: u8) -> Outcome {
        let room = vec![0; size.into()];
        let request = [words(&[offset, size.into(), 0]), room].concat();
        self.ask("GET_CONFIG", code::GET_CONFIG, &request)?;
        Ok(())
    }

    /// ADD_MEM_REG or REM_MEM_REG.
    fn region(&mut self, name: &str, code: u32, ram: &GuestRam) -> Outcome {
        let region = [vec![0; 8], region_payload(ram.numbers())].concat();
        let fds = if code == code::ADD_MEM_REG {
            vec![ram.fd()]
        } else {
            vec![]
        };
        self.send(name, (code, true), &region, &fds)
    }

    /// Requests of every kind on every vring, good and bad.
    fn requests(&mut self, seed: u64) -> Outcome {
        let mut random = fastrand::Rng::with_seed(seed);
        for index in 0..QUEUES {
            for (kind, sector, count) in [
                (Kind::Out, random.u64(..64), 512 * random.usize(1..=127)),
                (Kind::Flush, 0, 0),
                (Kind::In, random.u64(..64), 512 * random.usize(1..=127)),
                (Kind::GetId, 0, 20),
                (Kind::GetId, 0, 7),
                (Kind::In, 1 << 40, 512),
                (Kind::Out, (4 << 20 >> 9) - 1, 1024),
                (Kind::Out, 0, 700),
            ] {
                let data: Vec<u8> = (0..count).map(|_| random.u8(..)).collect();
                let head = self.front_end.submit(index, 0, (kind, sector), &data)?;
                let used = self.front_end.vring(index)?.wait_used(head)?;
                let [_, status, bytes] = self.front_end.vring(index)?.places(0);
                let status = self.front_end.ram.read(status, 1)?;
                let data = self.front_end.ram.read(bytes, count)?;
                self.seen
                    .note(format!("{kind:?} {sector}+{count}"), (used, status, data));
            }
        }
        Ok(())
    }

    /// Disables and stops every vring.
    fn stop(&mut self) -> Outcome {
        let disable = |index| words(&[index, 0]);
        self.for_vrings("SET_VRING_ENABLE", (code::SET_VRING_ENABLE, true), disable)?;
        for index in 0..u32::from(QUEUES) {
            let payload = words(&[index, 0]);
            self.ask("GET_VRING_BASE", code::GET_VRING_BASE, &payload)?;
        }
        Ok(())
    }

    fn base(&mut self) -> Outcome<u32> {
        Ok(self.front_end.vring(0)?.ring.next_avail().into())
    }

    /// The device is new to its driver: rings start over, and features with them.
    fn start_over(&mut self) -> Outcome {
        for vring in &mut self.front_end.vrings {
            vring.ring.start_over()?;
        }
        Ok(())
    }

    /// What was marked since the last time.
    fn marks(&mut self, log: &DirtyLog) -> Outcome {
        // A stop lets everything come to rest first: no marks are still to come.
        let pages = log.take()?;
        self.seen.note("marks", pages);
        Ok(())
    }
}

/// hw/virtio/vhost.c, hw/virtio/vhost-user.c and hw/block/vhost-user-blk.c of QEMU 10.
mod qemu {
    use super::*;

    /// `user_feature_bits` and MQ, as far as the driver goes with them.
    const FEATURES: u64 = 1 << 1
        | 1 << 2
        | 1 << 4
        | 1 << 6
        | 1 << 9
        | 1 << 10
        | 1 << 11
        | 1 << 12
        | 1 << 13
        | 1 << 14
        | 1 << 28
        | 1 << 32;

    /// vhost_dev_init.
    fn connect(script: &mut Script) -> Outcome {
        script.number("GET_FEATURES", code::GET_FEATURES)?;
        let offered = script.number("GET_PROTOCOL_FEATURES", code::GET_PROTOCOL_FEATURES)?;
        script.protocol = offered & COMMON;
        let acked = script.protocol.to_ne_bytes();
        script.send(
            "SET_PROTOCOL_FEATURES",
            (code::SET_PROTOCOL_FEATURES, false),
            &acked,
            &[],
        )?;
        script.number("GET_QUEUE_NUM", code::GET_QUEUE_NUM)?;
        script.number("GET_MAX_MEM_SLOTS", code::GET_MAX_MEM_SLOTS)?;
        script.send("SET_OWNER", (code::SET_OWNER, false), &[], &[])?;
        script.features = script.number("GET_FEATURES", code::GET_FEATURES)? & FEATURES;
        script.events("SET_VRING_CALL", code::SET_VRING_CALL)?;
        script.events("SET_VRING_ERR", code::SET_VRING_ERR)?;
        script.get_config(0, 60)
    }

    /// vhost_dev_start.
    fn start(script: &mut Script, with_memory: bool) -> Outcome {
        script.set_features(false)?;
        if with_memory {
            let ram = script.front_end.ram.clone();
            script.region("ADD_MEM_REG", code::ADD_MEM_REG, &ram)?;
        }
        let size = |index| words(&[index, 128]);
        script.for_vrings("SET_VRING_NUM", (code::SET_VRING_NUM, false), size)?;
        let base = script.base()?;
        let base = |index| words(&[index, base]);
        script.for_vrings("SET_VRING_BASE", (code::SET_VRING_BASE, false), base)?;
        script.addresses(false)?;
        script.events("SET_VRING_KICK", code::SET_VRING_KICK)?;
        let enable = |index| words(&[index, 1]);
        script.for_vrings("SET_VRING_ENABLE", (code::SET_VRING_ENABLE, true), enable)?;
        script.events("SET_VRING_CALL", code::SET_VRING_CALL)?;
        script.number("GET_FEATURES", code::GET_FEATURES)?;
        Ok(())
    }

    pub(super) fn run(peer: Peer) -> Outcome<Seen> {
        let mut script = Script::new(peer, false)?;
        connect(&mut script)?;
        start(&mut script, true)?;
        script.requests(1)?;
        for writeback in [0, 1] {
            script.set_config(writeback)?;
            script.get_config(0, 60)?;
            script.requests(2)?;
        }
        // vhost_commit: a dimm comes and goes.
        let dimm = GuestRam::at(Layout {
            guest: 1 << 32,
            size: 1 << 20,
            offset: 0,
        })?;
        script.region("ADD_MEM_REG", code::ADD_MEM_REG, &dimm)?;
        script.requests(3)?;
        script.region("REM_MEM_REG", code::REM_MEM_REG, &dimm)?;
        script.requests(4)?;
        // The guest is stopped and goes on; then it reboots.
        script.stop()?;
        start(&mut script, false)?;
        script.requests(5)?;
        script.stop()?;
        script.send("RESET_DEVICE", (code::RESET_DEVICE, false), &[], &[])?;
        script.start_over()?;
        start(&mut script, false)?;
        script.requests(6)?;
        migrate(&mut script)?;
        script.stop()?;
        Ok(script.seen)
    }

    /// vhost_migration_log, on running rings; the second log replaces the first. At the end the
    /// migration is given up, and the guest goes on.
    fn migrate(script: &mut Script) -> Outcome {
        let end = script.front_end.ram.layout().size;
        let logs = [DirtyLog::new(end, 0)?, DirtyLog::new(end, PAGE)?];
        for (round, log) in (0..).zip(&logs) {
            let payload = log.payload();
            let fds = [log.fd()];
            let peer = &script.front_end.peer;
            peer.tell(code::SET_LOG_BASE, &payload, &fds)?;
            let answer = peer.reply()?;
            script.seen.note("SET_LOG_BASE", answer);
            script.features |= LOG_ALL;
            script.set_features(true)?;
            script.log_used = true;
            script.addresses(true)?;
            log.take()?;
            for seed in 0..5 {
                script.requests(seed * 2 + round)?;
            }
            script.stop()?;
            script.marks(log)?;
            start(script, false)?;
        }
        script.features &= !LOG_ALL;
        script.set_features(true)?;
        script.log_used = false;
        script.addresses(true)?;
        script.requests(7)
    }
}

/// virtio-devices/src/vhost_user of Cloud Hypervisor 53, which asks for an answer to everything.
mod cloud_hypervisor {
    use super::*;

    /// blk.rs and DEFAULT_VIRTIO_FEATURES, as far as the driver goes with them.
    const FEATURES: u64 = 1 << 1
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
        | 1 << 32;

    /// setup_vhost_user.
    fn activate(script: &mut Script) -> Outcome {
        script.set_features(true)?;
        let ram = script.front_end.ram.clone();
        let table = [words(&[1, 0]), region_payload(ram.numbers())].concat();
        script.send(
            "SET_MEM_TABLE",
            (code::SET_MEM_TABLE, true),
            &table,
            &[ram.fd()],
        )?;
        let size = |index| words(&[index, 128]);
        script.for_vrings("SET_VRING_NUM", (code::SET_VRING_NUM, true), size)?;
        script.addresses(true)?;
        let base = script.base()?;
        let base = |index| words(&[index, base]);
        script.for_vrings("SET_VRING_BASE", (code::SET_VRING_BASE, true), base)?;
        script.events("SET_VRING_CALL", code::SET_VRING_CALL)?;
        script.events("SET_VRING_KICK", code::SET_VRING_KICK)?;
        enable(script, 1)
    }

    fn enable(script: &mut Script, enable: u32) -> Outcome {
        let payload = |index| words(&[index, enable]);
        script.for_vrings("SET_VRING_ENABLE", (code::SET_VRING_ENABLE, true), payload)
    }

    pub(super) fn run(peer: Peer) -> Outcome<Seen> {
        let mut script = Script::new(peer, false)?;
        script.send("SET_OWNER", (code::SET_OWNER, false), &[], &[])?;
        script.features = script.number("GET_FEATURES", code::GET_FEATURES)? & FEATURES;
        let offered = script.number("GET_PROTOCOL_FEATURES", code::GET_PROTOCOL_FEATURES)?;
        script.protocol = offered & COMMON;
        let acked = script.protocol.to_ne_bytes();
        script.send(
            "SET_PROTOCOL_FEATURES",
            (code::SET_PROTOCOL_FEATURES, false),
            &acked,
            &[],
        )?;
        script.eager = true;
        script.number("GET_QUEUE_NUM", code::GET_QUEUE_NUM)?;
        // Version 46 counted from the start of the transport's registers.
        for offset in [0, 0x100] {
            script.get_config(offset, 60)?;
        }
        // LOG_ALL is acknowledged when a migration begins.
        script.features &= !LOG_ALL;
        activate(&mut script)?;
        script.requests(11)?;
        script.set_config(0)?;
        script.requests(12)?;
        let more = GuestRam::at(Layout {
            guest: 1 << 32,
            size: 1 << 20,
            offset: 0,
        })?;
        script.region("ADD_MEM_REG", code::ADD_MEM_REG, &more)?;
        script.requests(13)?;
        // pause_vhost_user and resume_vhost_user.
        enable(&mut script, 0)?;
        enable(&mut script, 1)?;
        script.requests(14)?;
        // reset_vhost_user, and another activation.
        script.stop()?;
        script.start_over()?;
        activate(&mut script)?;
        script.requests(15)?;
        migrate(&mut script)?;
        script.stop()?;
        Ok(script.seen)
    }

    /// start_dirty_log and dirty_log: a new log for every round, on running rings.
    fn migrate(script: &mut Script) -> Outcome {
        script.features |= LOG_ALL;
        script.log_used = true;
        let end = script.front_end.ram.layout().size;
        for round in 0..3 {
            let log = DirtyLog::new(end, 0)?;
            let payload = log.payload();
            let peer = &script.front_end.peer;
            peer.send(
                code::SET_LOG_BASE,
                VERSION | NEED_REPLY,
                &payload,
                &[log.fd()],
            )?;
            let answer = peer.reply()?;
            script.seen.note("SET_LOG_BASE", answer);
            if round == 0 {
                script.set_features(true)?;
                script.addresses(true)?;
            }
            log.take()?;
            script.requests(20 + round)?;
            if round == 2 {
                script.stop()?;
            } else {
                enable(script, 0)?;
                enable(script, 1)?;
            }
            script.marks(&log)?;
        }
        Ok(())
    }
}

/// MQ, LOG_SHMFD, REPLY_ACK, CONFIG, RESET_DEVICE and CONFIGURE_MEM_SLOTS: what a front end can
/// have from both.
const COMMON: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;

/// Runs a script against both, and compares.
fn compare(run: fn(Peer) -> Outcome<Seen>) -> Outcome {
    for workers in [1, 2] {
        let options = ServeOptions {
            workers,
            ..ServeOptions::default()
        };
        let stock = Stock::start(&options)?;
        let with_stock = run(stock.connect()?)?;
        stock.left()?;
        let served = Served::start_with(&options)?;
        let with_ours = run(served.connect()?)?;
        served.stop()?;
        assert_eq!(with_stock.0.len(), with_ours.0.len());
        let mut differed = Vec::new();
        for ((name, stock), (other, ours)) in with_stock.0.iter().zip(&with_ours.0) {
            assert_eq!(name, other);
            if stock != ours {
                let known = DIFFER.iter().find(|(known, _)| known == name);
                assert!(known.is_some(), "{name}:\nstock {stock}\nours  {ours}");
                differed.push(name.as_str());
            }
        }
        differed.sort_unstable();
        differed.dedup();
        assert_eq!(differed, DIFFER.map(|(name, _)| name), "no difference less");
    }
    Ok(())
}

#[test]
fn qemu_sees_no_difference() -> Outcome {
    compare(qemu::run)
}

#[test]
fn cloud_hypervisor_sees_no_difference() -> Outcome {
    compare(cloud_hypervisor::run)
}

/// What each offers of the protocol, and what that means.
#[test]
fn the_stock_daemon_offers_less() -> Outcome {
    let stock = Stock::start(&ServeOptions::default())?;
    let peer = stock.connect()?;
    let offered = peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
    assert_eq!(offered, COMMON);
    drop(peer);
    stock.left()?;
    let served = Served::start()?;
    let offered = served.connect()?.ask_number(code::GET_PROTOCOL_FEATURES)?;
    assert_eq!(offered & COMMON, COMMON);
    // INFLIGHT_SHMFD and BACKEND_REQ.
    assert_eq!(offered & (1 << 12 | 1 << 5), 1 << 12 | 1 << 5);
    served.stop()
}
