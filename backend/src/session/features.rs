//! Protocol features: which are offered, and which messages each brings.

use blockdev::Abort;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Bits};

use super::Refusal;
use crate::proto::Code;

/// A protocol feature that is offered.
#[derive(Debug)]
pub struct Feature {
    /// Its bit, as a mask.
    pub bit: u64,
    /// Its name in the specification, without the common prefix.
    pub name: &'static str,
    /// The messages that may be sent once it is negotiated.
    pub brings: &'static [Code],
    /// Which devices offer it.
    pub offered_by: OfferedBy,
}

/// Which devices offer a protocol feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferedBy {
    /// All of them.
    All,
    /// Those that can take back what they have in flight: a write that the kernel has cannot be
    /// recalled, and would land after the other side has done it again.
    Abortable,
}

/// GET_VRING_BASE_INFLIGHT, which the `vhost` crate does not know: GET_VRING_BASE may ask not to
/// wait for what is in flight.
const GET_VRING_BASE_INFLIGHT: u64 = 1 << 20;
/// GET_VRING_BASE_SKIP_DRAIN, with a message of its own for that.
const GET_VRING_BASE_SKIP_DRAIN: u64 = 1 << 23;

/// Every protocol feature that some device offers.
pub const OFFERED: &[Feature] = &[
    Feature {
        bit: Bits::MQ.bits(),
        name: "MQ",
        brings: &[Code::of(FrontendReq::GET_QUEUE_NUM)],
        offered_by: OfferedBy::All,
    },
    // NEED_REPLY is a flag of other messages; REPLY_ACK brings none of its own.
    Feature {
        bit: Bits::REPLY_ACK.bits(),
        name: "REPLY_ACK",
        brings: &[],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::LOG_SHMFD.bits(),
        name: "LOG_SHMFD",
        brings: &[
            Code::of(FrontendReq::SET_LOG_BASE),
            Code::of(FrontendReq::SET_LOG_FD),
        ],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::INFLIGHT_SHMFD.bits(),
        name: "INFLIGHT_SHMFD",
        brings: &[
            Code::of(FrontendReq::GET_INFLIGHT_FD),
            Code::of(FrontendReq::SET_INFLIGHT_FD),
        ],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::BACKEND_REQ.bits(),
        name: "BACKEND_REQ",
        brings: &[Code::of(FrontendReq::SET_BACKEND_REQ_FD)],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::CONFIG.bits(),
        name: "CONFIG",
        brings: &[
            Code::of(FrontendReq::GET_CONFIG),
            Code::of(FrontendReq::SET_CONFIG),
        ],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::RESET_DEVICE.bits(),
        name: "RESET_DEVICE",
        brings: &[Code::of(FrontendReq::RESET_DEVICE)],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::CONFIGURE_MEM_SLOTS.bits(),
        name: "CONFIGURE_MEM_SLOTS",
        brings: &[
            Code::of(FrontendReq::GET_MAX_MEM_SLOTS),
            Code::of(FrontendReq::ADD_MEM_REG),
            Code::of(FrontendReq::REM_MEM_REG),
        ],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: Bits::DEVICE_STATE.bits(),
        name: "DEVICE_STATE",
        brings: &[
            Code::of(FrontendReq::SET_DEVICE_STATE_FD),
            Code::of(FrontendReq::CHECK_DEVICE_STATE),
        ],
        offered_by: OfferedBy::All,
    },
    Feature {
        bit: GET_VRING_BASE_INFLIGHT,
        name: "GET_VRING_BASE_INFLIGHT",
        brings: &[],
        offered_by: OfferedBy::Abortable,
    },
    Feature {
        bit: GET_VRING_BASE_SKIP_DRAIN,
        name: "GET_VRING_BASE_SKIP_DRAIN",
        brings: &[Code::SKIP_DRAIN],
        offered_by: OfferedBy::Abortable,
    },
];

/// What a front end and we agreed on.
#[derive(Debug)]
pub(super) struct Negotiation {
    /// Virtio features the front end acknowledged.
    pub(super) features: u64,
    offered: u64,
    protocol: u64,
}

impl Negotiation {
    /// Nothing is acknowledged yet, by the front end of a device that can or cannot abort.
    pub(super) fn new(abort: Abort) -> Negotiation {
        Negotiation {
            features: 0,
            offered: offered(abort),
            protocol: 0,
        }
    }

    /// The protocol features offered.
    pub(super) fn offered(&self) -> u64 {
        self.offered
    }

    /// Acknowledges protocol features. GET_PROTOCOL_FEATURES need not have come before.
    pub(super) fn acknowledge(&mut self, bits: u64) -> Result<(), Refusal> {
        let beyond = bits & !self.offered;
        if beyond != 0 {
            return Err(Refusal::Features(beyond));
        }
        self.protocol = bits;
        Ok(())
    }

    /// Whether NEED_REPLY means something.
    pub(super) fn reply_ack(&self) -> bool {
        self.has(Bits::REPLY_ACK.bits())
    }

    /// Whether GET_VRING_BASE may ask not to wait for what is in flight.
    pub(super) fn may_suspend(&self) -> bool {
        self.has(GET_VRING_BASE_INFLIGHT)
    }

    /// Refuses a message whose protocol feature was not negotiated.
    pub(super) fn check(&self, code: Code) -> Result<(), Refusal> {
        let brings = |feature: &&Feature| feature.brings.contains(&code);
        match OFFERED.iter().find(brings) {
            Some(feature) if !self.has(feature.bit) => Err(Refusal::NotNegotiated(feature.name)),
            Some(_) | None => Ok(()),
        }
    }

    fn has(&self, bit: u64) -> bool {
        self.protocol & bit != 0
    }
}

/// The protocol features that a device offers.
fn offered(abort: Abort) -> u64 {
    let offers = |feature: &&Feature| match feature.offered_by {
        OfferedBy::All => true,
        OfferedBy::Abortable => abort == Abort::Possible,
    };
    let bits = OFFERED.iter().filter(offers).map(|feature| feature.bit);
    bits.fold(0, |all, bit| all | bit)
}
