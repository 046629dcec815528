//! What every service is hosted in, so that a service is only its contract:
//!
//! ```text
//!   socket ─► Server ─► Admission (deadline, limit, span, shutdown) ─► health | reflection | the service
//!                └─ Tasks: every background task has a name, an owner and an end
//! ```
//!
//! It must not know any particular service.

pub mod admission;
pub mod causes;
pub mod client;
pub mod metrics;
pub mod replicated;
pub mod secrets;
pub mod server;
pub mod settings;
pub mod signals;
pub mod tasks;
pub mod telemetry;

pub use causes::with_causes;
pub use replicated::ReplicatedChannel;
pub use secrets::SecretKey;
pub use server::Server;
pub use tasks::Tasks;
