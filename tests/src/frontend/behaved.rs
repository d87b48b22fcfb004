//! A front end that behaves.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vublk::fds::borrow;

use super::peer::{NEED_REPLY, PeerError, VERSION, code, region_payload, words};
use super::{Descriptor, DirtyLog, DriverRing, GuestRam, InflightFile, Kind, Outcome, PAGE, Peer};

/// VIRTIO_F_VERSION_1.
const VERSION_1: u64 = 1 << 32;
/// VHOST_F_LOG_ALL.
pub const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// How long a request may take before the test is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a request's data at most.
const DATA: u64 = 64 << 10;
/// Bytes between the places of two requests: header, status and data.
const STRIDE: u64 = DATA + 4096;

/// How the front end is set up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Vrings.
    pub vrings: u16,
    /// Entries of each.
    pub size: u16,
    /// Virtio features beside VERSION_1 and PROTOCOL_FEATURES.
    pub features: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            vrings: 1,
            size: 16,
            features: 0,
        }
    }
}

/// One vring with its events.
#[derive(Debug)]
pub struct Vring {
    /// The driver's half.
    pub ring: DriverRing,
    /// Its kick.
    pub kick: EventFd,
    /// Its call.
    pub call: EventFd,
    /// Its err.
    pub err: EventFd,
    /// Whether writes to the used ring are to be logged (VHOST_VRING_F_LOG).
    pub log_used: bool,
    /// The guest address that the log knows the used ring by.
    pub log_guest: u64,
    /// Where its requests' bytes are.
    buffers: u64,
    /// What came back before it was asked for, by head.
    came: HashMap<u16, u32>,
}

/// A front end that behaves.
#[derive(Debug)]
pub struct FrontEnd {
    /// Its socket.
    pub peer: Peer,
    /// Its memory.
    pub ram: Rc<GuestRam>,
    /// Its vrings.
    pub vrings: Vec<Vring>,
    /// The features of its options.
    pub features: u64,
}

impl FrontEnd {
    /// A handshake, memory and started vrings.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn start(peer: Peer, options: Options) -> Outcome<FrontEnd> {
        let mut front_end = FrontEnd::attach(peer, options)?;
        for index in 0..options.vrings {
            front_end.start_vring(index, 0)?;
        }
        Ok(front_end)
    }

    /// A handshake and memory; the vrings are not started.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn attach(peer: Peer, options: Options) -> Outcome<FrontEnd> {
        let front_end = FrontEnd::silent(peer, options)?;
        front_end.negotiate(options.features)?;
        front_end.share_memory()?;
        Ok(front_end)
    }

    /// Memory and rings, and a daemon that has not heard a word.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn silent(peer: Peer, options: Options) -> Outcome<FrontEnd> {
        let per_vring =
            DriverRing::new(&Rc::new(GuestRam::new(4096)?), options.size, 0).end() + 16 * STRIDE;
        let ram = Rc::new(GuestRam::new(per_vring * u64::from(options.vrings))?);
        let mut vrings = Vec::new();
        for index in 0..options.vrings {
            let ring = DriverRing::new(&ram, options.size, per_vring * u64::from(index));
            let event = || EventFd::new(EFD_NONBLOCK);
            vrings.push(Vring {
                buffers: ring.end(),
                log_guest: ring.used_addr(),
                ring,
                kick: event()?,
                call: event()?,
                err: event()?,
                log_used: false,
                came: HashMap::new(),
            });
        }
        Ok(FrontEnd {
            peer,
            ram,
            vrings,
            features: options.features,
        })
    }

    /// Owner, features and protocol features: everything offered.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn negotiate(&self, features: u64) -> Outcome {
        let FrontEnd { peer, .. } = self;
        peer.tell(code::SET_OWNER, &[], &[])?;
        let protocol = peer.ask_number(code::GET_PROTOCOL_FEATURES)?;
        peer.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[])?;
        let acked = self.acked(features)?;
        Ok(peer.confirm(code::SET_FEATURES, &acked.to_ne_bytes(), &[])?)
    }

    /// Gives the daemon all memory, in one table.
    ///
    /// # Errors
    /// When it refuses.
    pub fn share_memory(&self) -> Outcome {
        let mut payload = words(&[1, 0]);
        payload.extend(region_payload(self.ram.numbers()));
        Ok(self
            .peer
            .confirm(code::SET_MEM_TABLE, &payload, &[self.ram.fd()])?)
    }

    /// Describes a vring, starts and enables it.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn start_vring(&mut self, index: u16, base: u16) -> Outcome {
        self.describe_vring(index, base)?;
        self.kick_vring(index, NEED_REPLY)?;
        self.vring_kicked(index)
    }

    /// Describes a vring, so that only its kick is missing.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn describe_vring(&self, index: u16, base: u16) -> Outcome {
        let FrontEnd { peer, vrings, .. } = self;
        let vring = vrings.get(usize::from(index)).ok_or("no such vring")?;
        let n = u32::from(index);
        peer.confirm(
            code::SET_VRING_NUM,
            &words(&[n, u32::from(vring.ring.size())]),
            &[],
        )?;
        peer.confirm(code::SET_VRING_BASE, &words(&[n, u32::from(base)]), &[])?;
        peer.confirm(code::SET_VRING_ADDR, &vring.addr_payload(n), &[])?;
        let file = u64::from(n).to_ne_bytes();
        peer.confirm(code::SET_VRING_ERR, &file, &[borrow(&vring.err)])?;
        Ok(peer.confirm(code::SET_VRING_CALL, &file, &[borrow(&vring.call)])?)
    }

    /// Sends a vring's kick, which starts it, with these flags beside the version. An answer is not
    /// waited for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kick_vring(&self, index: u16, flags: u32) -> Outcome {
        let vring = self.vrings.get(usize::from(index)).ok_or("no such vring")?;
        let file = u64::from(index).to_ne_bytes();
        let kick = [borrow(&vring.kick)];
        Ok(self
            .peer
            .send(code::SET_VRING_KICK, VERSION | flags, &file, &kick)?)
    }

    /// Waits for the answer to a vring's kick, and enables the vring.
    ///
    /// # Errors
    /// When the daemon refuses either.
    pub fn vring_kicked(&self, index: u16) -> Outcome {
        let answer = self.peer.reply_to(code::SET_VRING_KICK)?;
        if answer.payload != 0_u64.to_ne_bytes() {
            return Err(PeerError::Refused(code::SET_VRING_KICK).into());
        }
        let enable = words(&[u32::from(index), 1]);
        Ok(self.peer.confirm(code::SET_VRING_ENABLE, &enable, &[])?)
    }

    /// Goes on with another daemon, or over another connection, as a front end does that
    /// reconnects: everything is said again, the in-flight region is handed over, and vrings start
    /// at a base that means nothing.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn reconnect(&mut self, peer: Peer, features: u64, inflight: &InflightFile) -> Outcome {
        self.peer = peer;
        self.negotiate(features)?;
        inflight.set(&self.peer)?;
        self.share_memory()?;
        for index in 0..u16::try_from(self.vrings.len())? {
            self.start_vring(index, 0x1234)?;
        }
        Ok(())
    }

    /// Sets a log, and has the daemon log everything in it, used rings included.
    ///
    /// # Errors
    /// When the daemon refuses any of it.
    pub fn start_logging(&mut self, log: &DirtyLog, features: u64) -> Outcome {
        self.set_log(log)?;
        let acked = self.acked(features | LOG_ALL)?;
        self.peer
            .confirm(code::SET_FEATURES, &acked.to_ne_bytes(), &[])?;
        self.log_used_rings(true)
    }

    /// Sets a log, or swaps it.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn set_log(&self, log: &DirtyLog) -> Outcome {
        let payload = log.payload();
        self.peer.tell(code::SET_LOG_BASE, &payload, &[log.fd()])?;
        let reply = self.peer.reply_to(code::SET_LOG_BASE)?.payload;
        if reply != payload {
            return Err(format!("SET_LOG_BASE was answered with {reply:?}").into());
        }
        Ok(())
    }

    /// Has the daemon log nothing any more.
    ///
    /// # Errors
    /// When it refuses.
    pub fn stop_logging(&mut self, features: u64) -> Outcome {
        let acked = self.acked(features)?;
        self.peer
            .confirm(code::SET_FEATURES, &acked.to_ne_bytes(), &[])?;
        self.log_used_rings(false)
    }

    /// Switches the logging of every used ring.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn log_used_rings(&mut self, log_used: bool) -> Outcome {
        let FrontEnd { peer, vrings, .. } = self;
        for (index, vring) in (0..).zip(vrings) {
            vring.log_used = log_used;
            peer.confirm(code::SET_VRING_ADDR, &vring.addr_payload(index), &[])?;
        }
        Ok(())
    }

    /// Makes sure that the pages that were changed are marked, and no others but those of used
    /// rings that are logged. A worker marks these whenever it goes to sleep and asks for kicks,
    /// which may be long after its last answer was seen, and also where there was no request.
    ///
    /// # Panics
    /// When a page is missing, or one is marked that nobody changed.
    #[track_caller]
    pub fn assert_marked(&self, marked: &[u64], changed: &[u64]) {
        let of_ring = |page: &u64| {
            let mut rings = self.vrings.iter().map(Vring::logged_pages);
            rings.any(|ring| ring.contains(page))
        };
        let is_missing = |page: &&u64| !marked.contains(page);
        let is_too_many = |page: &&u64| !changed.contains(page) && !of_ring(page);
        let missing: Vec<_> = changed.iter().filter(is_missing).collect();
        let more: Vec<_> = marked.iter().filter(is_too_many).collect();
        assert!(
            missing.is_empty() && more.is_empty(),
            "{marked:?} are marked and {changed:?} were changed: {missing:?} are missing, and \
             {more:?} are too many"
        );
    }

    /// What is acknowledged of the offered features.
    fn acked(&self, features: u64) -> Outcome<u64> {
        let offered = self.peer.ask_number(code::GET_FEATURES)?;
        Ok(offered & (VERSION_1 | PROTOCOL_FEATURES | features))
    }

    /// A vring.
    ///
    /// # Errors
    /// When there is none of this index.
    pub fn vring(&mut self, index: u16) -> Outcome<&mut Vring> {
        Ok(self
            .vrings
            .get_mut(usize::from(index))
            .ok_or("no such vring")?)
    }

    /// Makes a request available in one of sixteen places, and kicks. Its head is three times the
    /// place, so that a ring of 16 has room for the first five.
    ///
    /// # Errors
    /// When it does not fit memory.
    pub fn submit(
        &mut self,
        index: u16,
        place: u16,
        request: (Kind, u64),
        data: &[u8],
    ) -> Outcome<u16> {
        let ram = self.ram.clone();
        let vring = self.vring(index)?;
        let (kind, sector) = request;
        let [header, status, bytes] = vring.places(place);
        ram.write(header, &kind.header(sector))?;
        ram.write(status, &[0xff])?;
        let len = u32::try_from(data.len())?;
        let mut chain = vec![Descriptor::source(header, 16)];
        match kind {
            Kind::Out => {
                ram.write(bytes, data)?;
                chain.push(Descriptor::source(bytes, len));
            }
            Kind::In | Kind::GetId => {
                ram.write(bytes, data)?;
                chain.push(Descriptor::dest(bytes, len));
            }
            Kind::Flush => {}
        }
        chain.push(Descriptor::dest(status, 1));
        let head = place * 3;
        vring.ring.offer_chain(head, &chain)?;
        vring.kick.write(1)?;
        Ok(head)
    }

    /// Waits for a request; its status byte.
    ///
    /// # Errors
    /// When it does not come back for a long time.
    pub fn wait(&mut self, index: u16, head: u16) -> Outcome<u8> {
        let ram = self.ram.clone();
        let vring = self.vring(index)?;
        vring.wait_used(head)?;
        let [_, status, _] = vring.places(head / 3);
        Ok(ram.read(status, 1)?.first().copied().unwrap_or(0xff))
    }

    /// One request in the first place, from kick to status.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn request(&mut self, index: u16, request: (Kind, u64), data: &[u8]) -> Outcome<u8> {
        let head = self.submit(index, 0, request, data)?;
        self.wait(index, head)
    }

    /// Writes a sector.
    ///
    /// # Errors
    /// When its status is not OK.
    pub fn write(&mut self, index: u16, sector: u64, data: &[u8]) -> Outcome {
        match self.request(index, (Kind::Out, sector), data)? {
            0 => Ok(()),
            status => Err(format!("writing sector {sector}: status {status}").into()),
        }
    }

    /// Reads sectors.
    ///
    /// # Errors
    /// When its status is not OK.
    pub fn read(&mut self, index: u16, sector: u64, count: usize) -> Outcome<Vec<u8>> {
        match self.request(index, (Kind::In, sector), &vec![0xa5; count])? {
            0 => {
                let [_, _, bytes] = self.vring(index)?.places(0);
                self.ram.read(bytes, count)
            }
            status => Err(format!("reading sector {sector}: status {status}").into()),
        }
    }

    /// Writes, reads back and flushes on every vring, with bytes that differ by `seed`.
    ///
    /// # Errors
    /// When anything is not as written.
    pub fn verify(&mut self, seed: u64) -> Outcome {
        let mut random = fastrand::Rng::with_seed(seed);
        for index in 0..u16::try_from(self.vrings.len())? {
            for sectors in [1_usize, 8, 127] {
                let data: Vec<u8> = (0..sectors * 512).map(|_| random.u8(..)).collect();
                let sector = random.u64(..4096);
                self.write(index, sector, &data)?;
                if self.request(index, (Kind::Flush, 0), &[])? != 0 {
                    return Err("FLUSH failed".into());
                }
                if self.read(index, sector, data.len())? != data {
                    return Err(format!("sector {sector} is not as it was written").into());
                }
            }
        }
        Ok(())
    }
}

impl Vring {
    /// Guest addresses of the header, status and data of a place.
    #[must_use]
    pub fn places(&self, place: u16) -> [u64; 3] {
        let base = self.buffers + u64::from(place) * STRIDE;
        [base, base + 16, base + 4096]
    }

    /// The payload of SET_VRING_ADDR.
    #[must_use]
    pub fn addr_payload(&self, index: u32) -> Vec<u8> {
        let mut payload = words(&[index, u32::from(self.log_used)]);
        for address in self.ring.addresses() {
            payload.extend(address.to_ne_bytes());
        }
        payload.extend(self.log_guest.to_ne_bytes());
        payload
    }

    /// The pages by which the log knows the used ring; none if it is not logged.
    #[must_use]
    pub fn logged_pages(&self) -> Range<u64> {
        if !self.log_used {
            return 0..0;
        }
        let end = self.log_guest + self.ring.used_bytes();
        self.log_guest / PAGE..end.div_ceil(PAGE)
    }

    /// Waits until a head was used; the length that was reported.
    ///
    /// # Errors
    /// When it does not come for a long time.
    pub fn wait_used(&mut self, head: u16) -> Outcome<u32> {
        loop {
            while let Some((head, len)) = self.ring.take_used()? {
                self.came.insert(u16::try_from(head)?, len);
            }
            if let Some(len) = self.came.remove(&head) {
                return Ok(len);
            }
            wait_readable(&self.call)?;
        }
    }
}

/// Waits until an event was signalled, and takes the signal.
///
/// # Errors
/// When it does not come for a long time.
pub fn wait_readable(event: &EventFd) -> Outcome {
    let fd = borrow(event);
    let patience = Timespec {
        tv_sec: i64::try_from(PATIENCE.as_secs())?,
        tv_nsec: 0,
    };
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    if poll(&mut polled, Some(&patience))? == 0 {
        return Err("nothing was signalled for a long time".into());
    }
    event.read()?;
    Ok(())
}
