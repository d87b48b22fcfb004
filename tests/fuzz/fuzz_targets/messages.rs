//! Any messages with any descriptors: the socket, the decoder, the session and its answers.
//!
//! The input is a list of records: a kind, a byte of attributes, a length, and as many bytes.
//! Kinds up to 63 are messages of that code; the attributes are the number of descriptors (four
//! bits), their kind (two bits), and NEED_REPLY. Other kinds send raw bytes, hold the workers'
//! reports back, or let them through. The workers are notes that check what they are told.
#![no_main]

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

use blockdev::open;
use iov_iter::MemoryTable;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vublk::blk::{BlkDevice, BlkOptions};
use vublk::proto::Connection;
use vublk::session::{Crew, Link, Remains, Wants};
use vublk::worker::{
    ClaimEnd, Command, DeviceId, Errand, Outcome, Report, StopMode, TableEpoch, VringId,
};

const WORKERS: usize = 2;
const RAW: u8 = 64;
const HOLD_REPORTS: u8 = 65;
const LET_REPORTS: u8 = 66;

/// What a front end hands over: an eventfd, 64 KiB of memory, a file, a socket.
static FDS: LazyLock<[OwnedFd; 4]> = LazyLock::new(|| {
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, 64 << 10).expect("a memfd of 64 KiB");
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty()).expect("/dev/null");
    let (socket, other_end) = UnixStream::pair().expect("a socket");
    // Writing to a socket that nobody has ends a process in which Rust did not start.
    std::mem::forget(other_end);
    [event, memory, null, socket.into()]
});

static DEVICE: LazyLock<Arc<BlkDevice>> = LazyLock::new(|| {
    let storage = open::null(1 << 20, 512).expect("a null device");
    let options = BlkOptions {
        serial: "fuzz".into(),
        num_queues: 1,
    };
    Arc::new(BlkDevice::new(DeviceId(0), storage, &options).expect("a device"))
});

fuzz_target!(|data: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("a socketpair");
    ours.set_nonblocking(true).expect("a non-blocking socket");
    let mut run = Run {
        link: Link::new(
            Connection::new(theirs),
            DEVICE.clone(),
            Remains::new(WORKERS),
        ),
        notes: Notes::default(),
        socket: ours,
        sent: 0,
        replies: 0,
    };
    run.play(data);
    run.end();
});

struct Run {
    link: Link,
    notes: Notes,
    socket: UnixStream,
    sent: usize,
    replies: usize,
}

impl Run {
    fn play(&mut self, mut data: &[u8]) {
        let mut through = true;
        while let Some((&[kind, attributes, len], rest)) = data.split_first_chunk::<3>() {
            let (payload, rest) = rest.split_at(usize::from(len).min(rest.len()));
            data = rest;
            match kind {
                HOLD_REPORTS => through = false,
                LET_REPORTS => through = true,
                RAW => self.send(payload, &[]),
                code => self.message(u32::from(code), attributes, payload),
            }
            self.link.readable(&self.notes);
            while through && self.report() {
                self.link.readable(&self.notes);
            }
            self.take_replies();
            if self.link.wants() == Wants::Nothing {
                return;
            }
        }
    }

    fn message(&mut self, code: u32, attributes: u8, payload: &[u8]) {
        let flags = 1 | u32::from(attributes >> 3 & 8);
        let size = u32::try_from(payload.len()).expect("at most 255");
        let mut bytes: Vec<u8> = [code, flags, size]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        bytes.extend_from_slice(payload);
        let fd = FDS[usize::from(attributes >> 4 & 3)].as_fd().as_raw_fd();
        self.send(&bytes, &vec![fd; usize::from(attributes & 15)]);
    }

    fn send(&mut self, bytes: &[u8], fds: &[RawFd]) {
        // A message is at least a header long; the daemon may take what was sent as several.
        self.sent += 1 + bytes.len() / 12;
        // A socket that is full or closed takes nothing, which is as good an input.
        let _ = self.socket.send_with_fds(&[bytes], fds);
    }

    /// Lets one report through, if there is one.
    fn report(&mut self) -> bool {
        let next = self.notes.reports.borrow_mut().pop_front();
        if let Some((worker, report)) = next {
            self.notes.stopped(report);
            self.link.reported(worker, report, &self.notes);
        }
        next.is_some()
    }

    /// Every reply is whole, and marked as QEMU compares it.
    fn take_replies(&mut self) {
        let mut header = [0; 12];
        while self.socket.read_exact(&mut header).is_ok() {
            let word = |at: usize| header[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
            assert_eq!(word(4), 5);
            let mut payload = vec![0; word(8) as usize];
            assert!(payload.len() <= 12 + 256);
            self.socket
                .read_exact(&mut payload)
                .expect("a reply is sent whole");
            self.replies += 1;
            assert!(self.replies <= self.sent, "an answer that nobody asked for");
        }
    }

    /// Whatever came before, the front end leaves, and everything comes back.
    fn end(mut self) {
        self.link.hung_up(&self.notes);
        while self.report() {}
        assert_eq!(self.link.wants(), Wants::Nothing);
        self.link.close();
        assert!(self.link.is_over(), "{:?}", self.link.waits_for());
        assert!(
            self.notes
                .vrings
                .borrow()
                .values()
                .all(|life| *life == Life::Stopped)
        );
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Stopped,
    Started,
    Stopping,
}

/// Workers that do at once what they are told, and check that it can be told to a real one.
#[derive(Default)]
struct Notes {
    reports: RefCell<VecDeque<(usize, Report)>>,
    vrings: RefCell<HashMap<VringId, Life>>,
    epochs: [Cell<u64>; WORKERS],
}

impl Notes {
    fn tell(&self, worker: usize, report: Report) {
        self.reports.borrow_mut().push_back((worker, report));
    }

    fn stop(&self, worker: usize, id: VringId, mode: StopMode) {
        let mut vrings = self.vrings.borrow_mut();
        let life = vrings
            .get_mut(&id)
            .expect("only what was started is stopped");
        match (*life, mode) {
            (Life::Started, _) => {
                *life = Life::Stopping;
                self.tell(worker, Report::Stopped { id, next_avail: 0 });
            }
            (Life::Stopping, StopMode::Abandon | StopMode::Suspend) => {}
            (Life::Stopping, StopMode::Drain) | (Life::Stopped, _) => {
                panic!("{id:?} is {life:?} and told to {mode:?}")
            }
        }
    }

    /// A vring that has stopped may be started again.
    fn stopped(&self, report: Report) {
        if let Report::Stopped { id, .. } = report {
            self.vrings.borrow_mut().insert(id, Life::Stopped);
        }
    }

    fn started(&self, id: VringId) {
        assert_eq!(self.vrings.borrow().get(&id), Some(&Life::Started));
    }
}

impl Crew for Notes {
    fn count(&self) -> usize {
        WORKERS
    }

    fn owner(&self, id: VringId) -> usize {
        usize::from(id.index) % WORKERS
    }

    fn send(&self, worker: usize, command: Command) {
        match command {
            Command::SetTable {
                device,
                epoch: TableEpoch(epoch),
                ..
            } => {
                assert!(
                    self.epochs[worker].replace(epoch) < epoch,
                    "tables are numbered upwards"
                );
                self.tell(worker, Report::Adopted(device, TableEpoch(epoch)));
                self.tell(worker, Report::Released(device, TableEpoch(epoch)));
            }
            Command::Start(id, setup) => {
                assert!(setup.size.is_power_of_two());
                assert_eq!(worker, self.owner(id));
                let before = self.vrings.borrow_mut().insert(id, Life::Started);
                assert!(matches!(before, None | Some(Life::Stopped)));
            }
            Command::Stop(id, mode) => self.stop(worker, id, mode),
            Command::Enable(id, _)
            | Command::SetKick(id, _)
            | Command::SetCall(id, _)
            | Command::SetErr(id, _)
            | Command::SetUsedLog(id, _) => self.started(id),
            Command::Fence(device, fence) => self.tell(worker, Report::Fenced(device, fence)),
            Command::SetFeatures(..)
            | Command::SetLog(..)
            | Command::Resize(_)
            | Command::SetPins(..)
            | Command::Quit => {}
        }
    }

    fn pin(&self, _device: DeviceId, _epoch: TableEpoch, _table: Arc<MemoryTable>) {
        panic!("no device here pins its memory");
    }

    fn errand(&self, device: DeviceId, errand: Errand) {
        let outcome = match errand {
            Errand::Claim(_) => Outcome::Claimed(ClaimEnd::Held),
            Errand::GiveUpClaim => return,
            Errand::Release => Outcome::Released,
            Errand::Sync => Outcome::Synced(true),
            Errand::Refresh => Outcome::Refreshed,
        };
        self.tell(0, Report::Helper(device, outcome));
    }
}
