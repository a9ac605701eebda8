//! What surrounds a served disk on its machine.
//!
//! [`holders`] answers who uses a block device, and acts on exactly what it found. Knows the core, not the copy and not
//! the commands.

pub mod holders;
