//! `mvm-ci vm usage`: what a VM has used.

use std::time::Duration;

use blixard::pb::{
    common::v1::{IoCounters, NetworkCounters, VmUsage},
    scheduler::v1 as pb,
};
use serde_json::{Value, json};

use super::{
    client::{Client, missing},
    failure::Failure,
    output::{self, Printer},
};

/// See the module.
pub(crate) async fn usage(client: &Client, vm_id: &str, printer: &Printer) -> Result<(), Failure> {
    let request = pb::GetVmUsageRequest { vm_id: vm_id.to_owned() };
    let answer = client.call(request, async |mut stub, request| stub.get_vm_usage(request).await).await?;
    let usage = answer.usage.ok_or_else(|| missing("usage"))?;
    printer.print(|| usage_json(vm_id, &usage), || usage_text(&usage))
}

fn usage_json(vm_id: &str, usage: &VmUsage) -> Value {
    json!({
        "vm_id": vm_id,
        "measured_at": output::maybe_time(usage.measured_at.map(Into::into)),
        "cpu_time_us": usage.cpu_time_us,
        "cpu_user_time_us": usage.cpu_user_time_us,
        "cpu_system_time_us": usage.cpu_system_time_us,
        "memory_bytes": usage.memory_bytes,
        "memory_peak_bytes": usage.memory_peak_bytes,
        "threads": usage.threads,
        "storage": usage.storage.as_ref().map(io_json),
        "disks": usage.disks.as_ref().map(io_json),
        "network": usage.network.as_ref().map(network_json),
    })
}

fn io_json(io: &IoCounters) -> Value {
    json!({
        "read_bytes": io.read_bytes, "written_bytes": io.written_bytes, "reads": io.reads, "writes": io.writes,
    })
}

fn network_json(network: &NetworkCounters) -> Value {
    json!({
        "sent_bytes": network.sent_bytes,
        "sent_packets": network.sent_packets,
        "sent_dropped": network.sent_dropped,
        "received_bytes": network.received_bytes,
        "received_packets": network.received_packets,
        "received_dropped": network.received_dropped,
    })
}

fn usage_text(usage: &VmUsage) -> String {
    output::fields(&[
        ("measured", usage.measured_at.map(|time| output::rfc3339(time.into())).unwrap_or_default()),
        ("cpu", usage.cpu_time_us.map(|time| cpu_text(time, usage)).unwrap_or_default()),
        ("memory", usage.memory_bytes.map(|bytes| memory_text(bytes, usage)).unwrap_or_default()),
        ("threads", usage.threads.map(|threads| threads.to_string()).unwrap_or_default()),
        ("storage", usage.storage.as_ref().map(io_text).unwrap_or_default()),
        ("guest's disks", usage.disks.as_ref().map(io_text).unwrap_or_default()),
        ("network", usage.network.as_ref().map(network_text).unwrap_or_default()),
    ])
}

fn cpu_text(time: u64, usage: &VmUsage) -> String {
    let seconds = |us| format!("{:.3}s", Duration::from_micros(us).as_secs_f64());
    match (usage.cpu_user_time_us, usage.cpu_system_time_us) {
        (Some(user), Some(system)) => format!("{} ({} user, {} system)", seconds(time), seconds(user), seconds(system)),
        (_, _) => seconds(time),
    }
}

fn memory_text(bytes: u64, usage: &VmUsage) -> String {
    let peak = usage.memory_peak_bytes.map(|peak| format!(", at most {}", size(peak))).unwrap_or_default();
    format!("{}{peak}", size(bytes))
}

fn io_text(io: &IoCounters) -> String {
    let way = |bytes, done: &str, count: Option<u64>, times: &str| match count {
        Some(count) => format!("{} in {count} {times}", size(bytes)),
        None => format!("{} {done}", size(bytes)),
    };
    let read = way(io.read_bytes, "read", io.reads, "reads");
    format!("{read}, {}", way(io.written_bytes, "written", io.writes, "writes"))
}

fn network_text(network: &NetworkCounters) -> String {
    let way = |what: &str, bytes, packets, dropped| {
        let dropped = if dropped == 0 { String::new() } else { format!(", {dropped} dropped") };
        format!("{} {what} ({packets} packets{dropped})", size(bytes))
    };
    let sent = way("sent", network.sent_bytes, network.sent_packets, network.sent_dropped);
    format!("{sent}, {}", way("received", network.received_bytes, network.received_packets, network.received_dropped))
}

fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_usage_and_one_of_which_little_is_known() {
        let whole = VmUsage {
            measured_at: Some(output::tests::CREATED.into()),
            cpu_time_us: Some(12_345_678),
            cpu_user_time_us: Some(12_000_000),
            cpu_system_time_us: Some(345_678),
            memory_bytes: Some(73_400_320),
            memory_peak_bytes: Some(83_886_080),
            threads: Some(9),
            storage: Some(IoCounters {
                read_bytes: 1_048_576,
                written_bytes: 3_000_000,
                reads: Some(16),
                writes: Some(7),
            }),
            disks: Some(IoCounters { read_bytes: 4096, written_bytes: 3_000_000, reads: Some(1), writes: Some(12) }),
            network: Some(NetworkCounters {
                sent_bytes: 52_428,
                sent_packets: 100,
                sent_dropped: 0,
                received_bytes: 10_485_760,
                received_packets: 7000,
                received_dropped: 3,
            }),
        };
        let by_processes = VmUsage {
            measured_at: Some(output::tests::CREATED.into()),
            cpu_time_us: Some(120_000),
            storage: Some(IoCounters { written_bytes: 8192, ..IoCounters::default() }),
            ..VmUsage::default()
        };
        let shown = [whole, by_processes].map(|usage| format!("{}{:#}\n", usage_text(&usage), usage_json("7", &usage)));
        insta::assert_snapshot!(shown.join("\n"));
    }
}
