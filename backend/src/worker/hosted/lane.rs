//! A lane: what one thread of the host does for a device.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};

use blockdev::{Completion, Engine, Event, Ring, Wait};
use iov_iter::{Area, MemoryTable, Pools, View, sigbus};
use log::warn;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::custody::Custody;
use super::gate::{Ask, Asked, Gate};
use super::memory::Bitmaps;
use super::{Memory, Vring};
use crate::blk::BlkDevice;
use crate::limits::{MAX_BOUNCE_BYTES, MAX_REQUEST_BYTES};
use crate::vring::{Used, logs_all};
use crate::worker::attachment::{CHAINS_PER_TURN, Lent, Share};
use crate::worker::path::{Finish, Path, Step, Unanswerable};
use crate::worker::slots::Slots;
use crate::worker::token::Token;
use crate::worker::{Report, StopMode, VringId, WorkerError};

/// One thread's part of a device.
pub(super) struct Lane {
    gate: Arc<Gate>,
    asked: Receiver<Asked>,
    custody: Arc<Custody>,
    // Before the ring, which outlives its channel.
    path: Path<Bitmaps>,
    ring: Ring,
    slots: Slots,
    share: Share,
    /// The host's memory that rings are accessed through; requests go through the path's view.
    memory: Arc<Memory>,
    features: u64,
    seats: Vec<Seat>,
    change: Option<Change>,
    /// Who waits for a vring to come to rest, or for all of them.
    drains: Vec<(Option<usize>, Sender<()>)>,
    /// Contained faults up to which the memory is known to be all there.
    faults: usize,
    // A path lends these too; here they stay empty.
    outgoing: Vec<EventFd>,
    reports: Vec<Report>,
}

/// What a lane knows of a vring that the host does not.
#[derive(Debug, Default)]
struct Seat {
    /// Requests that were popped and not used yet.
    in_flight: usize,
    /// The storage was taken for it.
    started: bool,
    /// It was kicked and not found empty since.
    ready: bool,
    /// Something was used since the last call.
    touched: bool,
    /// Its driver broke the virtio specification: not popped before the next stop.
    broken: bool,
}

/// Memory that waits for its turn.
#[derive(Debug)]
struct Change {
    table: Arc<MemoryTable>,
    memory: Arc<Memory>,
    done: Sender<()>,
}

impl Lane {
    /// A lane for the calling thread, which its ring belongs to.
    pub(super) fn new(
        device: Arc<BlkDevice>,
        engine: Engine,
        share: Share,
        gate: Arc<Gate>,
        custody: Arc<Custody>,
    ) -> Result<Lane, WorkerError> {
        let asked = gate.open().ok_or(WorkerError::Died)?;
        let mut ring = Ring::new(engine).map_err(WorkerError::Ring)?;
        let channel = device.storage().open_channel(&mut ring);
        let channel = channel.map_err(|source| WorkerError::Open {
            name: device.name(),
            source,
        })?;
        if let Some(event) = channel.event() {
            let token = Token::Channel { device: 0 }.pack();
            ring.watch(event, token).map_err(WorkerError::Watch)?;
        }
        gate.listen(&ring.as_fd()).map_err(WorkerError::Watch)?;
        let budget = (MAX_BOUNCE_BYTES / share.of).max(MAX_REQUEST_BYTES as usize);
        let view = View::new(Arc::new(MemoryTable::empty()), Pools::new(budget));
        let queues = usize::from(device.num_queues());
        let mut seats = Vec::new();
        seats.resize_with(queues.div_ceil(share.of), Seat::default);
        Ok(Lane {
            gate,
            asked,
            custody,
            path: Path::new(device, channel, 0, view),
            ring,
            slots: Slots::default(),
            share,
            memory: Arc::new(Memory::new()),
            features: 0,
            seats,
            change: None,
            drains: Vec::new(),
            faults: 0,
            outgoing: Vec::new(),
            reports: Vec::new(),
        })
    }

    /// Whether this is the lane of that gate.
    pub(super) fn is_behind(&self, gate: &Arc<Gate>) -> bool {
        Arc::ptr_eq(&self.gate, gate)
    }

    /// Does all there is to do, and comes back when only an event can bring more.
    pub(super) fn serve(&mut self, kicked: Option<usize>, vrings: &[Vring]) -> io::Result<()> {
        if let Some(local) = kicked {
            self.path.counters.kicks.add(1);
            if let Some(seat) = self.seats.get_mut(local) {
                seat.ready = true;
            }
        }
        self.gate.woken();
        loop {
            self.obey();
            self.retry(vrings);
            for (local, vring) in vrings.iter().enumerate() {
                if self.may_pop(local) {
                    let again = self.pop(local, vring);
                    self.seats[local].ready = again;
                }
            }
            self.call(vrings);
            self.ring.submit(Wait::No)?;
            let mut came = false;
            while let Some(event) = self.ring.reap() {
                came = true;
                self.route(event, vrings);
            }
            self.call(vrings);
            self.answer();
            if !came && !(0..vrings.len()).any(|local| self.may_pop(local)) {
                return Ok(());
            }
        }
    }

    /// Takes what was asked. Behind a change of memory everything waits.
    fn obey(&mut self) {
        while self.change.is_none()
            && let Ok(Asked { ask, done }) = self.asked.try_recv()
        {
            match ask {
                Ask::Nothing => {}
                Ask::Features(features) => {
                    self.features = features;
                    self.path.logging = logs_all(features);
                }
                Ask::Memory { table, memory } => {
                    self.change = Some(Change {
                        table,
                        memory,
                        done,
                    });
                    continue;
                }
                Ask::Drain(local) => {
                    for (place, seat) in self.seats.iter_mut().enumerate() {
                        let other = local.is_some_and(|local| local != place);
                        seat.broken &= other;
                        // A reset stops no vring of the host's.
                        seat.started &= other || local.is_none();
                    }
                    self.drains.push((local, done));
                    continue;
                }
            }
            tell(&done);
        }
    }

    /// Answers what waited for requests to come back.
    fn answer(&mut self) {
        let seats = &self.seats;
        let idle = seats.iter().all(|seat| seat.in_flight == 0);
        self.drains.retain(|(local, done)| {
            let seat = local.and_then(|local| seats.get(local));
            let over = seat.map_or(idle, |seat| seat.in_flight == 0);
            if over {
                tell(done);
            }
            !over
        });
        if let Some(Change {
            table,
            memory,
            done,
        }) = self.change.take_if(|_| idle)
        {
            self.path.view = View::new(table, self.path.view.pools().clone());
            self.path.log = Some(Bitmaps(memory.clone()));
            self.memory = memory;
            tell(&done);
        }
    }

    fn may_pop(&self, local: usize) -> bool {
        let seat = self.seats.get(local);
        self.change.is_none()
            && self.path.parked.is_empty()
            && seat.is_some_and(|seat| seat.ready && !seat.broken)
    }

    /// Pops and starts what a vring has, [`CHAINS_PER_TURN`] at the most; says whether it may have
    /// more.
    fn pop(&mut self, local: usize, vring: &Vring) -> bool {
        if !self.may_touch_storage(local, vring) {
            return false;
        }
        let Some((descriptors, size)) = self.descriptors(local, vring) else {
            return false;
        };
        for _ in 0..CHAINS_PER_TURN {
            let Some(head) = next_head(vring, &self.memory) else {
                return self.arm(local, vring);
            };
            let features = self.features;
            let (path, mut lent) = self.lend();
            match path.begin(local, head, (&descriptors, size), features, &mut lent) {
                Ok(Step::Underway) => self.seats[local].in_flight += 1,
                Ok(Step::Ended(used)) => self.push_used(local, used, vring),
                Err(Unanswerable) => {
                    self.seats[local].broken = true;
                    return false;
                }
            }
            if !self.path.parked.is_empty() {
                break;
            }
            // As for a vring of our own: memory that was taken away is not worth going on with.
            let faults = sigbus::faults();
            if faults != self.faults {
                if self.path.view.table().poisoned() {
                    return false;
                }
                self.faults = faults;
            }
        }
        true
    }

    /// Takes the storage for a vring that was started; a vring that has to do without is tried
    /// again at its next kick.
    fn may_touch_storage(&mut self, local: usize, vring: &Vring) -> bool {
        if self.seats[local].started {
            return true;
        }
        if !vring.get_ref().get_queue().ready() {
            return false;
        }
        let id = self.id(local);
        match self.custody.start(id.index) {
            Ok(()) => {
                self.seats[local].started = true;
                true
            }
            Err(error) => {
                self.path.complain(id, &error);
                false
            }
        }
    }

    /// Asks for a kick; says whether there is more to pop without one.
    fn arm(&mut self, local: usize, vring: &Vring) -> bool {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return false;
        }
        let queue = state.get_queue_mut();
        let more = queue.enable_notification(&*self.memory);
        // The queue says that there is more of an index that it refuses to pop, too.
        let ahead = queue
            .avail_idx(&*self.memory, Ordering::Relaxed)
            .map(|index| index.0.wrapping_sub(queue.next_avail()));
        let size = queue.size();
        drop(state);
        match (more, ahead) {
            (Ok(more), Ok(ahead)) if ahead <= size => more,
            (Err(error), _) | (_, Err(error)) => {
                self.path.complain(self.id(local), &error);
                false
            }
            (Ok(_), Ok(_)) => {
                let error = virtio_queue::Error::InvalidAvailRingIndex;
                self.path.complain(self.id(local), &error);
                self.seats[local].broken = true;
                false
            }
        }
    }

    /// Tells the driver of a vring that may be popped not to kick, and finds its descriptor table
    /// in the lane's own memory; also the vring's size.
    fn descriptors(&mut self, local: usize, vring: &Vring) -> Option<(Area, u16)> {
        let mut state = vring.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return None;
        }
        let queue = state.get_queue_mut();
        let (start, size) = (queue.desc_table(), queue.size());
        let quiet = queue.disable_notification(&*self.memory);
        drop(state);
        let bytes = usize::from(size) * DESCRIPTOR_BYTES;
        let area = self.path.view.table().area(start, bytes, DESCRIPTOR_BYTES);
        match (quiet, area) {
            (Ok(()), Ok(area)) => Some((area, size)),
            (Err(error), _) => {
                self.path.complain(self.id(local), &error);
                None
            }
            (Ok(()), Err(error)) => {
                self.path.complain(self.id(local), &error);
                None
            }
        }
    }

    /// Tries again what waited for a buffer.
    fn retry(&mut self, vrings: &[Vring]) {
        loop {
            let (path, mut lent) = self.lend();
            match path.retry_parked(&mut lent) {
                None => return,
                Some((_, None)) => {}
                Some((local, Some(used))) => self.came_back(local, used, vrings),
            }
        }
    }

    fn route(&mut self, event: Event, vrings: &[Vring]) {
        match event {
            Event::Done(done) => self.complete(done, vrings),
            Event::Ready(_) => self.path.channel.collect(&mut self.ring),
            Event::Unwatched(_) => {}
        }
    }

    fn complete(&mut self, done: Completion, vrings: &[Vring]) {
        let Some(local) = self.slots.get_mut(done.tag).map(|request| request.vring) else {
            debug_assert!(false, "a completion without a request");
            return;
        };
        let (path, mut lent) = self.lend();
        match path.complete(done, StopMode::Drain, &mut lent) {
            Finish::Used(used) => self.came_back(local, used, vrings),
            Finish::GoesOn | Finish::Abandoned => {}
        }
    }

    fn came_back(&mut self, local: usize, used: Used, vrings: &[Vring]) {
        self.seats[local].in_flight -= 1;
        if let Some(vring) = vrings.get(local) {
            self.push_used(local, used, vring);
        }
    }

    fn push_used(&mut self, local: usize, used: Used, vring: &Vring) {
        let mut state = vring.get_mut();
        let added = state
            .get_queue_mut()
            .add_used(&*self.memory, used.head, used.len);
        drop(state);
        match added {
            Ok(()) => self.seats[local].touched = true,
            Err(error) => self.path.complain(self.id(local), &error),
        }
    }

    /// Calls for what was used.
    fn call(&mut self, vrings: &[Vring]) {
        for (seat, vring) in self.seats.iter_mut().zip(vrings) {
            if !std::mem::take(&mut seat.touched) {
                continue;
            }
            let mut state = vring.get_mut();
            let wanted = state.get_queue_mut().needs_notification(&*self.memory);
            // A driver whose wishes cannot be read is called.
            if wanted.unwrap_or(true) {
                self.path.counters.calls.add(1);
                if let Err(error) = state.signal_used_queue() {
                    warn!("a call could not be made: {error}");
                }
            }
        }
    }

    fn id(&self, local: usize) -> VringId {
        let index = local * self.share.of + self.share.worker;
        VringId {
            device: self.path.device.id(),
            index: u16::try_from(index).unwrap_or(u16::MAX),
        }
    }

    fn lend(&mut self) -> (&mut Path<Bitmaps>, Lent<'_>) {
        let Lane {
            path,
            ring,
            slots,
            outgoing,
            reports,
            ..
        } = self;
        (
            path,
            Lent {
                ring,
                slots,
                outgoing,
                reports,
            },
        )
    }
}

impl Drop for Lane {
    /// Waits for what is in flight, and gives it up: the host ends the thread, and nobody pops the
    /// used ring for it.
    fn drop(&mut self) {
        for local in 0..self.seats.len() {
            self.path.abandon_parked(local);
        }
        while self.slots.in_flight() > 0 {
            if let Err(error) = self.ring.submit(Wait::Event) {
                warn!("what is in flight is leaked: {error}");
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            while let Some(event) = self.ring.reap() {
                let (path, mut lent) = self.lend();
                match event {
                    Event::Done(done) => {
                        path.complete(done, StopMode::Abandon, &mut lent);
                    }
                    Event::Ready(_) => path.channel.collect(lent.ring),
                    Event::Unwatched(_) => {}
                }
            }
        }
        let vrings = (0..self.seats.len()).map(|local| self.id(local).index);
        self.custody.stop(vrings);
    }
}

/// The next head of a vring that may be popped. The host may stop it or disable it at any time, so
/// that is looked at under the same lock.
fn next_head(vring: &Vring, memory: &Arc<Memory>) -> Option<u16> {
    let mut state = vring.get_mut();
    if !state.is_enabled() || !state.get_queue().ready() {
        return None;
    }
    let chain = state.get_queue_mut().pop_descriptor_chain(memory.clone());
    chain.map(|chain| chain.head_index())
}

/// Says that something was done. Who asked waits for it.
fn tell(done: &Sender<()>) {
    let _ = done.send(());
}

/// Bytes of a descriptor, and what its table is aligned to (virtio 2.7.5).
const DESCRIPTOR_BYTES: usize = 16;
