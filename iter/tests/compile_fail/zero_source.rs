//! What a device reads from cannot be zeroed.

use iov_iter::{Hold, IovIter, Source};

fn zero(iter: &mut IovIter<Source>, hold: &Hold) {
    iter.zero(hold, 4);
}

fn main() {}
