//! Replies, as bytes.

use super::code::Code;
use super::header::Header;
use super::message::ConfigRange;

/// What a message is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, counts, and the acknowledgements that NEED_REPLY asks for.
    U64(u64),
    /// A vring and its next avail index.
    VringBase {
        /// The vring.
        index: u32,
        /// The index.
        base: u16,
    },
    /// A range of the configuration space and its bytes.
    Config(ConfigRange, Vec<u8>),
    /// No payload at all, which says that the configuration space cannot be read (*GET_CONFIG*).
    ConfigError,
}

impl Reply {
    /// The acknowledgement that NEED_REPLY asks for (*REPLY_ACK*).
    pub const ACK: Reply = Reply::U64(0);

    /// The refusal that NEED_REPLY asks for: anything but zero.
    pub const NACK: Reply = Reply::U64(1);

    /// The whole reply to `code`, header included.
    pub fn encode(&self, code: Code) -> Vec<u8> {
        let payload = match self {
            Reply::U64(value) => value.to_ne_bytes().to_vec(),
            Reply::VringBase { index, base } => numbers(&[*index, u32::from(*base)]),
            Reply::Config(range, bytes) => {
                let mut payload = numbers(&[range.offset, range.size, range.flags]);
                payload.extend_from_slice(bytes);
                payload
            }
            Reply::ConfigError => Vec::new(),
        };
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Header::reply(code, size).to_vec();
        bytes.extend_from_slice(&payload);
        bytes
    }
}

fn numbers(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_laid_out_as_the_specification_says() {
        let flags_and_size = |size: u32| [5_u32.to_ne_bytes(), size.to_ne_bytes()].concat();
        let start = |code: u32, size| [code.to_ne_bytes().to_vec(), flags_and_size(size)].concat();

        let features = Reply::U64(0x1_0000_0002).encode(Code(1));
        assert_eq!(
            features,
            [start(1, 8), 0x1_0000_0002_u64.to_ne_bytes().to_vec()].concat()
        );

        let base = Reply::VringBase {
            index: 3,
            base: 0xffff,
        }
        .encode(Code(11));
        let payload = [3_u32.to_ne_bytes(), 0xffff_u32.to_ne_bytes()].concat();
        assert_eq!(base, [start(11, 8), payload].concat());

        let range = ConfigRange {
            offset: 8,
            size: 2,
            flags: 1,
        };
        let config = Reply::Config(range, vec![7, 9]).encode(Code(24));
        let payload = numbers(&[8, 2, 1]);
        assert_eq!(config, [start(24, 14), payload, vec![7, 9]].concat());

        assert_eq!(Reply::ConfigError.encode(Code(24)), start(24, 0));
    }
}
