//! `blixard.guest.v1.GuestService`: parse, one call, encode.

use std::{pin::Pin, sync::Arc, time::Duration};

use blixard::{
    error::{Error, invalid},
    id::JobId,
    job::JobSpec,
    pb::guest::v1::{self as pb, guest_service_server::GuestService, run_request::Message},
};
use futures::Stream;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    admission::AttemptId,
    attempt::{Attempt, StreamNumber},
    boot, file,
    guest::{Guest, Work},
    identity::{Configuration, Configured, Memory},
    input,
    lease::Lease,
};

/// The longest grace of a shutdown.
const MAX_GRACE_MS: u64 = 60_000;

/// The gRPC face of a [`Guest`].
#[derive(Debug, Clone)]
pub(crate) struct Service(pub(crate) Arc<Guest>);

#[tonic::async_trait]
impl GuestService for Service {
    type RunStream = Pin<Box<dyn Stream<Item = Result<pb::RunResponse, Status>> + Send>>;

    async fn hello(&self, _: Request<pb::HelloRequest>) -> Result<Response<pb::HelloResponse>, Status> {
        let status = self.0.status();
        let memory = if self.0.identity.owns_guest { Memory::read() } else { Memory::default() };
        if self.0.identity.owns_guest {
            boot::restart_console();
        }
        Ok(Response::new(pb::HelloResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: self.0.identity.kernel_release.clone(),
            boot_id: status.boot_id,
            configured: status.vm_id.is_some(),
            vm_id: status.vm_id.map(|id| id.to_string()).unwrap_or_default(),
            job_id: status.owed.map(|id| id.job_id.to_string()).unwrap_or_default(),
            attempt: status.owed.map(|id| id.number).unwrap_or_default(),
            memory_total_kib: memory.total_kib,
            memory_available_kib: memory.available_kib,
        }))
    }

    async fn configure(
        &self,
        request: Request<pb::ConfigureRequest>,
    ) -> Result<Response<pb::ConfigureResponse>, Status> {
        let configuration = Configuration::parse(request.into_inner())?;
        let Configured { done, skipped, boot_id } = self.0.configure(&configuration)?;
        let done = done.into_iter().map(str::to_owned).collect();
        Ok(Response::new(pb::ConfigureResponse { skipped, done, boot_id }))
    }

    async fn run(&self, request: Request<Streaming<pb::RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(Message::Start(start)) = first else {
            return Err(invalid("start", "", "required in the first message").into());
        };
        let id = attempt_id("start.", &start.job_id, start.attempt)?;
        let attempt = if start.attach_only {
            self.0.find(id)?
        } else {
            let spec = JobSpec::parse_full("start.spec", start.spec)?;
            let lease = Lease::granted(Instant::now(), start.lease_ms);
            let work = Work { spec, input: input::parse(start.input)?, lease };
            self.0.run(id, &work, start.resume_offset)?
        };
        if start.lease_ms > 0 {
            attempt.renew(start.lease_ms);
        }
        let stream = attempt.attach(start.resume_offset)?;
        self.0.spawn(obey(attempt.clone(), stream, requests));
        Ok(Response::new(Box::pin(attempt.responses(stream, start.resume_offset))))
    }

    type GetFileStream = Pin<Box<dyn Stream<Item = Result<pb::GetFileResponse, Status>> + Send>>;

    async fn get_file(&self, request: Request<pb::GetFileRequest>) -> Result<Response<Self::GetFileStream>, Status> {
        let request = request.into_inner();
        Ok(Response::new(Box::pin(file::read(&request.path, request.offset)?)))
    }

    async fn signal(&self, request: Request<pb::SignalRequest>) -> Result<Response<pb::SignalResponse>, Status> {
        let request = request.into_inner();
        let id = attempt_id("", &request.job_id, request.attempt)?;
        if !(1..=64).contains(&request.signal) {
            return Err(invalid("signal", request.signal, "1 to 64").into());
        }
        self.0.signal(id, request.signal)?;
        Ok(Response::new(pb::SignalResponse {}))
    }

    async fn shutdown(&self, request: Request<pb::ShutdownRequest>) -> Result<Response<pb::ShutdownResponse>, Status> {
        let grace_ms = request.into_inner().grace_ms;
        if grace_ms > MAX_GRACE_MS {
            return Err(invalid("grace_ms", grace_ms, &format!("at most {MAX_GRACE_MS}")).into());
        }
        self.0.shut_down(Duration::from_millis(grace_ms));
        Ok(Response::new(pb::ShutdownResponse {}))
    }
}

fn attempt_id(prefix: &str, job_id: &str, number: u32) -> Result<AttemptId, Error> {
    if number == 0 {
        return Err(invalid(&format!("{prefix}attempt"), number, "1 or more"));
    }
    Ok(AttemptId { job_id: JobId::parse(&format!("{prefix}job_id"), job_id)?, number })
}

/// Ends with the requests, or at the first one that can't be true: a host that has lost count must attach again.
async fn obey(attempt: Arc<Attempt>, stream: StreamNumber, mut requests: Streaming<pb::RunRequest>) {
    while let Ok(Some(request)) = requests.message().await {
        let result = match request.message {
            Some(Message::Ack(ack)) => attempt.acknowledge(ack.offset),
            Some(Message::Renew(renew)) => {
                attempt.renew(renew.lease_ms);
                Ok(())
            }
            Some(Message::Start(_)) | None => {
                Err(invalid("message", "", "an acknowledgement or a renewal, after the first message"))
            }
        };
        if let Err(error) = result {
            return attempt.break_off(stream, error);
        }
    }
}
