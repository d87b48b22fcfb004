//! The iterator against a model: random operations, compared step by step with a flat vector of
//! bytes and a list of the places each byte of the iterator lies at.

use std::rc::Rc;

use iov_iter::{
    Cursor, Dest, Direction, Hold, IovIter, IterError, MemoryNeeds, PrivateMemory, Segment, Source,
    Stability,
};
use proptest::prelude::*;
use vm_memory::VolatileSlice;

use crate::guest::Guest;

/// Small, so that segments alias each other and cross the border in the middle.
const SIZE: usize = 0x3000;
const REGIONS: [(u64, u64); 2] = [(0, 0x2000), (0x2000, 0x1000)];

#[derive(Clone, Copy, Debug)]
enum Step {
    Advance(usize),
    Revert(usize),
    Truncate(usize),
    Reexpand(usize),
    Save,
    Restore(usize),
    Copy(usize),
    CopyFull(usize),
    Zero(usize),
    Extract {
        max: usize,
        arrives: usize,
        advanced: usize,
        needs: MemoryNeeds,
    },
    SplitKeepHead(usize),
    SplitKeepTail(usize),
    TakeLastByte,
}

fn step() -> impl Strategy<Value = Step> {
    let n = || prop_oneof![2 => 0_usize..40, 2 => 0_usize..3000, 1 => 0_usize..20_000];
    let align = || prop_oneof![Just(1_u32), Just(2), Just(16), Just(512), Just(4096)];
    let stability = prop_oneof![3 => Just(Stability::AsIs), 1 => Just(Stability::Stable)];
    let needs = (align(), align(), stability).prop_map(|(address_align, len_align, stability)| {
        MemoryNeeds {
            address_align,
            len_align,
            stability,
        }
    });
    let extract =
        (n(), n(), n(), needs).prop_map(|(max, arrives, advanced, needs)| Step::Extract {
            max,
            arrives,
            advanced,
            needs,
        });
    prop_oneof![
        4 => n().prop_map(Step::Advance),
        4 => n().prop_map(Step::Revert),
        2 => n().prop_map(Step::Truncate),
        2 => n().prop_map(Step::Reexpand),
        2 => Just(Step::Save),
        2 => (0_usize..8).prop_map(Step::Restore),
        4 => n().prop_map(Step::Copy),
        2 => n().prop_map(Step::CopyFull),
        2 => n().prop_map(Step::Zero),
        4 => extract,
        1 => n().prop_map(Step::SplitKeepHead),
        1 => n().prop_map(Step::SplitKeepTail),
        1 => Just(Step::TakeLastByte),
    ]
}

/// Runs of memory: address and length.
type Runs = Vec<(usize, usize)>;

fn runs() -> impl Strategy<Value = Runs> {
    let run = prop_oneof![
        4 => (0..SIZE - 600, 0_usize..600),
        1 => (0_usize..4, 0_usize..4).prop_map(|(page, len)| (page * 0x800, len * 512)),
        1 => (0x1f00_usize..0x2000, 0x80_usize..0x200),
        1 => (0..SIZE, Just(1_usize)).prop_map(|(at, len)| (at, len)),
    ];
    prop_oneof![
        1 => prop::collection::vec(run.clone(), 0..2),
        4 => prop::collection::vec(run.clone(), 0..10),
        // More than an operation of the kernel's takes at a time.
        1 => prop::collection::vec((0..SIZE - 4, 1_usize..4), 1000..1100),
    ]
}

/// What the iterator should be, in the plainest form.
#[derive(Clone, Debug)]
struct Model {
    /// All memory, by address.
    memory: Vec<u8>,
    /// For each byte from origin to end: its address, and the number of its segment.
    places: Vec<(usize, usize)>,
    at: usize,
    end: usize,
    /// Added to an address where alignment is asked.
    base: u64,
    sink: bool,
    status: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Guest,
    Lent,
    Private,
    Sink,
}

impl Model {
    /// `borders` are addresses that no segment crosses.
    fn new(runs: &Runs, memory: Vec<u8>, borders: &[usize], base: u64, kind: Kind) -> Self {
        let mut places = Vec::new();
        let mut segment = 0;
        for &(start, len) in runs {
            for at in start..start + len {
                if at > start && borders.contains(&at) {
                    segment += 1;
                }
                places.push((at, segment));
            }
            segment += 1;
        }
        let end = places.len();
        Self {
            memory,
            places,
            at: 0,
            end,
            base,
            sink: kind == Kind::Sink,
            status: kind,
        }
    }

    fn count(&self) -> usize {
        self.end - self.at
    }

    /// Remaining segments: address and length.
    fn remaining(&self) -> Runs {
        let mut runs: Runs = Vec::new();
        let mut last = None;
        if self.sink {
            return runs;
        }
        for &(at, segment) in &self.places[self.at..self.end] {
            match runs.last_mut() {
                Some(run) if last == Some(segment) => run.1 += 1,
                _ => runs.push((at, 1)),
            }
            last = Some(segment);
        }
        runs
    }

    fn take(&mut self, n: usize) -> Vec<u8> {
        let n = n.min(self.count());
        let bytes = self.places[self.at..self.at + n]
            .iter()
            .map(|(at, _)| self.memory[*at]);
        let bytes = bytes.collect();
        self.at += n;
        bytes
    }

    fn put(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.count());
        self.put_at(self.at, &bytes[..n]);
        self.at += n;
        n
    }

    fn put_at(&mut self, from: usize, bytes: &[u8]) {
        if self.sink {
            return;
        }
        for (place, byte) in self.places[from..].iter().zip(bytes) {
            self.memory[place.0] = *byte;
        }
    }

    /// Host-contiguous runs of the next `n` bytes, as an extraction in place would give them.
    fn vectors(&self, n: usize, borders: &[usize]) -> Runs {
        let mut runs: Runs = Vec::new();
        for &(at, _) in &self.places[self.at..self.at + n] {
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == at && !borders.contains(&at) => run.1 += 1,
                _ => runs.push((at, 1)),
            }
        }
        runs
    }
}

/// One subject of the test: an iterator over some kind of memory, and how to see that memory.
struct Subject<D: Direction> {
    guest: Guest,
    private: Option<Rc<PrivateMemory>>,
    hold: Option<Hold>,
    iter: IovIter<D>,
    model: Model,
    cursors: Vec<(Cursor, usize, usize)>,
    fill: u8,
}

/// What differs by direction.
trait Ops: Direction {
    fn copy(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError>
    where
        Self: Sized;
    fn copy_full(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError>
    where
        Self: Sized;
    fn zero(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError>
    where
        Self: Sized;
    fn transfer(
        subject: &mut Subject<Self>,
        held: iov_iter::Held<Self>,
        from: usize,
        advanced: usize,
        arrives: usize,
    ) -> Result<Hold, TestCaseError>
    where
        Self: Sized;
    fn take_last(iter: &mut IovIter<Self>, model: &mut Model) -> Result<(), TestCaseError>
    where
        Self: Sized;
}

impl Ops for Source {
    fn copy(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError> {
        let mut bytes = vec![0; n];
        let hold = subject.hold.as_ref().unwrap();
        let done = subject.iter.copy_from(hold, &mut bytes);
        let expected = subject.model.take(n);
        prop_assert_eq!(done, expected.len());
        prop_assert_eq!(&bytes[..done], &expected[..]);
        Ok(())
    }

    fn copy_full(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError> {
        let mut bytes = vec![0; n];
        let hold = subject.hold.as_ref().unwrap();
        let copied = subject.iter.copy_from_full(hold, &mut bytes);
        let done = subject.model.count();
        if n > done {
            prop_assert_eq!(copied, Err(IterError::Short { want: n, done }));
        } else {
            prop_assert_eq!(copied, Ok(()));
            prop_assert_eq!(bytes, subject.model.take(n));
        }
        Ok(())
    }

    fn zero(_: &mut Subject<Self>, _: usize) -> Result<(), TestCaseError> {
        Ok(())
    }

    fn transfer(
        subject: &mut Subject<Self>,
        mut held: iov_iter::Held<Self>,
        from: usize,
        advanced: usize,
        _: usize,
    ) -> Result<Hold, TestCaseError> {
        let advanced = advanced.min(held.len());
        let mut model = subject.model.clone();
        model.at = from;
        let expected = model.take(held.len());
        held.advance(advanced);
        prop_assert_eq!(bytes_of(held.slices()), &expected[advanced..]);
        Ok(held.into_hold())
    }

    fn take_last(_: &mut IovIter<Self>, _: &mut Model) -> Result<(), TestCaseError> {
        Ok(())
    }
}

impl Ops for Dest {
    fn copy(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError> {
        let bytes = subject.pattern(n);
        let hold = subject.hold.as_ref().unwrap();
        let done = subject.iter.copy_to(hold, &bytes);
        prop_assert_eq!(done, subject.model.put(&bytes));
        Ok(())
    }

    fn copy_full(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError> {
        let bytes = subject.pattern(n);
        let hold = subject.hold.as_ref().unwrap();
        let copied = subject.iter.copy_to_full(hold, &bytes);
        let (at, done) = (subject.model.at, subject.model.put(&bytes));
        if done < n {
            // What was copied stays copied; the position does not move.
            subject.model.at = at;
            prop_assert_eq!(copied, Err(IterError::Short { want: n, done }));
        } else {
            prop_assert_eq!(copied, Ok(()));
        }
        Ok(())
    }

    fn zero(subject: &mut Subject<Self>, n: usize) -> Result<(), TestCaseError> {
        let hold = subject.hold.as_ref().unwrap();
        let done = subject.iter.zero(hold, n);
        prop_assert_eq!(done, subject.model.put(&vec![0; n]));
        Ok(())
    }

    fn transfer(
        subject: &mut Subject<Self>,
        mut held: iov_iter::Held<Self>,
        from: usize,
        advanced: usize,
        arrives: usize,
    ) -> Result<Hold, TestCaseError> {
        let len = held.len();
        let arrives = arrives.min(len);
        let data = subject.pattern(arrives);
        // A device that fills what it says arrived, in two steps.
        let first = advanced.min(arrives);
        fill(held.slices(), &data[..first]);
        held.advance(first);
        prop_assert_eq!((held.len(), held.moved()), (len - first, first));
        fill(held.slices(), &data[first..]);
        let hold = held.land(arrives);
        subject.model.put_at(from, &data);
        Ok(hold)
    }

    fn take_last(iter: &mut IovIter<Self>, model: &mut Model) -> Result<(), TestCaseError> {
        let last = iter.take_last_byte().map(|status| status.guest());
        let possible = model.status == Kind::Guest && model.at < model.places.len();
        prop_assert_eq!(
            last,
            possible.then(|| model.places[model.places.len() - 1].0 as u64)
        );
        if possible {
            model.places.pop();
            model.end = model.end.min(model.places.len());
        }
        Ok(())
    }
}

fn bytes_of<'a>(slices: impl Iterator<Item = VolatileSlice<'a>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in slices {
        let at = bytes.len();
        bytes.resize(at + slice.len(), 0_u8);
        slice.copy_to(&mut bytes[at..]);
    }
    bytes
}

fn fill<'a>(slices: impl Iterator<Item = VolatileSlice<'a>>, mut data: &[u8]) {
    for slice in slices {
        let (now, later) = data.split_at(data.len().min(slice.len()));
        slice.copy_from(now);
        data = later;
    }
}

impl<D: Ops> Subject<D> {
    fn new(kind: Kind, runs: &Runs, sink: impl Fn(usize) -> IovIter<D>) -> Self {
        let guest = Guest::new(&REGIONS);
        let memory: Vec<u8> = (0..SIZE)
            .map(|i| (i % 251) as u8 ^ (i >> 8) as u8)
            .collect();
        guest.write(0, &memory);
        let ranges: Vec<_> = runs
            .iter()
            .map(|(at, len)| (*at as u64, *len as u32))
            .collect();
        let sum: usize = runs.iter().map(|(_, len)| len).sum();
        let mut private = None;
        let view = &guest.view;
        let border = [REGIONS[1].0 as usize];
        let (iter, model) = match kind {
            Kind::Guest => {
                let iter = IovIter::guest(view, &ranges).unwrap();
                (iter, Model::new(runs, memory, &border, 0, kind))
            }
            Kind::Lent => {
                let plain = IovIter::<D>::guest(view, &ranges).unwrap();
                let segments: Vec<Segment> = plain.segments().collect();
                let iter = IovIter::lent(&Rc::new(view.hold()), &segments).unwrap();
                (iter, Model::new(runs, memory, &border, 0, kind))
            }
            Kind::Private => {
                let own = Rc::new(PrivateMemory::new(SIZE).unwrap());
                assert_eq!(own.write(0, &memory), SIZE);
                let base = own.slice(0, 1).unwrap().ptr_guard().as_ptr().addr() as u64;
                private = Some(Rc::clone(&own));
                let whole = vec![(0, SIZE)];
                (
                    IovIter::private(own),
                    Model::new(&whole, memory, &[], base, kind),
                )
            }
            Kind::Sink => (
                sink(sum),
                Model::new(&vec![(0, sum.min(SIZE))], memory, &[], 0, kind),
            ),
        };
        let hold = Some(guest.view.hold());
        Self {
            guest,
            private,
            hold,
            iter,
            model,
            cursors: Vec::new(),
            fill: 1,
        }
    }

    /// `n` bytes that no earlier pattern had at these places.
    fn pattern(&mut self, n: usize) -> Vec<u8> {
        self.fill = self.fill.wrapping_mul(5).wrapping_add(3);
        (0..n)
            .map(|i| self.fill.wrapping_add((i % 253) as u8))
            .collect()
    }

    fn apply(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Advance(n) => {
                let moved = n.min(self.model.count());
                prop_assert_eq!(self.iter.advance(n), moved);
                self.model.at += moved;
            }
            Step::Revert(n) => {
                let by = IterError::RevertPastStart {
                    by: n,
                    consumed: self.model.at,
                };
                let possible = n <= self.model.at;
                prop_assert_eq!(self.iter.revert(n), if possible { Ok(()) } else { Err(by) });
                self.model.at -= if possible { n } else { 0 };
            }
            Step::Truncate(n) => {
                self.iter.truncate(n);
                self.model.end = self.model.end.min(self.model.at + n);
            }
            Step::Reexpand(count) => {
                let left = self.model.places.len() - self.model.at;
                let past = IterError::ExpandPastEnd { count, left };
                let possible = count <= left;
                prop_assert_eq!(
                    self.iter.reexpand(count),
                    if possible { Ok(()) } else { Err(past) }
                );
                if possible {
                    self.model.end = self.model.at + count;
                }
            }
            Step::Save => {
                self.cursors
                    .push((self.iter.save(), self.model.at, self.model.end));
            }
            Step::Restore(which) => self.restore(which)?,
            Step::Copy(n) => D::copy(self, n)?,
            Step::CopyFull(n) => D::copy_full(self, n)?,
            Step::Zero(n) => D::zero(self, n)?,
            Step::Extract {
                max,
                arrives,
                advanced,
                needs,
            } => {
                self.extract(max, arrives, advanced, &needs)?;
            }
            Step::SplitKeepHead(n) => self.split(n, true)?,
            Step::SplitKeepTail(n) => self.split(n, false)?,
            Step::TakeLastByte => D::take_last(&mut self.iter, &mut self.model)?,
        }
        self.compare()
    }

    fn restore(&mut self, which: usize) -> Result<(), TestCaseError> {
        let Some(&(cursor, at, end)) = self.cursors.get(which) else {
            return Ok(());
        };
        // A byte taken off the end, or a split, can have made it too short.
        if end > self.model.places.len() {
            prop_assert_eq!(self.iter.restore(cursor), Err(IterError::ForeignCursor));
        } else {
            prop_assert_eq!(self.iter.restore(cursor), Ok(()));
            (self.model.at, self.model.end) = (at, end);
        }
        Ok(())
    }

    fn split(&mut self, n: usize, keep_head: bool) -> Result<(), TestCaseError> {
        let count = self.model.count();
        let tail = self.iter.split(n);
        if n > count {
            prop_assert_eq!(tail.err(), Some(IterError::SplitPastEnd { at: n, count }));
            return Ok(());
        }
        let mut tail = tail.unwrap();
        for (cursor, ..) in &self.cursors {
            prop_assert_eq!(tail.restore(*cursor), Err(IterError::ForeignCursor));
        }
        let cut = self.model.at + n;
        if keep_head {
            self.model.places.truncate(cut);
            self.model.end = cut;
        } else {
            self.iter = tail;
            self.model.places.drain(..cut);
            self.model.end -= cut;
            self.model.at = 0;
            self.cursors.clear();
        }
        Ok(())
    }

    fn extract(
        &mut self,
        max: usize,
        arrives: usize,
        advanced: usize,
        needs: &MemoryNeeds,
    ) -> Result<(), TestCaseError> {
        use iov_iter::ExtractErrorKind as Kinds;
        let len = max.min(self.model.count());
        let expected = if self.model.sink {
            Some(Kinds::Sink)
        } else if len == 0 {
            Some(Kinds::Empty)
        } else if !len.is_multiple_of(needs.len_align as usize) {
            Some(Kinds::Misaligned {
                len,
                align: needs.len_align,
            })
        } else {
            None
        };
        let hold = self.hold.take().unwrap();
        let held = match self.iter.extract(hold, max, needs) {
            Err(refused) => {
                prop_assert_eq!(Some(refused.kind), expected);
                self.hold = Some(refused.hold);
                return Ok(());
            }
            Ok(held) => held,
        };
        prop_assert_eq!(None, expected);
        let vectors = self.model.vectors(len, &[REGIONS[1].0 as usize]);
        let base = self.model.base as usize;
        let aligned = |(at, len): &(usize, usize)| {
            (base + at).is_multiple_of(needs.address_align as usize)
                && len.is_multiple_of(needs.len_align as usize)
        };
        let own = self.model.status == Kind::Private || vectors.iter().all(aligned);
        let own = own
            && (self.model.status != Kind::Private
                || (base + self.model.places[self.model.at].0)
                    .is_multiple_of(needs.address_align as usize));
        prop_assert_eq!(
            held.is_bounced(),
            !own || needs.stability == Stability::Stable
        );
        let total: usize = held.vectors().iter().map(|v| v.iov_len).sum();
        prop_assert_eq!((held.len(), total), (len, len));
        if !held.is_bounced() && self.model.status != Kind::Private {
            let lens: Vec<_> = held.vectors().iter().map(|v| v.iov_len).collect();
            let expected: Vec<_> = vectors.iter().map(|(_, len)| *len).collect();
            prop_assert_eq!(lens, expected);
        }
        let from = self.model.at;
        let hold = D::transfer(self, held, from, advanced, arrives)?;
        self.hold = Some(hold);
        self.model.at = from + len;
        Ok(())
    }

    fn compare(&self) -> Result<(), TestCaseError> {
        let Self { iter, model, .. } = self;
        prop_assert_eq!(iter.count(), model.count());
        let runs = model.remaining();
        let address = |at: usize| model.base + at as u64;
        let single = runs.first().map_or(0, |run| run.1);
        prop_assert_eq!(
            iter.single_seg_count(),
            if model.sink { model.count() } else { single }
        );
        let or = |bits, &(at, len): &(usize, usize)| bits | address(at) | len as u64;
        prop_assert_eq!(iter.alignment(), runs.iter().fold(0, or));
        let gap = |bits, pair: &[(usize, usize)]| {
            bits | (address(pair[0].0) + pair[0].1 as u64) | address(pair[1].0)
        };
        prop_assert_eq!(iter.gap_alignment(), runs.windows(2).fold(0, gap));
        let pages = |&(at, len): &(usize, usize)| {
            let first = address(at) / 4096;
            let last = (address(at) + len as u64 - 1) / 4096;
            (last - first + 1) as usize
        };
        let pages: usize = runs.iter().map(pages).sum();
        prop_assert_eq!(iter.npages(usize::MAX), pages);
        prop_assert_eq!((iter.npages(3), iter.npages(0)), (pages.min(3), 0));
        for mask in [0, 1, 511, 4095] {
            let aligned = |run: &(usize, usize)| address(run.0) & mask == 0;
            prop_assert_eq!(iter.is_aligned(mask, 0), runs.iter().all(aligned));
            let even = |run: &(usize, usize)| run.1 as u64 & mask == 0;
            prop_assert_eq!(iter.is_aligned(0, mask), runs.iter().all(even));
        }
        let guest_memory = matches!(model.status, Kind::Guest | Kind::Lent);
        let listed = iter
            .segments()
            .map(|segment| segment.len as usize)
            .sum::<usize>();
        prop_assert_eq!(listed, if guest_memory { model.places.len() } else { 0 });
        prop_assert_eq!(iter.will_pin(), guest_memory);
        Ok(())
    }

    fn compare_memory(&self) -> Result<(), TestCaseError> {
        let mut memory = vec![0; SIZE];
        match &self.private {
            Some(private) => prop_assert_eq!(private.read(0, &mut memory), SIZE),
            None => memory = self.guest.read(0, SIZE),
        }
        prop_assert!(memory == self.model.memory, "memory differs");
        // The guest's is untouched by what happens in the daemon's own.
        Ok(())
    }
}

fn run<D: Ops>(
    kind: Kind,
    runs: &Runs,
    steps: &[Step],
    sink: impl Fn(usize) -> IovIter<D>,
) -> Result<(), TestCaseError> {
    let mut subject = Subject::new(kind, runs, sink);
    subject.compare()?;
    for step in steps {
        subject.apply(*step)?;
    }
    subject.compare_memory()?;
    let pools = Rc::clone(&subject.guest.pools);
    let view = Rc::clone(&subject.guest.view);
    drop(subject);
    prop_assert_eq!((view.holds(), pools.bounce_in_use()), (0, 0));
    Ok(())
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..24)
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn source_iterators_do_what_the_model_does(runs in runs(), steps in steps()) {
        run::<Source>(Kind::Guest, &runs, &steps, |_| unreachable!())?;
    }

    #[test]
    fn dest_iterators_do_what_the_model_does(runs in runs(), steps in steps()) {
        run::<Dest>(Kind::Guest, &runs, &steps, |_| unreachable!())?;
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn lent_segments_do_what_the_model_does(runs in runs(), steps in steps()) {
        run::<Source>(Kind::Lent, &runs, &steps, |_| unreachable!())?;
        run::<Dest>(Kind::Lent, &runs, &steps, |_| unreachable!())?;
    }

    #[test]
    fn private_memory_does_what_the_model_does(steps in steps()) {
        run::<Source>(Kind::Private, &vec![], &steps, |_| unreachable!())?;
        run::<Dest>(Kind::Private, &vec![], &steps, |_| unreachable!())?;
    }

    #[test]
    fn a_sink_does_what_the_model_does(len in 0_usize..SIZE, steps in steps()) {
        run::<Dest>(Kind::Sink, &vec![(0, len)], &steps, IovIter::sink)?;
    }
}
