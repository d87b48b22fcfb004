//! Protocol features: which are offered, and which messages each brings.

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Bits};

use super::Refusal;
use crate::proto::Code;

/// A protocol feature that is offered.
#[derive(Debug)]
pub struct Feature {
    /// Its bit.
    pub bit: Bits,
    /// Its name in the specification, without the common prefix.
    pub name: &'static str,
    /// The messages that may be sent once it is negotiated.
    pub brings: &'static [FrontendReq],
}

/// Every protocol feature that is offered.
pub const OFFERED: &[Feature] = &[
    Feature {
        bit: Bits::MQ,
        name: "MQ",
        brings: &[FrontendReq::GET_QUEUE_NUM],
    },
    // NEED_REPLY is a flag of other messages; REPLY_ACK brings none of its own.
    Feature {
        bit: Bits::REPLY_ACK,
        name: "REPLY_ACK",
        brings: &[],
    },
    Feature {
        bit: Bits::LOG_SHMFD,
        name: "LOG_SHMFD",
        brings: &[FrontendReq::SET_LOG_BASE, FrontendReq::SET_LOG_FD],
    },
    Feature {
        bit: Bits::INFLIGHT_SHMFD,
        name: "INFLIGHT_SHMFD",
        brings: &[FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_INFLIGHT_FD],
    },
    Feature {
        bit: Bits::BACKEND_REQ,
        name: "BACKEND_REQ",
        brings: &[FrontendReq::SET_BACKEND_REQ_FD],
    },
    Feature {
        bit: Bits::CONFIG,
        name: "CONFIG",
        brings: &[FrontendReq::GET_CONFIG, FrontendReq::SET_CONFIG],
    },
    Feature {
        bit: Bits::RESET_DEVICE,
        name: "RESET_DEVICE",
        brings: &[FrontendReq::RESET_DEVICE],
    },
    Feature {
        bit: Bits::CONFIGURE_MEM_SLOTS,
        name: "CONFIGURE_MEM_SLOTS",
        brings: &[
            FrontendReq::GET_MAX_MEM_SLOTS,
            FrontendReq::ADD_MEM_REG,
            FrontendReq::REM_MEM_REG,
        ],
    },
];

/// What a front end and we agreed on.
#[derive(Debug)]
pub(super) struct Negotiation {
    /// Virtio features the front end acknowledged.
    pub(super) features: u64,
    protocol: Bits,
}

impl Negotiation {
    pub(super) fn new() -> Negotiation {
        Negotiation {
            features: 0,
            protocol: Bits::empty(),
        }
    }

    /// The protocol features offered.
    pub(super) fn offered() -> u64 {
        OFFERED
            .iter()
            .fold(0, |bits, feature| bits | feature.bit.bits())
    }

    /// Acknowledges protocol features. GET_PROTOCOL_FEATURES need not have come before.
    pub(super) fn acknowledge(&mut self, bits: u64) -> Result<(), Refusal> {
        let beyond = bits & !Negotiation::offered();
        if beyond != 0 {
            return Err(Refusal::Features(beyond));
        }
        self.protocol = Bits::from_bits_truncate(bits);
        Ok(())
    }

    /// Whether NEED_REPLY means something.
    pub(super) fn reply_ack(&self) -> bool {
        self.protocol.contains(Bits::REPLY_ACK)
    }

    /// Refuses a message whose protocol feature was not negotiated.
    pub(super) fn check(&self, code: Code) -> Result<(), Refusal> {
        let brings = |feature: &&Feature| {
            feature
                .brings
                .iter()
                .any(|&request| Code::of(request) == code)
        };
        match OFFERED.iter().find(brings) {
            Some(feature) if !self.protocol.contains(feature.bit) => {
                Err(Refusal::NotNegotiated(feature.name))
            }
            Some(_) | None => Ok(()),
        }
    }
}
