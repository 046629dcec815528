//! File systems that are written without the kernel's help: EROFS of a tree of files, whose judges are the kernel and `fsck.erofs`, and
//! an empty ext4, whose judges are the kernel and `e2fsck`.
//!
//! ```text
//!   directory: list, stamp ─┐
//!   layers of an image ─────┴─► tree: merge ─► erofs         ext4: a scratch disk
//! ```
//! Images (`mvm-ci image`) and volumes are made by the same writer. Nothing here knows VMs or jobs.

pub mod directory;
pub mod erofs;
pub mod ext4;
pub mod tree;
