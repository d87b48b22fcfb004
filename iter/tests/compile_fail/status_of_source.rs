//! There is no status byte in what a device reads from.

use iov_iter::{IovIter, Source, StatusSlot};

fn status(iter: &mut IovIter<Source>) -> Option<StatusSlot> {
    iter.take_last_byte()
}

fn main() {}
