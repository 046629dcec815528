//! Images on this machine: made, imported, listed, removed. A tool of the node, which needs no control plane: an image is
//! a directory below `image_dir`, and vmhost finds what is there (`blixard_vmhost::hypervisor::Manifest`).
//!
//! ```text
//!   registry ─ pull ─┐
//!   OCI layout ──────┼─► blobs ─► layer: unpack, verify ─► tree: merge ─► erofs ─┐
//!   OCI/Docker tar ──┘                                      ▲                    ├─► draft ─ rename ─► image_dir/NAME
//!   directory ──────────────────────────────────────────────┘                    │
//!   kernel and initramfs of a base image, linked ────────────────────────────────┘
//! ```
//!
//! - Nothing is trusted: each blob has the digest by which it was asked for, each layer the one that the configuration
//!   says; sizes are limited; files of layers never become files of the host (see [`tree`]).
//! - An import needs no right beyond writing to `image_dir`. Owners, modes, links, devices and extended attributes are
//!   written into the file system as the layers have them.
//! - What is not complete has a name with a dot in front, which is no image's, and a lock; when its maker is gone, the
//!   next import or `image gc` removes it. What is complete appears by one rename.
//! - Removing or replacing an image does nothing to VMs that run: they have its files open. The kernel gives the space
//!   back when the last of them ends.
//!
//! It must not know about jobs, VMs or the control plane.

mod blobs;
mod build;
mod import;
mod layer;
mod oci;
mod reference;
mod registry;
mod root;
mod store;
mod tarball;

use std::{fmt, io};

use blixard_vmhost::disk::{directory, erofs, tree};

pub use build::{from_directory, run_script};
pub use import::{Settings, Source, import};
pub use store::{Entry, Store};

/// What is being done, for a progress bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Fetching from a registry.
    Download,
    /// Unpacking and verifying layers.
    Unpack,
    /// Writing the file system.
    Write,
}

/// Takes how much of how much is done, in bytes.
pub type Told<'a> = &'a mut (dyn FnMut(Phase, u64, u64) + Send);

/// Why an image could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Something is not what it has to be.
    #[error("{what} {problem}")]
    Invalid {
        /// What.
        what: String,
        /// And why.
        problem: String,
    },
    /// Bytes are not those that were asked for.
    #[error("{what} is not what was asked for: it should be {expected}, and is {actual}")]
    Mismatch {
        /// The blob.
        what: String,
        /// Digest or size.
        expected: String,
        /// The same of what came.
        actual: String,
    },
    /// More than is allowed.
    #[error("{what} is more than is allowed: {allowed}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much is.
        allowed: String,
    },
    /// The name is taken.
    #[error("there is an image \"{0}\" already; replace it with --replace")]
    Exists(String),
    /// No such image.
    #[error("there is no image \"{name}\"; there are: {}", known.join(", "))]
    NotFound {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// The network, or the registry.
    #[error("{what}: {problem}")]
    Registry {
        /// The address.
        what: String,
        /// What went wrong with it.
        problem: String,
    },
    /// The file system.
    #[error("{what}: {source}")]
    Io {
        /// The file, or what was done.
        what: String,
        /// What the operating system says.
        source: io::Error,
    },
}

impl ImageError {
    fn invalid(what: &str, problem: &str) -> Self {
        Self::Invalid { what: what.to_owned(), problem: problem.to_owned() }
    }

    fn io(what: impl fmt::Display, source: io::Error) -> Self {
        Self::Io { what: what.to_string(), source }
    }
}
