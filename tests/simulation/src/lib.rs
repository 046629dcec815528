//! Years of failures in seconds: scheduler, registry and vmhosts in one thread, over a simulated network, clock and disk.
//!
//! ```text
//!   clients ──► scheduler (real control and engine) ──► registry (real store, SQLite in memory)
//!                     │                                     ▲
//!                     └──► host (real lifecycle) ───────────┘        faults ──► all of them
//!                             └─► guest                              checker ◄── sees all of it
//! ```
//! [`world::run`] lives through one run: chance, and nothing else, comes from its seed, so a run can be repeated. `kernel` is
//! time and processes, `network` how they reach each other. docs/SIMULATION.md says what is modelled and what is not.

pub mod checker;
pub mod clients;
pub mod faults;
pub mod guest;
pub mod host;
pub mod kernel;
pub mod network;
pub mod random;
pub mod registry;
pub mod scheduler;
pub mod settings;
pub mod turns;
pub mod wire;
pub mod world;

pub use settings::{Protection, Settings};
pub use world::{Outcome, run};
