//! What every server gives its callers, over a real socket: deadlines, limits, health, reflection, an ordered end.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use blixard::{
    error::{Error, Reason},
    limits,
    pb::{
        common::v1::LogHeartbeat,
        vmhost::v1::{
            self as pb,
            vm_host_service_client::VmHostServiceClient,
            vm_host_service_server::{VmHostService, VmHostServiceServer},
        },
    },
};
use blixard_chassis::{Server, Tasks, client};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{v1, v1alpha};

/// Answers late, never, or with a stream that never ends: what a server must protect its callers from.
#[derive(Clone)]
struct Stubborn;

type Records = Pin<Box<dyn Stream<Item = Result<pb::StreamLogsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl VmHostService for Stubborn {
    async fn start_vm(&self, _: Request<pb::StartVmRequest>) -> Result<Response<pb::StartVmResponse>, Status> {
        Ok(Response::new(pb::StartVmResponse {}))
    }
    async fn stop_vm(&self, _: Request<pb::StopVmRequest>) -> Result<Response<pb::StopVmResponse>, Status> {
        std::future::pending().await
    }
    async fn run_job(&self, _: Request<pb::RunJobRequest>) -> Result<Response<pb::RunJobResponse>, Status> {
        Err(blixard::error::invalid("vm_id", "x", "a UUID").into())
    }
    async fn cancel_job(&self, _: Request<pb::CancelJobRequest>) -> Result<Response<pb::CancelJobResponse>, Status> {
        std::future::pending().await
    }
    async fn list_vms(&self, _: Request<pb::ListVmsRequest>) -> Result<Response<pb::ListVmsResponse>, Status> {
        std::future::pending().await
    }
    type StreamLogsStream = Records;
    async fn stream_logs(&self, _: Request<pb::StreamLogsRequest>) -> Result<Response<Records>, Status> {
        let beat = pb::stream_logs_response::Record::Heartbeat(LogHeartbeat { next_offset: 7 });
        let first = tokio_stream::once(Ok(pb::StreamLogsResponse { attempt: 1, record: Some(beat) }));
        Ok(Response::new(Box::pin(first.chain(tokio_stream::pending()))))
    }
    async fn list_artifacts(
        &self,
        _: Request<pb::ListArtifactsRequest>,
    ) -> Result<Response<pb::ListArtifactsResponse>, Status> {
        std::future::pending().await
    }
    type GetArtifactStream = Pin<Box<dyn Stream<Item = Result<pb::GetArtifactResponse, Status>> + Send>>;
    async fn get_artifact(
        &self,
        _: Request<pb::GetArtifactRequest>,
    ) -> Result<Response<Self::GetArtifactStream>, Status> {
        std::future::pending().await
    }
    async fn check_invariants(
        &self,
        _: Request<pb::CheckInvariantsRequest>,
    ) -> Result<Response<pb::CheckInvariantsResponse>, Status> {
        std::future::pending().await
    }
    async fn get_console(&self, _: Request<pb::GetConsoleRequest>) -> Result<Response<pb::GetConsoleResponse>, Status> {
        std::future::pending().await
    }
    async fn get_vm_usage(
        &self,
        _: Request<pb::GetVmUsageRequest>,
    ) -> Result<Response<pb::GetVmUsageResponse>, Status> {
        std::future::pending().await
    }
    async fn resize_vm(&self, _: Request<pb::ResizeVmRequest>) -> Result<Response<pb::ResizeVmResponse>, Status> {
        std::future::pending().await
    }
}

struct Hosted {
    endpoint: String,
    tasks: Tasks,
    done: tokio::task::JoinHandle<()>,
}

impl Hosted {
    async fn start() -> Self {
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let endpoint = server.local_endpoint();
        let tasks = Tasks::new();
        let server =
            server.add_service(VmHostServiceServer::new(Stubborn).max_decoding_message_size(limits::MAX_MESSAGE_BYTES));
        let serving = tasks.clone();
        #[expect(clippy::disallowed_methods, reason = "the test owns this task by its handle")]
        let done = tokio::spawn(async move { server.serve(&serving).await.expect("serves") });
        Self { endpoint, tasks, done }
    }

    fn client(&self) -> VmHostServiceClient<tonic::transport::Channel> {
        VmHostServiceClient::new(client::channel(&self.endpoint).expect("an endpoint"))
    }
}

#[tokio::test]
async fn a_missed_deadline_has_its_reason_whoever_notices_it() {
    let hosted = Hosted::start().await;
    let request = client::request(pb::StopVmRequest::default(), Duration::from_millis(300));
    let status = hosted.client().stop_vm(request).await.expect_err("never answered");
    // On a loaded machine tonic's client may be first with words of its own; the reason is the same.
    assert_eq!(Error::from_status(&status).reason, Reason::DeadlineExceeded, "{status:?}");
}

#[tokio::test]
async fn a_callers_deadline_ends_a_stream_too() {
    let hosted = Hosted::start().await;
    let request = client::request(pb::StreamLogsRequest::default(), Duration::from_millis(300));
    let mut records = hosted.client().stream_logs(request).await.expect("a stream").into_inner();
    assert!(records.message().await.expect("a first record").is_some());
    let status = records.message().await.expect_err("the deadline");
    assert_eq!(Error::from_status(&status).reason, Reason::DeadlineExceeded, "{status:?}");
}

#[tokio::test]
async fn shutdown_ends_open_streams_with_a_reason_to_come_back() {
    let hosted = Hosted::start().await;
    let mut records =
        hosted.client().stream_logs(pb::StreamLogsRequest::default()).await.expect("a stream").into_inner();
    assert!(records.message().await.expect("a first record").is_some());
    hosted.tasks.token().cancel();
    let status = records.message().await.expect_err("the end");
    assert_eq!(Error::from_status(&status).reason, Reason::ShuttingDown, "{status:?}");
    tokio::time::timeout(Duration::from_secs(30), hosted.done).await.expect("ends within its grace").expect("no panic");
}

#[tokio::test]
async fn errors_carry_error_info_across_the_socket_and_too_large_messages_are_refused() {
    let hosted = Hosted::start().await;
    let status = hosted.client().run_job(pb::RunJobRequest::default()).await.expect_err("refused");
    let error = Error::from_status(&status);
    assert_eq!((status.code(), error.reason), (Code::InvalidArgument, Reason::InvalidField));
    assert_eq!(error.metadata["field"], "vm_id");

    let huge = pb::RunJobRequest { vm_id: "x".repeat(limits::MAX_MESSAGE_BYTES + 1), ..Default::default() };
    let status = hosted.client().run_job(huge).await.expect_err("refused");
    let error = Error::from_status(&status);
    assert_eq!((error.reason, error.metadata["field"].as_str()), (Reason::InvalidField, "message"), "{status:?}");
}

#[tokio::test]
async fn health_answers_for_the_server_and_for_each_service_by_name() {
    let hosted = Hosted::start().await;
    let mut health = HealthClient::new(client::channel(&hosted.endpoint).expect("an endpoint"));
    for service in ["", "blixard.vmhost.v1.VmHostService"] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.expect(service).into_inner();
        assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving, "{service}");
    }
    let unknown = health.check(HealthCheckRequest { service: "no.such.Service".into() }).await.expect_err("unknown");
    assert_eq!(unknown.code(), Code::NotFound);
}

#[tokio::test]
async fn reflection_lists_what_is_served_and_knows_every_contract_in_v1_and_v1alpha() {
    let hosted = Hosted::start().await;
    let channel = client::channel(&hosted.endpoint).expect("an endpoint");
    let names = {
        let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = v1::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.expect("v1").into_inner();
        match answers.message().await.expect("an answer").and_then(|answer| answer.message_response) {
            Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) => list.service,
            other => panic!("{other:?}"),
        }
    };
    let mut names: Vec<_> = names.iter().map(|service| service.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["blixard.vmhost.v1.VmHostService", "grpc.health.v1.Health"]);

    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let symbol = "blixard.scheduler.v1.SchedulerService".to_owned();
    let find = v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(symbol);
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(find) };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.expect("v1alpha").into_inner();
    let answer = answers.message().await.expect("an answer").and_then(|answer| answer.message_response);
    let found = matches!(answer, Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_)));
    assert!(found, "{answer:?}");
}
