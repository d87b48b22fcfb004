//! What was extracted for reading cannot land.

use iov_iter::{Held, Hold, Source};

fn land(held: Held<Source>) -> Hold {
    held.land(512)
}

fn main() {}
