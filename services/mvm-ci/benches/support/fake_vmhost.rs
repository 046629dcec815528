//! A vmhost without guests: VMs are Ready and jobs have succeeded at once, which it reports as a real one does. Without a
//! registry it only answers: what gRPC costs alone.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use blixard::{
    limits,
    pb::{
        common::v1::{self as common, LogChunk},
        registry::v1::{self as registry, registry_service_client::RegistryServiceClient},
        vmhost::v1::{
            self as pb, stream_logs_response,
            vm_host_service_client::VmHostServiceClient,
            vm_host_service_server::{VmHostService, VmHostServiceServer},
        },
    },
    time::Timestamp,
};
use blixard_chassis::{Server, Tasks, client};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, transport::Channel};
use uuid::Uuid;

/// The length of every log.
pub const LOG_BYTES: u64 = 256 * 1024 * 1024;
/// Enough for whatever is measured.
const MAX_VMS: u32 = 10_000;

type Registry = RegistryServiceClient<Channel>;
type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves until it is dropped.
pub struct FakeVmHost {
    pub client: VmHostServiceClient<Channel>,
    endpoint: String,
    tasks: Tasks,
}

impl FakeVmHost {
    /// Only answers.
    pub async fn start() -> anyhow::Result<Self> {
        Self::serve(None).await
    }

    /// Is a node of this registry.
    pub async fn node(registry_endpoint: &str) -> anyhow::Result<Self> {
        let registry = RegistryServiceClient::new(client::channel(registry_endpoint)?);
        let fake = Self::serve(Some(registry.clone())).await?;
        fake.register(registry).await?;
        Ok(fake)
    }

    async fn serve(registry: Option<Registry>) -> anyhow::Result<Self> {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let (endpoint, tasks) = (server.local_endpoint(), Tasks::new());
        let client = VmHostServiceClient::new(client::channel(&endpoint)?);
        let server = server.add_service(VmHostServiceServer::new(Service { registry, tasks: tasks.clone() }));
        let serving = tasks.clone();
        tasks.spawn("fake vmhost", async move { drop(server.serve(&serving).await) });
        Ok(Self { client, endpoint, tasks })
    }

    async fn register(&self, mut registry: Registry) -> anyhow::Result<()> {
        let node = common::Node {
            id: "fake".to_owned(),
            endpoint: self.endpoint.clone(),
            driver: "process".to_owned(),
            vcpus: 64,
            memory_mib: 1 << 30,
            max_vms: MAX_VMS,
            images: vec![limits::DEFAULT_IMAGE.to_owned()],
            ..Default::default()
        };
        let request = registry::RegisterNodeRequest { node: Some(node), ..Default::default() };
        let node = registry.register_node(request).await?.into_inner().node.unwrap_or_default();
        let beat = registry::HeartbeatRequest { node_id: node.id, incarnation: node.incarnation };
        let beats = stream::repeat(beat).then(async |beat| {
            tokio::time::sleep(Duration::from_secs(1)).await;
            beat
        });
        self.tasks.spawn("fake heartbeats", async move {
            let Ok(answers) = registry.heartbeat(beats).await else { return };
            answers.into_inner().for_each(async |_| {}).await;
        });
        Ok(())
    }

    /// A call that does nothing.
    pub async fn echo(&self) -> anyhow::Result<()> {
        let message = pb::CancelJobRequest { job_id: Uuid::nil().to_string(), attempt: 1 };
        self.client.clone().cancel_job(message).await?;
        Ok(())
    }
}

impl Drop for FakeVmHost {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}

#[derive(Clone)]
struct Service {
    registry: Option<Registry>,
    tasks: Tasks,
}

impl Service {
    fn report<F: Future<Output = Result<(), Status>> + Send>(
        &self,
        report: impl FnOnce(Registry) -> F + Send + 'static,
    ) {
        let Some(registry) = self.registry.clone() else { return };
        self.tasks.spawn("report", async move {
            if let Err(status) = report(registry).await {
                eprintln!("the registry refused: {status}");
            }
        });
    }
}

async fn transition(mut registry: Registry, vm_id: String, to: common::VmState) -> Result<(), Status> {
    let step = registry::TransitionVmRequest { vm_id, to_state: to.into(), ..Default::default() };
    registry.transition_vm(step).await.map(drop)
}

/// As of a short command: its start is told with its end.
async fn run(mut registry: Registry, job: pb::RunJobRequest) -> Result<(), Status> {
    let now = || Some(Timestamp::now().into());
    let result = registry::AttemptResult {
        state: common::JobState::Succeeded.into(),
        exit: Some(common::ExitStatus { exit_code: Some(0), ..Default::default() }),
        started_at: now(),
        finished_at: now(),
        ..Default::default()
    };
    let outcome = Some(registry::finish_attempt_request::Outcome::Result(result));
    let finished =
        registry::FinishAttemptRequest { job_id: job.job_id, attempt: job.attempt, outcome, ..Default::default() };
    registry.finish_attempt(finished).await.map(drop)
}

#[tonic::async_trait]
impl VmHostService for Service {
    async fn start_vm(&self, request: Request<pb::StartVmRequest>) -> Answer<pb::StartVmResponse> {
        let vm_id = request.into_inner().vm_id;
        self.report(move |registry| transition(registry, vm_id, common::VmState::Ready));
        Ok(Response::new(pb::StartVmResponse {}))
    }

    async fn stop_vm(&self, request: Request<pb::StopVmRequest>) -> Answer<pb::StopVmResponse> {
        let vm_id = request.into_inner().vm_id;
        self.report(move |registry| transition(registry, vm_id, common::VmState::Terminated));
        Ok(Response::new(pb::StopVmResponse {}))
    }

    async fn run_job(&self, request: Request<pb::RunJobRequest>) -> Answer<pb::RunJobResponse> {
        let job = request.into_inner();
        self.report(move |registry| run(registry, job));
        Ok(Response::new(pb::RunJobResponse {}))
    }

    async fn cancel_job(&self, _: Request<pb::CancelJobRequest>) -> Answer<pb::CancelJobResponse> {
        Ok(Response::new(pb::CancelJobResponse {}))
    }

    async fn list_vms(&self, _: Request<pb::ListVmsRequest>) -> Answer<pb::ListVmsResponse> {
        Ok(Response::new(pb::ListVmsResponse::default()))
    }

    type StreamLogsStream = Streamed<pb::StreamLogsResponse>;

    async fn stream_logs(&self, _: Request<pb::StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        let data = Bytes::from(vec![0; limits::MAX_LOG_CHUNK]);
        let chunks = LOG_BYTES / limits::MAX_LOG_CHUNK as u64;
        let records = (0..chunks).map(move |number| {
            let offset = number * limits::MAX_LOG_CHUNK as u64;
            let chunk = LogChunk { stream: 1, offset, time: None, data: data.clone() };
            Ok(pb::StreamLogsResponse { attempt: 1, record: Some(stream_logs_response::Record::Chunk(chunk)) })
        });
        Ok(Response::new(Box::pin(stream::iter(records))))
    }

    async fn list_artifacts(&self, _: Request<pb::ListArtifactsRequest>) -> Answer<pb::ListArtifactsResponse> {
        Ok(Response::new(pb::ListArtifactsResponse::default()))
    }

    type GetArtifactStream = Streamed<pb::GetArtifactResponse>;

    async fn get_artifact(&self, _: Request<pb::GetArtifactRequest>) -> Answer<Self::GetArtifactStream> {
        Err(Status::not_found("there are none"))
    }

    async fn check_invariants(&self, _: Request<pb::CheckInvariantsRequest>) -> Answer<pb::CheckInvariantsResponse> {
        Ok(Response::new(pb::CheckInvariantsResponse::default()))
    }

    async fn get_console(&self, _: Request<pb::GetConsoleRequest>) -> Answer<pb::GetConsoleResponse> {
        Ok(Response::new(pb::GetConsoleResponse::default()))
    }

    async fn get_vm_usage(&self, _: Request<pb::GetVmUsageRequest>) -> Answer<pb::GetVmUsageResponse> {
        Ok(Response::new(pb::GetVmUsageResponse::default()))
    }

    async fn resize_vm(&self, _: Request<pb::ResizeVmRequest>) -> Answer<pb::ResizeVmResponse> {
        Err(Status::failed_precondition("there is no machine"))
    }
}
