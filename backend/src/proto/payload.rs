//! Payloads and descriptors, as the parts of messages they are.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{
    VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserMsgValidator, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use super::message::{ConfigRange, InflightLayout, Malformed, Message, RegionMessage, Transfer};
use crate::inflight::Description;
use crate::limits::MAX_MESSAGE_FDS;
use crate::vring::Addresses;

/// Bits of SET_VRING_KICK, CALL and ERR that hold the vring's index.
const VRING_INDEX_MASK: u64 = 0xff;

/// Bit of SET_VRING_KICK, CALL and ERR that says that no file descriptor comes with it.
const VRING_NO_FD: u64 = 1 << 8;

/// Bytes of an in-flight description without padding (*Inflight description*).
const INFLIGHT_BYTES: usize = 20;

/// VHOST_VRING_F_LOG: writes to the used ring are to be logged (vhost-user, *Migration*).
const VRING_F_LOG: u32 = 1;

/// Reads a payload of exactly one `T`.
fn exactly<T: ByteValued + Default>(payload: &[u8]) -> Result<T, Malformed> {
    let mut value = T::default();
    if payload.len() != size_of::<T>() {
        return Err(Malformed::PayloadSize {
            want: size_of::<T>(),
            got: payload.len(),
        });
    }
    value.as_mut_slice().copy_from_slice(payload);
    Ok(value)
}

/// Reads the `T` a payload starts with, and gives what follows.
fn leading<T: ByteValued + Default>(payload: &[u8]) -> Result<(T, &[u8]), Malformed> {
    let (head, rest) = payload
        .split_at_checked(size_of::<T>())
        .ok_or(Malformed::PayloadSize {
            want: size_of::<T>(),
            got: payload.len(),
        })?;
    Ok((exactly(head)?, rest))
}

pub(super) fn bare(payload: &[u8], message: Message) -> Result<Message, Malformed> {
    nothing(payload)?;
    Ok(message)
}

fn nothing(payload: &[u8]) -> Result<(), Malformed> {
    if payload.is_empty() {
        return Ok(());
    }
    Err(Malformed::PayloadSize {
        want: 0,
        got: payload.len(),
    })
}

pub(super) fn number(payload: &[u8]) -> Result<u64, Malformed> {
    Ok(exactly::<VhostUserU64>(payload)?.value)
}

/// Two numbers of 32 bits.
fn pair(payload: &[u8]) -> Result<(u32, u32), Malformed> {
    let state: VhostUserVringState = exactly(payload)?;
    Ok((state.index, state.num))
}

pub(super) fn state(
    payload: &[u8],
    build: impl Fn(u32, u32) -> Message,
) -> Result<Message, Malformed> {
    let (index, num) = pair(payload)?;
    Ok(build(index, num))
}

pub(super) fn vring_addr(payload: &[u8]) -> Result<Message, Malformed> {
    let addr: VhostUserVringAddr = exactly(payload)?;
    if !addr.is_valid() {
        return Err(Malformed::VringAddr);
    }
    Ok(Message::SetVringAddr {
        index: addr.index,
        addresses: Addresses {
            desc: addr.descriptor,
            avail: addr.available,
            used: addr.used,
        },
        log_used: addr.flags & VRING_F_LOG != 0,
        log_addr: addr.log,
    })
}

/// A kick, call or err: its vring, and the descriptor if the message announces one.
pub(super) fn vring_file(
    payload: &[u8],
    fds: Vec<OwnedFd>,
    build: impl FnOnce(u32, Option<OwnedFd>) -> Message,
) -> Result<Message, Malformed> {
    let value = number(payload)?;
    let index = u32::try_from(value & VRING_INDEX_MASK).unwrap_or(u32::MAX);
    if value & VRING_NO_FD == 0 {
        return Ok(build(index, Some(single(fds)?)));
    }
    if fds.is_empty() {
        return Ok(build(index, None));
    }
    Err(Malformed::Descriptors {
        want: 0,
        got: fds.len(),
    })
}

pub(super) fn backend_channel(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    nothing(payload)?;
    Ok(Message::SetBackendReqFd(single(fds)?))
}

pub(super) fn log_base(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    let log: VhostUserLog = exactly(payload)?;
    Ok(Message::SetLogBase {
        size: log.mmap_size,
        offset: log.mmap_offset,
        file: single(fds)?,
    })
}

/// The specification gives the message no payload; front ends that send a number with it, as with
/// the other descriptors, are understood.
pub(super) fn log_file(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    if payload.len() != size_of::<u64>() {
        nothing(payload)?;
    }
    Ok(Message::SetLogFd(single(fds)?))
}

pub(super) fn inflight(payload: &[u8]) -> Result<(Description, InflightLayout), Malformed> {
    let padded = size_of::<VhostUserInflight>();
    let (layout, inflight) = match <[u8; INFLIGHT_BYTES]>::try_from(payload) {
        Ok(packed) => {
            let mut bytes = packed.to_vec();
            bytes.resize(padded, 0);
            (
                InflightLayout::Packed,
                exactly::<VhostUserInflight>(&bytes)?,
            )
        }
        Err(_) => (
            InflightLayout::Padded,
            exactly::<VhostUserInflight>(payload)?,
        ),
    };
    let description = Description {
        mmap_size: inflight.mmap_size,
        mmap_offset: inflight.mmap_offset,
        queues: inflight.num_queues,
        queue_size: inflight.queue_size,
    };
    Ok((description, layout))
}

/// The only phase there is yet is that all vrings are stopped.
pub(super) fn device_state(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    let (direction, phase) = pair(payload)?;
    let transfer = match (direction, phase) {
        (0, 0) => Transfer::Save,
        (1, 0) => Transfer::Load,
        _ => return Err(Malformed::Transfer { direction, phase }),
    };
    Ok(Message::SetDeviceStateFd(transfer, single(fds)?))
}

pub(super) fn single(fds: Vec<OwnedFd>) -> Result<OwnedFd, Malformed> {
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(fd),
        Err(fds) => Err(Malformed::Descriptors {
            want: 1,
            got: fds.len(),
        }),
    }
}

pub(super) fn memory_table(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    let (table, rest): (VhostUserMemory, _) = leading(payload)?;
    let announced = table.num_regions;
    let count = usize::try_from(announced).unwrap_or(usize::MAX);
    if count > MAX_MESSAGE_FDS {
        return Err(Malformed::Regions(announced));
    }
    let region_bytes = size_of::<VhostUserMemoryRegion>();
    let want = count.saturating_mul(region_bytes);
    if rest.len() != want {
        return Err(Malformed::PayloadSize {
            want,
            got: rest.len(),
        });
    }
    if fds.len() != count {
        return Err(Malformed::Descriptors {
            want: count,
            got: fds.len(),
        });
    }
    let mut regions = Vec::with_capacity(count);
    for (place, (bytes, fd)) in rest.chunks_exact(region_bytes).zip(fds).enumerate() {
        regions.push((region(place, &exactly(bytes)?)?, fd));
    }
    Ok(Message::SetMemTable(regions))
}

pub(super) fn single_region(payload: &[u8]) -> Result<RegionMessage, Malformed> {
    let single: VhostUserSingleMemoryRegion = exactly(payload)?;
    region(0, &single)
}

fn region(place: usize, region: &VhostUserMemoryRegion) -> Result<RegionMessage, Malformed> {
    if !VhostUserMsgValidator::is_valid(region) {
        return Err(Malformed::Region(place));
    }
    Ok(RegionMessage {
        guest_addr: region.guest_phys_addr,
        size: region.memory_size,
        front_end_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
    })
}

pub(super) fn config(payload: &[u8]) -> Result<(ConfigRange, &[u8]), Malformed> {
    let (config, bytes): (VhostUserConfig, _) = leading(payload)?;
    let range = ConfigRange {
        offset: config.offset,
        size: config.size,
        flags: config.flags,
    };
    Ok((range, bytes))
}

pub(super) fn set_config(payload: &[u8]) -> Result<Message, Malformed> {
    let (range, bytes) = config(payload)?;
    let want = usize::try_from(range.size).unwrap_or(usize::MAX);
    if bytes.len() != want {
        return Err(Malformed::PayloadSize {
            want,
            got: bytes.len(),
        });
    }
    Ok(Message::SetConfig(range, bytes.to_vec()))
}
