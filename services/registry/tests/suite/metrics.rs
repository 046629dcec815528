//! Metrics: what a real process serves over HTTP moves with what it does, and is what the documentation says.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blixard::{
    pb::registry::v1 as wire,
    vm::{VmKind, VmState},
};

use crate::kit::{Client, connect, create_job, create_vm, refusal, transition, uuid};

/// A `registry` process that serves metrics, ended with the test.
struct Process {
    child: Child,
    client: Client,
    metrics: String,
}

impl Process {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_registry"))
            .args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--data-dir"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut after = |head: &str| lines.find_map(|line| Some(line.strip_prefix(head)?.to_owned())).unwrap();
        let (endpoint, metrics) = (after("registry listening on "), after("registry metrics on http://"));
        let metrics = metrics.strip_suffix("/metrics").unwrap().to_owned();
        Self { child, client: connect(&endpoint), metrics }
    }

    /// The answer to an HTTP request: its head and its body.
    fn http(&self, method: &str, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(&self.metrics).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    /// The value of a metric, with its labels as they are written.
    fn value(&self, name: &str) -> Option<f64> {
        let (_, body) = self.http("GET", "/metrics");
        body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_move_with_what_the_registry_does_and_are_those_of_the_documentation() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::start(dir.path());
    assert_eq!(process.value("blixard_registry_revision"), Some(0.0));
    assert_eq!(process.value("blixard_registry_commit_seconds_count"), Some(0.0));

    let vm = uuid();
    process.client.create_vm(create_vm(&vm, VmKind::Service)).await.unwrap();
    process.client.transition_vm(transition(&vm, VmState::Ready)).await.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let mut client = process.client.clone();
        callers.spawn(async move { client.create_job(create_job(&uuid())).await.map(drop) });
    }
    callers.join_all().await.into_iter().collect::<Result<(), _>>().unwrap();
    assert_eq!(refusal(process.client.transition_vm(transition(&uuid(), VmState::Ready)).await), "VM_NOT_FOUND");
    let query = wire::QueryRequest { sql: "DELETE FROM vms".into(), ..Default::default() };
    let mut answer = process.client.query(query).await.unwrap().into_inner();
    assert_eq!(refusal(answer.message().await), "QUERY_REFUSED");

    assert_eq!(process.value("blixard_registry_revision"), Some(52.0));
    assert_eq!(process.value("blixard_registry_queued_mutations"), Some(0.0));
    let of = |path: &str, code: &str| format!("blixard_grpc_requests_total{{method=\"{path}\",code=\"{code}\"}}");
    let service = "/blixard.registry.v1.RegistryService";
    assert_eq!(process.value(&of(&format!("{service}/CreateJob"), "Ok")), Some(50.0));
    assert_eq!(process.value(&of(&format!("{service}/TransitionVm"), "Ok")), Some(1.0));
    assert_eq!(process.value(&of(&format!("{service}/TransitionVm"), "NotFound")), Some(1.0));
    assert_eq!(process.value("blixard_registry_queries_refused_total{reason=\"QUERY_REFUSED\"}"), Some(1.0));
    assert_eq!(process.value("blixard_registry_commit_mutations_sum"), Some(53.0));
    let commits = process.value("blixard_registry_commit_mutations_count").unwrap();
    assert!((4.0..=53.0).contains(&commits), "{commits}");
    assert_eq!(process.value("blixard_registry_commit_seconds_count"), Some(commits));
    assert!(process.value("blixard_registry_commit_seconds_sum").unwrap() > 0.0);

    let mut watch = process.client.watch(wire::WatchRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap();
    assert_eq!(process.value("blixard_registry_watchers"), Some(1.0));
    drop(watch);
    let deadline = Instant::now() + Duration::from_secs(30);
    while process.value("blixard_registry_watchers") != Some(0.0) {
        assert!(Instant::now() < deadline, "the watcher has gone and is still counted");
        tokio::task::yield_now().await;
    }

    let (_, body) = process.http("GET", "/metrics");
    let served: BTreeSet<_> = body.lines().filter_map(described(&body)).collect();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/METRICS.md");
    let page = std::fs::read_to_string(page).unwrap();
    let documented: BTreeSet<_> = page.lines().filter_map(row).collect();
    assert_eq!(served, documented);
}

/// A line `# TYPE name kind` as name, kind and the text of the metric's `# HELP` line.
fn described(body: &str) -> impl Fn(&str) -> Option<(String, String, String)> {
    move |line| {
        let (name, kind) = line.strip_prefix("# TYPE ")?.split_once(' ')?;
        let help = body.lines().find_map(|line| line.strip_prefix(&format!("# HELP {name} ")));
        Some((name.to_owned(), kind.to_owned(), help.unwrap_or_default().to_owned()))
    }
}

/// A row of the documentation's table, as [`described`] gives it.
fn row(line: &str) -> Option<(String, String, String)> {
    let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
    let name = cells.next()?.trim_end_matches('`').to_owned();
    let (kind, _labels, help) = (cells.next()?, cells.next()?, cells.next()?);
    Some((name, kind.to_owned(), help.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn other_requests_to_the_metrics_listener_are_told_where_metrics_are() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dir.path());
    let (head, body) = process.http("GET", "/");
    assert!(head.starts_with("HTTP/1.1 404 ") && body.contains("/metrics"), "{head}\n{body}");
    let (head, _) = process.http("DELETE", "/metrics");
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
    let (head, _) = process.http("GET", "/metrics");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
}
