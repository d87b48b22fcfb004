//! A worker's views, and the holds counted on them, stay on its thread.

use iov_iter::Hold;

fn hand_over<T: Send>(_: T) {}

fn other_thread(hold: Hold) {
    hand_over(hold);
}

fn main() {}
