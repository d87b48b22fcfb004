//! Guest memory is never a byte slice: the guest writes to it meanwhile.

use iov_iter::Region;

fn bytes(region: &Region) -> Option<&[u8]> {
    region.slice(0, 512)
}

fn main() {}
