//! `mvm-ci stats`.

use std::process::ExitCode;

use blixard::pb::scheduler::v1 as pb;
use serde_json::{Map, Value, json};

use super::{
    client::Client,
    failure::Failure,
    output::{self, Printer, job_state_name, vm_state_name},
};

/// See the module.
pub(crate) async fn stats(client: Client, printer: &Printer) -> Result<ExitCode, Failure> {
    let request = pb::GetStatsRequest {};
    let stats = client.call(request, async |mut stub, request| stub.get_stats(request).await).await?;
    printer.print(|| stats_json(&stats), || stats_text(&stats))?;
    Ok(ExitCode::SUCCESS)
}

fn vm_states(stats: &pb::GetStatsResponse) -> Vec<(String, u64)> {
    stats.vm_states.iter().map(|row| (vm_state_name(row.state), row.count)).collect()
}

fn job_states(stats: &pb::GetStatsResponse) -> Vec<(String, u64)> {
    stats.job_states.iter().map(|row| (job_state_name(row.state), row.count)).collect()
}

fn stats_json(stats: &pb::GetStatsResponse) -> Value {
    let object = |counts: Vec<(String, u64)>| -> Map<String, Value> {
        counts.into_iter().map(|(state, count)| (state, count.into())).collect()
    };
    json!({
        "total_vms": stats.total_vms,
        "running_vms": stats.running_vms,
        "max_vms": stats.max_vms,
        "ready_nodes": stats.ready_nodes,
        "vm_states": object(vm_states(stats)),
        "job_states": object(job_states(stats)),
        "revision": stats.revision,
        "leader": (!stats.leader.is_empty()).then_some(&stats.leader),
        "leading": stats.leading,
    })
}

fn stats_text(stats: &pb::GetStatsResponse) -> String {
    let list = |counts: Vec<(String, u64)>| {
        counts.into_iter().map(|(state, count)| format!("{count} {state}")).collect::<Vec<_>>().join(", ")
    };
    output::fields(&[
        ("VMs", format!("{} on record, {} running, at most {}", stats.total_vms, stats.running_vms, stats.max_vms)),
        ("by state", list(vm_states(stats))),
        ("jobs", list(job_states(stats))),
        ("ready nodes", stats.ready_nodes.to_string()),
        ("revision", stats.revision.to_string()),
        ("leader", leader(stats)),
    ])
}

/// The scheduler that leads, and whether it is the one that answered.
fn leader(stats: &pb::GetStatsResponse) -> String {
    match (stats.leader.as_str(), stats.leading) {
        ("", _) => "none is known".to_owned(),
        (leader, true) => format!("{leader}, which answered"),
        (leader, false) => format!("{leader}; a follower answered"),
    }
}

#[cfg(test)]
mod tests {
    use blixard::{job::JobState, vm::VmState};

    use super::*;

    #[test]
    fn counts_for_people_and_for_programs() {
        let stats = pb::GetStatsResponse {
            total_vms: 5,
            running_vms: 2,
            vm_states: vec![
                pb::VmStateCount { state: VmState::Idle.to_pb().into(), count: 2 },
                pb::VmStateCount { state: VmState::Failed.to_pb().into(), count: 3 },
            ],
            job_states: vec![pb::JobStateCount { state: JobState::Succeeded.to_pb().into(), count: 9 }],
            ready_nodes: 1,
            max_vms: 10,
            revision: 77,
            leader: "node-1".into(),
            leading: true,
        };
        insta::assert_snapshot!(format!("{}\n{:#}", stats_text(&stats), stats_json(&stats)));
    }
}
