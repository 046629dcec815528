//! Owns the microVMs of one node.
//!
//! ```text
//! scheduler ──► service ──► VmHandle ──► driver (one task a VM) ──► hypervisor ─► machine
//!                  │                        │  ▲  └── attempt ◄──── guest agent
//!                  │                        │  lifecycle (pure)         │ output
//!                  └── StreamLogs ◄── logs ◄┼───────────────────────────┘
//!                                           └── reporter ──► registry
//! ```
//! What a VM holds is on disk before it is made (`records`), so that a kill -9 at any moment leaves nothing that the next start
//! does not find (`recovery`). VMs outlive this process.
//!
//! This crate must not know how jobs are placed or queued: it is told, and it reports to the registry.

pub mod hypervisor;

mod attempt;
mod capacity;
mod consoles;
mod driver;
mod guest;
mod heartbeat;
mod host;
mod lifecycle;
mod logs;
mod reconcile;
mod records;
mod recovery;
mod registry;
mod reporter;
mod service;

pub use host::{StartError, VmHost, VmHostConfig};
pub use service::Service;
