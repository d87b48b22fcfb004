//! What Firecracker sends, message by message, as src/vmm/src/devices/virtio/vhost_user.rs and
//! src/vmm/src/devices/virtio/block/vhost_user/device.rs have it: handshake, activation, a PATCH of
//! the drive. One queue of 256, CONFIG with or without REPLY_ACK, no MQ; it leaves without a word.

use vublk::fds::borrow;
use vublk_tests::frontend::{FrontEnd, Options, Outcome, Served, code, words};

/// AVAILABLE_FEATURES: VERSION_1, PROTOCOL_FEATURES, RO, and FLUSH for a write-back cache;
/// EVENT_IDX is left out, since the driver of this test does not use it.
const AVAILABLE: u64 = 1 << 32 | 1 << 30 | 1 << 5 | 1 << 9;
const CONFIG: u64 = 1 << 9;
const REPLY_ACK: u64 = 1 << 3;

struct Firecracker {
    front_end: FrontEnd,
    acked: u64,
    eager: bool,
}

impl Firecracker {
    /// VhostUserBlockImpl::new.
    fn new(served: &Served, wanted: u64) -> Outcome<Firecracker> {
        let options = Options {
            vrings: 1,
            size: 256,
            features: 0,
        };
        let front_end = FrontEnd::silent(served.connect()?, options)?;
        let peer = &front_end.peer;
        peer.tell(code::SET_OWNER, &[], &[])?;
        let acked = peer.ask_number(code::GET_FEATURES)? & AVAILABLE;
        let protocol = peer.ask_number(code::GET_PROTOCOL_FEATURES)? & wanted;
        peer.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let firecracker = Firecracker {
            front_end,
            acked,
            eager: protocol & REPLY_ACK != 0,
        };
        firecracker.read_config()?;
        Ok(firecracker)
    }

    /// get_config(0, 60, WRITABLE) with an empty buffer behind it.
    fn read_config(&self) -> Outcome {
        let request = [words(&[0, 60, 1]), vec![0; 60]].concat();
        let config = if self.eager {
            self.front_end
                .peer
                .ask_eagerly(code::GET_CONFIG, &request)?
        } else {
            self.front_end.peer.ask(code::GET_CONFIG, &request)?
        };
        assert_eq!(config.len(), 72);
        assert_eq!(config.get(..12), request.get(..12));
        Ok(())
    }

    fn say(&self, code: u32, payload: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Outcome {
        if self.eager {
            return Ok(self.front_end.peer.confirm(code, payload, fds)?);
        }
        Ok(self.front_end.peer.tell(code, payload, fds)?)
    }

    /// activate: the features the driver acknowledged, then setup_backend.
    fn activate(&self) -> Outcome {
        let FrontEnd { ram, vrings, .. } = &self.front_end;
        let [vring] = vrings.as_slice() else {
            return Err("one queue".into());
        };
        self.say(code::SET_FEATURES, &self.acked.to_ne_bytes(), &[])?;
        let mut table = words(&[1, 0]);
        table.extend(vublk_tests::frontend::region_payload(ram.numbers()));
        self.say(code::SET_MEM_TABLE, &table, &[ram.fd()])?;
        self.say(code::SET_VRING_NUM, &words(&[0, 256]), &[])?;
        self.say(code::SET_VRING_ADDR, &vring.addr_payload(0), &[])?;
        self.say(code::SET_VRING_BASE, &words(&[0, 0]), &[])?;
        self.say(code::SET_VRING_CALL, &[0; 8], &[borrow(&vring.call)])?;
        self.say(code::SET_VRING_KICK, &[0; 8], &[borrow(&vring.kick)])?;
        self.say(code::SET_VRING_ENABLE, &words(&[0, 1]), &[])
    }
}

#[test]
fn firecracker_boots_patches_its_drive_and_leaves() -> Outcome {
    let served = Served::start()?;
    for (seed, wanted) in [(130, CONFIG), (131, CONFIG | REPLY_ACK)] {
        let mut firecracker = Firecracker::new(&served, wanted)?;
        firecracker.activate()?;
        firecracker.front_end.verify(seed)?;
        // config_update: the drive was patched while it runs.
        firecracker.read_config()?;
        firecracker.front_end.verify(seed + 10)?;
        firecracker.front_end.peer.still_served()?;
    }
    served.stop()
}
