//! A request's way from its head to its op, and from its completion to its used element.

mod op;
mod parked;
mod plain;

use std::collections::VecDeque;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;

use blockdev::{Channel, Completion, Durability, IoError, Op};
use iov_iter::{Area, BrokenChain, Chain, ChainFault, ChainLimits, Dest, DirtyLog};
use iov_iter::{ExtractErrorKind, Hold, IovIter, Line, Plain, Source, View};
use log::{error, warn};

use self::op::{into_hold, next_range, range_op};
use self::parked::Parked;
use super::attachment::Lent;
use super::log_gate::LogGate;
use super::slots::{InFlight, Job};
use super::{StopMode, VringId, pins};
use crate::blk::{
    Admitted, BlkDevice, Counters, Driver, Kind, Profile, Range, RangeOp, Request, Status, refuse,
};
use crate::limits::{MAX_CHAIN_BYTES, MAX_SEGMENTS};
use crate::vring::{Started, Used};

/// What a chain may be.
const LIMITS: ChainLimits = ChainLimits {
    max_segments: MAX_SEGMENTS,
    max_bytes: MAX_CHAIN_BYTES,
};

/// Vrings of a worker whose headers are told apart. A wrong guess only costs its fetch.
const LINES: usize = 8;

/// Everything of a device that a request meets on its way; `L` is the kind of dirty log.
pub(super) struct Path<L> {
    pub(super) device: Arc<BlkDevice>,
    pub(super) channel: Box<dyn Channel>,
    pub(super) counters: Arc<Counters>,
    pub(super) view: Rc<View>,
    pub(super) parked: VecDeque<Parked>,
    /// Vrings with used elements to publish.
    pub(super) touched: Vec<usize>,
    /// The log the front end set, whether it wants it written now or not.
    pub(super) log: Option<L>,
    /// Whether it wants it written (VHOST_F_LOG_ALL).
    pub(super) logging: bool,
    /// Where the last header of each vring lay.
    headers: [Line; LINES],
    profile: Profile,
    place: usize,
    ranges: Vec<Range>,
    broken_chains: LogGate,
    broken_vrings: LogGate,
    failures: LogGate,
}

/// What becomes of a request on its way to the device.
pub(super) enum Step {
    /// It is with the device, or parked.
    Underway,
    /// It ended.
    Ended(Used),
}

/// The driver offered a chain that no used element can name: its vring cannot go on.
pub(super) struct Unanswerable;

impl<L: DirtyLog> Path<L> {
    pub(super) fn new(
        device: Arc<BlkDevice>,
        channel: Box<dyn Channel>,
        place: usize,
        view: Rc<View>,
    ) -> Path<L> {
        Path {
            profile: device.profile(),
            counters: device.new_counters(),
            device,
            channel,
            view,
            parked: VecDeque::new(),
            touched: Vec::new(),
            log: None,
            logging: false,
            headers: [Line::default(); LINES],
            place,
            ranges: Vec::new(),
            broken_chains: LogGate::default(),
            broken_vrings: LogGate::default(),
            failures: LogGate::default(),
        }
    }

    /// The device has another size now.
    pub(super) fn resize(&mut self) {
        self.profile = self.device.profile();
    }

    /// Fetches the header that the next chain of a vring is likely to have: that of the last one.
    #[inline]
    pub(super) fn fetch_ahead(&self, local: usize) {
        self.headers[local % LINES].fetch();
    }

    /// Where changes of guest memory are to be marked. Asked for when they are all made, not
    /// before: the front end switches it while requests are on their way.
    #[inline]
    fn dirty(&self) -> Option<&L> {
        self.log.as_ref().filter(|_| self.logging)
    }

    /// Starts the chain that was popped as `head`.
    pub(super) fn start(
        &mut self,
        vring: &mut Started,
        local: usize,
        head: u16,
        lent: &mut Lent<'_>,
    ) {
        let (features, descriptors) = (vring.features(), vring.descriptors());
        match self.begin(local, head, (descriptors, vring.size()), features, lent) {
            Ok(Step::Underway) => {}
            Ok(Step::Ended(used)) => self.settle(vring, local, Some(used)),
            Err(Unanswerable) => {
                vring.break_down();
                self.settle(vring, local, None);
            }
        }
    }

    /// As [`start`](Self::start), for a vring that is somebody else's: its descriptor table, its
    /// entries and the features of its driver.
    pub(super) fn begin(
        &mut self,
        local: usize,
        head: u16,
        (descriptors, size): (&Area, u16),
        features: u64,
        lent: &mut Lent<'_>,
    ) -> Result<Step, Unanswerable> {
        self.counters.reffed.add(1);
        let driver = Driver {
            features,
            cache: self.device.cache_for(features),
        };
        if let Some((plain, hold)) = Plain::walk(&self.view, descriptors, size, head, &LIMITS) {
            return Ok(self.admit_plain(local, plain, hold, driver, lent));
        }
        match Chain::walk(&self.view, descriptors, size, head, &LIMITS) {
            Ok(chain) => Ok(self.admit_lists(local, head, chain.split(), driver, lent)),
            Err(broken) => self.refuse(head, broken).map(Step::Ended),
        }
    }

    /// A chain came to its end.
    pub(super) fn settle(&mut self, vring: &mut Started, local: usize, used: Option<Used>) {
        if vring.settle(used) {
            self.touched.push(local);
        }
    }

    /// Says why a vring is not served any more, now and then.
    pub(super) fn complain(&mut self, id: VringId, error: &dyn Error) {
        if let Some(held_back) = self.broken_vrings.open() {
            let (name, index) = (self.device.name(), id.index);
            error!("{name}: vring {index} is not served any more: {error} ({held_back} more)");
        }
    }

    /// Answers a chain that broke the virtio specification as far as it can be answered.
    fn refuse(&mut self, head: u16, broken: BrokenChain) -> Result<Used, Unanswerable> {
        self.counters.broken_chains.add(1);
        if let Some(held_back) = self.broken_chains.open() {
            let name = self.device.name();
            warn!(
                "{name}: a driver's chain {head} is refused: {} ({held_back} more)",
                broken.fault
            );
        }
        let BrokenChain {
            fault,
            status,
            hold,
        } = broken;
        if let Some(status) = status {
            refuse(&status, &hold, Status::IoErr, self.dirty());
        }
        if matches!(fault, ChainFault::HeadOutOfRange { .. }) {
            return Err(Unanswerable);
        }
        Ok(Used { head, len: 0 })
    }

    fn admit_lists(
        &mut self,
        local: usize,
        head: u16,
        (mut source, dest, hold): (IovIter<Source>, IovIter<Dest>, Hold),
        driver: Driver,
        lent: &mut Lent<'_>,
    ) -> Step {
        let (mut request, header, hold) = match Request::parse(head, &mut source, dest, hold) {
            Ok(parsed) => parsed,
            Err(malformed) => {
                self.counters.broken_chains.add(1);
                if let Some(status) = malformed.status {
                    refuse(&status, &malformed.hold, Status::IoErr, self.dirty());
                }
                return Step::Ended(Used { head, len: 0 });
            }
        };
        self.count(header.kind);
        let dest_len = request.dest().count();
        let (profile, ranges) = (&self.profile, &mut self.ranges);
        match header.admit(&mut source, dest_len, &hold, profile, driver, ranges) {
            Ok(admitted) => self.launch_first(local, request, source, admitted, hold, lent),
            Err(status) => Step::Ended(self.end(request, hold, 0, status)),
        }
    }

    /// Hands an admitted request to the device, or parks it.
    fn launch_first(
        &mut self,
        local: usize,
        request: Request,
        source: IovIter<Source>,
        admitted: Admitted,
        hold: Hold,
        lent: &mut Lent<'_>,
    ) -> Step {
        let waiting = self.parked.len();
        let step = self.launch(local, request, source, admitted, hold, lent);
        self.counters
            .parked
            .add((self.parked.len() - waiting) as u64);
        step
    }

    /// Hands an admitted request to the device.
    fn launch(
        &mut self,
        local: usize,
        mut request: Request,
        mut source: IovIter<Source>,
        admitted: Admitted,
        hold: Hold,
        lent: &mut Lent<'_>,
    ) -> Step {
        let op = match admitted {
            Admitted::Read(at) => {
                let max = request.dest().count();
                request
                    .dest()
                    .extract(hold, max, &self.profile.memory)
                    .map(|into| Op::Read { at, into })
            }
            Admitted::Write(at, durability) => {
                let max = source.count();
                source
                    .extract(hold, max, &self.profile.memory)
                    .map(|from| Op::Write {
                        at,
                        from,
                        durability,
                    })
            }
            Admitted::Flush => Ok(Op::Flush { hold }),
            Admitted::Ranges(op, durability) => {
                return self.launch_ranges(local, request, op, durability, hold, lent);
            }
            Admitted::Identify => {
                let moved = request.identify(&hold, self.device.serial());
                return Step::Ended(self.end(request, hold, moved, Status::Ok));
            }
            Admitted::Nothing => return Step::Ended(self.end(request, hold, 0, Status::Ok)),
        };
        match op {
            Ok(op) => self.hand_over(local, request, op, lent),
            Err(error) => match error.kind {
                // Buffers come back with the requests that have them; with none out, none will.
                ExtractErrorKind::NoBounce { .. } if lent.slots.in_flight() > 0 => {
                    let hold = error.hold;
                    self.parked.push_back(Parked {
                        vring: local,
                        request,
                        source,
                        admitted,
                        hold,
                    });
                    Step::Underway
                }
                ExtractErrorKind::NoBounce { .. }
                | ExtractErrorKind::Empty
                | ExtractErrorKind::Misaligned { .. }
                | ExtractErrorKind::Faulted
                | ExtractErrorKind::Sink => {
                    Step::Ended(self.end(request, error.hold, 0, Status::IoErr))
                }
            },
        }
    }

    /// Hands an op to the device. One that is done at once needs no place among those in flight.
    #[inline(always)]
    fn hand_over(&mut self, local: usize, request: Request, op: Op, lent: &mut Lent<'_>) -> Step {
        if let Some((moved, outcome)) = self.channel.now(&op) {
            let status = self.judge(outcome);
            return Step::Ended(self.answer(request, op, moved, status));
        }
        pins::count(&op, &self.device, &self.counters);
        self.counters.handed_over.add(1);
        let in_flight = self.in_flight(local, request, Job::Single);
        let tag = lent.slots.insert(in_flight, None);
        self.channel.prep(lent.ring, tag, op);
        Step::Underway
    }

    /// Answers a request that the device is done with.
    #[inline(always)]
    fn answer(&self, request: Request, op: Op, moved: u32, status: Status) -> Used {
        match op {
            Op::Read { into, .. } => {
                self.counters.read_bytes.add(u64::from(moved));
                let moved = moved as usize;
                let hold = into.land(moved);
                self.end(request, hold, moved, status)
            }
            op @ (Op::Write { .. }
            | Op::Flush { .. }
            | Op::Discard { .. }
            | Op::WriteZeroes { .. }) => {
                self.counters.written_bytes.add(u64::from(moved));
                self.end(request, into_hold(op), 0, status)
            }
        }
    }

    fn launch_ranges(
        &mut self,
        local: usize,
        request: Request,
        op: RangeOp,
        durability: Durability,
        hold: Hold,
        lent: &mut Lent<'_>,
    ) -> Step {
        let Some(first) = self.ranges.first() else {
            return Step::Ended(self.end(request, hold, 0, Status::Ok));
        };
        let first = range_op(op, first, durability, hold);
        let in_flight = self.in_flight(local, request, Job::Ranges { op, next: 1 });
        self.counters.handed_over.add(1);
        let tag = lent.slots.insert(in_flight, Some(&mut self.ranges));
        self.channel.prep(lent.ring, tag, first);
        Step::Underway
    }

    fn in_flight(&self, vring: usize, request: Request, job: Job) -> InFlight {
        InFlight {
            device: self.place,
            vring,
            request,
            job,
        }
    }

    /// Takes back what the device has of one vring, as far as it can.
    pub(super) fn abort(&mut self, vring: usize, lent: &mut Lent<'_>) {
        let Path { channel, place, .. } = self;
        for tag in lent.slots.tags_of(*place, vring) {
            channel.abort(lent.ring, tag);
        }
    }

    /// What a completion means for its request.
    pub(super) fn complete(
        &mut self,
        done: Completion,
        mode: StopMode,
        lent: &mut Lent<'_>,
    ) -> Finish {
        let Completion {
            tag,
            op,
            moved,
            outcome,
        } = done;
        let status = self.judge(outcome);
        let goes_on = status == Status::Ok && mode == StopMode::Drain;
        if let Some((job, range)) = goes_on.then(|| next_range(lent, tag)).flatten() {
            let op = range_op(job, &range, op.durability(), into_hold(op));
            self.channel.prep(lent.ring, tag, op);
            return Finish::GoesOn;
        }
        let Some(InFlight { request, .. }) = lent.slots.remove(tag) else {
            debug_assert!(false, "a completion without a request");
            return Finish::GoesOn;
        };
        self.counters.given_back.add(1);
        match (mode, op) {
            (StopMode::Abandon | StopMode::Suspend, op) => {
                self.counters.abandoned.add(1);
                request.abandon(into_hold(op), self.dirty());
                Finish::Abandoned
            }
            (StopMode::Drain, op) => Finish::Used(self.answer(request, op, moved, status)),
        }
    }

    #[inline(always)]
    fn end(&self, request: Request, hold: Hold, moved: usize, status: Status) -> Used {
        if status == Status::IoErr {
            self.counters.errors.add(1);
        }
        request.finish(hold, moved, status, self.dirty())
    }

    /// Turns an outcome into a status; what failed on the host's side is said, now and then.
    #[inline]
    fn judge(&mut self, outcome: Result<(), IoError>) -> Status {
        match outcome {
            Ok(()) => Status::Ok,
            Err(error) => self.judge_error(error),
        }
    }

    #[cold]
    fn judge_error(&mut self, error: IoError) -> Status {
        if let Some(held_back) = self.failures.open() {
            warn!(
                "{}: a request failed: {error} ({held_back} more)",
                self.device.name()
            );
        }
        Status::from(&error)
    }

    fn count(&self, kind: Kind) {
        let counters = &self.counters;
        let count = match kind {
            Kind::In => &counters.reads,
            Kind::Out => &counters.writes,
            Kind::Flush => &counters.flushes,
            Kind::GetId => &counters.get_ids,
            Kind::Discard => &counters.discards,
            Kind::WriteZeroes => &counters.write_zeroes,
            Kind::Unsupported(_) => &counters.unsupported,
        };
        count.add(1);
    }
}

/// How a completion left its request.
pub(super) enum Finish {
    /// With the device again.
    GoesOn,
    /// Answered.
    Used(Used),
    /// Given up.
    Abandoned,
}
