//! What crosvm sends, message by message, as devices/src/virtio/vhost_user_frontend/mod.rs has it:
//! handshake, configuration, activation, reset. It negotiates REPLY_ACK and never asks for an
//! acknowledgement.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vublk::fds::borrow;
use vublk_tests::frontend::{FrontEnd, Options, Outcome, Served, code, region_payload, words};

/// CONFIG, MQ, BACKEND_REQ, DEVICE_STATE, SHMEM_MAP, REPLY_ACK.
const PROTOCOL: u64 = 1 << 9 | 1 | 1 << 5 | 1 << 19 | 1 << 22 | 1 << 3;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const QUEUES: u16 = 3;

struct Crosvm {
    front_end: FrontEnd,
    available: u64,
    acked: u64,
}

impl Crosvm {
    /// VhostUserFrontend::new.
    fn new(served: &Served) -> Outcome<Crosvm> {
        let options = Options {
            vrings: QUEUES,
            size: 256,
            features: 0,
        };
        let front_end = FrontEnd::silent(served.connect()?, options)?;
        let peer = &front_end.peer;
        peer.tell(code::SET_OWNER, &[], &[])?;
        let available = peer.ask_number(code::GET_FEATURES)?;
        let protocol = peer.ask_number(code::GET_PROTOCOL_FEATURES)? & PROTOCOL;
        peer.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let (_ours, theirs) = UnixStream::pair()?;
        peer.tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        assert_eq!(peer.ask_number(code::GET_QUEUE_NUM)?, 256);
        Ok(Crosvm {
            front_end,
            available,
            acked: PROTOCOL_FEATURES,
        })
    }

    /// ack_features: once for each half the driver writes, and what is acked adds up.
    fn ack_features(&mut self, features: u64) -> Outcome {
        self.acked |= features & self.available;
        let acked = self.acked.to_ne_bytes();
        Ok(self.front_end.peer.tell(code::SET_FEATURES, &acked, &[])?)
    }

    /// activate: the table, then one ring after the other, enabled as it is described.
    fn activate(&self) -> Outcome {
        let FrontEnd {
            peer, ram, vrings, ..
        } = &self.front_end;
        let table = [words(&[1, 0]), region_payload(ram.numbers())].concat();
        peer.tell(code::SET_MEM_TABLE, &table, &[ram.fd()])?;
        for (index, vring) in (0_u32..).zip(vrings) {
            let file = u64::from(index).to_ne_bytes();
            let size = u32::from(vring.ring.size());
            let base = u32::from(vring.ring.next_avail());
            peer.tell(code::SET_VRING_NUM, &words(&[index, size]), &[])?;
            peer.tell(code::SET_VRING_ADDR, &vring.addr_payload(index), &[])?;
            peer.tell(code::SET_VRING_BASE, &words(&[index, base]), &[])?;
            peer.tell(code::SET_VRING_CALL, &file, &[borrow(&vring.call)])?;
            peer.tell(code::SET_VRING_KICK, &file, &[borrow(&vring.kick)])?;
            peer.tell(code::SET_VRING_ENABLE, &words(&[index, 1]), &[])?;
        }
        Ok(())
    }

    /// deactivate_vring, for each; where each stopped.
    fn deactivate(&self) -> Outcome<Vec<u32>> {
        let mut bases = Vec::new();
        for index in 0..u32::from(QUEUES) {
            self.front_end
                .peer
                .tell(code::SET_VRING_ENABLE, &words(&[index, 0]), &[])?;
            bases.push(self.front_end.peer.vring_base(index)?);
        }
        Ok(bases)
    }
}

#[test]
fn crosvm_boots_sleeps_wakes_and_resets() -> Outcome {
    let served = Served::start()?;
    let mut crosvm = Crosvm::new(&served)?;
    // read_config: the guest's own accesses, each a message.
    let whole = crosvm.front_end.peer.config(0, 60)?;
    for (offset, size) in [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (20, 4),
        (24, 1),
        (25, 1),
        (34, 2),
    ] {
        let part = crosvm.front_end.peer.config(offset, size)?;
        let start = usize::try_from(offset)?;
        assert_eq!(
            Some(part.as_slice()),
            whole.get(start..start + usize::try_from(size)?)
        );
    }
    for boot in 0..2 {
        crosvm.ack_features(1 << 1 | 1 << 2 | 1 << 9)?;
        crosvm.ack_features(1 << 32)?;
        crosvm.activate()?;
        crosvm.front_end.verify(120 + boot)?;

        // virtio_sleep and virtio_wake: the rings go on where they were.
        let bases = crosvm.deactivate()?;
        for (base, vring) in bases.iter().zip(&crosvm.front_end.vrings) {
            assert_eq!(*base, u32::from(vring.ring.next_avail()));
        }
        crosvm.activate()?;
        crosvm.front_end.verify(122 + boot)?;

        // write_config: the writeback byte, without flags.
        let payload = [words(&[32, 1, 0]), vec![1]].concat();
        crosvm
            .front_end
            .peer
            .tell(code::SET_CONFIG, &payload, &[])?;

        crosvm.deactivate()?;
        for vring in &mut crosvm.front_end.vrings {
            vring.ring.start_over()?;
        }
    }
    served.stop()
}
