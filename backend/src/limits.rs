//! Every limit a front end or a guest can reach, in one place.
//!
//! Each has a test at the limit and one beyond it.

/// Segments one request may have, header and status included: what fits 1024 data segments
/// (`UIO_MAXIOV`) and one each for the header and the status byte.
pub const MAX_SEGMENTS: u32 = 1026;

/// Bytes of payload one request may move; `max_sectors` of the block layers above is far below it.
pub const MAX_REQUEST_BYTES: u32 = 16 << 20;

/// Bytes a chain may describe. The used length is a `u32`, so a longer chain could not be answered
/// (virtio 2.7.8).
pub const MAX_CHAIN_BYTES: u64 = u32::MAX as u64;

/// Bounce memory of one device, in bytes. Its workers have equal parts of it, but never less than
/// [`MAX_REQUEST_BYTES`] each: a request that fits the other limits must be able to bounce.
pub const MAX_BOUNCE_BYTES: usize = 64 << 20;

/// Vrings of one device. `GET_QUEUE_NUM` answers this whatever the number of workers, so that no
/// front end is refused for asking for more than one.
pub const MAX_VRINGS: u16 = 256;

/// Entries of one vring (virtio 2.7: the maximum queue size is 32768).
pub const MAX_VRING_SIZE: u16 = 32768;

/// Regions of one memory table; what QEMU and the vhost-user crates use as the upper bound.
pub const MAX_REGIONS: usize = iov_iter::MAX_REGIONS;

/// File descriptors one message may carry (vhost-user: SET_MEM_TABLE has at most 8 regions).
pub const MAX_MESSAGE_FDS: usize = 8;

/// Bytes of one message's payload.
pub const MAX_MESSAGE_BYTES: usize = 4096;

/// Ranges one DISCARD or WRITE_ZEROES request may carry.
pub const MAX_RANGES: u32 = 32;

/// Bytes of a device's state that are read from a front end.
pub const MAX_STATE_BYTES: u64 = 4096;

/// Workers of one daemon.
pub const MAX_WORKERS: usize = 256;

/// Segments of data a driver is told it may use (`seg_max`, virtio 5.2.4).
pub const OFFERED_SEG_MAX: u32 = 254;

/// Bytes of one segment a driver is told it may use (`size_max`, virtio 5.2.4). A request that
/// keeps to both stays below [`MAX_REQUEST_BYTES`], so no driver that obeys is ever refused for its
/// size.
pub const OFFERED_SIZE_MAX: u32 = 64 << 10;

const _: () = assert!(OFFERED_SEG_MAX * OFFERED_SIZE_MAX <= MAX_REQUEST_BYTES);
const _: () = assert!(OFFERED_SEG_MAX + 2 <= MAX_SEGMENTS);
