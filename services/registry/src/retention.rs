//! Retention: forgets old events, and VMs and jobs that have ended, in small steps that nobody waits for.
//!
//! ```text
//!   database ─► next_step (what is too old, or too much?) ─► a mutation like any other ─► pause ─► …
//! ```
//! One replica does it, the leader, and only decides: what is deleted stands in the mutation, so every replica deletes the
//! same. What was deleted of the events is on record (`compaction`), so that a watch that comes too late is told.

use std::{sync::Arc, time::Duration};

use blixard::{config::RetentionConfig, error::Error, time::Timestamp};
use hiqlite::rusqlite::{self, Connection};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    change::compacted_revision,
    commit::CommitHandle,
    mutation::{ENDED_JOBS, ENDED_VMS, EXPIRED_JOBS, Mutation},
    read::{Readers, newest_revision},
    rows::number,
    time,
};

/// Events that one step deletes, and rows of VMs or jobs (whose triggers write an event each): a few milliseconds of
/// everybody's time.
const EVENTS_AT_ONCE: u64 = 1000;
const ROWS_AT_ONCE: u32 = 200;
/// Shortest pause after a step. It is at least as long as the step took, so that others have half the time, however slow
/// the disk.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);

/// What is kept, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Age at which an event goes.
    pub events_for: Duration,
    /// The newest events that stay.
    pub max_events: u64,
    /// Time after its end at which a VM or a job goes.
    pub ended_for: Duration,
    /// Pause between two looks. A look costs a few reads by key.
    pub look_every: Duration,
}

impl From<RetentionConfig> for Retention {
    fn from(config: RetentionConfig) -> Self {
        let days = |days: u32| Duration::from_secs(u64::from(days) * 24 * 3600);
        Self {
            events_for: days(config.events_days),
            max_events: config.max_events.into(),
            ended_for: days(config.ended_days),
            look_every: Duration::from_secs(10),
        }
    }
}

/// The task that forgets.
pub(crate) struct RetentionDriver {
    pub(crate) retention: Retention,
    pub(crate) readers: Arc<Readers>,
    pub(crate) commits: CommitHandle,
    /// Whether this replica is the one to do it.
    pub(crate) leads: watch::Receiver<bool>,
}

impl RetentionDriver {
    /// Forgets until `stop` is cancelled, while this replica leads.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        while let Some(true) = stop.run_until_cancelled(self.look_when_leading()).await {
            stop.run_until_cancelled(tokio::time::sleep(self.retention.look_every)).await;
        }
    }

    /// False when this replica will never lead any more.
    async fn look_when_leading(&mut self) -> bool {
        let leads = self.leads.wait_for(|leads| *leads).await.is_ok();
        if leads && let Err(error) = self.forget().await {
            tracing::debug!(%error, "retention goes on later");
        }
        leads
    }

    /// Step by step, as long as there is something to forget.
    async fn forget(&self) -> Result<(), Error> {
        let retention = self.retention;
        while *self.leads.borrow() {
            let step = move |connection: &Connection| next_step(connection, &retention, Timestamp::now());
            let Some(step) = self.readers.read(step).await? else { break };
            let begun = Instant::now();
            tracing::debug!(?step, "retention");
            self.commits.submit(step, None).await?;
            tokio::time::sleep(begun.elapsed().max(SHORTEST_PAUSE)).await;
        }
        Ok(())
    }
}

/// What is to be forgotten next, if anything is.
pub(crate) fn next_step(
    connection: &Connection,
    retention: &Retention,
    now: Timestamp,
) -> rusqlite::Result<Option<Mutation>> {
    let ended_before = before(now, retention.ended_for);
    for (ended, step) in [
        (&*ENDED_VMS, Mutation::ForgetVms { ended_before, at_most: ROWS_AT_ONCE }),
        (&*ENDED_JOBS, Mutation::ForgetJobs { ended_before, at_most: ROWS_AT_ONCE }),
    ] {
        if connection.prepare_cached(&format!("SELECT 1 {ended}"))?.exists([time::to_text(ended_before)])? {
            return Ok(Some(step));
        }
    }
    if connection.prepare_cached(&format!("SELECT 1 {EXPIRED_JOBS}"))?.exists([now.0])? {
        return Ok(Some(Mutation::ForgetExpiredJobs { now, at_most: ROWS_AT_ONCE }));
    }
    let compacted = compacted_revision(connection)?;
    let too_many = newest_revision(connection)?.saturating_sub(retention.max_events);
    let too_old = too_old(connection, compacted, before(now, retention.events_for))?;
    let through = too_many.max(too_old).min(compacted + EVENTS_AT_ONCE);
    Ok((through > compacted).then_some(Mutation::CompactEvents { through }))
}

/// Of the next events, the last before the first that is young enough.
fn too_old(connection: &Connection, compacted: u64, before: Timestamp) -> rusqlite::Result<u64> {
    let sql = "SELECT revision, timestamp < ?3 FROM events WHERE revision > ?1 ORDER BY revision LIMIT ?2";
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query((compacted.cast_signed(), EVENTS_AT_ONCE.cast_signed(), time::to_text(before)))?;
    let mut through = compacted;
    while let Some(row) = rows.next()?
        && row.get(1)?
    {
        through = number(row, 0)?;
    }
    Ok(through)
}

fn before(now: Timestamp, age: Duration) -> Timestamp {
    Timestamp(now.0.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn database() -> Connection {
        let database = Connection::open_in_memory().unwrap();
        schema::create(&database).unwrap();
        database
    }

    /// Events, one for each of these days of the year.
    fn record(database: &Connection, days: impl IntoIterator<Item = i64>) {
        for day in days {
            let sql = "INSERT INTO events (timestamp, entity, entity_id, reason) VALUES (?1, 'node', 'n', '')";
            database.execute(sql, [time::to_text(on(day))]).unwrap();
        }
    }

    fn on(day: i64) -> Timestamp {
        Timestamp(day * i64::try_from(DAY.as_millis()).unwrap())
    }

    fn keep(days: u32, max_events: u64) -> Retention {
        Retention { events_for: DAY * days, max_events, ended_for: DAY * 1000, look_every: DAY }
    }

    /// Up to where events go, step by step, until there is nothing to forget.
    fn compactions(database: &Connection, retention: &Retention, today: i64) -> Vec<u64> {
        let mut steps = Vec::new();
        while let Some(step) = next_step(database, retention, on(today)).unwrap() {
            let Mutation::CompactEvents { through } = step else { panic!("{step:?}") };
            database.execute("DELETE FROM events WHERE revision <= ?1", [through.cast_signed()]).unwrap();
            database.execute("UPDATE compaction SET revision = ?1", [through.cast_signed()]).unwrap();
            steps.push(through);
        }
        steps
    }

    #[test]
    fn events_go_by_age_from_the_oldest_on_and_no_further_than_the_first_young_one() {
        let database = database();
        record(&database, [1, 2, 3, 10, 4, 11]);
        assert_eq!(compactions(&database, &keep(7, 100), 8), [0_u64; 0]);
        assert_eq!(compactions(&database, &keep(7, 100), 10), [2]);
        assert_eq!(compactions(&database, &keep(7, 100), 17), [3]);
        assert_eq!(compactions(&database, &keep(7, 100), 100), [6]);
        record(&database, [101]);
        assert_eq!(compactions(&database, &keep(7, 100), 102), [0_u64; 0]);
    }

    #[test]
    fn events_go_by_number_in_small_steps_and_the_newest_stay() {
        let database = database();
        record(&database, (0..3500).map(|_| 1));
        assert_eq!(compactions(&database, &keep(7, 1000), 2), [1000, 2000, 2500]);
        // By age too, in as small steps.
        assert_eq!(compactions(&database, &keep(7, 1000), 9), [3500]);
        assert_eq!(newest_revision(&database).unwrap(), 3500);
    }

    #[test]
    fn what_has_ended_is_found_without_reading_what_has_not() {
        let database = database();
        for (ended, index) in
            [(ENDED_VMS.as_str(), "vms_ended"), (ENDED_JOBS.as_str(), "jobs_ended"), (EXPIRED_JOBS, "jobs_expiring")]
        {
            let sql = format!("EXPLAIN QUERY PLAN SELECT 1 {ended}");
            let plan: String = database.query_row(&sql, [""], |row| row.get("detail")).unwrap();
            assert!(plan.starts_with("SEARCH") && plan.contains(&format!("INDEX {index} ")), "{plan}");
        }
    }
}
