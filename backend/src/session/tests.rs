use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsFd;

use blockdev::{Abort, open};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::blk::BlkOptions;
use crate::proto::{ConfigRange, InFlight, Malformed, RegionMessage};
use crate::session::features::OfferedBy;
use crate::vring::Addresses;
use crate::worker::{ClaimEnd, Command, DeviceId, Enablement, Errand, Outcome, VringId};

mod log;
mod pins;

const DEVICE: DeviceId = DeviceId(0);
const SIZE: u64 = 1 << 20;
const PROTOCOL: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

/// Two workers that only note what they are told.
#[derive(Default)]
struct Notes {
    told: RefCell<Vec<(usize, Command)>>,
    errands: RefCell<Vec<Errand>>,
    pins: RefCell<Vec<(TableEpoch, usize)>>,
}

impl Crew for Notes {
    fn count(&self) -> usize {
        2
    }

    fn owner(&self, id: VringId) -> usize {
        usize::from(id.index) % 2
    }

    fn send(&self, worker: usize, command: Command) {
        self.told.borrow_mut().push((worker, command));
    }

    fn errand(&self, _device: DeviceId, errand: Errand) {
        self.errands.borrow_mut().push(errand);
    }

    fn pin(&self, _device: DeviceId, epoch: TableEpoch, table: Arc<MemoryTable>) {
        self.pins.borrow_mut().push((epoch, table.regions().len()));
    }
}

impl Notes {
    fn take(&self) -> Vec<(usize, Command)> {
        self.told.take()
    }

    /// What they were told, the fences left out.
    fn take_but_fences(&self) -> Vec<(usize, Command)> {
        let mut told = self.take();
        told.retain(|(_, command)| !matches!(command, Command::Fence(..)));
        told
    }
}

fn session() -> (Session, Notes) {
    let options = BlkOptions {
        serial: "test".into(),
        num_queues: 4,
    };
    let storage = open::memory(1 << 20, 512).unwrap();
    let device = BlkDevice::new(DEVICE, storage, &options).unwrap();
    (
        Session::new(Arc::new(device), Epochs::new(2)),
        Notes::default(),
    )
}

fn ram() -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, SIZE).unwrap();
    fd
}

fn region(place: u64) -> RegionMessage {
    RegionMessage {
        guest_addr: place * SIZE,
        size: SIZE,
        front_end_addr: 0x7000_0000 + place * SIZE,
        mmap_offset: 0,
    }
}

fn event() -> OwnedFd {
    let event = EventFd::new(0).unwrap();
    crate::fds::borrow(&event).try_clone_to_owned().unwrap()
}

/// Which message this is on the wire.
fn code(message: &Message) -> Code {
    Code(match message {
        Message::GetFeatures => 1,
        Message::SetFeatures(_) => 2,
        Message::SetOwner => 3,
        Message::ResetOwner => 4,
        Message::SetMemTable(_) => 5,
        Message::SetLogBase { .. } => 6,
        Message::SetLogFd(_) => 7,
        Message::SetVringNum { .. } => 8,
        Message::SetVringAddr { .. } => 9,
        Message::SetVringBase { .. } => 10,
        Message::GetVringBase { .. } => 11,
        Message::SetVringKick { .. } => 12,
        Message::SetVringCall { .. } => 13,
        Message::SetVringErr { .. } => 14,
        Message::GetProtocolFeatures => 15,
        Message::SetProtocolFeatures(_) => 16,
        Message::GetQueueNum => 17,
        Message::SetVringEnable { .. } => 18,
        Message::SetBackendReqFd(_) => 21,
        Message::GetConfig(_) => 24,
        Message::SetConfig(..) => 25,
        Message::GetInflightFd { .. } => 31,
        Message::SetInflightFd(..) => 32,
        Message::ResetDevice => 34,
        Message::GetMaxMemSlots => 36,
        Message::SetDeviceStateFd(..) => 42,
        Message::CheckDeviceState => 43,
        Message::AddMemReg(..) => 37,
        Message::RemMemReg(_) => 38,
    })
}

impl Session {
    fn send(&mut self, message: Message, crew: &Notes) -> Result<Step, Refusal> {
        let step = self.handle(code(&message), message, crew)?;
        self.run_errands(crew);
        match step {
            Step::Wait(wait @ (Wait::Claimed | Wait::Synced)) => {
                self.settle(wait).expect("the helper is quick")?;
                Ok(Step::DONE)
            }
            step @ (Step::Done(_) | Step::Wait(_)) => Ok(step),
        }
    }

    /// The helper thread does at once what it is told.
    fn run_errands(&mut self, crew: &Notes) {
        for errand in crew.errands.take() {
            let outcome = match errand {
                Errand::Claim(_) => Outcome::Claimed(ClaimEnd::Held),
                Errand::GiveUpClaim => continue,
                Errand::Release => Outcome::Released,
                Errand::Sync => Outcome::Synced(true),
                Errand::Refresh => Outcome::Refreshed,
            };
            self.reported(usize::MAX, Report::Helper(DEVICE, outcome), crew);
        }
    }

    fn settled(&mut self, wait: Wait) -> bool {
        self.settle(wait).is_some()
    }
}

fn addresses() -> Addresses {
    Addresses {
        desc: 0x7000_0000,
        avail: 0x7000_1000,
        used: 0x7000_2000,
    }
}

/// The protocol features of a device that cannot take back what it has in flight.
fn protocol_offered() -> u64 {
    Negotiation::new(Abort::Impossible).offered()
}

fn base_of(index: u32) -> Message {
    Message::GetVringBase {
        index,
        in_flight: InFlight::Done,
    }
}

fn addr(index: u32, addresses: Addresses) -> Message {
    Message::SetVringAddr {
        index,
        addresses,
        log_used: false,
        log_addr: 0,
    }
}

/// A session with memory, all protocol features and a vring 1 that is ready to start.
fn ready() -> (Session, Notes) {
    let (mut session, crew) = session();
    for message in [
        Message::SetProtocolFeatures(protocol_offered()),
        Message::SetFeatures(PROTOCOL | VERSION_1),
        Message::SetVringNum { index: 1, size: 8 },
        Message::SetVringBase { index: 1, base: 5 },
    ] {
        assert_eq!(session.send(message, &crew).unwrap(), Step::DONE);
    }
    let table = Message::SetMemTable(vec![(region(0), ram())]);
    assert_eq!(
        session.send(table, &crew).unwrap(),
        Step::Wait(Wait::Released(TableEpoch(1)))
    );
    release(&mut session, &crew, 1);
    session.send(addr(1, addresses()), &crew).unwrap();
    crew.take();
    (session, crew)
}

fn release(session: &mut Session, crew: &Notes, epoch: u64) {
    for worker in 0..2 {
        session.reported(worker, Report::Adopted(DEVICE, TableEpoch(epoch)), crew);
        session.reported(worker, Report::Released(DEVICE, TableEpoch(epoch)), crew);
    }
}

fn kick(index: u32) -> Message {
    Message::SetVringKick {
        index,
        fd: Some(event()),
    }
}

fn id(index: u16) -> VringId {
    VringId {
        device: DEVICE,
        index,
    }
}

#[test]
fn a_vring_starts_at_its_kick_with_what_it_was_told() {
    let (mut session, crew) = ready();
    let call = Message::SetVringCall {
        index: 1,
        fd: Some(event()),
    };
    session.send(call, &crew).unwrap();
    session.send(kick(1), &crew).unwrap();
    let [(1, Command::Start(started, setup))] = &crew.take()[..] else {
        panic!("not started by its worker");
    };
    assert_eq!(*started, id(1));
    assert_eq!(
        (setup.size, setup.next_avail, setup.addresses),
        (8, 5, addresses())
    );
    assert_eq!(setup.features, PROTOCOL | VERSION_1);
    assert_eq!(setup.enablement, Enablement::Disabled);
    assert!(setup.kick.is_some() && setup.call.is_some() && setup.err.is_none());
}

#[test]
fn a_vring_without_a_kick_is_started_too() {
    let (mut session, crew) = ready();
    session
        .send(Message::SetVringKick { index: 1, fd: None }, &crew)
        .unwrap();
    let [(1, Command::Start(_, setup))] = &crew.take()[..] else {
        panic!("not started");
    };
    assert!(setup.kick.is_none());
}

#[test]
fn a_vring_does_not_start_before_it_has_everything() {
    let (mut session, crew) = session();
    let missing = |session: &mut Session, crew: &Notes| match session.send(kick(1), crew) {
        Err(Refusal::NotReady { index: 1, missing }) => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(&mut session, &crew), "SET_VRING_NUM");
    session
        .send(Message::SetVringNum { index: 1, size: 8 }, &crew)
        .unwrap();
    assert_eq!(missing(&mut session, &crew), "SET_VRING_ADDR");
    session.send(addr(1, addresses()), &crew).unwrap();
    assert_eq!(missing(&mut session, &crew), "SET_VRING_BASE");
    session
        .send(Message::SetVringBase { index: 1, base: 0 }, &crew)
        .unwrap();
    let unmapped = session.send(kick(1), &crew);
    assert!(
        matches!(unmapped, Err(Refusal::Vring { index: 1, .. })),
        "{unmapped:?}"
    );
    assert!(crew.take().is_empty());
}

#[test]
fn a_started_vring_keeps_its_shape_and_takes_new_events() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    crew.take();
    let mut refuse = |message| {
        let refused = session.send(message, &crew);
        assert!(matches!(refused, Err(Refusal::Started(1))), "{refused:?}");
    };
    refuse(Message::SetVringNum { index: 1, size: 16 });
    refuse(Message::SetVringBase { index: 1, base: 0 });
    refuse(addr(
        1,
        Addresses {
            used: 0x7000_3000,
            ..addresses()
        },
    ));
    assert!(crew.take().is_empty());

    // What QEMU sends when a migration begins.
    session.send(addr(1, addresses()), &crew).unwrap();
    let told = crew.take_but_fences();
    assert!(matches!(&told[..], [(1, Command::SetUsedLog(_, None))]));
    session.send(kick(1), &crew).unwrap();
    session
        .send(Message::SetVringCall { index: 1, fd: None }, &crew)
        .unwrap();
    session
        .send(
            Message::SetVringErr {
                index: 1,
                fd: Some(event()),
            },
            &crew,
        )
        .unwrap();
    let told = crew.take();
    assert!(matches!(
        &told[..],
        [
            (1, Command::SetKick(_, Some(_))),
            (1, Command::SetCall(_, None)),
            (1, Command::SetErr(_, Some(_))),
        ]
    ));
}

#[test]
fn get_vring_base_is_answered_when_the_worker_has_stopped() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    crew.take();
    let step = session.send(base_of(1), &crew).unwrap();
    assert_eq!(step, Step::Wait(Wait::Stopped(1)));
    assert!(matches!(
        &crew.take()[..],
        [(1, Command::Stop(_, StopMode::Drain))]
    ));
    assert!(!session.settled(Wait::Stopped(1)));
    session.reported(
        1,
        Report::Stopped {
            id: id(1),
            next_avail: 77,
        },
        &crew,
    );
    let reply = Some(Reply::VringBase { index: 1, base: 77 });
    session.run_errands(&crew);
    let settled = session.settle(Wait::Stopped(1));
    assert_eq!(settled.and_then(Result::ok), Some(reply.clone()));
    let again = session.send(base_of(1), &crew).unwrap();
    assert_eq!(
        again,
        Step::Done(reply),
        "a stopped vring is answered at once"
    );
    assert!(crew.take().is_empty());
}

#[test]
fn vring_indices_end_at_the_limit() {
    let (mut session, crew) = session();
    let last = u32::from(MAX_VRINGS) - 1;
    session
        .send(
            Message::SetVringNum {
                index: last,
                size: 8,
            },
            &crew,
        )
        .unwrap();
    for beyond in [last + 1, 0x1_0000, u32::MAX] {
        for message in [
            Message::SetVringNum {
                index: beyond,
                size: 8,
            },
            addr(beyond, addresses()),
            Message::SetVringBase {
                index: beyond,
                base: 0,
            },
            base_of(beyond),
            Message::SetVringKick {
                index: beyond,
                fd: None,
            },
            Message::SetVringCall {
                index: beyond,
                fd: None,
            },
            Message::SetVringErr {
                index: beyond,
                fd: None,
            },
            Message::SetVringEnable {
                index: beyond,
                enable: 1,
            },
        ] {
            let refused = session.send(message, &crew);
            assert!(
                matches!(refused, Err(Refusal::VringIndex(i)) if i == beyond),
                "{refused:?}"
            );
        }
    }
}

#[test]
fn vring_sizes_are_powers_of_two_up_to_the_limit() {
    let (mut session, crew) = session();
    for size in [1, 2, 256, 32768] {
        session
            .send(Message::SetVringNum { index: 0, size }, &crew)
            .unwrap();
    }
    for size in [0, 3, 100, 32769, 65536, u32::MAX] {
        let refused = session.send(Message::SetVringNum { index: 0, size }, &crew);
        assert!(
            matches!(refused, Err(Refusal::Vring { .. })),
            "{size}: {refused:?}"
        );
    }
    session
        .send(
            Message::SetVringBase {
                index: 0,
                base: 0xffff,
            },
            &crew,
        )
        .unwrap();
    let refused = session.send(
        Message::SetVringBase {
            index: 0,
            base: 0x1_0000,
        },
        &crew,
    );
    assert!(matches!(
        refused,
        Err(Refusal::OutOfRange {
            value: 0x1_0000,
            ..
        })
    ));
}

#[test]
fn features_beyond_the_offered_are_refused() {
    let (mut session, crew) = session();
    let offered = session.offered_features();
    for bit in (0..64)
        .map(|shift| 1_u64 << shift)
        .filter(|bit| offered & bit == 0)
    {
        let refused = session.send(Message::SetFeatures(offered | bit), &crew);
        assert!(matches!(refused, Err(Refusal::Features(beyond)) if beyond == bit));
    }
    session.send(Message::SetFeatures(offered), &crew).unwrap();
    let offered = protocol_offered();
    for bit in (0..64)
        .map(|shift| 1_u64 << shift)
        .filter(|bit| offered & bit == 0)
    {
        let refused = session.send(Message::SetProtocolFeatures(bit), &crew);
        assert!(matches!(refused, Err(Refusal::Features(beyond)) if beyond == bit));
    }
}

#[test]
fn a_front_end_without_protocol_features_has_all_vrings_enabled() {
    let (mut session, crew) = ready();
    session
        .send(Message::SetFeatures(VERSION_1), &crew)
        .unwrap();
    session.send(kick(1), &crew).unwrap();
    let told = crew.take();
    let Some((_, Command::Start(_, setup))) = told.last() else {
        panic!("not started")
    };
    assert_eq!(setup.enablement, Enablement::Enabled);
}

#[test]
fn features_that_shape_a_ring_stay_while_one_is_started() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    session
        .send(Message::SetFeatures(PROTOCOL | VERSION_1), &crew)
        .unwrap();
    let refused = session.send(Message::SetFeatures(PROTOCOL), &crew);
    assert!(
        matches!(refused, Err(Refusal::FeaturesInUse(VERSION_1))),
        "{refused:?}"
    );
}

#[test]
fn enabling_reaches_the_worker_of_a_started_vring_only() {
    let (mut session, crew) = ready();
    let enable = |enable| Message::SetVringEnable { index: 1, enable };
    session.send(enable(1), &crew).unwrap();
    assert!(crew.take().is_empty());
    session.send(kick(1), &crew).unwrap();
    session.send(enable(0), &crew).unwrap();
    let told = crew.take_but_fences();
    let [(1, Command::Start(_, setup)), (1, Command::Enable(_, now))] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(
        (setup.enablement, *now),
        (Enablement::Enabled, Enablement::Disabled)
    );
    let refused = session.send(enable(2), &crew);
    assert!(matches!(
        refused,
        Err(Refusal::OutOfRange {
            what: "enable",
            value: 2
        })
    ));
    session.send(enable(1), &crew).unwrap();
    crew.take();
    session.send(Message::ResetOwner, &crew).unwrap();
    assert!(matches!(
        &crew.take_but_fences()[..],
        [(1, Command::Enable(_, Enablement::Disabled))]
    ));
}

#[test]
fn a_disabled_vring_is_acknowledged_when_its_worker_obeyed() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    let step = session
        .send(
            Message::SetVringEnable {
                index: 1,
                enable: 0,
            },
            &crew,
        )
        .unwrap();
    let Step::Wait(wait @ Wait::Fenced(fence)) = step else {
        panic!("{step:?}")
    };
    for worker in 0..2 {
        assert!(!session.settled(wait), "worker {worker} has not answered");
        session.reported(worker, Report::Fenced(DEVICE, fence), &crew);
    }
    assert!(session.settled(wait));
}

#[test]
fn an_addition_waits_for_adoption_and_a_removal_for_release() {
    let (mut session, crew) = ready();
    let added = session
        .send(Message::AddMemReg(region(1), ram()), &crew)
        .unwrap();
    let Step::Wait(added @ Wait::Adopted(TableEpoch(2))) = added else {
        panic!("{added:?}")
    };
    let tables = crew.take();
    assert!(matches!(
        &tables[..],
        [(0, Command::SetTable { epoch: TableEpoch(2), table, .. }), (1, Command::SetTable { .. })]
            if table.regions().len() == 2
    ));
    session.reported(0, Report::Adopted(DEVICE, TableEpoch(2)), &crew);
    assert!(
        !session.settled(added),
        "one worker of two has not adopted it"
    );
    session.reported(1, Report::Adopted(DEVICE, TableEpoch(2)), &crew);
    assert!(session.settled(added));

    let removed = session.send(Message::RemMemReg(region(1)), &crew).unwrap();
    let Step::Wait(removed @ Wait::Released(TableEpoch(3))) = removed else {
        panic!("{removed:?}")
    };
    for worker in 0..2 {
        session.reported(worker, Report::Adopted(DEVICE, TableEpoch(3)), &crew);
    }
    session.reported(0, Report::Released(DEVICE, TableEpoch(3)), &crew);
    assert!(!session.settled(removed), "a request still uses the region");
    assert_eq!(
        session.missing(removed).to_string(),
        "requests of workers [1] that use earlier guest memory"
    );
    session.reported(1, Report::Released(DEVICE, TableEpoch(3)), &crew);
    assert!(session.settled(removed));

    let gone = session.send(Message::RemMemReg(region(1)), &crew);
    assert!(matches!(gone, Err(Refusal::Memory(_))), "{gone:?}");
    let overlapping = session.send(Message::AddMemReg(region(0), ram()), &crew);
    assert!(
        matches!(overlapping, Err(Refusal::Memory(_))),
        "{overlapping:?}"
    );
}

#[test]
fn a_region_is_known_by_its_addresses_and_size_whatever_its_offset() {
    let (mut session, crew) = ready();
    let removal = RegionMessage {
        mmap_offset: 12345,
        ..region(0)
    };
    assert!(session.send(Message::RemMemReg(removal), &crew).is_ok());
    assert!(session.table.regions().is_empty());
}

#[test]
fn a_device_is_as_at_first_after_a_reset_but_keeps_its_memory() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    session
        .send(Message::SetConfig(writeback(), vec![0]), &crew)
        .unwrap();
    crew.take();
    let step = session.send(Message::ResetDevice, &crew).unwrap();
    assert_eq!(step, Step::Wait(Wait::Reset));
    assert!(matches!(
        &crew.take()[..],
        [(1, Command::Stop(_, StopMode::Drain))]
    ));
    assert!(!session.settled(Wait::Reset));
    session.reported(
        1,
        Report::Stopped {
            id: id(1),
            next_avail: 6,
        },
        &crew,
    );
    assert!(!session.settled(Wait::Reset), "its storage is still ours");
    session.run_errands(&crew);
    assert!(session.settled(Wait::Reset));
    assert_eq!(session.table.regions().len(), 1);
    assert!(matches!(
        session.send(kick(1), &crew),
        Err(Refusal::NotReady {
            missing: "SET_VRING_NUM",
            ..
        })
    ));
    let read = session
        .send(Message::GetConfig(writeback()), &crew)
        .unwrap();
    assert_eq!(read, Step::Done(Some(Reply::Config(writeback(), vec![1]))));
}

/// The one byte of the configuration space that can be written (virtio 5.2.4).
fn writeback() -> ConfigRange {
    ConfigRange {
        offset: 32,
        size: 1,
        flags: 0,
    }
}

#[test]
fn the_end_of_a_session_takes_everything_back_once() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    crew.take();
    session.end(StopMode::Drain, &crew);
    session.end(StopMode::Drain, &crew);
    let told = crew.take();
    assert!(
        matches!(&told[..], [(1, Command::Stop(_, StopMode::Drain))]),
        "{told:?}"
    );
    // The front end hangs up, so that nobody is left to be told what was used.
    session.end(StopMode::Abandon, &crew);
    let told = crew.take();
    assert!(
        matches!(&told[..], [(1, Command::Stop(_, StopMode::Abandon))]),
        "{told:?}"
    );

    let stopped = Report::Stopped {
        id: id(1),
        next_avail: 6,
    };
    session.reported(1, stopped, &crew);
    session.reported(1, stopped, &crew);
    session.run_errands(&crew);
    let told = crew.take();
    assert!(matches!(
        &told[..],
        [(0, Command::SetTable { .. }), (1, Command::SetTable { .. })]
    ));
    assert!(!session.is_over(), "its memory is still there");
    release(&mut session, &crew, 2);
    assert!(session.is_over());
    assert_eq!(session.into_epochs().holders(TableEpoch(3)), [0, 1]);
}

#[test]
fn storage_that_is_given_back_is_taken_again_for_the_next_start() {
    let (mut session, crew) = ready();
    session.send(kick(1), &crew).unwrap();
    session.send(base_of(1), &crew).unwrap();
    let stopped = Report::Stopped {
        id: id(1),
        next_avail: 5,
    };
    session.reported(1, stopped, &crew);
    crew.take();
    // It is still being given back.
    let message = kick(1);
    let step = session.handle(code(&message), message, &crew).unwrap();
    assert_eq!(step, Step::Wait(Wait::Claimed));
    assert!(!session.settled(Wait::Claimed));
    session.run_errands(&crew);
    assert!(
        !session.settled(Wait::Claimed),
        "given back, not taken again"
    );
    assert!(crew.take_but_fences().is_empty());
    session.run_errands(&crew);
    assert!(session.settled(Wait::Claimed));
    assert!(matches!(
        &crew.take_but_fences()[..],
        [(1, Command::Start(..))]
    ));
}

#[test]
fn a_log_that_was_given_back_does_not_keep_a_device_from_starting_again() {
    let (mut session, crew) = ready();
    let log = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&log, 32).unwrap();
    let set = Message::SetLogBase {
        size: 32,
        offset: 0,
        file: log,
    };
    session.send(set, &crew).unwrap();
    let logging = PROTOCOL | VERSION_1 | 1 << 26;
    session.send(Message::SetFeatures(logging), &crew).unwrap();
    session.send(kick(1), &crew).unwrap();
    let larger = || Message::SetMemTable(vec![(region(0), ram()), (region(4), ram())]);
    let refused = session.send(larger(), &crew);
    assert!(matches!(refused, Err(Refusal::LogTooSmall { .. })));
    // QEMU stops the device when its guest reboots, and gives the log back.
    session.send(base_of(1), &crew).unwrap();
    let stopped = Report::Stopped {
        id: id(1),
        next_avail: 5,
    };
    session.reported(1, stopped, &crew);
    session.run_errands(&crew);
    assert!(session.settled(Wait::Stopped(1)));
    session.send(Message::SetFeatures(logging), &crew).unwrap();
    crew.take();
    session.send(larger(), &crew).unwrap();
    // The workers forget it before the vring starts, which is not popped before there is another.
    session.send(kick(1), &crew).unwrap();
    let told = crew.take_but_fences();
    let forgotten = told
        .iter()
        .position(|(_, command)| matches!(command, Command::SetLog(_, None)));
    let started = told
        .iter()
        .position(|(_, command)| matches!(command, Command::Start(..)));
    assert!(forgotten.is_some() && forgotten < started, "{told:?}");
}

#[test]
fn whatever_is_offered_is_handled_and_whatever_is_not_is_refused() {
    let everywhere = |feature: &&Feature| feature.offered_by == OfferedBy::All;
    let brought: Vec<_> = OFFERED
        .iter()
        .filter(everywhere)
        .flat_map(|feature| feature.brings)
        .collect();
    // What only devices that can abort offer is tested with one that can.
    for code in (0..60).map(Code).filter(|code| *code != Code::SKIP_DRAIN) {
        let offered = brought.contains(&&code);
        let (mut session, crew) = session();
        let refused = session.negotiation.check(code).is_err();
        assert_eq!(
            refused, offered,
            "{code} needs its feature exactly if one brings it"
        );
        session
            .send(Message::SetProtocolFeatures(protocol_offered()), &crew)
            .unwrap();
        assert!(session.negotiation.check(code).is_ok(), "{code}");
        if offered {
            let decoded = Message::decode(code, &[0; 3], Vec::new());
            let handled = !matches!(decoded, Err(Malformed::NotOffered | Malformed::Unknown));
            assert!(handled, "{code} is offered, so it is decoded");
        }
    }
}

#[test]
fn a_message_needs_its_feature() {
    let (mut session, crew) = session();
    let everywhere = |feature: &&Feature| feature.offered_by == OfferedBy::All;
    for feature in OFFERED.iter().filter(everywhere) {
        let others = protocol_offered() & !feature.bit;
        session
            .send(Message::SetProtocolFeatures(others), &crew)
            .unwrap();
        for &request in feature.brings {
            let refused = session.negotiation.check(request).unwrap_err();
            assert!(matches!(refused, Refusal::NotNegotiated(name) if name == feature.name));
        }
    }
}

#[test]
fn only_sockets_are_kept_as_the_back_end_channel() {
    let (mut session, crew) = ready();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let refused = session.send(Message::SetBackendReqFd(null), &crew);
    assert!(matches!(refused, Err(Refusal::NotSocket)), "{refused:?}");
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd = socket.as_fd().try_clone_to_owned().unwrap();
    session.send(Message::SetBackendReqFd(fd), &crew).unwrap();
    assert!(session.back_channel.is_some());
    session.end(StopMode::Abandon, &crew);
    assert!(session.back_channel.is_none());
}
