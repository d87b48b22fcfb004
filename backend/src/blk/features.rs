//! The virtio features a device offers.

use blockdev::{Access, Capabilities, Geometry};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The mask of a feature bit.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What every device offers, whatever stores its blocks.
const ALWAYS: u64 = bit(VIRTIO_BLK_F_SIZE_MAX)
    | bit(VIRTIO_BLK_F_SEG_MAX)
    | bit(VIRTIO_BLK_F_BLK_SIZE)
    | bit(VIRTIO_BLK_F_TOPOLOGY)
    | bit(VIRTIO_BLK_F_FLUSH)
    | bit(VIRTIO_BLK_F_CONFIG_WCE)
    | bit(VIRTIO_BLK_F_MQ)
    | bit(VIRTIO_RING_F_INDIRECT_DESC)
    | bit(VIRTIO_RING_F_EVENT_IDX)
    | bit(VIRTIO_F_VERSION_1)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The features offered for a device with this geometry and these capabilities.
pub(super) fn offered(geometry: &Geometry, capabilities: &Capabilities) -> u64 {
    let mut features = ALWAYS;
    match geometry.access {
        Access::ReadOnly => features |= bit(VIRTIO_BLK_F_RO),
        Access::ReadWrite => {
            if capabilities.discard.is_some() {
                features |= bit(VIRTIO_BLK_F_DISCARD);
            }
            if capabilities.write_zeroes.is_some() {
                features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
            }
        }
    }
    features
}
