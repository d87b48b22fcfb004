//! Typed messages of the front end.

use std::os::fd::OwnedFd;

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use super::code::Code;
use super::payload::{
    backend_channel, bare, config, device_state, inflight, log_base, log_file, memory_table,
    number, set_config, single, single_region, state, vring_addr, vring_file,
};
use crate::inflight::Description;
use crate::limits::MAX_MESSAGE_FDS;
use crate::vring::Addresses;

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

/// How an in-flight description is written: the specification's structure has 20 bytes, and front
/// ends that take a C compiler's layout for it have four more at its end. The answer is as long as
/// the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InflightLayout {
    /// 20 bytes.
    Packed,
    /// 24 bytes.
    Padded,
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

/// What becomes of requests in flight when a vring stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// They are done first.
    Done,
    /// They stay recorded in the in-flight region (*Suspended device state*).
    Recorded,
}

impl InFlight {
    /// What the number in GET_VRING_BASE asks for: it was reserved, and zero, at first.
    fn of(num: u32) -> InFlight {
        match num {
            1 => InFlight::Recorded,
            _ => InFlight::Done,
        }
    }
}

/// Which way a device's state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From us to the front end.
    Save,
    /// From the front end to us.
    Load,
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
        /// Whether what is in flight is waited for.
        in_flight: InFlight,
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
    /// Log changes of guest memory here.
    SetLogBase {
        /// Bytes of the log.
        size: u64,
        /// Where it starts in its file, in bytes.
        offset: u64,
        /// Its file.
        file: OwnedFd,
    },
    /// Signal this when something was logged.
    SetLogFd(OwnedFd),
    /// Make an in-flight region.
    GetInflightFd {
        /// What it is for; only the numbers of vrings and entries mean something.
        wanted: Description,
        /// How that was written.
        layout: InflightLayout,
    },
    /// Use this in-flight region.
    SetInflightFd(Description, OwnedFd),
    /// Transfer the device's state through this file.
    SetDeviceStateFd(Transfer, OwnedFd),
    /// Did the transfer succeed?
    CheckDeviceState,
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
    /// The transfer of a device's state in a direction or phase that there is not.
    #[error("a transfer of the device's state in direction {direction}, phase {phase}")]
    Transfer {
        /// Its direction.
        direction: u32,
        /// Its phase.
        phase: u32,
    },
    /// A part of the vring is not aligned, or a flag is not known.
    #[error("a part of the vring is not aligned, or one of its flags is not known")]
    VringAddr,
}

impl Message {
    /// Makes a message of what came. Descriptors that do not belong to it are closed.
    ///
    /// # Errors
    /// When it is not a message that could be handled, whatever the session's state.
    #[expect(clippy::too_many_lines, reason = "a line for each message there is")]
    pub fn decode(code: Code, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, Malformed> {
        use FrontendReq as Req;
        if code == Code::SKIP_DRAIN {
            return state(payload, |index, _| Message::GetVringBase {
                index,
                in_flight: InFlight::Recorded,
            });
        }
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
            Req::GET_VRING_BASE => state(payload, |index, num| Message::GetVringBase {
                index,
                in_flight: InFlight::of(num),
            }),
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
            Req::SET_LOG_BASE => log_base(payload, fds),
            Req::SET_LOG_FD => log_file(payload, fds),
            Req::GET_INFLIGHT_FD => {
                let (wanted, layout) = inflight(payload)?;
                Ok(Message::GetInflightFd { wanted, layout })
            }
            Req::SET_INFLIGHT_FD => {
                let (description, _) = inflight(payload)?;
                Ok(Message::SetInflightFd(description, single(fds)?))
            }
            Req::SET_DEVICE_STATE_FD => device_state(payload, fds),
            Req::CHECK_DEVICE_STATE => bare(payload, Message::CheckDeviceState),
            Req::SEND_RARP
            | Req::NET_SET_MTU
            | Req::IOTLB_MSG
            | Req::SET_VRING_ENDIAN
            | Req::CREATE_CRYPTO_SESSION
            | Req::CLOSE_CRYPTO_SESSION
            | Req::POSTCOPY_ADVISE
            | Req::POSTCOPY_LISTEN
            | Req::POSTCOPY_END
            | Req::GPU_SET_SOCKET
            | Req::VRING_KICK
            | Req::SET_STATUS
            | Req::GET_STATUS
            | Req::GET_SHARED_OBJECT
            | Req::GET_SHMEM_CONFIG => Err(Malformed::NotOffered),
        }
    }
}

#[cfg(test)]
mod tests;
