//! What other programs rely on: the three gRPC contracts on one port, the database on disk, the SDK.

use std::{process::Command, time::Duration};

use blixard::pb::scheduler::v1::{WatchJobRequest, scheduler_service_client::SchedulerServiceClient};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    plane::Plane,
    support::{output, stdout, text},
};

#[path = "../../examples/usage_guide.rs"]
#[expect(dead_code, reason = "the example's own main is not called")]
mod usage_guide;

const SERVICES: [&str; 3] =
    ["blixard.registry.v1.RegistryService", "blixard.scheduler.v1.SchedulerService", "blixard.vmhost.v1.VmHostService"];

/// Runs a test's asynchronous part while its plane lives outside the runtime.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("runtime").block_on(future)
}

fn channel(plane: &Plane) -> tonic::transport::Channel {
    blixard_chassis::client::channel(&plane.endpoint).expect("an endpoint")
}

#[test]
fn health_is_serving_for_the_server_and_for_each_service() {
    let plane = Plane::start();
    block_on(async {
        let mut health = HealthClient::new(channel(&plane));
        for service in SERVICES.iter().chain([&""]) {
            let request = HealthCheckRequest { service: (*service).to_owned() };
            let answer = health.check(request).await.expect(service).into_inner();
            assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
        }
        let unknown = HealthCheckRequest { service: "nobody".into() };
        assert_eq!(health.check(unknown).await.expect_err("unknown").code(), Code::NotFound);
    });
}

macro_rules! listed_services {
    ($plane:expr, $version:ident) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let mut client = ServerReflectionClient::new(channel(&$plane));
        let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
        let asked = [
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol(SERVICES[1].into())),
        ];
        let mut answers =
            client.server_reflection_info(futures::stream::iter(asked)).await.expect("answered").into_inner();
        let first = answers.message().await.expect("a message").expect("an answer").message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = first else { panic!("{first:?}") };
        let second = answers.message().await.expect("a message").expect("an answer").message_response;
        assert!(matches!(second, Some(MessageResponse::FileDescriptorResponse(_))), "{second:?}");
        list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
    }};
}

#[test]
fn reflection_lists_the_services_in_both_of_its_versions() {
    let plane = Plane::start();
    block_on(async {
        for listed in [listed_services!(plane, v1), listed_services!(plane, v1alpha)] {
            for service in SERVICES {
                assert!(listed.iter().any(|name| name == service), "{service} is not in {listed:?}");
            }
        }
    });
}

#[test]
fn a_deadline_comes_back_as_deadline_exceeded() {
    let plane = Plane::start();
    let id = stdout(plane.cli(["run", "--detach", "--", "sleep", "600"])).trim().to_owned();
    block_on(async {
        let mut client = SchedulerServiceClient::connect(plane.endpoint.clone()).await.expect("connect");
        let mut request = tonic::Request::new(WatchJobRequest { job_id: id.clone() });
        request.set_timeout(Duration::from_millis(500));
        let mut watch = client.watch_job(request).await.expect("opened").into_inner();
        let status = loop {
            match watch.message().await {
                Ok(message) => assert!(message.is_some(), "the watch ended before the job and the deadline"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    });
}

#[test]
fn the_guides_sql_works_while_the_system_runs() {
    let plane = Plane::start();
    let vm = plane.json(["vm", "create", "--wait"])["id"].as_str().expect("an id").to_owned();
    assert_eq!(stdout(plane.cli(["run", "--ephemeral", "--", "echo", "x"])), "x\n");
    let database = plane.path("data/hiqlite/hiqlite.db");
    let sql = |query: &str| {
        let mut sqlite = Command::new("sqlite3");
        sqlite.arg(&database).arg(query);
        let result = output(sqlite);
        assert!(result.status.success(), "{query}: {}", text(&result.stderr));
        text(&result.stdout)
    };
    let row = sql(&format!("SELECT id, state, node_id, created_at FROM vms WHERE id = '{vm}';"));
    assert!(row.starts_with(&format!("{vm}|Ready|node-1|")), "{row}");
    assert!(sql("SELECT state, COUNT(*) FROM vms GROUP BY state;").contains("Ready|1"));
    assert!(sql("SELECT id, config FROM vms WHERE state = 'Ready';").contains(&vm));
    assert_eq!(sql("SELECT COUNT(*) FROM vms WHERE state IN ('Ready', 'Busy');"), "1\n");
    assert_eq!(sql("SELECT id, state, node_id FROM vms WHERE state = 'Failed';"), "");
    let events = sql(&format!("SELECT * FROM vm_events WHERE vm_id = '{vm}' ORDER BY timestamp DESC;"));
    assert_eq!(events.lines().count(), 2, "{events}");
}

#[test]
fn the_code_of_the_guide_runs() {
    let plane = Plane::start();
    let printed = block_on(usage_guide::guide(&plane.endpoint)).expect("the guide");
    assert!(printed.contains("Total VMs: "), "{printed}");
}
