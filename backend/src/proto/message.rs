//! Typed messages of the front end.

use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserMemory, VhostUserMemoryRegion, VhostUserMsgValidator,
    VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::code::Code;
use crate::limits::MAX_MESSAGE_FDS;
use crate::vring::Addresses;

/// Bits of SET_VRING_KICK, CALL and ERR that hold the vring's index.
const VRING_INDEX_MASK: u64 = 0xff;

/// Bit of SET_VRING_KICK, CALL and ERR that says that no file descriptor comes with it.
const VRING_NO_FD: u64 = 1 << 8;

/// VHOST_VRING_F_LOG: writes to the used ring are to be logged (vhost-user, *Migration*).
const VRING_F_LOG: u32 = 1;

/// A memory region as a message describes it; every sum of it was checked to fit 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionMessage {
    /// Guest-physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front end.
    pub front_end_addr: u64,
    /// Where the region starts in its file, in bytes.
    pub mmap_offset: u64,
}

/// A range of the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRange {
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// What the front end writes for (*VhostUserConfig flags*); mirrored in the reply.
    pub flags: u32,
}

/// A message of the front end, its file descriptors taken with it.
///
/// Vring indices are as they came: the session knows how many vrings there are.
#[derive(Debug)]
pub enum Message {
    /// Which virtio features are offered?
    GetFeatures,
    /// These virtio features were acknowledged.
    SetFeatures(u64),
    /// The front end owns this session.
    SetOwner,
    /// Deprecated; asks for the vrings to be disabled.
    ResetOwner,
    /// Replaces the memory table.
    SetMemTable(Vec<(RegionMessage, OwnedFd)>),
    /// The entries of a vring.
    SetVringNum {
        /// The vring.
        index: u32,
        /// Its entries.
        size: u32,
    },
    /// Where a vring's parts are.
    SetVringAddr {
        /// The vring.
        index: u32,
        /// Its parts.
        addresses: Addresses,
        /// Whether writes to its used ring are to be logged.
        log_used: bool,
        /// Guest address of the used ring, for the log.
        log_addr: u64,
    },
    /// The avail index a vring starts at.
    SetVringBase {
        /// The vring.
        index: u32,
        /// The index.
        base: u32,
    },
    /// Stop a vring and say which avail index is next.
    GetVringBase {
        /// The vring.
        index: u32,
    },
    /// Start a vring, or replace its kick; no descriptor means that it is polled.
    SetVringKick {
        /// The vring.
        index: u32,
        /// Its kick.
        fd: Option<OwnedFd>,
    },
    /// The vring's call; no descriptor means that the driver polls.
    SetVringCall {
        /// The vring.
        index: u32,
        /// Its call.
        fd: Option<OwnedFd>,
    },
    /// The vring's err.
    SetVringErr {
        /// The vring.
        index: u32,
        /// Its err.
        fd: Option<OwnedFd>,
    },
    /// Which protocol features are offered?
    GetProtocolFeatures,
    /// These protocol features were acknowledged.
    SetProtocolFeatures(u64),
    /// How many vrings are there?
    GetQueueNum,
    /// Enable or disable a vring.
    SetVringEnable {
        /// The vring.
        index: u32,
        /// One to enable, zero to disable.
        enable: u32,
    },
    /// The socket for messages of ours.
    SetBackendReqFd(OwnedFd),
    /// Read the configuration space.
    GetConfig(ConfigRange),
    /// Write the configuration space.
    SetConfig(ConfigRange, Vec<u8>),
    /// Disable all vrings and go back to the initial state.
    ResetDevice,
    /// How many memory regions may there be?
    GetMaxMemSlots,
    /// Adds a region to the memory table.
    AddMemReg(RegionMessage, OwnedFd),
    /// Removes a region from the memory table.
    RemMemReg(RegionMessage),
}

/// A message that is none, or none of ours. The stream goes on.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The specification has no such message.
    #[error("the specification has no such message")]
    Unknown,
    /// The specification has it, but it belongs to a feature that is not offered.
    #[error("it belongs to a feature that is not offered")]
    NotOffered,
    /// The payload is not the message's.
    #[error("it has {got} bytes of payload, not {want}")]
    PayloadSize {
        /// Bytes the message has.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
    /// The file descriptors are not the message's.
    #[error("{got} file descriptors came with it, not {want}")]
    Descriptors {
        /// Descriptors the message has.
        want: usize,
        /// Descriptors that came.
        got: usize,
    },
    /// More regions than a message can carry descriptors for.
    #[error("it lists {0} regions, more than {MAX_MESSAGE_FDS}")]
    Regions(u32),
    /// A memory region is empty or wraps around.
    #[error("region {0} is empty or wraps around the address space")]
    Region(usize),
    /// A part of the vring is not aligned, or a flag is not known.
    #[error("a part of the vring is not aligned, or one of its flags is not known")]
    VringAddr,
}

impl Message {
    /// Makes a message of what came. Descriptors that do not belong to it are closed.
    ///
    /// # Errors
    /// When it is not a message that could be handled, whatever the session's state.
    pub fn decode(code: Code, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
        use FrontendReq as Req;
        let Some(request) = code.request() else {
            let known = code.is_known();
            return Err(if known {
                Malformed::NotOffered
            } else {
                Malformed::Unknown
            });
        };
        match request {
            Req::GET_FEATURES => bare(payload, Message::GetFeatures),
            Req::SET_FEATURES => Ok(Message::SetFeatures(number(payload)?)),
            Req::SET_OWNER => bare(payload, Message::SetOwner),
            Req::RESET_OWNER => bare(payload, Message::ResetOwner),
            Req::SET_MEM_TABLE => memory_table(payload, fds),
            Req::SET_VRING_NUM => {
                state(payload, |index, size| Message::SetVringNum { index, size })
            }
            Req::SET_VRING_ADDR => vring_addr(payload),
            Req::SET_VRING_BASE => {
                state(payload, |index, base| Message::SetVringBase { index, base })
            }
            Req::GET_VRING_BASE => state(payload, |index, _| Message::GetVringBase { index }),
            Req::SET_VRING_KICK => vring_file(payload, fds, |index, fd| Message::SetVringKick {
                index,
                fd,
            }),
            Req::SET_VRING_CALL => vring_file(payload, fds, |index, fd| Message::SetVringCall {
                index,
                fd,
            }),
            Req::SET_VRING_ERR => {
                vring_file(payload, fds, |index, fd| Message::SetVringErr { index, fd })
            }
            Req::GET_PROTOCOL_FEATURES => bare(payload, Message::GetProtocolFeatures),
            Req::SET_PROTOCOL_FEATURES => Ok(Message::SetProtocolFeatures(number(payload)?)),
            Req::GET_QUEUE_NUM => bare(payload, Message::GetQueueNum),
            Req::SET_VRING_ENABLE => state(payload, |index, enable| Message::SetVringEnable {
                index,
                enable,
            }),
            Req::SET_BACKEND_REQ_FD => backend_channel(payload, fds),
            Req::GET_CONFIG => Ok(Message::GetConfig(config(payload)?.0)),
            Req::SET_CONFIG => set_config(payload),
            Req::RESET_DEVICE => bare(payload, Message::ResetDevice),
            Req::GET_MAX_MEM_SLOTS => bare(payload, Message::GetMaxMemSlots),
            Req::ADD_MEM_REG => Ok(Message::AddMemReg(single_region(payload)?, single(fds)?)),
            // A descriptor may come with it and is closed unused (*REM_MEM_REG*).
            Req::REM_MEM_REG => Ok(Message::RemMemReg(single_region(payload)?)),
            Req::SET_LOG_BASE
            | Req::SET_LOG_FD
            | Req::SEND_RARP
            | Req::NET_SET_MTU
            | Req::IOTLB_MSG
            | Req::SET_VRING_ENDIAN
            | Req::CREATE_CRYPTO_SESSION
            | Req::CLOSE_CRYPTO_SESSION
            | Req::POSTCOPY_ADVISE
            | Req::POSTCOPY_LISTEN
            | Req::POSTCOPY_END
            | Req::GET_INFLIGHT_FD
            | Req::SET_INFLIGHT_FD
            | Req::GPU_SET_SOCKET
            | Req::VRING_KICK
            | Req::SET_STATUS
            | Req::GET_STATUS
            | Req::GET_SHARED_OBJECT
            | Req::SET_DEVICE_STATE_FD
            | Req::CHECK_DEVICE_STATE
            | Req::GET_SHMEM_CONFIG => Err(Malformed::NotOffered),
        }
    }
}

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

fn bare(payload: &[u8], message: Message) -> Result<Message, Malformed> {
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

fn number(payload: &[u8]) -> Result<u64, Malformed> {
    Ok(exactly::<VhostUserU64>(payload)?.value)
}

fn state(payload: &[u8], build: impl Fn(u32, u32) -> Message) -> Result<Message, Malformed> {
    let state: VhostUserVringState = exactly(payload)?;
    Ok(build(state.index, state.num))
}

fn vring_addr(payload: &[u8]) -> Result<Message, Malformed> {
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
fn vring_file(
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

fn backend_channel(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
    nothing(payload)?;
    Ok(Message::SetBackendReqFd(single(fds)?))
}

fn single(fds: Vec<OwnedFd>) -> Result<OwnedFd, Malformed> {
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(fd),
        Err(fds) => Err(Malformed::Descriptors {
            want: 1,
            got: fds.len(),
        }),
    }
}

fn memory_table(payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
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

fn single_region(payload: &[u8]) -> Result<RegionMessage, Malformed> {
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

fn config(payload: &[u8]) -> Result<(ConfigRange, &[u8]), Malformed> {
    let (config, bytes): (VhostUserConfig, _) = leading(payload)?;
    let range = ConfigRange {
        offset: config.offset,
        size: config.size,
        flags: config.flags,
    };
    Ok((range, bytes))
}

fn set_config(payload: &[u8]) -> Result<Message, Malformed> {
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

#[cfg(test)]
mod tests;
