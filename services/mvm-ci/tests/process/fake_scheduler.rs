//! A small SchedulerService that misbehaves to order, for what the real one does only when a machine dies.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use blixard::{
    error::{Error, Reason},
    job::JobState,
    pb::{
        common::v1 as common,
        scheduler::v1::{
            scheduler_service_server::{SchedulerService, SchedulerServiceServer},
            *,
        },
    },
};
use blixard_chassis::{Server, Tasks};
use futures::{Stream, StreamExt as _};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status};

/// What happens to one log stream.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// These records, then a clean close.
    Close(Vec<StreamJobLogsResponse>),
    /// These records, then this error.
    Fail(Vec<StreamJobLogsResponse>, Reason),
    /// These records, then silence until the job is cancelled, then its end.
    Hang(Vec<StreamJobLogsResponse>),
}

/// What was asked of the fake and what it answers.
#[derive(Default)]
pub(crate) struct State {
    /// One per log stream, in order; afterwards NOT_FOUND.
    pub(crate) scripts: VecDeque<Script>,
    /// Answers that are lost after the job was recorded.
    pub(crate) lost_submissions: usize,
    /// How the job ends.
    pub(crate) result: common::Job,
    pub(crate) submitted: Vec<SubmitJobRequest>,
    pub(crate) streamed: Vec<StreamJobLogsRequest>,
    pub(crate) cancelled: bool,
    /// The files that the job left; streams of their bytes break after each message when `breaks` is set.
    pub(crate) artifacts: Vec<(common::Artifact, Vec<u8>)>,
    pub(crate) breaks: bool,
}

/// A running fake.
pub(crate) struct Fake {
    pub(crate) endpoint: String,
    state: Arc<Mutex<State>>,
    cancelled: tokio::sync::watch::Sender<bool>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn start(scripts: impl IntoIterator<Item = Script>, result: common::Job) -> Self {
        let state = State { scripts: scripts.into_iter().collect(), result, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
        let (cancelled, _) = tokio::sync::watch::channel(false);
        let service = Service { tasks: Tasks::new(), state: state.clone(), cancelled: cancelled.clone() };
        let server = runtime.block_on(Server::bind("127.0.0.1:0".parse().expect("address"))).expect("bind");
        let endpoint = server.local_endpoint();
        let server = server.add_service(SchedulerServiceServer::new(service));
        runtime.spawn(async move { server.serve(&Tasks::new()).await });
        Self { endpoint, state, cancelled, _runtime: runtime }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("state")
    }

    pub(crate) fn was_cancelled(&self) -> bool {
        *self.cancelled.borrow()
    }
}

/// A job as it ended.
pub(crate) fn ended(state: JobState, exit: Option<common::ExitStatus>, reason: &str) -> common::Job {
    common::Job { state: state.to_pb().into(), exit, reason: reason.into(), attempt: 1, ..common::Job::default() }
}

pub(crate) fn exited(code: i32) -> Option<common::ExitStatus> {
    Some(common::ExitStatus { exit_code: Some(code), ..Default::default() })
}

pub(crate) fn killed(signal: i32) -> Option<common::ExitStatus> {
    Some(common::ExitStatus { signal: Some(signal), ..Default::default() })
}

pub(crate) fn chunk(attempt: u32, stream: common::LogStream, offset: u64, data: &[u8]) -> StreamJobLogsResponse {
    let data = data.to_vec().into();
    let chunk = common::LogChunk { stream: stream.into(), offset, time: None, data };
    StreamJobLogsResponse { attempt, record: Some(stream_job_logs_response::Record::Chunk(chunk)) }
}

pub(crate) fn end(attempt: u32, end_offset: u64, state: JobState, reason: &str) -> StreamJobLogsResponse {
    let end = common::LogEnd { end_offset, state: state.to_pb().into(), exit: None, reason: reason.into() };
    StreamJobLogsResponse { attempt, record: Some(stream_job_logs_response::Record::End(end)) }
}

#[derive(Clone)]
struct Service {
    tasks: Tasks,
    state: Arc<Mutex<State>>,
    cancelled: tokio::sync::watch::Sender<bool>,
}

impl Service {
    fn job(&self) -> Result<common::Job, Status> {
        let state = self.state.lock().expect("state");
        let submitted =
            state.submitted.first().ok_or_else(|| Status::from(Error::new(Reason::JobNotFound, "no job")))?;
        let mut spec = submitted.spec.clone().unwrap_or_default();
        spec.vcpus.get_or_insert(1);
        spec.memory_mib.get_or_insert(128);
        Ok(common::Job { id: submitted.request_id.clone(), spec: Some(spec), ..state.result.clone() })
    }

    /// Notes a submission; an error when its answer is to be lost.
    fn submit(&self, request: SubmitJobRequest) -> Result<common::Job, Status> {
        let lose = {
            let mut state = self.state.lock().expect("state");
            state.submitted.push(request);
            let lose = state.lost_submissions > 0;
            state.lost_submissions = state.lost_submissions.saturating_sub(1);
            lose
        };
        if lose { Err(Status::unavailable("the answer was lost")) } else { self.job() }
    }

    /// Plays the next script; `None`: there is none.
    fn play(&self, request: StreamJobLogsRequest) -> Option<Streamed<StreamJobLogsResponse>> {
        let script = {
            let mut state = self.state.lock().expect("state");
            state.streamed.push(request);
            state.scripts.pop_front()
        };
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let send = |records: Vec<StreamJobLogsResponse>| {
            for record in records {
                let _ = sender.send(Ok(record));
            }
        };
        match script? {
            Script::Close(records) => send(records),
            Script::Fail(records, reason) => {
                send(records);
                let _ = sender.send(Err(Error::new(reason, "as the script says").into()));
            }
            Script::Hang(records) => {
                send(records);
                let mut cancelled = self.cancelled.subscribe();
                self.tasks.spawn("hang", async move {
                    let _ = cancelled.wait_for(|cancelled| *cancelled).await;
                    let _ = sender.send(Ok(end(1, 0, JobState::Cancelled, "")));
                });
            }
        }
        Some(UnboundedReceiverStream::new(receiver).boxed())
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn unimplemented<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the fake cannot do this"))
}

#[tonic::async_trait]
impl SchedulerService for Service {
    type WatchJobStream = Streamed<WatchJobResponse>;
    type StreamJobLogsStream = Streamed<StreamJobLogsResponse>;
    type RunJobStream = Streamed<RunJobResponse>;
    type GetArtifactStream = Streamed<GetArtifactResponse>;

    async fn submit_job(&self, request: Request<SubmitJobRequest>) -> Result<Response<SubmitJobResponse>, Status> {
        Ok(Response::new(SubmitJobResponse { job: Some(self.submit(request.into_inner())?) }))
    }

    /// The job as it will have ended, its output as a stream of logs would bring it, and its end where the script has one.
    async fn run_job(&self, request: Request<RunJobRequest>) -> Result<Response<Self::RunJobStream>, Status> {
        let RunJobRequest { request_id, spec, input } = request.into_inner();
        let job = self.submit(SubmitJobRequest { request_id: request_id.clone(), spec, input })?;
        let change = |job| {
            let change = WatchJobResponse { job: Some(job), ..Default::default() };
            Ok(RunJobResponse { event: Some(run_job_response::Event::Job(change)) })
        };
        let queued = common::Job { state: JobState::Queued.to_pb().into(), attempt: 0, exit: None, ..job.clone() };
        let logs = StreamJobLogsRequest { job_id: request_id, attempt: 0, offset: 0, follow: true };
        let records = self.play(logs).unwrap_or_else(|| futures::stream::empty().boxed());
        let logs = records.flat_map(move |record| {
            let last = matches!(&record, Ok(StreamJobLogsResponse { record: Some(stream_job_logs_response::Record::End(end)), .. })
                if JobState::from_pb("state", end.state).is_ok_and(JobState::is_terminal));
            let ended = last.then(|| change(job.clone()));
            let record = record.map(|log| RunJobResponse { event: Some(run_job_response::Event::Log(log)) });
            futures::stream::iter(std::iter::once(record).chain(ended))
        });
        Ok(Response::new(futures::stream::iter([change(queued)]).chain(logs).boxed()))
    }

    async fn submit_job_group(
        &self,
        request: Request<SubmitJobGroupRequest>,
    ) -> Result<Response<SubmitJobGroupResponse>, Status> {
        let SubmitJobGroupRequest { request_id, jobs } = request.into_inner();
        let mut answer = SubmitJobGroupResponse { group_id: request_id, jobs: Vec::new() };
        for job in jobs {
            for index in job.array_first..=job.array_last {
                let request_id = uuid::Uuid::from_u128(index.into()).to_string();
                let request = SubmitJobRequest { request_id: request_id.clone(), spec: job.spec.clone(), input: None };
                answer.jobs.push(common::Job { id: request_id, ..self.submit(request)? });
            }
        }
        Ok(Response::new(answer))
    }

    async fn list_artifacts(
        &self,
        _: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        let artifacts =
            self.state.lock().expect("state").artifacts.iter().map(|(artifact, _)| artifact.clone()).collect();
        Ok(Response::new(ListArtifactsResponse { artifacts, attempt: 1 }))
    }

    async fn get_artifact(
        &self,
        request: Request<GetArtifactRequest>,
    ) -> Result<Response<Self::GetArtifactStream>, Status> {
        let (state, asked) = (self.state.lock().expect("state"), request.into_inner());
        let found = state.artifacts.iter().find(|(artifact, _)| artifact.path == asked.path);
        let (_, bytes) = found.ok_or_else(|| Status::from(Error::new(Reason::ArtifactNotFound, "no such file")))?;
        let left = &bytes[usize::try_from(asked.offset).expect("an offset")..];
        let parts =
            left.chunks(65_536).map(|part| Ok(GetArtifactResponse { artifact: None, data: part.to_vec().into() }));
        let mut parts: Vec<_> = parts.collect();
        if state.breaks && parts.len() > 1 {
            parts.truncate(1);
            parts.push(Err(Error::new(Reason::PeerUnavailable, "the node is away").into()));
        }
        Ok(Response::new(futures::stream::iter(parts).boxed()))
    }

    async fn explain_job(&self, _: Request<ExplainJobRequest>) -> Result<Response<ExplainJobResponse>, Status> {
        unimplemented()
    }
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        unimplemented()
    }
    async fn cordon_node(&self, _: Request<CordonNodeRequest>) -> Result<Response<CordonNodeResponse>, Status> {
        unimplemented()
    }
    async fn uncordon_node(&self, _: Request<UncordonNodeRequest>) -> Result<Response<UncordonNodeResponse>, Status> {
        unimplemented()
    }
    async fn drain_node(&self, _: Request<DrainNodeRequest>) -> Result<Response<DrainNodeResponse>, Status> {
        unimplemented()
    }

    async fn get_job(&self, _: Request<GetJobRequest>) -> Result<Response<GetJobResponse>, Status> {
        Ok(Response::new(GetJobResponse { job: Some(self.job()?) }))
    }

    async fn cancel_job(&self, _: Request<CancelJobRequest>) -> Result<Response<CancelJobResponse>, Status> {
        self.state.lock().expect("state").cancelled = true;
        self.cancelled.send_replace(true);
        Ok(Response::new(CancelJobResponse { job: Some(self.job()?) }))
    }

    async fn watch_job(&self, _: Request<WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        let change = WatchJobResponse { job: Some(self.job()?), waiting_for: String::new() };
        Ok(Response::new(futures::stream::iter([Ok(change)]).boxed()))
    }

    async fn stream_job_logs(
        &self,
        request: Request<StreamJobLogsRequest>,
    ) -> Result<Response<Self::StreamJobLogsStream>, Status> {
        let records = self.play(request.into_inner());
        let records =
            records.ok_or_else(|| Status::from(Error::new(Reason::LogNotFound, "the script is at its end")))?;
        Ok(Response::new(records))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        unimplemented()
    }
    async fn check_node(&self, _: Request<CheckNodeRequest>) -> Result<Response<CheckNodeResponse>, Status> {
        unimplemented()
    }
    async fn start_vm(&self, _: Request<StartVmRequest>) -> Result<Response<StartVmResponse>, Status> {
        unimplemented()
    }
    async fn stop_vm(&self, _: Request<StopVmRequest>) -> Result<Response<StopVmResponse>, Status> {
        unimplemented()
    }
    async fn get_vm(&self, _: Request<GetVmRequest>) -> Result<Response<GetVmResponse>, Status> {
        unimplemented()
    }
    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        unimplemented()
    }
    async fn list_vm_events(&self, _: Request<ListVmEventsRequest>) -> Result<Response<ListVmEventsResponse>, Status> {
        unimplemented()
    }
    async fn purge_vms(&self, _: Request<PurgeVmsRequest>) -> Result<Response<PurgeVmsResponse>, Status> {
        unimplemented()
    }
    async fn get_vm_console(&self, _: Request<GetVmConsoleRequest>) -> Result<Response<GetVmConsoleResponse>, Status> {
        unimplemented()
    }
    async fn get_vm_usage(&self, _: Request<GetVmUsageRequest>) -> Result<Response<GetVmUsageResponse>, Status> {
        unimplemented()
    }
    async fn resize_vm(&self, _: Request<ResizeVmRequest>) -> Result<Response<ResizeVmResponse>, Status> {
        unimplemented()
    }
    async fn get_stats(&self, _: Request<GetStatsRequest>) -> Result<Response<GetStatsResponse>, Status> {
        let vm_states = BTreeMap::from([(1, 1)]);
        let vm_states = vm_states.into_iter().map(|(state, count)| VmStateCount { state, count }).collect();
        Ok(Response::new(GetStatsResponse { vm_states, ..Default::default() }))
    }
}
