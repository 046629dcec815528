//! The contract: parse, one domain call, encode; [`crate::rpc`] has the parts.

use std::{pin::Pin, sync::Arc};

use blixard::{
    error::Error,
    pb::registry::v1::{self as wire, registry_service_server::RegistryService},
    time::Timestamp,
};
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    backup::Backups,
    change::Wanted,
    commit::CommitHandle,
    heartbeat::Heartbeats,
    mutation::Mutation,
    query::Queries,
    read::Readers,
    requests,
    rpc::{self, Command, LeaseRequest, PURGE_CHUNK, Question},
    tail::Tail,
    verdict::Answer,
    watch::Watcher,
};

/// Serves `blixard.registry.v1.RegistryService`.
#[derive(Clone)]
pub struct Service {
    pub(crate) commits: CommitHandle,
    pub(crate) readers: Arc<Readers>,
    pub(crate) queries: Arc<Queries>,
    pub(crate) tail: Arc<Tail>,
    pub(crate) heartbeats: Arc<Heartbeats>,
    pub(crate) backups: Arc<Backups>,
}

type Answered<T> = Result<Response<T>, Status>;

impl Service {
    async fn change<C: Command>(&self, request: Request<C>) -> Answered<C::Response> {
        let (request, once) = requests::parse(request.into_inner())?;
        let answer = self.commits.submit(request.parse(Timestamp::now())?, once).await?;
        Ok(Response::new(C::response(answer).ok_or_else(wrong_answer)?))
    }

    async fn read<Q: Question>(&self, request: Request<Q>) -> Answered<Q::Response> {
        Ok(Response::new(self.readers.read(request.into_inner().parse()?).await??))
    }
}

#[tonic::async_trait]
impl RegistryService for Service {
    async fn create_vm(&self, request: Request<wire::CreateVmRequest>) -> Answered<wire::CreateVmResponse> {
        self.change(request).await
    }

    async fn transition_vm(&self, request: Request<wire::TransitionVmRequest>) -> Answered<wire::TransitionVmResponse> {
        self.change(request).await
    }

    async fn create_job(&self, request: Request<wire::CreateJobRequest>) -> Answered<wire::CreateJobResponse> {
        self.change(request).await
    }

    async fn assign_job(&self, request: Request<wire::AssignJobRequest>) -> Answered<wire::AssignJobResponse> {
        self.change(request).await
    }

    async fn start_attempt(&self, request: Request<wire::StartAttemptRequest>) -> Answered<wire::StartAttemptResponse> {
        self.change(request).await
    }

    async fn finish_attempt(
        &self,
        request: Request<wire::FinishAttemptRequest>,
    ) -> Answered<wire::FinishAttemptResponse> {
        self.change(request).await
    }

    async fn cancel_job(&self, request: Request<wire::CancelJobRequest>) -> Answered<wire::CancelJobResponse> {
        self.change(request).await
    }

    async fn fail_queued_job(
        &self,
        request: Request<wire::FailQueuedJobRequest>,
    ) -> Answered<wire::FailQueuedJobResponse> {
        self.change(request).await
    }

    async fn register_node(&self, request: Request<wire::RegisterNodeRequest>) -> Answered<wire::RegisterNodeResponse> {
        self.change(request).await
    }

    async fn update_node(&self, request: Request<wire::UpdateNodeRequest>) -> Answered<wire::UpdateNodeResponse> {
        self.change(request).await
    }

    async fn resize_vm(&self, request: Request<wire::ResizeVmRequest>) -> Answered<wire::ResizeVmResponse> {
        self.change(request).await
    }

    async fn create_jobs(&self, request: Request<wire::CreateJobsRequest>) -> Answered<wire::CreateJobsResponse> {
        let answer = self.commits.submit(rpc::new_jobs(request.into_inner())?, None).await?;
        let Answer::Jobs(jobs) = answer else { return Err(wrong_answer().into()) };
        Ok(Response::new(wire::CreateJobsResponse { jobs }))
    }

    async fn purge_vms(&self, request: Request<wire::PurgeVmsRequest>) -> Answered<wire::PurgeVmsResponse> {
        let (request, mut once) = requests::parse(request.into_inner())?;
        let chunk = rpc::purge(&request)?;
        let mut purged = 0;
        loop {
            let answer = self.commits.submit(chunk.clone(), once.clone()).await?;
            let Answer::Purged(count) = answer else { return Err(wrong_answer().into()) };
            purged += count as u64;
            if count < PURGE_CHUNK as usize {
                return Ok(Response::new(wire::PurgeVmsResponse { purged }));
            }
            // Each chunk is remembered; a repeat goes through the same ones, and on from where the first was cut off.
            once = once.map(|before| before.next_part());
        }
    }

    async fn get_vm(&self, request: Request<wire::GetVmRequest>) -> Answered<wire::GetVmResponse> {
        self.read(request).await
    }

    async fn list_vms(&self, request: Request<wire::ListVmsRequest>) -> Answered<wire::ListVmsResponse> {
        self.read(request).await
    }

    async fn list_vm_events(
        &self,
        request: Request<wire::ListVmEventsRequest>,
    ) -> Answered<wire::ListVmEventsResponse> {
        self.read(request).await
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Answered<wire::GetJobResponse> {
        self.read(request).await
    }

    async fn get_job_input(&self, request: Request<wire::GetJobInputRequest>) -> Answered<wire::GetJobInputResponse> {
        self.read(request).await
    }

    async fn list_attempts(&self, request: Request<wire::ListAttemptsRequest>) -> Answered<wire::ListAttemptsResponse> {
        self.read(request).await
    }

    async fn list_jobs(&self, request: Request<wire::ListJobsRequest>) -> Answered<wire::ListJobsResponse> {
        self.read(request).await
    }

    async fn list_nodes(&self, request: Request<wire::ListNodesRequest>) -> Answered<wire::ListNodesResponse> {
        self.read(request).await
    }

    async fn get_counts(&self, request: Request<wire::GetCountsRequest>) -> Answered<wire::GetCountsResponse> {
        self.read(request).await
    }

    async fn find_forgotten_jobs(
        &self,
        request: Request<wire::FindForgottenJobsRequest>,
    ) -> Answered<wire::FindForgottenJobsResponse> {
        let question = request.into_inner().parse()?;
        // What is forgotten is deleted elsewhere: only a leader that still is one may say so.
        self.commits.submit(Mutation::ConfirmRevision, None).await?;
        Ok(Response::new(self.readers.read(question).await??))
    }

    async fn acquire_lease(&self, request: Request<wire::AcquireLeaseRequest>) -> Answered<wire::AcquireLeaseResponse> {
        let request = LeaseRequest::parse(request.into_inner())?;
        let lease = self.heartbeats.lease(&request).await?;
        Ok(Response::new(request.response(lease)))
    }

    type HeartbeatStream = Pin<Box<dyn Stream<Item = Result<wire::HeartbeatResponse, Status>> + Send>>;

    async fn heartbeat(&self, request: Request<Streaming<wire::HeartbeatRequest>>) -> Answered<Self::HeartbeatStream> {
        Ok(Response::new(Box::pin(self.heartbeats.answer(request.into_inner()))))
    }

    async fn get_revision(&self, _: Request<wire::GetRevisionRequest>) -> Answered<wire::GetRevisionResponse> {
        let answer = self.commits.submit(Mutation::ConfirmRevision, None).await?;
        let Answer::Revision(revision) = answer else { return Err(wrong_answer().into()) };
        Ok(Response::new(wire::GetRevisionResponse { revision }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<wire::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Answered<Self::WatchStream> {
        let request = request.into_inner();
        let watcher = Watcher::begin(&self.tail, Wanted::parse(&request)?, request.start_revision)?;
        Ok(Response::new(Box::pin(watcher.stream())))
    }

    type QueryStream = Pin<Box<dyn Stream<Item = Result<wire::QueryResponse, Status>> + Send>>;

    async fn query(&self, request: Request<wire::QueryRequest>) -> Answered<Self::QueryStream> {
        Ok(Response::new(Box::pin(self.queries.start(request.into_inner())?)))
    }

    type BackupStream = Pin<Box<dyn Stream<Item = Result<wire::BackupResponse, Status>> + Send>>;

    async fn backup(&self, _: Request<wire::BackupRequest>) -> Answered<Self::BackupStream> {
        Ok(Response::new(Box::pin(self.backups.start()?)))
    }
}

fn wrong_answer() -> Error {
    Error::internal(|error_id| tracing::error!(error_id, "a change was answered with another kind of object"))
}
