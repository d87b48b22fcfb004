//! A device's view of the memory ends with what holds it.

use iov_iter::{Held, Source};

fn leak(held: Held<Source>) -> usize {
    let slice = held.slices().next().unwrap();
    drop(held.into_hold());
    slice.len()
}

fn main() {}
