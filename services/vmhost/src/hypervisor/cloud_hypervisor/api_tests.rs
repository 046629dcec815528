//! The client against a small server: what is sent, and what is made of each kind of answer.

use std::{
    io::{Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    thread::JoinHandle,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::{
    api::{Api, ApiError, PciDevice, Ping},
    config::NetConfig,
};

/// What a server got: the request's bytes, and the descriptors that came with them.
pub(super) struct Got {
    pub(super) request: String,
    descriptors: Vec<OwnedFd>,
}

/// A server that takes one request, answers it, and tells what it got.
struct Server {
    dir: tempfile::TempDir,
    thread: JoinHandle<Got>,
}

impl Server {
    fn answering(status: u16, body: &str) -> Self {
        let length = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        let length = if status == 204 { "" } else { &length };
        let answer = format!("HTTP/1.1 {status} \r\nConnection: keep-alive\r\n{length}\r\n{body}");
        let dir = tempfile::tempdir().expect("tempdir");
        let listener = UnixListener::bind(dir.path().join("api")).expect("binds");
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepts");
            let got = receive(&stream);
            // Until the client has had enough.
            let _ = stream.write_all(answer.as_bytes());
            let _ = stream.read_to_end(&mut Vec::new());
            got
        });
        Self { dir, thread }
    }

    fn api(&self) -> Api {
        Api::new(self.dir.path().join("api"))
    }

    fn got(self) -> Got {
        self.thread.join().expect("the server got a request")
    }
}

/// Reads until the request is whole.
pub(super) fn receive(stream: &UnixStream) -> Got {
    let mut got = Got { request: String::new(), descriptors: Vec::new() };
    loop {
        let mut bytes = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [std::io::IoSliceMut::new(&mut bytes)];
        let received =
            rustix::net::recvmsg(stream, &mut buffers, &mut ancillary, RecvFlags::empty()).expect("receives");
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                got.descriptors.extend(descriptors);
            }
        }
        got.request += std::str::from_utf8(&bytes[..received.bytes]).expect("text");
        let whole = got.request.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length =
                head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            body.len() >= length.unwrap_or(0)
        });
        if whole || received.bytes == 0 {
            return got;
        }
    }
}

fn net() -> NetConfig {
    NetConfig { id: "net0".into(), mac: "52:54:00:12:34:56".into(), num_queues: 2 }
}

#[tokio::test]
async fn a_tap_is_passed_with_the_request_that_it_belongs_to() {
    let server = Server::answering(200, r#"{"id":"net0","bdf":"0000:00:05.0"}"#);
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let device = server.api().add_net(&net(), vec![writer]).await.expect("is added");
    assert_eq!(device, Some(PciDevice { id: "net0".into(), bdf: "0000:00:05.0".into() }));

    let mut got = server.got();
    let (head, body) = got.request.split_once("\r\n\r\n").expect("a request");
    assert!(head.starts_with("PUT /api/v1/vm.add-net HTTP/1.1\r\n"), "{head}");
    assert_eq!(body, r#"{"id":"net0","mac":"52:54:00:12:34:56","num_queues":2}"#);
    assert_eq!(got.descriptors.len(), 1);
    // It is that pipe, and nobody else holds its other end any more.
    let passed = got.descriptors.remove(0);
    rustix::io::write(&passed, b"through").expect("writes");
    drop(passed);
    let mut text = String::new();
    std::fs::File::from(reader).read_to_string(&mut text).expect("reads to the end");
    assert_eq!(text, "through");
}

#[tokio::test]
async fn a_device_added_before_the_boot_has_no_place_yet() {
    let server = Server::answering(204, "");
    assert_eq!(server.api().add_net(&net(), Vec::new()).await.expect("is added"), None);
    assert!(server.got().descriptors.is_empty());
}

#[tokio::test]
async fn more_descriptors_than_a_call_can_carry_are_refused() {
    let server = Server::answering(204, "");
    let taps = (0..17).map(|_| rustix::pipe::pipe().expect("a pipe").0).collect();
    let error = server.api().add_net(&net(), taps).await.expect_err("is refused");
    let text = crate::driver::with_sources(&error);
    assert!(text.contains("17 descriptors in one call; at most 16"), "{text}");
}

#[tokio::test]
async fn ping_says_who_answers() {
    let answer = r#"{"build_version":"v53.0","version":"53.0.0","pid":3012,"features":["io_uring","kvm"]}"#;
    let server = Server::answering(200, answer);
    let ping = server.api().ping().await.expect("answers");
    let features = vec!["io_uring".to_owned(), "kvm".to_owned()];
    assert_eq!(ping, Ping { version: "53.0.0".to_owned(), pid: 3012, features });
    assert!(server.got().request.starts_with("GET /api/v1/vmm.ping HTTP/1.1\r\n"));
}

#[tokio::test]
async fn counters_are_each_devices_own() {
    let answer = r#"{"_disk0":{"read_bytes":4096,"read_latency_min":18446744073709551615},"net0":{"rx_bytes":7}}"#;
    let server = Server::answering(200, answer);
    let counters = server.api().counters().await.expect("answers");
    assert_eq!(counters["_disk0"]["read_bytes"], 4096);
    assert_eq!(counters["net0"].len(), 1);
    assert!(server.got().request.starts_with("GET /api/v1/vm.counters HTTP/1.1\r\n"));
    let error = Server::answering(200, r#"{"_disk0":{"read_bytes":-1}}"#).api().counters().await;
    assert!(matches!(error, Err(ApiError::Nonsense { .. })), "{error:?}");
}

#[tokio::test]
async fn a_refusal_carries_the_hypervisors_own_words() {
    let refusal = r#"["Error from API","The VM could not boot","no disk"]"#;
    let error = Server::answering(500, refusal).api().boot().await.expect_err("refused");
    assert_eq!(
        error.to_string(),
        "vm.boot was refused with status 500 Internal Server Error: Error from API: The VM could not boot: no disk"
    );
    let plain = Server::answering(404, "what?").api().boot().await;
    assert!(plain.expect_err("refused").to_string().ends_with("404 Not Found: what?"));
    let silent = Server::answering(400, "").api().boot().await;
    assert!(silent.expect_err("refused").to_string().ends_with("400 Bad Request: it gives no reason"));
    let endless = Server::answering(400, &"é".repeat(300_000)).api().boot().await;
    let told = endless.expect_err("refused").to_string();
    assert!(told.ends_with("éé") && told.len() < 5000, "{} bytes", told.len());
}

#[tokio::test]
async fn an_answer_that_makes_no_sense_is_an_error() {
    let error = Server::answering(200, "{}").api().ping().await;
    assert!(matches!(error, Err(ApiError::Nonsense { .. })), "{error:?}");
    let error = Server::answering(204, "").api().ping().await;
    assert!(matches!(error, Err(ApiError::Nonsense { .. })), "{error:?}");
    let error = Server::answering(200, &"x".repeat(2 << 20)).api().ping().await;
    assert!(matches!(error, Err(ApiError::Nonsense { .. })), "{error:?}");
}

#[tokio::test]
async fn a_hypervisor_that_is_gone_is_an_error_at_once() {
    let error = Api::new("/no/such/socket".into()).ping().await;
    assert!(matches!(error, Err(ApiError::Unreachable { .. })), "{error:?}");

    let dir = tempfile::tempdir().expect("tempdir");
    let listener = UnixListener::bind(dir.path().join("api")).expect("binds");
    let hangs_up = std::thread::spawn(move || drop(listener.accept()));
    let error = Api::new(dir.path().join("api")).ping().await;
    assert!(matches!(error, Err(ApiError::Unreachable { .. })), "{error:?}");
    hangs_up.join().expect("hung up");
}

#[tokio::test(start_paused = true)]
async fn a_hypervisor_that_never_answers_meets_the_deadline() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _listener = UnixListener::bind(dir.path().join("api")).expect("binds");
    let error = Api::new(dir.path().join("api")).ping().await.expect_err("late");
    assert_eq!(error.to_string(), "vmm.ping was not answered within 10 s");
    let error = Api::new(dir.path().join("api")).counters().await.expect_err("late");
    assert_eq!(error.to_string(), "vm.counters was not answered within 2 s");
}
