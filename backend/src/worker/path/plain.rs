//! The short way of reads and writes of the common shape: nothing of them is a list.

use blockdev::Op;
use iov_iter::{Data, DirtyLog, Held, Hold, IovIter, Plain};

use super::{LINES, Path, Step};
use crate::blk::{Admitted, Driver, Header, Kind, Request};
use crate::worker::attachment::Lent;

impl<L: DirtyLog> Path<L> {
    /// Reads and writes of the common shape; everything else of that shape is a list like others.
    #[inline]
    pub(super) fn admit_plain(
        &mut self,
        local: usize,
        plain: Plain,
        hold: Hold,
        driver: Driver,
        lent: &mut Lent<'_>,
    ) -> Step {
        let header = Header::of(&plain, &hold).map(|(header, line)| {
            self.headers[local % LINES] = line;
            header
        });
        let admitted = match (header, plain.data) {
            (Some(header), Data::Into(data)) if header.kind == Kind::In => {
                self.counters.reads.add(1);
                header.admit_read(data.size(), &self.profile)
            }
            (Some(header), Data::From(data)) if header.kind == Kind::Out => {
                self.counters.writes.add(1);
                header.admit_write(data.size(), &self.profile, driver)
            }
            _ => {
                let (source, dest) = plain.into_iters();
                return self.admit_lists(local, plain.head, (source, dest, hold), driver, lent);
            }
        };
        let request = Request::plain(&plain);
        match admitted {
            Ok(admitted) => self.launch_plain(local, request, plain.data, admitted, hold, lent),
            Err(status) => Step::Ended(self.end(request, hold, 0, status)),
        }
    }

    /// Hands an admitted request of the common shape to the device, if its memory is as the device
    /// needs it.
    #[inline(always)]
    fn launch_plain(
        &mut self,
        local: usize,
        request: Request,
        data: Data,
        admitted: Admitted,
        hold: Hold,
        lent: &mut Lent<'_>,
    ) -> Step {
        let needs = &self.profile.memory;
        let op = match (admitted, data) {
            (Admitted::Read(at), Data::Into(segment)) => {
                Held::in_place(hold, &segment, needs).map(|into| Op::Read { at, into })
            }
            (Admitted::Write(at, durability), Data::From(segment)) => {
                Held::in_place(hold, &segment, needs).map(|from| Op::Write {
                    at,
                    from,
                    durability,
                })
            }
            _ => Err(hold),
        };
        match op {
            Ok(op) => self.hand_over(local, request, op, lent),
            Err(hold) => {
                let source = match data {
                    Data::From(segment) => IovIter::from_segments(&[segment]),
                    Data::Into(_) => IovIter::from_segments(&[]),
                };
                self.launch_first(local, request, source, admitted, hold, lent)
            }
        }
    }
}
