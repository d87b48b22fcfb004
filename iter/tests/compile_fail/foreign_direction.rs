//! There are two directions, and no more.

use iov_iter::Direction;

#[derive(Clone, Copy, Debug)]
struct Both;

impl Direction for Both {
    const NAME: &'static str = "both";
}

fn main() {}
