//! The all-in-one control plane and the command line.
//!
//! ```text
//!   mvm-ci                    ControlPlane: registry + vmhost + scheduler behind one gRPC server, over loopback
//!   mvm-ci run|job|vm|stats   a client of SchedulerService at --endpoint, and of nothing else
//!   mvm-ci image              makes and lists the images of this machine; needs no control plane
//!   mvm-ci guest-agent        the guest agent, for the `process` driver (hidden)
//!   mvm-ci query-worker       one SQL query of the registry, confined (hidden)
//! ```
//!
//! [`ControlPlane`] is public so that tests and examples can run one in their own process. The client half must not know
//! that the control plane may be in the same binary: it speaks the contract.

pub mod cli;
pub mod control_plane;
pub mod image;

pub use control_plane::ControlPlane;
