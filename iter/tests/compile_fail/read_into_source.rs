//! Memory extracted for reading is no place for a read.

use iov_iter::{Dest, Held, Hold, IovIter, MemoryNeeds, Source};

fn extract(iter: &mut IovIter<Source>, hold: Hold) -> Held<Dest> {
    iter.extract(hold, 512, &MemoryNeeds::NONE).unwrap()
}

fn main() {}
