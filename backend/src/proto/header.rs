//! The twelve bytes in front of every message.

use thiserror::Error;
use vhost::vhost_user::message::VhostUserHeaderFlag;

use super::code::Code;
use crate::limits::MAX_MESSAGE_BYTES;

/// Bytes of a header: request, flags, size (vhost-user, *Header*).
pub const HEADER_BYTES: usize = 12;

/// The version every message carries in the lowest two bits of its flags.
pub(super) const VERSION: u32 = 1;

/// The header of a message from the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message follows.
    pub code: Code,
    /// Whether the front end asks for an answer to a message that has none of its own.
    pub need_reply: bool,
    /// Bytes of payload that follow, at most [`MAX_MESSAGE_BYTES`].
    pub size: usize,
}

/// The stream cannot be read any further: where the next message starts is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StreamFault {
    /// The version is not the only one there is.
    #[error("{code} has version {version} in its flags, not {VERSION}")]
    Version {
        /// The message.
        code: Code,
        /// The two version bits.
        version: u32,
    },
    /// The front end sent a reply, but nothing was asked of it on this socket.
    #[error("{0} is marked as a reply")]
    Reply(Code),
    /// The payload is longer than any message may be.
    #[error("{code} announces {size} bytes of payload, more than {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// The message.
        code: Code,
        /// Bytes announced.
        size: u32,
    },
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// When nothing that follows on the stream can be trusted; the connection has to be closed.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, StreamFault> {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
        let code = Code(u32::from_ne_bytes([a, b, c, d]));
        let flags = u32::from_ne_bytes([e, f, g, h]);
        let announced = u32::from_ne_bytes([i, j, k, l]);

        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(StreamFault::Version { code, version });
        }
        if flags & VhostUserHeaderFlag::REPLY.bits() != 0 {
            return Err(StreamFault::Reply(code));
        }
        let too_long = StreamFault::TooLong {
            code,
            size: announced,
        };
        let size = usize::try_from(announced).unwrap_or(usize::MAX);
        if size > MAX_MESSAGE_BYTES {
            return Err(too_long);
        }
        let need_reply = flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0;
        Ok(Header {
            code,
            need_reply,
            size,
        })
    }

    /// The header of a reply to `code` with `size` bytes of payload.
    ///
    /// QEMU compares the flags with exactly these two bits, so NEED_REPLY is not mirrored.
    pub(super) fn reply(code: Code, size: u32) -> [u8; HEADER_BYTES] {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.chunks_exact_mut(4).zip([code.0, flags, size]) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&code.to_ne_bytes());
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_payload_is_taken_at_the_limit_and_refused_one_beyond() {
        let limit = u32::try_from(MAX_MESSAGE_BYTES).unwrap();
        let read = Header::decode(&header(24, 0x9, limit)).unwrap();
        assert_eq!(
            read,
            Header {
                code: Code(24),
                need_reply: true,
                size: MAX_MESSAGE_BYTES
            }
        );
        let refused = Header::decode(&header(24, 0x9, limit + 1)).unwrap_err();
        assert_eq!(
            refused,
            StreamFault::TooLong {
                code: Code(24),
                size: limit + 1
            }
        );
    }

    #[test]
    fn only_version_one_is_taken() {
        for version in [0, 2, 3] {
            let refused = Header::decode(&header(1, version, 0)).unwrap_err();
            assert_eq!(
                refused,
                StreamFault::Version {
                    code: Code(1),
                    version
                }
            );
        }
    }

    #[test]
    fn a_reply_is_refused_and_reserved_flags_are_not() {
        assert_eq!(
            Header::decode(&header(1, 5, 0)).unwrap_err(),
            StreamFault::Reply(Code(1))
        );
        let read = Header::decode(&header(1, 0xffff_fff1, 8)).unwrap();
        assert_eq!(
            read,
            Header {
                code: Code(1),
                need_reply: false,
                size: 8
            }
        );
    }

    #[test]
    fn replies_carry_the_flags_qemu_compares_with() {
        assert_eq!(Header::reply(Code(1), 8), header(1, 0x5, 8));
    }
}
