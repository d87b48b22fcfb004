//! The suite every device must pass.

pub mod rig;
