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
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn unimplemented<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the fake cannot do this"))
}

#[tonic::async_trait]
impl SchedulerService for Service {
    type WatchJobStream = Streamed<WatchJobResponse>;
    type StreamJobLogsStream = Streamed<StreamJobLogsResponse>;

    async fn submit_job(&self, request: Request<SubmitJobRequest>) -> Result<Response<SubmitJobResponse>, Status> {
        let lose = {
            let mut state = self.state.lock().expect("state");
            state.submitted.push(request.into_inner());
            let lose = state.lost_submissions > 0;
            state.lost_submissions = state.lost_submissions.saturating_sub(1);
            lose
        };
        if lose {
            return Err(Status::unavailable("the answer was lost"));
        }
        Ok(Response::new(SubmitJobResponse { job: Some(self.job()?) }))
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
        let script = {
            let mut state = self.state.lock().expect("state");
            state.streamed.push(request.into_inner());
            state.scripts.pop_front()
        };
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let send = |records: Vec<StreamJobLogsResponse>| {
            for record in records {
                let _ = sender.send(Ok(record));
            }
        };
        match script {
            None => return Err(Error::new(Reason::LogNotFound, "the script is at its end").into()),
            Some(Script::Close(records)) => send(records),
            Some(Script::Fail(records, reason)) => {
                send(records);
                let _ = sender.send(Err(Error::new(reason, "as the script says").into()));
            }
            Some(Script::Hang(records)) => {
                send(records);
                let mut cancelled = self.cancelled.subscribe();
                self.tasks.spawn("hang", async move {
                    let _ = cancelled.wait_for(|cancelled| *cancelled).await;
                    let _ = sender.send(Ok(end(1, 0, JobState::Cancelled, "")));
                });
            }
        }
        Ok(Response::new(UnboundedReceiverStream::new(receiver).boxed()))
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
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
    async fn get_stats(&self, _: Request<GetStatsRequest>) -> Result<Response<GetStatsResponse>, Status> {
        let vm_states = BTreeMap::from([(1, 1)]);
        let vm_states = vm_states.into_iter().map(|(state, count)| VmStateCount { state, count }).collect();
        Ok(Response::new(GetStatsResponse { vm_states, ..Default::default() }))
    }
}
