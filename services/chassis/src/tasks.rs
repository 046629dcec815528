//! Tasks with an owner. Nothing of ours runs in a bare `tokio::spawn`.

use std::{future::Future, time::Duration};

use futures::FutureExt as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A tree of owned tasks: cancel it, then wait for it. Cloning gives another handle to the same node of the tree.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    /// A new root.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A node below this one: cancelled with it, and able to be shut down alone. Its tasks are its own to wait for.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { token: self.token.child_token(), tracker: TaskTracker::new() }
    }

    /// Cancelled when the tasks are to end.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// Runs a task. It is expected to end soon after the token is cancelled; a panic is logged under its name.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        // Boxed: each `async` block around a future has room for it twice, where it comes from and where it runs.
        let guarded = std::panic::AssertUnwindSafe(Box::pin(future)).catch_unwind();
        self.tracker.spawn(async move {
            if guarded.await.is_err() {
                tracing::error!(task = name, "task panicked");
            }
        });
    }

    /// Runs a task that has nothing to put in order: it is dropped when the token is cancelled.
    pub fn spawn_until_end(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let (token, future) = (self.token.clone(), Box::pin(future));
        self.spawn(name, async move {
            tokio::select! {
                () = token.cancelled() => {}
                () = future => {}
            }
        });
    }

    /// Asks the tasks to end and waits for them; false when some had not ended after `grace`.
    pub async fn shutdown(&self, grace: Duration) -> bool {
        self.token.cancel();
        self.tracker.close();
        tokio::time::timeout(grace, self.tracker.wait()).await.is_ok()
    }
}
