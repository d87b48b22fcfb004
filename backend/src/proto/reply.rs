//! Replies, as bytes.

use super::code::Code;
use super::header::{Header, VERSION};
use super::message::{ConfigRange, InflightLayout};
use crate::inflight::Description;

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
    /// The log that was set, as it was described: libvhost-user answers with a number instead, some
    /// front ends want this, and QEMU looks at neither.
    Log {
        /// Bytes of the log.
        size: u64,
        /// Where it starts in its file, in bytes.
        offset: u64,
    },
    /// An in-flight region; its file comes with it.
    Inflight(Description, InflightLayout),
    /// No payload at all, which says that the configuration space cannot be read (*GET_CONFIG*).
    ConfigError,
}

/// The bit that says that no file comes with a reply.
const NO_FILE: u64 = 1 << 8;

impl Reply {
    /// The acknowledgement that NEED_REPLY asks for (*REPLY_ACK*).
    pub const ACK: Reply = Reply::U64(0);

    /// The refusal that NEED_REPLY asks for: anything but zero.
    pub const NACK: Reply = Reply::U64(1);

    /// The refusal of a transfer of the device's state: an error, and no file of ours
    /// (*Migrating back-end state*).
    pub const NO_TRANSFER: Reply = Reply::U64(1 | NO_FILE);

    /// The transfer takes place through the front end's file.
    pub const TRANSFER: Reply = Reply::U64(NO_FILE);

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
            Reply::Log { size, offset } => [size.to_ne_bytes(), offset.to_ne_bytes()].concat(),
            Reply::Inflight(description, layout) => inflight(description, *layout),
            Reply::ConfigError => Vec::new(),
        };
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Header::reply(code, size).to_vec();
        bytes.extend_from_slice(&payload);
        bytes
    }
}

/// The back end's message that says that the configuration space changed (CONFIG_CHANGE_MSG, 2 of
/// *Back-end message types*): a header only.
#[must_use]
pub fn config_changed() -> Vec<u8> {
    const CONFIG_CHANGE_MSG: u32 = 2;
    numbers(&[CONFIG_CHANGE_MSG, VERSION, 0])
}

fn inflight(description: &Description, layout: InflightLayout) -> Vec<u8> {
    let Description {
        mmap_size,
        mmap_offset,
        queues,
        queue_size,
    } = description;
    let mut payload = [mmap_size.to_ne_bytes(), mmap_offset.to_ne_bytes()].concat();
    payload.extend(queues.to_ne_bytes());
    payload.extend(queue_size.to_ne_bytes());
    match layout {
        InflightLayout::Packed => {}
        InflightLayout::Padded => payload.extend([0; 4]),
    }
    payload
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

        let log = Reply::Log {
            size: 4096,
            offset: 1 << 40,
        };
        let payload = [4096_u64.to_ne_bytes(), (1_u64 << 40).to_ne_bytes()].concat();
        assert_eq!(log.encode(Code(6)), [start(6, 16), payload].concat());

        let region = Description {
            mmap_size: 0x1234_5678_9abc,
            mmap_offset: 64,
            queues: 3,
            queue_size: 0x8000,
        };
        let mut payload = [0x1234_5678_9abc_u64.to_ne_bytes(), 64_u64.to_ne_bytes()].concat();
        payload.extend(3_u16.to_ne_bytes());
        payload.extend(0x8000_u16.to_ne_bytes());
        let packed = Reply::Inflight(region, InflightLayout::Packed).encode(Code(31));
        assert_eq!(packed, [start(31, 20), payload.clone()].concat());
        payload.extend([0; 4]);
        let padded = Reply::Inflight(region, InflightLayout::Padded).encode(Code(31));
        assert_eq!(padded, [start(31, 24), payload].concat());
    }
}
