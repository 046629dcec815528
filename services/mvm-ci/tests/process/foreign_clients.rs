//! Clients that are not ours: grpcurl by reflection, and Python with stubs that grpcio-tools makes from `proto/`. They come
//! with `make test` (BLIXARD_PYTHON is the directory of their programs); without it these tests skip and say so.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    plane::Plane,
    support::{code, output, stdout, text},
};

fn tool(name: &str) -> Option<PathBuf> {
    let Some(directory) = std::env::var_os("BLIXARD_PYTHON") else {
        eprintln!("SKIPPED: BLIXARD_PYTHON is not set, so there is no {name} (make test sets it)");
        return None;
    };
    Some(Path::new(&directory).join(name))
}

fn address(plane: &Plane) -> &str {
    plane.endpoint.trim_start_matches("http://")
}

fn grpcurl(plane: &Plane, program: &Path, body: Option<&str>, method: &str) -> Command {
    let mut command = Command::new(program);
    command.arg("-plaintext");
    if let Some(body) = body {
        command.args(["-d", body]);
    }
    command.arg(address(plane)).args(method.split(' '));
    command
}

#[test]
fn grpcurl_lists_checks_submits_follows_and_reads_errors() {
    let Some(program) = tool("grpcurl") else { return };
    let plane = Plane::start();
    let services = stdout(grpcurl(&plane, &program, None, "list"));
    for service in ["registry.v1.RegistryService", "scheduler.v1.SchedulerService", "vmhost.v1.VmHostService"] {
        assert!(services.contains(&format!("blixard.{service}")), "{services}");
        let body = format!("{{\"service\": \"blixard.{service}\"}}");
        let health = stdout(grpcurl(&plane, &program, Some(&body), "grpc.health.v1.Health/Check"));
        assert!(health.contains("SERVING") && !health.contains("NOT_SERVING"), "{health}");
    }

    let submit = "blixard.scheduler.v1.SchedulerService/SubmitJob";
    let body = r#"{"spec": {"command": ["sh", "-c", "echo grpc; exit 4"]}}"#;
    let answer: Value = serde_json::from_str(&stdout(grpcurl(&plane, &program, Some(body), submit))).expect("JSON");
    let body = format!("{{\"job_id\": {}, \"follow\": true}}", answer["job"]["id"]);
    let follow = "blixard.scheduler.v1.SchedulerService/StreamJobLogs";
    let records = stdout(grpcurl(&plane, &program, Some(&body), follow));
    // "grpc\n" in base64, as JSON has bytes.
    assert!(records.contains("Z3JwYwo=") && records.contains("\"exitCode\": 4"), "{records}");

    let refused = output(grpcurl(&plane, &program, Some(r#"{"spec": {"command": ["true"], "vcpus": 0}}"#), submit));
    let message = text(&refused.stderr);
    assert!(message.contains("spec.vcpus: \"0\" is not allowed: 1 to 64"), "{message}");
    assert!(message.contains("\"reason\":\"INVALID_FIELD\""), "the details are in clear: {message}");
}

#[test]
fn a_client_generated_for_python_submits_a_job_and_follows_its_log() {
    let Some(program) = tool("python") else { return };
    let plane = Plane::start();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut client = Command::new(program);
    client.arg(root.join("tests/clients/follow_job.py")).arg(address(&plane)).arg(root.join("proto"));
    let output = output(client);
    assert_eq!(code(output.status), 3, "{}", text(&output.stderr));
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("from python\n", "aside\n"));
}
