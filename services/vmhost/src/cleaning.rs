//! Deletes what the registry has forgotten: the logs and artifacts of jobs, and the consoles of VMs, that are not on record any more. And
//! drops output and artifacts of the oldest attempts when all of them take too much of the disk.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use blixard::{error::Error, id::JobId};

use crate::{blocking::blocking, host::Host, logs::Dropped};

/// How often. What is forgotten was kept for days: nobody waits for its room.
pub(crate) const EVERY: Duration = Duration::from_secs(600);
/// The first time: a node that starts has adopted its VMs and reported what they came to by then, and one that is restarted over
/// and over does not ask for everything each time.
pub(crate) const FIRST_AFTER: Duration = Duration::from_secs(300);
/// How many jobs are asked about at once: what the registry takes.
const BATCH: usize = 1000;

/// How often it is asked whether logs take too much: a number is compared.
pub(crate) const MAKE_ROOM_EVERY: Duration = Duration::from_secs(5);
/// How often it is looked, whatever was written: artifacts are not counted as they come.
const LOOK_EVERY: Duration = Duration::from_secs(600);

/// Keeps what logs take within its bound, for ever.
pub(crate) async fn keep_room(host: &Arc<Host>) {
    let mut looked: Option<Instant> = None;
    loop {
        let due = looked.is_none_or(|looked| looked.elapsed() >= LOOK_EVERY);
        let from = Arc::clone(host);
        let made =
            blocking(
                move || if due || from.logs.may_be_crowded()? { from.logs.make_room().map(Some) } else { Ok(None) },
            );
        match made.await {
            Ok(None) => {}
            Ok(Some(dropped)) => {
                looked = Some(Instant::now());
                if dropped.attempts > 0 {
                    let Dropped { attempts, bytes, .. } = dropped;
                    tracing::warn!(
                        attempts,
                        bytes,
                        "output and artifacts of the oldest attempts dropped: logs took too much of the disk"
                    );
                }
                if dropped.crowded {
                    tracing::warn!("the logs of attempts that run take more of the disk than all may");
                    tokio::time::sleep(host.pace.clean_every).await;
                }
            }
            Err(error) => tracing::warn!(%error, "whether logs take too much of the disk is looked at again later"),
        }
        tokio::time::sleep(host.pace.make_room_every).await;
    }
}

/// Cleans now and then, for ever.
pub(crate) async fn keep_clean(host: &Arc<Host>) {
    tokio::time::sleep(host.pace.first_cleaning_after).await;
    loop {
        match clean(host).await {
            Ok(0) => {}
            Ok(jobs) => tracing::info!(jobs, "logs of forgotten jobs deleted"),
            Err(error) => tracing::warn!(%error, "forgotten jobs are looked for again later"),
        }
        tokio::time::sleep(host.pace.clean_every).await;
    }
}

/// Returns how many jobs were deleted. The registry has to say of each that it is forgotten: without an answer nothing is.
async fn clean(host: &Arc<Host>) -> Result<usize, Error> {
    let from = Arc::clone(host);
    let quiet = blocking(move || from.logs.quiet_jobs()).await.map_err(unusable)?;
    let mut deleted = 0;
    for batch in quiet.chunks(BATCH) {
        let asked: Vec<JobId> = batch.to_vec();
        let forgotten = host.registry.forgotten_jobs(&asked).await?;
        let from = Arc::clone(host);
        deleted += blocking(move || {
            // Only what was asked about, whatever the answer.
            forgotten
                .iter()
                .filter(|job| asked.contains(job))
                .try_fold(0, |deleted, job| Ok(deleted + usize::from(from.logs.delete(*job)?)))
        })
        .await
        .map_err(unusable)?;
    }
    for vm in host.consoles.list() {
        if host.registry.vm(vm).await?.is_none() {
            host.consoles.delete(vm);
        }
    }
    Ok(deleted)
}

fn unusable(error: io::Error) -> Error {
    Error::internal(|error_id| tracing::error!(error_id, %error, "the log directory can't be used"))
}
