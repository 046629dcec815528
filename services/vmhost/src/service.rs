//! The gRPC service: parse, one call, encode.

mod artifacts;
mod stream_logs;

use std::{sync::Arc, time::Duration};

use blixard::{
    error::{Error, Reason, invalid},
    id::{JobId, VmId},
    job::JobSpec,
    limits::{DEFAULT_PAGE_SIZE, DEFAULT_STOP_GRACE, MAX_PAGE_BYTES, MAX_PAGE_SIZE, MAX_REASON_BYTES, MAX_STOP_GRACE},
    pb::{common::v1::VmUsage, vmhost::v1 as pb},
    time::Timestamp,
    vm::{VmConfig, VmResize, VmShape},
};
use futures::stream::BoxStream;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::{driver::VmHandle, host::Host, invariants, net::Lease};

/// Answers for one node's VMs.
pub struct Service {
    host: Arc<Host>,
}

impl Service {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }
}

#[tonic::async_trait]
impl pb::vm_host_service_server::VmHostService for Service {
    async fn start_vm(&self, request: Request<pb::StartVmRequest>) -> Result<Response<pb::StartVmResponse>, Status> {
        let request = request.into_inner();
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let config = VmConfig::parse_full("config", request.config)?;
        self.host.start_vm(vm_id, config).await?;
        Ok(Response::new(pb::StartVmResponse {}))
    }

    async fn stop_vm(&self, request: Request<pb::StopVmRequest>) -> Result<Response<pb::StopVmResponse>, Status> {
        let request = request.into_inner();
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let grace = request.grace_ms.map_or(DEFAULT_STOP_GRACE, Duration::from_millis);
        if grace > MAX_STOP_GRACE {
            let allowed = format!("at most {}", MAX_STOP_GRACE.as_millis());
            return Err(invalid("grace_ms", grace.as_millis(), &allowed).into());
        }
        if request.reason.len() > MAX_REASON_BYTES {
            return Err(invalid("reason", request.reason, &format!("at most {MAX_REASON_BYTES} bytes")).into());
        }
        self.host.stop_vm(vm_id, grace, request.reason).await?;
        Ok(Response::new(pb::StopVmResponse {}))
    }

    async fn run_job(&self, request: Request<pb::RunJobRequest>) -> Result<Response<pb::RunJobResponse>, Status> {
        let request = request.into_inner();
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let job = JobId::parse("job_id", &request.job_id)?;
        let attempt = parse_attempt(request.attempt)?;
        let spec = JobSpec::parse_full("spec", request.spec)?;
        self.host.run_job(vm_id, job, attempt, spec, request.incarnation).await?;
        Ok(Response::new(pb::RunJobResponse {}))
    }

    async fn cancel_job(
        &self,
        request: Request<pb::CancelJobRequest>,
    ) -> Result<Response<pb::CancelJobResponse>, Status> {
        let request = request.into_inner();
        let job = JobId::parse("job_id", &request.job_id)?;
        self.host.cancel_job(job, parse_attempt(request.attempt)?).await?;
        Ok(Response::new(pb::CancelJobResponse {}))
    }

    async fn list_vms(&self, request: Request<pb::ListVmsRequest>) -> Result<Response<pb::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => DEFAULT_PAGE_SIZE,
            size if size <= MAX_PAGE_SIZE => size,
            size => return Err(invalid("page_size", size, &format!("0 to {MAX_PAGE_SIZE}")).into()),
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(VmId::parse("page_token", token)?),
        };
        let only = match request.vm_id.as_str() {
            "" => None,
            id => Some(VmId::parse("vm_id", id)?),
        };
        let wanted = |id: &VmId| only.is_none_or(|only| only == *id);
        let vms: Vec<(VmId, VmHandle)> =
            self.host.vms().iter().filter(|(id, _)| wanted(id)).map(|(id, vm)| (*id, vm.clone())).collect();
        Ok(Response::new(page(vms.into_iter().filter(|(id, _)| after.is_none_or(|after| *id > after)), size as usize)))
    }

    type StreamLogsStream = BoxStream<'static, Result<pb::StreamLogsResponse, Status>>;

    async fn stream_logs(
        &self,
        request: Request<pb::StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let request = request.into_inner();
        let job = JobId::parse("job_id", &request.job_id)?;
        let attempt = parse_attempt(request.attempt)?;
        let stream = stream_logs::open(&self.host, job, attempt, request.offset, request.follow).await?;
        Ok(Response::new(stream))
    }

    type GetArtifactStream = BoxStream<'static, Result<pb::GetArtifactResponse, Status>>;

    async fn get_artifact(
        &self,
        request: Request<pb::GetArtifactRequest>,
    ) -> Result<Response<Self::GetArtifactStream>, Status> {
        let request = request.into_inner();
        let job = JobId::parse("job_id", &request.job_id)?;
        let attempt = parse_attempt(request.attempt)?;
        Ok(Response::new(artifacts::open(&self.host, job, attempt, request.path, request.offset).await?))
    }

    async fn list_artifacts(
        &self,
        request: Request<pb::ListArtifactsRequest>,
    ) -> Result<Response<pb::ListArtifactsResponse>, Status> {
        let request = request.into_inner();
        let job = JobId::parse("job_id", &request.job_id)?;
        let artifacts = artifacts::list(&self.host, job, parse_attempt(request.attempt)?).await?;
        Ok(Response::new(pb::ListArtifactsResponse { artifacts }))
    }

    async fn check_invariants(
        &self,
        request: Request<pb::CheckInvariantsRequest>,
    ) -> Result<Response<pb::CheckInvariantsResponse>, Status> {
        let findings = invariants::check(&self.host, request.into_inner().repair).await?;
        let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(pb::CheckInvariantsResponse {
            violations: findings.violations,
            vms: count(findings.vms),
            processes: count(findings.processes),
            directories: count(findings.directories),
        }))
    }

    async fn resize_vm(&self, request: Request<pb::ResizeVmRequest>) -> Result<Response<pb::ResizeVmResponse>, Status> {
        let request = request.into_inner();
        let vm_id = VmId::parse("vm_id", &request.vm_id)?;
        let wanted = VmResize::parse(request.vcpus, request.memory_mib)?;
        let vm = self.host.resize_vm(vm_id, wanted).await?;
        Ok(Response::new(pb::ResizeVmResponse { vm: Some(vm) }))
    }

    async fn get_console(
        &self,
        request: Request<pb::GetConsoleRequest>,
    ) -> Result<Response<pb::GetConsoleResponse>, Status> {
        let vm_id = VmId::parse("vm_id", &request.into_inner().vm_id)?;
        let vm = self.host.vm(vm_id);
        let machine = vm.as_ref().and_then(|vm| vm.view.borrow().machine.clone());
        let console = match (machine, self.host.consoles.get(vm_id)) {
            (Some(machine), _) => machine.console(),
            (None, Some(console)) => console,
            (None, None) if vm.is_some() => crate::hypervisor::Console::default(),
            (None, None) => {
                let message = format!("this node has no console of VM {vm_id}");
                return Err(Error::new(Reason::VmNotFound, message).with("vm_id", vm_id).into());
            }
        };
        Ok(Response::new(pb::GetConsoleResponse { data: console.tail.into(), skipped: console.skipped }))
    }

    async fn get_vm_usage(
        &self,
        request: Request<pb::GetVmUsageRequest>,
    ) -> Result<Response<pb::GetVmUsageResponse>, Status> {
        let vm_id = VmId::parse("vm_id", &request.into_inner().vm_id)?;
        let view = self.host.vm(vm_id).map(|vm| vm.view.borrow().clone()).filter(|view| !view.state.is_terminal());
        let view = view.ok_or_else(|| {
            Error::new(Reason::VmNotFound, format!("this node does not hold VM {vm_id}")).with("vm_id", vm_id)
        })?;
        let usage = match view.machine {
            Some(machine) => machine.usage().await,
            None => VmUsage { measured_at: Some(Timestamp::now().into()), ..VmUsage::default() },
        };
        Ok(Response::new(pb::GetVmUsageResponse { usage: Some(usage) }))
    }
}

fn parse_attempt(attempt: u32) -> Result<u32, Error> {
    if attempt == 0 { Err(invalid("attempt", attempt, "at least 1")) } else { Ok(attempt) }
}

fn page(vms: impl Iterator<Item = (VmId, VmHandle)>, size: usize) -> pb::ListVmsResponse {
    let mut answer = pb::ListVmsResponse::default();
    let mut bytes = 0;
    for (id, vm) in vms {
        if answer.vms.len() == size || bytes > MAX_PAGE_BYTES {
            answer.next_page_token = answer.vms.last().map(|vm: &pb::HostedVm| vm.vm_id.clone()).unwrap_or_default();
            break;
        }
        let hosted = hosted(id, &vm);
        bytes += hosted.encoded_len();
        answer.vms.push(hosted);
    }
    answer
}

fn hosted(id: VmId, vm: &VmHandle) -> pb::HostedVm {
    let view = vm.view.borrow().clone();
    let VmShape { vcpus, memory_mib } = view.room;
    pb::HostedVm {
        vm_id: id.to_string(),
        config: Some(VmConfig { vcpus, memory_mib, ..vm.config.clone() }.into()),
        state: view.state.to_pb().into(),
        pids: view.machine.map(|machine| machine.pids()).unwrap_or_default(),
        job_id: view.run.map(|(job, _)| job.to_string()).unwrap_or_default(),
        attempt: view.run.map_or(0, |(_, attempt)| attempt),
        accepted_at: Some(vm.accepted_at.into()),
        addresses: vm.lease.as_ref().map(Lease::addresses).unwrap_or_default(),
    }
}
