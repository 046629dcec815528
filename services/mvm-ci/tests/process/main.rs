//! The binary as its users meet it: a process with arguments, descriptors, signals and an exit code.

mod client;
mod contract;
mod fake_scheduler;
mod features;
mod fleet;
mod foreign_clients;
mod guest;
mod image;
mod jobs;
mod nonsense;
mod plane;
mod restart;
mod script;
mod support;
