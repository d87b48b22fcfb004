//! The vhost-user-blk daemon as a library; `main.rs` is a thin shell over it.
