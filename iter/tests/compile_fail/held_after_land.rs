//! What landed is no longer the device's to touch.

use iov_iter::{Dest, Held};

fn touch(held: Held<Dest>) -> usize {
    let _hold = held.land(512);
    held.vectors().len()
}

fn main() {}
