//! Nodes: what of them is taken, and what their keepers want of them.

use std::time::Duration;

use blixard::{
    error::{Error, Reason, invalid},
    id::NodeId,
    limits,
    node::NodeState,
    pb::{common::v1 as common, registry::v1 as registry, scheduler::v1 as pb, vmhost::v1 as vmhost},
    time::Timestamp,
};
use blixard_chassis::client::forward;
use tonic::{Request, Status};

use crate::{
    peers::{missing, peer_error},
    service::{SchedulerApi, check_reason, refused},
};

impl SchedulerApi {
    pub(crate) async fn nodes(&self, caller: &Request<pb::ListNodesRequest>) -> Result<pb::ListNodesResponse, Status> {
        let asked = caller.get_ref().clone();
        let list = registry::ListNodesRequest { page_size: asked.page_size, page_token: asked.page_token };
        let page = self.peers.registry().list_nodes(forward(caller, list)).await.map_err(refused)?.into_inner();
        let taken = self.shell.node_use().await?;
        let describe = |node: common::Node| {
            let taken =
                NodeId::parse("node.id", &node.id).ok().and_then(|id| taken.get(&id).copied()).unwrap_or_default();
            pb::NodeUse { node: Some(node), vms: taken.vms, used_memory_mib: taken.used_memory_mib, jobs: taken.jobs }
        };
        Ok(pb::ListNodesResponse {
            nodes: page.nodes.into_iter().map(describe).collect(),
            next_page_token: page.next_page_token,
        })
    }

    /// Records what is wanted of a node; `deadline`: from now.
    pub(crate) async fn want<T>(
        &self,
        caller: &Request<T>,
        node_id: &str,
        wanted: NodeState,
        reason: &str,
        deadline: Option<Duration>,
    ) -> Result<common::Node, Status> {
        let node_id = NodeId::parse("node_id", node_id)?;
        check_reason(reason)?;
        let update = registry::UpdateNodeRequest {
            node_id: node_id.to_string(),
            wanted: wanted.to_pb().into(),
            reason: reason.to_owned(),
            drain_deadline: deadline.map(|deadline| Timestamp::now().plus(deadline).into()),
            request_id: String::new(),
        };
        let answer = self.peers.registry().update_node(forward(caller, update)).await.map_err(refused)?;
        Ok(answer.into_inner().node.ok_or_else(|| missing("node"))?)
    }

    /// Has a node look at itself.
    pub(crate) async fn check(&self, caller: &Request<pb::CheckNodeRequest>) -> Result<pb::CheckNodeResponse, Status> {
        let asked = caller.get_ref();
        let node_id = NodeId::parse("node_id", &asked.node_id)?;
        let nodes = self.peers.nodes();
        if !nodes.contains_key(&node_id) {
            let known = nodes.keys().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
            let message = format!("there is no node \"{node_id}\"; there are: {known}");
            return Err(Error::new(Reason::NodeNotFound, message).with("node_id", node_id).into());
        }
        let check = vmhost::CheckInvariantsRequest { repair: asked.repair };
        let answer = self.peers.vmhost(&node_id)?.check_invariants(forward(caller, check)).await;
        let vmhost::CheckInvariantsResponse { violations, vms, processes, directories } =
            answer.map_err(|status| peer_error("vmhost", &status))?.into_inner();
        Ok(pb::CheckNodeResponse { violations, vms, processes, directories })
    }
}

/// How long a drain may take.
pub(crate) fn parse_deadline(deadline_ms: Option<u64>) -> Result<Option<Duration>, Error> {
    let Some(ms) = deadline_ms else { return Ok(None) };
    let deadline = Duration::from_millis(ms);
    if deadline > limits::MAX_DRAIN_DEADLINE {
        let allowed = format!("at most {} (7 days)", limits::MAX_DRAIN_DEADLINE.as_millis());
        return Err(invalid("deadline_ms", ms, &allowed));
    }
    Ok(Some(deadline))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_may_take_seven_days() {
        let week = 7 * 24 * 3600 * 1000;
        assert_eq!(parse_deadline(None), Ok(None));
        assert_eq!(parse_deadline(Some(week)), Ok(Some(limits::MAX_DRAIN_DEADLINE)));
        let refused = parse_deadline(Some(week + 1)).expect_err("too long");
        assert_eq!(refused.metadata["field"], "deadline_ms");
    }
}
