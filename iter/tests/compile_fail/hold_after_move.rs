//! A hold that went into an extraction is no longer there to be used.

use iov_iter::{Dest, Hold, IovIter, MemoryNeeds};

fn extract_and_zero(iter: &mut IovIter<Dest>, hold: Hold) {
    let _held = iter.extract(hold, 512, &MemoryNeeds::NONE);
    iter.zero(&hold, 512);
}

fn main() {}
