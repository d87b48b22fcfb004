//! The configuration space (virtio 5.2.4): the bytes a driver reads, and the one it may write.

use std::mem::{offset_of, size_of};

use blockdev::{Capabilities, Geometry, MayUnmap};
use thiserror::Error;
use virtio_bindings::virtio_blk::virtio_blk_config;

use super::WriteCache;
use crate::limits::{MAX_RANGES, OFFERED_SEG_MAX, OFFERED_SIZE_MAX};

/// Bytes of the structure.
pub(super) const CONFIG_BYTES: usize = size_of::<virtio_blk_config>();
/// The most a GET_CONFIG message may ask for (vhost-user, *Virtio device config space*).
const MAX_READ: usize = 256;
/// Where the structure starts for front ends that count from the start of a virtio-mmio device's
/// registers, as Cloud Hypervisor once did.
const MMIO_CONFIG_OFFSET: u32 = 0x100;
/// Where the only writable byte is.
const WRITEBACK: usize = offset_of!(virtio_blk_config, wce);

/// Why a write to the configuration space is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Only the writeback byte may be written (virtio 5.2.5).
    #[error("{len} bytes at offset {offset} of the configuration space are not writable")]
    ReadOnly {
        /// Where.
        offset: u32,
        /// How many.
        len: usize,
    },
    /// The writeback byte is 0 or 1.
    #[error("the writeback byte is 0 or 1, not {0}")]
    Writeback(u8),
}

/// The whole structure, little-endian as virtio 1 has it.
pub(super) fn bytes(
    geometry: &Geometry,
    capabilities: &Capabilities,
    num_queues: u16,
    cache: WriteCache,
) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    macro_rules! put {
        ($field:ident, $value:expr) => {{
            let value = $value.to_le_bytes();
            let at = offset_of!(virtio_blk_config, $field);
            config[at..at + value.len()].copy_from_slice(&value);
        }};
    }
    put!(capacity, geometry.capacity.0);
    put!(size_max, OFFERED_SIZE_MAX);
    put!(seg_max, OFFERED_SEG_MAX);
    put!(blk_size, geometry.block_size);
    put!(physical_block_exp, geometry.physical_block_exp);
    put!(alignment_offset, geometry.alignment_offset);
    put!(min_io_size, geometry.min_io_blocks);
    put!(opt_io_size, geometry.opt_io_blocks);
    put!(wce, u8::from(cache == WriteCache::Writeback));
    put!(num_queues, num_queues);
    if let Some(discard) = &capabilities.discard {
        put!(max_discard_sectors, discard.max_sectors);
        put!(max_discard_seg, MAX_RANGES);
        put!(discard_sector_alignment, discard.alignment_sectors);
    }
    if let Some(zeroes) = &capabilities.write_zeroes {
        put!(max_write_zeroes_sectors, zeroes.max_sectors);
        put!(max_write_zeroes_seg, MAX_RANGES);
        put!(
            write_zeroes_may_unmap,
            u8::from(zeroes.may_unmap == MayUnmap::Yes)
        );
    }
    config
}

/// `len` bytes from `offset`; what lies beyond the structure reads as zero, since front ends ask
/// for the whole of a structure that grew with the features they know.
pub(super) fn read(config: &[u8; CONFIG_BYTES], offset: u32, len: u32) -> Option<Vec<u8>> {
    let len = usize::try_from(len)
        .ok()
        .filter(|len| (1..=MAX_READ).contains(len))?;
    let offset = offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset);
    let start = usize::try_from(offset)
        .ok()
        .filter(|start| *start <= MAX_READ)?;
    Some(
        config
            .iter()
            .copied()
            .chain(std::iter::repeat(0))
            .skip(start)
            .take(len)
            .collect(),
    )
}

/// What a write of `written` at `offset` asks for.
pub(super) fn write(offset: u32, written: &[u8]) -> Result<WriteCache, ConfigError> {
    let offset_in = offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset);
    match (usize::try_from(offset_in), written) {
        (Ok(WRITEBACK), [0]) => Ok(WriteCache::Writethrough),
        (Ok(WRITEBACK), [1]) => Ok(WriteCache::Writeback),
        (Ok(WRITEBACK), &[other]) => Err(ConfigError::Writeback(other)),
        _ => Err(ConfigError::ReadOnly {
            offset,
            len: written.len(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered() -> [u8; CONFIG_BYTES] {
        std::array::from_fn(|i| u8::try_from(i).unwrap() + 1)
    }

    #[test]
    fn reads_at_the_offsets_front_ends_use() {
        let config = numbered();
        assert_eq!(read(&config, 0, 60).unwrap(), config[..60]);
        assert_eq!(read(&config, 0x100, 60).unwrap(), config[..60]);
        assert_eq!(read(&config, 32, 1).unwrap(), config[32..33]);
        let whole = read(&config, 0, 256).unwrap();
        assert_eq!(whole[..CONFIG_BYTES], config);
        assert!(whole[CONFIG_BYTES..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn reads_of_nothing_or_too_much_are_refused() {
        let config = numbered();
        assert_eq!(read(&config, 0, 0), None);
        assert_eq!(read(&config, 0, 257), None);
        assert_eq!(read(&config, u32::MAX, 1), None);
        assert_eq!(read(&config, 0, u32::MAX), None);
    }

    #[test]
    fn only_the_writeback_byte_is_writable() {
        assert_eq!(write(32, &[0]), Ok(WriteCache::Writethrough));
        assert_eq!(write(32, &[1]), Ok(WriteCache::Writeback));
        assert_eq!(write(0x120, &[1]), Ok(WriteCache::Writeback));
        assert_eq!(write(32, &[2]), Err(ConfigError::Writeback(2)));
        assert_eq!(
            write(32, &[]),
            Err(ConfigError::ReadOnly { offset: 32, len: 0 })
        );
        assert_eq!(
            write(31, &[0, 1]),
            Err(ConfigError::ReadOnly { offset: 31, len: 2 })
        );
        assert_eq!(
            write(0, &[1]),
            Err(ConfigError::ReadOnly { offset: 0, len: 1 })
        );
    }
}
