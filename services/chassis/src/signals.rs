//! How a process is asked to end.

use tokio::signal::unix::{SignalKind, signal};

use crate::Tasks;

/// Waits for SIGINT or SIGTERM. From then on a second one ends the process at once.
///
/// # Errors
/// The signal handlers can't be installed.
pub async fn asked_to_end() -> std::io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    // In a tree of its own: it lasts as long as the process, and who waits for the others must not wait for it.
    Tasks::new().spawn("second signal", async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::warn!("asked twice: ending at once");
        std::process::exit(130);
    });
    Ok(())
}
