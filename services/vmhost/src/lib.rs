//! Owns the microVMs of one node.
//!
//! ```text
//! scheduler ──► service ──► VmHandle ──► driver (one task a VM) ──► hypervisor ─► machine
//!                  │                        │  ▲  └── attempt ◄──── guest agent
//!                  │                        │  lifecycle (pure)         │ output
//!                  └── StreamLogs ◄── logs ◄┼───────────────────────────┘
//!                                           └── reporter ──► registry
//! ```
//! `node_lease` ends what runs here when the registry is silent for too long, `health` what does not answer, `cleaning` deletes what
//! the registry has forgotten, `invariants` finds and ends what nothing here accounts for, `pressure` gives memory back before the
//! kernel takes it, `net` is what guests reach, `volumes` the disks that they have beside their roots, `templates` what they are
//! restored from and `containment` what their hypervisors run as. What a VM
//! holds is on disk before it is made (`records`), so that a kill -9 at any moment leaves nothing that the next start
//! does not find (`recovery`). VMs outlive this process.
//!
//! This crate must not know how jobs are placed or queued: it is told, and it reports to the registry.

pub mod containment;
pub mod disk;
pub mod hypervisor;
pub mod lease;
pub mod lifecycle;
pub mod net;
pub mod pressure;

mod absent;
mod artifacts;
mod attempt;
mod blocking;
mod breaker;
mod capacity;
mod cleaning;
mod consoles;
mod driver;
mod guest;
mod health;
mod heartbeat;
mod host;
mod input;
mod invariants;
mod logs;
mod node_lease;
mod reconcile;
mod records;
mod recovery;
mod registry;
mod reporter;
mod resize;
mod service;
mod templates;
mod volumes;

pub use host::{HealthConfig, Pace, StartError, VmHost, VmHostConfig};
pub use logs::{LogLimits, NodeLogs};
pub use service::Service;
