use blockdev::{Buffers, Progress};

use super::*;
use crate::blk::Pin;

/// Slots of a mebibyte: one for each region of these tests.
const PIN: Pin = Pin::Registered { slot_shift: 20 };

/// A session of a device whose memory is pinned, with one region.
fn pinned() -> (Session, Notes) {
    let options = BlkOptions {
        serial: "test".into(),
        num_queues: 4,
    };
    let storage = open::memory(1 << 20, 512).unwrap();
    let device = BlkDevice::new(DEVICE, storage, &options).unwrap();
    let device = device.with_pin(PIN);
    device.pins().go_live();
    let mut session = Session::new(Arc::new(device), Epochs::new(2));
    let crew = Notes::default();
    let acked = Message::SetProtocolFeatures(protocol_offered());
    session.send(acked, &crew).unwrap();
    let table = Message::SetMemTable(vec![(region(0), ram())]);
    let step = session.send(table, &crew).unwrap();
    let wait = Wait::Released(TableEpoch(1));
    assert_eq!(step, Step::Wait(wait));
    release(&mut session, &crew, 1);
    assert!(!session.settled(wait), "an earlier table may be registered");
    unpin(&mut session, &crew, 1);
    assert!(session.settled(wait));
    crew.take();
    assert_eq!(crew.pins.take(), [(TableEpoch(1), 1)]);
    (session, crew)
}

/// The pinning thread has given back what is not in this table.
fn unpin(session: &mut Session, crew: &Notes, epoch: u64) {
    let outcome = Outcome::Unpinned(TableEpoch(epoch));
    session.reported(usize::MAX, Report::Helper(DEVICE, outcome), crew);
}

#[test]
fn an_addition_is_answered_before_it_is_pinned_and_a_removal_after_it_was_given_back() {
    let (mut session, crew) = pinned();
    let added = session
        .send(Message::AddMemReg(region(1), ram()), &crew)
        .unwrap();
    let Step::Wait(added) = added else {
        panic!("{added:?}")
    };
    for worker in 0..2 {
        session.reported(worker, Report::Adopted(DEVICE, TableEpoch(2)), &crew);
    }
    assert!(session.settled(added));
    assert_eq!(crew.pins.take(), [], "earlier tables are still in use");
    release(&mut session, &crew, 2);
    assert_eq!(crew.pins.take(), [(TableEpoch(2), 2)]);

    let removed = session.send(Message::RemMemReg(region(1)), &crew).unwrap();
    let Step::Wait(removed) = removed else {
        panic!("{removed:?}")
    };
    let released = Report::Released(DEVICE, TableEpoch(3));
    session.reported(0, released, &crew);
    assert_eq!(crew.pins.take(), [], "a worker has it still");
    session.reported(1, released, &crew);
    assert_eq!(crew.pins.take(), [(TableEpoch(3), 1)]);
    unpin(&mut session, &crew, 2);
    assert!(!session.settled(removed), "that was for an earlier table");
    assert_eq!(
        session.missing(removed).to_string(),
        "pinned guest memory to be given back"
    );
    unpin(&mut session, &crew, 3);
    assert!(session.settled(removed));
    assert_eq!(crew.pins.take(), [], "each table is sent once");
}

#[test]
fn a_session_is_over_when_its_memory_is_pinned_no_longer() {
    let (mut session, crew) = pinned();
    session.end(StopMode::Abandon, &crew);
    release(&mut session, &crew, 2);
    assert_eq!(crew.pins.take(), [(TableEpoch(2), 0)]);
    assert!(!session.is_over());
    unpin(&mut session, &crew, 2);
    assert!(session.is_over());
    // The next one begins with nothing pinned, and asks for nothing.
    let device = session.device.clone();
    let mut next = Session::new(device, session.into_epochs());
    next.reported(0, Report::Fenced(DEVICE, 0), &crew);
    assert_eq!(crew.pins.take(), []);
}

#[test]
fn what_is_registered_is_shared_unless_some_of_it_is_gone() {
    let (mut session, crew) = pinned();
    let mut buffers = Buffers::new(0..4, 20).unwrap();
    let registered = buffers.register(&session.table.regions()[0]).unwrap();
    assert_eq!(registered, Progress::Complete);
    let share = |session: &mut Session, lease| {
        session.device.pins().put(lease);
        let report = Report::Helper(DEVICE, Outcome::Pinned);
        session.reported(usize::MAX, report, &crew);
        session.reported(usize::MAX, report, &crew);
        crew.take()
    };
    let told = share(&mut session, buffers.lend());
    assert!(
        matches!(
            &told[..],
            [(0, Command::SetPins(DEVICE, lease)), (1, Command::SetPins(..))]
                if lease.regions().len() == 1
        ),
        "{told:?}"
    );
    drop(told);
    session.send(Message::RemMemReg(region(0)), &crew).unwrap();
    crew.take();
    // A worker that was told of the removal would take the slots it has given back again.
    assert!(share(&mut session, buffers.lend()).is_empty());
    // The same numbers again are another mapping.
    release(&mut session, &crew, 2);
    let again = Message::AddMemReg(region(0), ram());
    session.send(again, &crew).unwrap();
    crew.take();
    assert!(share(&mut session, buffers.lend()).is_empty());
}
