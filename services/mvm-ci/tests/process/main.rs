//! The binary as its users meet it: a process with arguments, descriptors, signals and an exit code.

mod client;
mod fake_scheduler;
mod support;
