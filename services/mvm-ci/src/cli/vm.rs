//! `mvm-ci vm …`.

use std::{
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use base64::Engine as _;
use blixard::{
    error::{Error, Reason},
    id::VmId,
    pb::{common::v1 as common, scheduler::v1 as pb},
    time::{Timestamp, millis},
    vm::{Vm, VmKind, VmState},
};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use super::{
    args::{Format, VmArgs, VmCommand, VmCreateArgs, VmStopArgs},
    client::{Client, missing},
    failure::Failure,
    job::page_size,
    output::{self, Printer, VmEvent},
    usage::usage,
};

/// How often `--wait` looks: often at first, when a process VM is up in milliseconds, later no more than this.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long `--wait` waits: a boot under emulation on a busy machine, or the longest grace and then some.
const WAIT_AT_MOST: Duration = Duration::from_secs(900);
/// How many VMs are stopped at once.
const STOPS_AT_ONCE: usize = 16;

/// See the module.
pub(crate) async fn vm(client: Client, args: VmArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    match args.command {
        VmCommand::Create(args) => create(&client, args, printer).await?,
        VmCommand::List { state, kind, node, all } => {
            let vms = list(&client, wanted_states(state, all), kind, node).await?;
            print_list(&vms, printer)?;
        }
        VmCommand::Get { id } => {
            let (vm, addresses) = get_with_addresses(&client, &parse(&id)?).await?;
            let json = || {
                let mut json = output::vm_json(&vm);
                json["addresses"] = json!(addresses);
                json
            };
            printer.print(json, || output::vm_text(&vm, &addresses))?;
        }
        VmCommand::Events { id, limit } => events(&client, id, limit, printer).await?,
        VmCommand::Console { id } => console(&client, &parse(&id)?, printer).await?,
        VmCommand::Usage { id } => usage(&client, &parse(&id)?, printer).await?,
        VmCommand::Stop(args) => stop(&client, args, printer).await?,
        VmCommand::Resize { id, vcpus, memory } => {
            let request = pb::ResizeVmRequest { vm_id: parse(&id)?, vcpus, memory_mib: memory };
            let answer = client.call(request, async |mut stub, request| stub.resize_vm(request).await).await?;
            print_list(&[parse_vm(answer.vm)?], printer)?;
        }
        VmCommand::Purge { state, ids } => purge(&client, state, ids, printer).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Ids are whole UUIDs; a prefix is refused here as it would be by the server.
fn parse(id: &str) -> Result<String, Failure> {
    Ok(VmId::parse("vm_id", id)?.to_string())
}

fn parse_vm(vm: Option<common::Vm>) -> Result<Vm, Error> {
    vm.ok_or_else(|| missing("vm")).and_then(Vm::try_from)
}

fn print_list(vms: &[Vm], printer: &Printer) -> Result<(), Failure> {
    let json = || Value::Array(vms.iter().map(output::vm_json).collect());
    printer.print(json, || output::vm_table(vms, Timestamp::now()))
}

async fn create(client: &Client, args: VmCreateArgs, printer: &Printer) -> Result<(), Failure> {
    let kind = if args.ephemeral { VmKind::Ephemeral } else { VmKind::Service };
    let request = pb::StartVmRequest {
        request_id: VmId::random().to_string(),
        config: Some(common::VmConfig {
            kind: kind.to_pb().into(),
            image: args.image,
            vcpus: args.vcpus,
            memory_mib: args.memory,
            labels: args.label.into_iter().collect(),
            node_id: args.node,
            egress: Some(args.egress.into()),
            volumes: args.volumes.into_pb(),
        }),
    };
    let answer = client.call(request, async |mut stub, request| stub.start_vm(request).await).await?;
    let mut vm = parse_vm(answer.vm)?;
    if args.wait {
        vm = wait(client, vm, |state| state != VmState::Starting).await?;
        if vm.state == VmState::Failed {
            let message = format!("VM {} failed: {}", vm.id, vm.reason);
            return Err(Failure::Rpc(Error::new(Reason::GuestRefused, message).with("vm_id", vm.id)));
        }
    }
    printer.print(|| output::vm_json(&vm), || vm.id.to_string())
}

/// Looks at a VM until its state is one of those waited for.
async fn wait(client: &Client, mut vm: Vm, done: impl Fn(VmState) -> bool) -> Result<Vm, Failure> {
    let since = Instant::now();
    let mut pause = Duration::from_millis(10);
    while !done(vm.state) {
        if since.elapsed() > WAIT_AT_MOST {
            let message = format!("VM {} is still {} after {}", vm.id, vm.state, output::age(WAIT_AT_MOST));
            return Err(Failure::Rpc(Error::new(Reason::DeadlineExceeded, message).with("vm_id", vm.id)));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_EVERY);
        vm = get(client, &vm.id.to_string()).await?;
    }
    Ok(vm)
}

async fn get(client: &Client, vm_id: &str) -> Result<Vm, Error> {
    Ok(get_with_addresses(client, vm_id).await?.0)
}

async fn get_with_addresses(client: &Client, vm_id: &str) -> Result<(Vm, Vec<String>), Error> {
    let request = pb::GetVmRequest { vm_id: vm_id.to_owned() };
    let answer = client.call(request, async |mut stub, request| stub.get_vm(request).await).await?;
    Ok((parse_vm(answer.vm)?, answer.addresses))
}

/// Without `--state` and `--all`: what has not ended.
fn wanted_states(states: Vec<VmState>, all: bool) -> Vec<VmState> {
    if all || !states.is_empty() {
        return states;
    }
    VmState::ALL.into_iter().filter(|state| !state.is_terminal()).collect()
}

async fn list(client: &Client, states: Vec<VmState>, kind: Option<VmKind>, node_id: String) -> Result<Vec<Vm>, Error> {
    let mut vms = Vec::new();
    let mut request = pb::ListVmsRequest {
        page_size: page_size(usize::MAX),
        page_token: String::new(),
        states: states.iter().map(|state| state.to_pb().into()).collect(),
        kind: kind.map_or(0, |kind| kind.to_pb().into()),
        node_id,
        labels: Default::default(),
    };
    loop {
        let page = client.call(request.clone(), async |mut stub, request| stub.list_vms(request).await).await?;
        for vm in page.vms {
            vms.push(vm.try_into()?);
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(vms);
        }
    }
}

async fn events(client: &Client, id: Option<String>, limit: usize, printer: &Printer) -> Result<(), Failure> {
    let vm_id = id.map(|id| parse(&id)).transpose()?.unwrap_or_default();
    let mut events: Vec<VmEvent> = Vec::new();
    let mut page_token = String::new();
    while events.len() < limit {
        let request =
            pb::ListVmEventsRequest { vm_id: vm_id.clone(), page_size: page_size(limit - events.len()), page_token };
        let page = client.call(request, async |mut stub, request| stub.list_vm_events(request).await).await?;
        for event in page.events {
            events.push(event.try_into()?);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    printer.print(|| Value::Array(events.iter().map(output::event_json).collect()), || output::event_table(&events))
}

async fn console(client: &Client, vm_id: &str, printer: &Printer) -> Result<(), Failure> {
    let request = pb::GetVmConsoleRequest { vm_id: vm_id.to_owned() };
    let tail = client.call(request, async |mut stub, request| stub.get_vm_console(request).await).await?;
    match printer.format() {
        Format::Table => Ok(std::io::stdout().write_all(&tail.data).and_then(|()| std::io::stdout().flush())?),
        Format::Json => printer.print(
            || {
                let mut json = json!({ "vm_id": vm_id, "skipped": tail.skipped });
                match std::str::from_utf8(&tail.data) {
                    Ok(text) => json["data"] = text.into(),
                    Err(_) => {
                        json["data_base64"] = base64::engine::general_purpose::STANDARD.encode(&tail.data).into();
                    }
                }
                json
            },
            String::new,
        ),
    }
}

async fn stop(client: &Client, args: VmStopArgs, printer: &Printer) -> Result<(), Failure> {
    let ids = if args.all {
        let vms = list(client, wanted_states(Vec::new(), false), None, String::new()).await?;
        vms.into_iter().map(|vm| vm.id.to_string()).collect()
    } else {
        args.ids.iter().map(|id| parse(id)).collect::<Result<Vec<_>, _>>()?
    };
    let grace = if args.force { Duration::ZERO } else { args.grace };
    let stop_one = |vm_id: String| async move {
        let request =
            pb::StopVmRequest { vm_id, grace_ms: Some(millis(grace)), reason: "stopped by mvm-ci vm stop".to_owned() };
        let answer = client.call(request, async |mut stub, request| stub.stop_vm(request).await).await?;
        let vm = parse_vm(answer.vm)?;
        if args.wait { wait(client, vm, VmState::is_terminal).await } else { Ok(vm) }
    };
    let stops = futures::stream::iter(ids.into_iter().map(stop_one)).buffered(STOPS_AT_ONCE);
    let vms: Vec<Vm> = stops.try_collect().await?;
    print_list(&vms, printer)
}

async fn purge(client: &Client, states: Vec<VmState>, ids: Vec<String>, printer: &Printer) -> Result<(), Failure> {
    let request = pb::PurgeVmsRequest {
        states: states.iter().map(|state| state.to_pb().into()).collect(),
        vm_ids: ids.iter().map(|id| parse(id)).collect::<Result<_, _>>()?,
    };
    let answer = client.call(request, async |mut stub, request| stub.purge_vms(request).await).await?;
    printer.print(|| json!({ "purged": answer.purged }), || format!("{} purged", answer.purged))
}
