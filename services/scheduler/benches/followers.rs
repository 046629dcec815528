//! What it costs to follow a log together: a finished log of 64 MiB read by 1, 16 and 64 callers, with `follow` (one read for all)
//! and without (each reads for himself), through a scheduler between a registry and a vmhost that hold everything in memory.
//!
//! ```text
//! cargo bench -p blixard-scheduler --bench followers
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Instant;

use blixard::{
    job::JobState,
    pb::{
        common::v1 as common,
        scheduler::v1::{self as pb, stream_job_logs_response::Record},
    },
};
use support::World;

const LOG_BYTES: usize = 64 * 1024 * 1024;
const RUNS: usize = 5;

#[tokio::main]
async fn main() {
    let world = World::start().await;
    let spec = common::JobSpec { command: vec!["true".into()], ..Default::default() };
    let submit = pb::SubmitJobRequest { spec: Some(spec), ..Default::default() };
    let job = world.scheduler.clone().submit_job(submit).await.expect("submitted").into_inner().job.expect("a job");
    world.registry.run(&job.id);
    world.vmhost.write(&vec![b'x'; LOG_BYTES]);
    world.vmhost.end();
    world.registry.finish(&job.id, JobState::Succeeded, LOG_BYTES as u64);
    println!("{:>9}  {:>12}  {:>12}  reads together", "followers", "each", "together");
    for followers in [1, 16, 64] {
        let (mut apart, mut together) = (Vec::new(), Vec::new());
        world.vmhost.held().opened.clear();
        let mut reads = 0;
        for _ in 0..RUNS {
            apart.push(rate(&world, &job.id, followers, false).await);
            let before = world.vmhost.held().opened.len();
            together.push(rate(&world, &job.id, followers, true).await);
            reads += world.vmhost.held().opened.len() - before;
        }
        let median = |mut rates: Vec<f64>| {
            rates.sort_by(f64::total_cmp);
            rates[RUNS / 2]
        };
        println!(
            "{followers:>9}  {:>6.0} MiB/s  {:>6.0} MiB/s  {:.1} a run",
            median(apart),
            median(together),
            reads as f64 / RUNS as f64
        );
    }
}

/// MiB a second, of all callers together.
async fn rate(world: &World, job_id: &str, followers: usize, follow: bool) -> f64 {
    let began = Instant::now();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..followers {
        let request = pb::StreamJobLogsRequest { job_id: job_id.into(), attempt: 0, offset: 0, follow };
        let mut scheduler = world.scheduler.clone();
        all.spawn(async move {
            let mut records = scheduler.stream_job_logs(request).await.expect("followed").into_inner();
            let mut bytes = 0;
            while let Some(response) = records.message().await.expect("a record") {
                if let Some(Record::Chunk(chunk)) = response.record {
                    bytes += chunk.data.len();
                }
            }
            assert_eq!(bytes, LOG_BYTES);
        });
    }
    while let Some(done) = all.join_next().await {
        done.expect("a follower");
    }
    (followers * LOG_BYTES) as f64 / (1024.0 * 1024.0) / began.elapsed().as_secs_f64()
}
