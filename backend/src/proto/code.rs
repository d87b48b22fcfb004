//! Message codes: their names, and what kind of answer each is owed.

use std::fmt;

use vhost::vhost_user::message::FrontendReq;

/// The code of a front-end message, known to the specification or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub u32);

/// The answer a message is owed, and with it the form a refusal takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// None of its own: a `u64` when NEED_REPLY asks for one, zero for success.
    Ack,
    /// A `u64` of its own in which zero is success, so that a refusal can be said.
    Status,
    /// The configuration space; a refusal is a reply without payload (*GET_CONFIG*).
    Config,
    /// A payload of its own that cannot say no.
    Value,
}

impl Code {
    /// GET_VRING_BASE_SKIP_DRAIN, which the `vhost` crate does not know yet.
    pub const SKIP_DRAIN: Code = Code(45);

    /// The code of a message the specification names.
    pub const fn of(request: FrontendReq) -> Code {
        #[expect(
            clippy::as_conversions,
            reason = "the discriminant is the code on the wire"
        )]
        Code(request as u32)
    }

    /// The message this is, if the specification names it and the `vhost` crate knows it.
    pub fn request(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.0).ok()
    }

    /// Whether the specification names this code at all.
    pub fn is_known(self) -> bool {
        self.request().is_some() || self == Code::SKIP_DRAIN
    }

    /// What the message is owed (*Communication* and each message's text).
    pub fn answer(self) -> Answer {
        use FrontendReq as Req;
        let Some(request) = self.request() else {
            return if self == Code::SKIP_DRAIN {
                Answer::Value
            } else {
                Answer::Ack
            };
        };
        match request {
            Req::GET_CONFIG => Answer::Config,
            Req::SET_DEVICE_STATE_FD | Req::CHECK_DEVICE_STATE => Answer::Status,
            Req::GET_FEATURES
            | Req::GET_VRING_BASE
            // Front ends that wait for its answer do not look whether it says no, and a log that
            // is not written loses pages: a refusal ends the connection.
            | Req::SET_LOG_BASE
            | Req::GET_PROTOCOL_FEATURES
            | Req::GET_QUEUE_NUM
            | Req::CREATE_CRYPTO_SESSION
            | Req::POSTCOPY_ADVISE
            | Req::POSTCOPY_END
            | Req::GET_INFLIGHT_FD
            | Req::GET_MAX_MEM_SLOTS
            | Req::GET_STATUS
            | Req::GET_SHARED_OBJECT
            | Req::GET_SHMEM_CONFIG => Answer::Value,
            Req::SET_FEATURES
            | Req::SET_OWNER
            | Req::RESET_OWNER
            | Req::SET_MEM_TABLE
            | Req::SET_LOG_FD
            | Req::SET_VRING_NUM
            | Req::SET_VRING_ADDR
            | Req::SET_VRING_BASE
            | Req::SET_VRING_KICK
            | Req::SET_VRING_CALL
            | Req::SET_VRING_ERR
            | Req::SET_PROTOCOL_FEATURES
            | Req::SET_VRING_ENABLE
            | Req::SEND_RARP
            | Req::NET_SET_MTU
            | Req::SET_BACKEND_REQ_FD
            | Req::IOTLB_MSG
            | Req::SET_VRING_ENDIAN
            | Req::SET_CONFIG
            | Req::CLOSE_CRYPTO_SESSION
            | Req::POSTCOPY_LISTEN
            | Req::SET_INFLIGHT_FD
            | Req::GPU_SET_SOCKET
            | Req::RESET_DEVICE
            | Req::VRING_KICK
            | Req::ADD_MEM_REG
            | Req::REM_MEM_REG
            | Req::SET_STATUS => Answer::Ack,
        }
    }
}

impl From<FrontendReq> for Code {
    fn from(request: FrontendReq) -> Code {
        Code::of(request)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.request() {
            Some(request) => write!(f, "{request:?}"),
            None if *self == Code::SKIP_DRAIN => f.write_str("GET_VRING_BASE_SKIP_DRAIN"),
            None => write!(f, "message {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_specification_has_a_name_and_no_other_has() {
        for code in 1..=45 {
            assert!(Code(code).is_known(), "{code}");
            assert!(!Code(code).to_string().starts_with("message"), "{code}");
        }
        for code in [0, 46, 1000, u32::MAX] {
            assert!(!Code(code).is_known(), "{code}");
            assert_eq!(Code(code).to_string(), format!("message {code}"));
            assert_eq!(Code(code).answer(), Answer::Ack);
        }
    }

    #[test]
    fn every_get_is_owed_an_answer() {
        for code in (1..=45).map(Code) {
            if code.to_string().starts_with("GET_") {
                assert_ne!(code.answer(), Answer::Ack, "{code}");
            }
        }
    }
}
