//! A device does not write to what it reads from.

use iov_iter::{Hold, IovIter, Source};

fn write(iter: &mut IovIter<Source>, hold: &Hold) {
    iter.copy_to(hold, b"data");
}

fn main() {}
