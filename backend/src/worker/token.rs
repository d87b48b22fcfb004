//! What a watched eventfd stands for.

/// Bits of a device's place in a token.
const DEVICE_BITS: u32 = 14;
/// Bits of a vring's place in a token.
const VRING_BITS: u32 = 16;

/// What a watched eventfd stands for, packed into the word the ring carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The control thread sent commands.
    Command,
    /// A channel's threads finished ops.
    Channel {
        /// The device, as a place in the worker's list.
        device: usize,
    },
    /// A vring was kicked.
    Kick {
        /// The device, as a place in the worker's list.
        device: usize,
        /// The vring, as a place in the device's list.
        vring: usize,
    },
}

impl Token {
    /// The word for the ring.
    pub(super) fn pack(self) -> u32 {
        let place = |value: usize, bits: u32| {
            debug_assert!(
                value < 1 << bits,
                "more devices or vrings than a token can name"
            );
            u32::try_from(value).unwrap_or(0)
        };
        match self {
            Token::Command => 0,
            Token::Channel { device } => (1 << 30) | (place(device, DEVICE_BITS) << VRING_BITS),
            Token::Kick { device, vring } => {
                (2 << 30) | (place(device, DEVICE_BITS) << VRING_BITS) | place(vring, VRING_BITS)
            }
        }
    }

    /// What a word from the ring stands for.
    pub(super) fn unpack(word: u32) -> Option<Token> {
        let device = ((word >> VRING_BITS) & ((1 << DEVICE_BITS) - 1)) as usize;
        let vring = (word & ((1 << VRING_BITS) - 1)) as usize;
        match word >> 30 {
            0 => Some(Token::Command),
            1 => Some(Token::Channel { device }),
            2 => Some(Token::Kick { device, vring }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were_packed() {
        for token in [
            Token::Command,
            Token::Channel { device: 0 },
            Token::Channel {
                device: (1 << DEVICE_BITS) - 1,
            },
            Token::Kick {
                device: 3,
                vring: 255,
            },
            Token::Kick {
                device: (1 << DEVICE_BITS) - 1,
                vring: (1 << VRING_BITS) - 1,
            },
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u32::MAX), None);
    }
}
