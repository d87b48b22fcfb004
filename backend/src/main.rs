//! The vublk daemon.

fn main() {}
