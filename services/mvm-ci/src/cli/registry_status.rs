//! `mvm-ci registry status`: asks one replica who the others are, and then each of them how it is.

use std::{process::ExitCode, time::Duration};

use blixard::{
    error::Error,
    pb::registry::v1::{
        GetReplicaRequest, GetReplicaResponse, ReplicaState, replica_service_client::ReplicaServiceClient,
    },
    replica::{Replica, Replicas},
};
use blixard_chassis::client;
use futures::future::join_all;
use serde_json::{Value, json};

use super::{
    failure::{Failure, unreachable},
    output::{self, Printer},
};

/// How long a replica has to answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Exit code when no leader has a majority.
const UNWELL: u8 = 1;

/// A replica and what it said; `None`: it did not answer.
struct Row {
    id: u64,
    endpoint: String,
    answer: Option<GetReplicaResponse>,
}

/// See the module.
pub(crate) async fn status(endpoint: &str, printer: &Printer) -> Result<ExitCode, Failure> {
    let first = ask(endpoint).await?.ok_or_else(|| unreachable(endpoint))?;
    let replicas: Replicas = first.replicas.parse().unwrap_or_default();
    let rows = if replicas.is_empty() {
        vec![Row { id: first.replica_id.into(), endpoint: endpoint.to_owned(), answer: Some(first) }]
    } else {
        join_all(replicas.iter().map(row)).await.into_iter().collect::<Result<_, _>>()?
    };
    printer.print(|| rows.iter().map(|row| row_json(row, &rows)).collect(), || table(&rows))?;
    Ok(if is_well(&rows) { ExitCode::SUCCESS } else { ExitCode::from(UNWELL) })
}

async fn row(replica: &Replica) -> Result<Row, Error> {
    let endpoint = replica.endpoint();
    Ok(Row { id: replica.id, answer: ask(&endpoint).await?, endpoint })
}

async fn ask(endpoint: &str) -> Result<Option<GetReplicaResponse>, Error> {
    let mut replica = ReplicaServiceClient::new(client::channel(endpoint)?);
    let answer = replica.get_replica(client::request(GetReplicaRequest::default(), TIMEOUT)).await;
    Ok(answer.ok().map(tonic::Response::into_inner))
}

/// Whether a leader has a majority.
fn is_well(rows: &[Row]) -> bool {
    let states = || rows.iter().filter_map(|row| Some(row.answer.as_ref()?.state()));
    let serving = states().filter(|state| matches!(state, ReplicaState::Leader | ReplicaState::Follower)).count();
    states().any(|state| state == ReplicaState::Leader) && serving > rows.len() / 2
}

/// Entries that a replica lacks of the longest log.
fn behind(answer: &GetReplicaResponse, rows: &[Row]) -> u64 {
    let newest = rows.iter().filter_map(|row| row.answer.as_ref()).map(|answer| answer.last_log_index).max();
    newest.unwrap_or(0).saturating_sub(answer.applied_index)
}

fn state_name(answer: &GetReplicaResponse) -> &'static str {
    answer.state().as_str_name().trim_start_matches("REPLICA_STATE_")
}

fn row_json(row: &Row, rows: &[Row]) -> Value {
    let (id, endpoint) = (row.id, &row.endpoint);
    match &row.answer {
        None => json!({ "id": id, "endpoint": endpoint, "state": null }),
        Some(answer) => json!({
            "id": id,
            "endpoint": endpoint,
            "state": state_name(answer),
            "leader_id": answer.leader_id,
            "term": answer.term,
            "applied_index": answer.applied_index,
            "behind": behind(answer, rows),
            "revision": answer.revision,
            "version": answer.version,
        }),
    }
}

fn table(rows: &[Row]) -> String {
    let cells = |row: &Row| {
        let mut cells = vec![row.id.to_string(), row.endpoint.clone()];
        match &row.answer {
            None => cells.push("no answer".to_owned()),
            Some(answer) => cells.extend([
                state_name(answer).to_owned(),
                if answer.leader_id == 0 { "-".to_owned() } else { answer.leader_id.to_string() },
                answer.term.to_string(),
                answer.applied_index.to_string(),
                behind(answer, rows).to_string(),
                answer.revision.to_string(),
                answer.version.clone(),
            ]),
        }
        cells.resize(HEADING.len(), "-".to_owned());
        cells
    };
    output::table(&HEADING, &rows.iter().map(cells).collect::<Vec<_>>())
}

const HEADING: [&str; 9] =
    ["REPLICA", "ENDPOINT", "STATE", "LEADER", "TERM", "APPLIED", "BEHIND", "REVISION", "VERSION"];

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64, state: ReplicaState, applied_index: u64) -> Row {
        let answer = GetReplicaResponse {
            state: state.into(),
            leader_id: 2,
            term: 4,
            last_log_index: applied_index,
            applied_index,
            revision: 7,
            version: "1.0.0".into(),
            ..Default::default()
        };
        Row { id, endpoint: format!("http://10.0.0.{id}:50052"), answer: Some(answer) }
    }

    fn silent(id: u64) -> Row {
        Row { answer: None, ..row(id, ReplicaState::Leader, 0) }
    }

    #[test]
    fn replicas_for_people_and_for_programs() {
        let rows = [silent(1), row(2, ReplicaState::Leader, 90), row(3, ReplicaState::Behind, 80)];
        let json: Value = rows.iter().map(|row| row_json(row, &rows)).collect();
        insta::assert_snapshot!(format!("{}\n{json:#}", table(&rows)));
    }

    #[test]
    fn a_registry_is_well_with_a_leader_and_a_majority() {
        let leader = || row(2, ReplicaState::Leader, 1);
        assert!(is_well(&[leader()]));
        assert!(is_well(&[silent(1), leader(), row(3, ReplicaState::Follower, 1)]));
        assert!(!is_well(&[silent(1), leader(), row(3, ReplicaState::Behind, 1)]));
        assert!(!is_well(&[row(1, ReplicaState::Follower, 1), row(3, ReplicaState::Follower, 1), silent(2)]));
    }
}
