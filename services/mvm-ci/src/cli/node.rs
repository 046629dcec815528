//! `mvm-ci node …`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, Reason},
    node::{Node, NodeState, shortage},
    pb::{common::v1 as common, scheduler::v1 as pb},
    time::{Timestamp, millis},
};
use serde_json::{Value, json};

use super::{
    args::{NodeArgs, NodeCommand},
    client::{Client, missing},
    failure::Failure,
    job::page_size,
    output::{self, Printer},
};

/// How often `--wait` looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How much longer than its deadline a drain is waited for: the VMs that it stops have ten seconds, and are ended then.
const STOP_TAKES: Duration = Duration::from_secs(60);

/// A node and what of it is taken.
struct NodeUse {
    node: Node,
    vms: u32,
    used_memory_mib: u64,
    jobs: u32,
}

/// See the module.
pub(crate) async fn node(client: Client, args: NodeArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    match args.command {
        NodeCommand::List => {
            let nodes = list(&client).await?;
            let now = Timestamp::now();
            printer.print(|| Value::Array(nodes.iter().map(node_json).collect()), || table(&nodes, now))?;
        }
        NodeCommand::Get { id } => {
            let found = get(&client, &id).await?;
            printer.print(|| node_json(&found), || text(&found))?;
        }
        NodeCommand::Cordon { id, reason } => {
            let request = pb::CordonNodeRequest { node_id: id, reason };
            let answer = client.call(request, async |mut stub, request| stub.cordon_node(request).await).await?;
            told(answer.node, printer)?;
        }
        NodeCommand::Uncordon { id } => {
            let request = pb::UncordonNodeRequest { node_id: id };
            let answer = client.call(request, async |mut stub, request| stub.uncordon_node(request).await).await?;
            told(answer.node, printer)?;
        }
        NodeCommand::Drain { id, deadline, reason, wait } => {
            let deadline_ms = deadline.map(millis);
            let request = pb::DrainNodeRequest { node_id: id.clone(), reason, deadline_ms };
            let answer = client.call(request, async |mut stub, request| stub.drain_node(request).await).await?;
            if wait {
                let empty = wait_until_empty(&client, &id, deadline).await?;
                printer.print(|| node_json(&empty), || format!("{id} is empty"))?;
            } else {
                told(answer.node, printer)?;
            }
        }
        NodeCommand::Check { ids, repair } => return check(&client, ids, repair, printer).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// A node's look at itself.
struct Checked {
    node_id: String,
    found: pb::CheckNodeResponse,
}

async fn check(client: &Client, ids: Vec<String>, repair: bool, printer: &Printer) -> Result<ExitCode, Failure> {
    let ids = if ids.is_empty() {
        let nodes = list(client).await?.into_iter().map(|seen| seen.node);
        nodes.filter(|node| node.state != NodeState::Lost).map(|node| node.id.to_string()).collect()
    } else {
        ids
    };
    let mut checked = Vec::new();
    for node_id in ids {
        let request = pb::CheckNodeRequest { node_id: node_id.clone(), repair };
        let found = client.call(request, async |mut stub, request| stub.check_node(request).await).await?;
        checked.push(Checked { node_id, found });
    }
    let json = || Value::Array(checked.iter().map(checked_json).collect());
    printer.print(json, || checked.iter().map(checked_text).collect::<Vec<_>>().join("\n"))?;
    let left = checked.iter().flat_map(|checked| &checked.found.violations).any(|violation| !violation.repaired);
    Ok(if left { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn kind(violation: &common::Violation) -> &'static str {
    match violation.kind() {
        common::ViolationKind::Unspecified => "unknown",
        common::ViolationKind::Process => "process",
        common::ViolationKind::Directory => "directory",
        common::ViolationKind::Record => "record",
        common::ViolationKind::Machine => "machine",
        common::ViolationKind::Interface => "interface",
        common::ViolationKind::Address => "address",
        common::ViolationKind::Cgroup => "cgroup",
    }
}

fn checked_json(checked: &Checked) -> Value {
    let violation = |violation: &common::Violation| {
        json!({
            "kind": kind(violation),
            "vm_id": violation.vm_id,
            "subject": violation.subject,
            "problem": violation.problem,
            "repaired": violation.repaired,
        })
    };
    json!({
        "node_id": checked.node_id,
        "vms": checked.found.vms,
        "processes": checked.found.processes,
        "directories": checked.found.directories,
        "violations": checked.found.violations.iter().map(violation).collect::<Vec<_>>(),
    })
}

/// `node-1: 3 VMs, 6 processes, 3 directories: all as on record`, or a line for each difference.
fn checked_text(checked: &Checked) -> String {
    let pb::CheckNodeResponse { violations, vms, processes, directories } = &checked.found;
    let mut text = format!("{}: {vms} VMs, {processes} processes, {directories} directories: ", checked.node_id);
    text += &match violations.len() {
        0 => "all as on record".to_owned(),
        1 => "1 difference".to_owned(),
        many => format!("{many} differences"),
    };
    for violation in violations {
        let repaired = if violation.repaired { "; repaired" } else { "" };
        let line = format!("{} {}: {}{repaired}", kind(violation), violation.subject, violation.problem);
        text += &format!("\n  {}", output::printable(&line));
    }
    text
}

/// What the node is after a change.
fn told(node: Option<common::Node>, printer: &Printer) -> Result<(), Failure> {
    let node = Node::try_from(node.ok_or_else(|| missing("node"))?)?;
    printer.print(|| state_json(&node), || state_line(&node))
}

async fn wait_until_empty(client: &Client, id: &str, deadline: Option<Duration>) -> Result<NodeUse, Failure> {
    let since = Instant::now();
    loop {
        let seen = get(client, id).await?;
        if seen.vms == 0 {
            return Ok(seen);
        }
        if deadline.is_some_and(|deadline| since.elapsed() > deadline + STOP_TAKES) {
            let message = format!("{} VMs are still on {id} after the deadline", seen.vms);
            return Err(Error::new(Reason::DeadlineExceeded, message).with("node_id", id).into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn get(client: &Client, id: &str) -> Result<NodeUse, Error> {
    let nodes = list(client).await?;
    let known = nodes.iter().map(|seen| seen.node.id.to_string()).collect::<Vec<_>>().join(", ");
    nodes.into_iter().find(|seen| seen.node.id.as_str() == id).ok_or_else(|| {
        Error::new(Reason::NodeNotFound, format!("there is no node \"{id}\"; there are: {known}")).with("node_id", id)
    })
}

async fn list(client: &Client) -> Result<Vec<NodeUse>, Error> {
    let mut nodes = Vec::new();
    let mut request = pb::ListNodesRequest { page_size: page_size(usize::MAX), page_token: String::new() };
    loop {
        let page = client.call(request.clone(), async |mut stub, request| stub.list_nodes(request).await).await?;
        for seen in page.nodes {
            let node = Node::try_from(seen.node.ok_or_else(|| missing("node"))?)?;
            let (vms, used_memory_mib, jobs) = (seen.vms, seen.used_memory_mib, seen.jobs);
            nodes.push(NodeUse { node, vms, used_memory_mib, jobs });
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(nodes);
        }
    }
}

fn state_json(node: &Node) -> Value {
    json!({
        "id": node.id.to_string(),
        "state": node.state.as_str(),
        "wanted": node.wanted.as_str(),
        "reason": node.reason,
        "drain_deadline": output::maybe_time(node.drain_deadline),
        "endpoint": node.endpoint,
        "driver": node.driver,
        "vcpus": node.vcpus,
        "memory_mib": node.memory_mib,
        "max_vms": node.max_vms,
        "images": node.images,
        "volumes": node.volumes,
        "scratch_mib": node.scratch_mib,
        "labels": node.labels,
        "pressure": node.pressure.iter().map(|pressure| pressure.as_str()).collect::<Vec<_>>(),
        "incarnation": node.incarnation,
        "registered_at": output::rfc3339(node.registered_at),
        "updated_at": output::rfc3339(node.updated_at),
        "revision": node.revision,
    })
}

fn node_json(seen: &NodeUse) -> Value {
    let mut json = state_json(&seen.node);
    json["vms"] = seen.vms.into();
    json["used_memory_mib"] = seen.used_memory_mib.into();
    json["jobs"] = seen.jobs.into();
    json
}

/// `Ready (memory)`: and what its machine is short of.
fn state(node: &Node) -> String {
    match node.pressure.is_empty() {
        true => node.state.to_string(),
        false => format!("{} ({})", node.state, shortage(&node.pressure)),
    }
}

/// `Draining until …: because`; a Lost node says what it comes back as.
fn state_words(node: &Node) -> String {
    let back = if node.state == node.wanted { String::new() } else { format!(", then {}", node.wanted) };
    let until = node.drain_deadline.map(|at| format!(" until {}", output::rfc3339(at))).unwrap_or_default();
    let why = if node.reason.is_empty() { String::new() } else { format!(": {}", node.reason) };
    let short =
        if node.pressure.is_empty() { String::new() } else { format!("; short of {}", shortage(&node.pressure)) };
    format!("{}{back}{until}{why}{short}", node.state)
}

fn state_line(node: &Node) -> String {
    output::printable(&format!("{} is {}", node.id, state_words(node)))
}

fn pairs(labels: &std::collections::BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn table(nodes: &[NodeUse], now: Timestamp) -> String {
    let row = |seen: &NodeUse| {
        let node = &seen.node;
        vec![
            node.id.to_string(),
            state(node),
            format!("{}/{}", seen.vms, node.max_vms),
            seen.jobs.to_string(),
            format!("{}/{} MiB", seen.used_memory_mib, node.memory_mib),
            node.vcpus.to_string(),
            node.driver.clone(),
            output::age(now.since(node.updated_at)),
            output::dash(pairs(&node.labels)),
            output::dash(node.reason.clone()),
        ]
    };
    let heading = ["ID", "STATE", "VMS", "JOBS", "MEMORY", "VCPUS", "DRIVER", "SINCE", "LABELS", "REASON"];
    output::table(&heading, &nodes.iter().map(row).collect::<Vec<_>>())
}

fn text(seen: &NodeUse) -> String {
    let node = &seen.node;
    output::fields(&[
        ("id", node.id.to_string()),
        ("state", state_words(node)),
        ("vms", format!("{} of {}", seen.vms, node.max_vms)),
        ("jobs", seen.jobs.to_string()),
        ("memory", format!("{} of {} MiB", seen.used_memory_mib, node.memory_mib)),
        ("vcpus", node.vcpus.to_string()),
        ("driver", node.driver.clone()),
        ("images", node.images.join(" ")),
        ("volumes", node.volumes.join(" ")),
        (
            "scratch",
            if node.scratch_mib == 0 { "none".to_owned() } else { format!("at most {} MiB", node.scratch_mib) },
        ),
        ("labels", pairs(&node.labels)),
        ("endpoint", node.endpoint.clone()),
        ("incarnation", node.incarnation.to_string()),
        ("registered", output::rfc3339(node.registered_at)),
        ("updated", output::rfc3339(node.updated_at)),
    ])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use blixard::{id::NodeId, node::HostPressure};

    use super::*;

    const REGISTERED: Timestamp = Timestamp(1_769_860_000_250);

    fn ready() -> NodeUse {
        let node = Node {
            id: NodeId::parse("id", "node-1").expect("a name"),
            state: NodeState::Ready,
            endpoint: "http://10.0.0.1:50053".into(),
            driver: "qemu".into(),
            vcpus: 8,
            memory_mib: 16_384,
            max_vms: 10,
            images: vec!["default".into(), "rust".into()],
            incarnation: 3,
            revision: 12,
            registered_at: REGISTERED,
            labels: BTreeMap::from([("disk".into(), "ssd".into()), ("zone".into(), "a".into())]),
            reason: String::new(),
            updated_at: REGISTERED,
            drain_deadline: None,
            wanted: NodeState::Ready,
            pressure: Default::default(),
            volumes: vec!["tools".into()],
            scratch_mib: 250_000,
        };
        NodeUse { node, vms: 3, used_memory_mib: 1536, jobs: 2 }
    }

    #[test]
    fn nodes_for_people_and_for_programs() {
        let mut draining = ready();
        draining.node.id = NodeId::parse("id", "node-2").expect("a name");
        draining.node.state = NodeState::Draining;
        draining.node.wanted = NodeState::Draining;
        draining.node.reason = "new\u{1b} disk".into();
        draining.node.drain_deadline = Some(Timestamp(REGISTERED.0 + 600_000));
        draining.node.pressure = [HostPressure::Disk, HostPressure::DiskCritical].into();
        let mut lost = ready();
        lost.node.state = NodeState::Lost;
        lost.node.wanted = NodeState::Cordoned;
        let stray = common::Violation {
            kind: common::ViolationKind::Process.into(),
            vm_id: "11111111-1111-4111-8111-111111111111".into(),
            subject: "4711 (qemu-system-x86)".into(),
            problem: "a process of a VM that this node does not hold".into(),
            repaired: true,
        };
        let found = |violations| pb::CheckNodeResponse { violations, vms: 3, processes: 6, directories: 3 };
        let clean = Checked { node_id: "node-1".into(), found: found(vec![]) };
        let checked = Checked { node_id: "node-2".into(), found: found(vec![stray]) };
        insta::assert_snapshot!(
            "checked",
            format!("{}\n{}\n\n{:#}", checked_text(&clean), checked_text(&checked), checked_json(&checked))
        );
        let nodes = [ready(), draining];
        let now = Timestamp(REGISTERED.0 + 90_000);
        insta::assert_snapshot!(format!(
            "{}\n{}\n{}\n{}\n\n{:#}",
            table(&nodes, now),
            text(&nodes[1]),
            state_line(&nodes[1].node),
            state_line(&lost.node),
            node_json(&nodes[1]),
        ));
    }
}
