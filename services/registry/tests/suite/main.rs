//! The registry through its contract, over real sockets and a real Hiqlite node.
#![expect(clippy::unwrap_used, reason = "tests")]

mod kit;
mod tables;
