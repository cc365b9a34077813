//! Guest images: recipes, the builder, the content-addressed store, overlays, seeds and k3s sources.
//!
//! A [`recipe`] says what an image is made of, the [`store`] makes it once and keeps it by digest, and what differs from
//! node to node travels in a [`seed`]. [`guest`] holds the contract between an image and whoever boots it. This crate
//! starts no process by itself: tools are run for it by a [`tool::ToolRunner`].

pub mod airgap;
mod build;
pub mod contain;
mod cpio;
pub mod download;
pub mod downloads;
pub mod elf;
mod error;
pub mod fs;
pub mod guest;
mod initrd;
pub mod k3s;
mod lock;
mod manifest;
pub mod overlay;
pub mod payload;
pub mod recipe;
pub mod release;
pub mod retry;
mod rootfs;
mod scalar;
pub mod seed;
mod sparse;
pub mod store;
pub mod tool;
mod tree;
mod units;
pub mod yaml;

pub use airgap::AirgapImages;
pub use build::BuildEvent;
pub use error::Error;
pub use k3s::{K3sBinary, K3sSource};
pub use payload::{GuestBinary, GuestFile};
pub use recipe::{Recipe, Recipes};
pub use seed::SeedFile;
pub use store::{Image, Store};
pub use tool::{ToolCommand, ToolError, ToolExit, ToolRunner};

/// Bytes as lowercase hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a string cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}
