//! The connection to the control plane: one channel, deadlines, and retries of what may be repeated.

use std::{future::Future, time::Duration};

use backon::{ExponentialBuilder, Retryable as _};
use blixard::{
    error::{DOMAIN, Error, Reason, invalid},
    job::Job,
    limits,
    pb::{
        registry::v1::{self as registry, registry_service_client::RegistryServiceClient},
        scheduler::v1::{self as pb, scheduler_service_client::SchedulerServiceClient},
    },
};
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use super::failure::{Failure, unreachable};

/// How long one call may take before it counts as lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a call that may be repeated is, over about half a minute: a control plane that restarts is back by then.
const RETRIES: usize = 12;

/// Whoever waits is told so before a pause of this length.
const SAID_FROM: Duration = Duration::from_millis(400);

type Stub = SchedulerServiceClient<Channel>;

/// A client of the scheduler's contract, and of the registry's queries and backups.
#[derive(Clone)]
pub(crate) struct Client {
    stub: Stub,
    registry: RegistryServiceClient<Channel>,
}

impl Client {
    /// Connects now, so that "nobody is there" is told at once and apart from a connection that is lost later.
    pub(crate) async fn connect(endpoint: &str) -> Result<Self, Failure> {
        let parsed = Endpoint::from_shared(endpoint.to_owned()).ok();
        let parsed = parsed
            .filter(|parsed| parsed.uri().scheme_str() == Some("http") && parsed.uri().host().is_some())
            .ok_or_else(|| invalid("endpoint", endpoint, "http://host:port"))?;
        let channel = blixard_chassis::client::tune(parsed).connect().await.map_err(|_| unreachable(endpoint))?;
        let registry = RegistryServiceClient::new(channel.clone()).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        let stub = Stub::new(channel)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        Ok(Self { stub, registry })
    }

    /// A unary call that may be repeated: each of the contract's may, as mutations carry ids.
    pub(crate) async fn call<M, T, F>(&self, message: M, method: impl Fn(Stub, Request<M>) -> F) -> Result<T, Error>
    where
        M: Clone,
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let attempt = || method(self.stub.clone(), blixard_chassis::client::request(message.clone(), CALL_TIMEOUT));
        let mut told = false;
        let say_so = |status: &Status, pause: Duration| {
            if pause >= SAID_FROM && !std::mem::replace(&mut told, true) {
                eprintln!("mvm-ci: {}; trying again", Error::from_status(status).message);
            }
        };
        let answer = attempt.retry(backoff().with_max_times(RETRIES)).when(is_transient).notify(say_so).await;
        answer.map(Response::into_inner).map_err(|status| Error::from_status(&status))
    }

    pub(crate) async fn get_job(&self, job_id: &str) -> Result<Job, Error> {
        let request = pb::GetJobRequest { job_id: job_id.to_owned() };
        let answer = self.call(request, async |mut stub, request| stub.get_job(request).await).await?;
        parse_job(answer.job)
    }

    pub(crate) async fn cancel_job(&self, job_id: &str, reason: &str) -> Result<Job, Error> {
        let request = pb::CancelJobRequest { job_id: job_id.to_owned(), reason: reason.to_owned() };
        let answer = self.call(request, async |mut stub, request| stub.cancel_job(request).await).await?;
        parse_job(answer.job)
    }

    /// Opens a job's watch; not repeated here.
    pub(crate) async fn watch_job(&self, job_id: &str) -> Result<tonic::Streaming<pb::WatchJobResponse>, Status> {
        let request = pb::WatchJobRequest { job_id: job_id.to_owned() };
        Ok(self.stub.clone().watch_job(request).await?.into_inner())
    }

    /// Submits a job and opens the stream of what becomes of it: once it is recorded. The id is the caller's, so this may be
    /// repeated until then.
    pub(crate) async fn run_job(
        &self,
        message: pb::RunJobRequest,
    ) -> Result<tonic::Streaming<pb::RunJobResponse>, Error> {
        let attempt = || {
            let (mut stub, message) = (self.stub.clone(), message.clone());
            // A stream has no deadline; its answer does.
            async move {
                let answer = tokio::time::timeout(CALL_TIMEOUT, stub.run_job(message)).await;
                answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("the control plane did not answer")))
            }
        };
        let answer = attempt.retry(backoff().with_max_times(RETRIES)).when(is_transient).await;
        answer.map(Response::into_inner).map_err(|status| Error::from_status(&status))
    }

    /// Opens an artifact; not repeated here.
    pub(crate) async fn get_artifact(
        &self,
        request: pb::GetArtifactRequest,
    ) -> Result<tonic::Streaming<pb::GetArtifactResponse>, Status> {
        Ok(self.stub.clone().get_artifact(request).await?.into_inner())
    }

    /// Starts a query; not repeated here.
    pub(crate) async fn query(
        &self,
        request: registry::QueryRequest,
    ) -> Result<tonic::Streaming<registry::QueryResponse>, Status> {
        Ok(self.registry.clone().query(request).await?.into_inner())
    }

    /// Starts a backup; not repeated here.
    pub(crate) async fn backup(&self) -> Result<tonic::Streaming<registry::BackupResponse>, Status> {
        Ok(self.registry.clone().backup(registry::BackupRequest {}).await?.into_inner())
    }

    /// Opens a job's log; not repeated here.
    pub(crate) async fn stream_job_logs(
        &self,
        request: pb::StreamJobLogsRequest,
    ) -> Result<tonic::Streaming<pb::StreamJobLogsResponse>, Status> {
        Ok(self.stub.clone().stream_job_logs(request).await?.into_inner())
    }
}

/// The waits between tries: 50 ms doubling to 5 s, spread out so that many clients do not come back at the same moment.
pub(crate) fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
}

/// Whether the same call may succeed later. A status with one of our reasons says so itself; one without came from the
/// transport (a connection that was cut reads as UNKNOWN, INTERNAL, CANCELLED or UNAVAILABLE, depending on when).
pub(crate) fn is_transient(status: &Status) -> bool {
    match status.get_details_error_info().filter(|info| info.domain == DOMAIN) {
        Some(info) => Reason::from_name(&info.reason).is_some_and(Reason::retryable),
        None => matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded
        ),
    }
}

/// An answer without the object it must carry is the server's fault.
pub(crate) fn parse_job(job: Option<blixard::pb::common::v1::Job>) -> Result<Job, Error> {
    job.ok_or_else(|| missing("job")).and_then(Job::try_from)
}

pub(crate) fn missing(field: &str) -> Error {
    Error::new(Reason::Internal, format!("the control plane's answer has no {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_reasons_decide_and_a_cut_connection_is_worth_another_try() {
        for reason in [Reason::PeerUnavailable, Reason::ShuttingDown, Reason::Overloaded] {
            assert!(is_transient(&Error::new(reason, "").into()), "{reason:?}");
        }
        for reason in [Reason::JobNotFound, Reason::Internal, Reason::InvalidField, Reason::DeadlineExceeded] {
            assert!(!is_transient(&Error::new(reason, "").into()), "{reason:?}");
        }
        assert!(is_transient(&Status::unknown("h2 protocol error")));
        assert!(!is_transient(&Status::unimplemented("")));
    }
}
