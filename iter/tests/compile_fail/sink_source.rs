//! Nothing can be read from a sink.

use iov_iter::{IovIter, Source};

fn sink() -> IovIter<Source> {
    IovIter::<Source>::sink(512)
}

fn main() {}
