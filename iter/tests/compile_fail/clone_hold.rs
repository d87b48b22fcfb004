//! A hold is given back once, so there is one.

use iov_iter::Hold;

fn two(hold: &Hold) -> Hold {
    hold.clone()
}

fn main() {}
