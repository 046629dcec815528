//! What the benches share: the control plane as a process, a node without guests, the baselines, the table.

#![allow(dead_code, unreachable_pub, reason = "each bench uses its part of this module")]

pub mod baseline;
pub mod fake_vmhost;
pub mod plane;
pub mod table;
pub mod usage;
