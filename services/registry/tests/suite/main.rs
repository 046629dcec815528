//! The registry through its contract, over real sockets and a real Hiqlite node.
#![expect(clippy::unwrap_used, reason = "tests")]

mod attempts;
mod backups;
mod commits;
mod kit;
mod leases;
mod lists;
mod metrics;
mod nodes;
mod queries;
mod replicas;
mod requests;
mod restarts;
mod retention;
mod tables;
mod watches;
