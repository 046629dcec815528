//! A client for Cloud Hypervisor's API: HTTP/1.1 with JSON bodies over a Unix socket, one connection per call.
//!
//! Our own, because the one on crates.io cannot pass descriptors, has no deadlines and fails on the empty 204 that a
//! device added before the boot is answered with. It has the calls that somebody makes, no more.

use std::{
    collections::BTreeMap,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use blixard::vm::VmShape;
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use super::config::{BYTES_PER_MIB, NetConfig, ResizeConfig, RestoreConfig, SnapshotConfig, VmConfig};

/// How long a call may take that only changes what the hypervisor knows: milliseconds, and the rest for a loaded host.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// How long booting may take: it reads kernel and initramfs into the guest's memory and starts the CPUs.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// How long saving and restoring may take: all of its memory is written, or read.
const MEMORY_DEADLINE: Duration = Duration::from_secs(300);
/// How long a machine that runs may take to tell what its devices did: somebody waits, who can do without it.
const COUNTERS_DEADLINE: Duration = Duration::from_secs(2);
/// The longest answer is `vm.info`: a few KiB, more with many devices.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// How much of a refusal is told: it gets into the log, too.
const MAX_REASON_BYTES: usize = 4096;
/// How many descriptors one call may carry: one for each queue pair of a network device.
const MAX_DESCRIPTORS: usize = 16;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// The hypervisor said no.
    #[error("{call} was refused with status {status}: {reason}")]
    Refused { call: &'static str, status: StatusCode, reason: String },
    /// It did not answer in time.
    #[error("{call} was not answered within {} s", deadline.as_secs())]
    Late { call: &'static str, deadline: Duration },
    /// It could not be reached, or hung up.
    #[error("{call} could not be made: {source}")]
    Unreachable { call: &'static str, source: io::Error },
    /// Its answer makes no sense.
    #[error("the answer to {call} is not what it should be: {problem}")]
    Nonsense { call: &'static str, problem: String },
}

/// What `vmm.ping` says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Ping {
    /// "53.0.0"
    pub(super) version: String,
    pub(super) pid: u32,
    /// "kvm" is one of them where it was built for KVM.
    pub(super) features: Vec<String>,
}

/// Where a device is that was added to a running VM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct PciDevice {
    pub(super) id: String,
    /// Bus, device and function: "0000:00:05.0".
    pub(super) bdf: String,
}

/// What a device has counted: "read_bytes", "tx_frames".
pub(super) type DeviceCounters = BTreeMap<String, u64>;

/// A VM, as `vm.info` has it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Info {
    config: InfoConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct InfoConfig {
    cpus: InfoCpus,
    memory: InfoMemory,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct InfoCpus {
    boot_vcpus: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct InfoMemory {
    size: u64,
}

impl Info {
    /// What was asked for last. Its guest may still have to give back a vCPU.
    pub(super) fn shape(&self) -> VmShape {
        let memory_mib = u32::try_from(self.config.memory.size / BYTES_PER_MIB).unwrap_or(u32::MAX);
        VmShape { vcpus: self.config.cpus.boot_vcpus, memory_mib }
    }
}

/// One hypervisor's API.
#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
}

impl Api {
    /// The API behind this socket. That of a hypervisor that has met a guest is held ([`super::super::socket::SocketDir::hold`]): it may have
    /// become hostile, and lay a link in its place.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) async fn info(&self) -> Result<Info, ApiError> {
        let call = "vm.info";
        let answer = self.call(Call { method: Method::GET, name: call, ..Call::default() }).await?;
        parse(call, answer.as_deref().unwrap_or_default())
    }

    pub(super) async fn resize(&self, config: &ResizeConfig) -> Result<(), ApiError> {
        self.put("vm.resize", Some(config)).await
    }

    pub(super) async fn ping(&self) -> Result<Ping, ApiError> {
        let call = "vmm.ping";
        let answer = self.call(Call { method: Method::GET, name: call, ..Call::default() }).await?;
        parse(call, answer.as_deref().unwrap_or_default())
    }

    pub(super) async fn create(&self, config: &VmConfig) -> Result<(), ApiError> {
        self.put("vm.create", Some(config)).await
    }

    /// Adds a network device whose TAP is open already, one descriptor for each queue pair: the hypervisor needs no right
    /// of its own to open it. Before the boot there is no PCI device yet.
    pub(super) async fn add_net(&self, config: &NetConfig, taps: Vec<OwnedFd>) -> Result<Option<PciDevice>, ApiError> {
        let name = "vm.add-net";
        let body = encode(name, config)?;
        let answer = self.call(Call { name, body: Some(body), descriptors: taps, ..Call::default() }).await?;
        answer.map(|answer| parse(name, &answer)).transpose()
    }

    pub(super) async fn boot(&self) -> Result<(), ApiError> {
        let call = Call { name: "vm.boot", deadline: BOOT_DEADLINE, ..Call::default() };
        self.call(call).await.map(drop)
    }

    pub(super) async fn pause(&self) -> Result<(), ApiError> {
        self.put("vm.pause", None::<&()>).await
    }

    pub(super) async fn resume(&self) -> Result<(), ApiError> {
        self.put("vm.resume", None::<&()>).await
    }

    /// Saves a VM that is paused.
    pub(super) async fn snapshot(&self, config: &SnapshotConfig) -> Result<(), ApiError> {
        let name = "vm.snapshot";
        let body = Some(encode(name, config)?);
        self.call(Call { name, body, deadline: MEMORY_DEADLINE, ..Call::default() }).await.map(drop)
    }

    /// Restores a VM, which is paused then.
    pub(super) async fn restore(&self, config: &RestoreConfig) -> Result<(), ApiError> {
        let name = "vm.restore";
        let body = Some(encode(name, config)?);
        self.call(Call { name, body, deadline: MEMORY_DEADLINE, ..Call::default() }).await.map(drop)
    }

    /// What its devices have counted since it was started, by their ids.
    pub(super) async fn counters(&self) -> Result<BTreeMap<String, DeviceCounters>, ApiError> {
        let (name, deadline) = ("vm.counters", COUNTERS_DEADLINE);
        let answer = self.call(Call { method: Method::GET, name, deadline, ..Call::default() }).await?;
        parse(name, answer.as_deref().unwrap_or_default())
    }

    pub(super) async fn put(&self, name: &'static str, body: Option<&impl Serialize>) -> Result<(), ApiError> {
        let body = body.map(|body| encode(name, body)).transpose()?;
        self.call(Call { name, body, ..Call::default() }).await.map(drop)
    }

    /// Makes one call; the answer's body, if it has one.
    pub(super) async fn call(&self, call: Call) -> Result<Option<Bytes>, ApiError> {
        let (name, deadline) = (call.name, call.deadline);
        let exchange = tokio::time::timeout(deadline, self.exchange(call)).await;
        let (status, body) = exchange.map_err(|_| ApiError::Late { call: name, deadline })??;
        if status.is_success() {
            return Ok(Some(body).filter(|body| !body.is_empty()));
        }
        Err(ApiError::Refused { call: name, status, reason: reason(&body) })
    }

    async fn exchange(&self, call: Call) -> Result<(StatusCode, Bytes), ApiError> {
        let name = call.name;
        let lost = |source| ApiError::Unreachable { call: name, source };
        let hung_up = |error: hyper::Error| lost(io::Error::other(error));
        let stream = UnixStream::connect(&self.socket).await.map_err(lost)?;
        let carrier = TokioIo::new(Carrier { stream, descriptors: call.descriptors });
        let (mut sender, connection) = hyper::client::conn::http1::handshake(carrier).await.map_err(hung_up)?;
        let request = Request::builder()
            .method(call.method)
            .uri(format!("/api/v1/{name}"))
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(call.body.unwrap_or_default()))
            .map_err(|error| ApiError::Nonsense { call: name, problem: error.to_string() })?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(hung_up)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| ApiError::Nonsense { call: name, problem: error.to_string() })?;
            Ok((status, body.to_bytes()))
        };
        // The connection ends when `sender` is dropped. Whatever becomes of it after that is of no interest.
        tokio::join!(exchange, connection).0
    }
}

/// A call to be made.
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) name: &'static str,
    pub(super) body: Option<Bytes>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) deadline: Duration,
}

impl Default for Call {
    fn default() -> Self {
        Self { method: Method::PUT, name: "", body: None, descriptors: Vec::new(), deadline: CALL_DEADLINE }
    }
}

fn encode(call: &'static str, body: &impl Serialize) -> Result<Bytes, ApiError> {
    let body = serde_json::to_vec(body).map_err(|error| ApiError::Nonsense { call, problem: error.to_string() })?;
    Ok(body.into())
}

pub(super) fn parse<T: DeserializeOwned>(call: &'static str, answer: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(answer).map_err(|error| ApiError::Nonsense { call, problem: error.to_string() })
}

/// What a refusal says: a list of messages, each the cause of the one before.
fn reason(body: &[u8]) -> String {
    let mut reason = match serde_json::from_slice::<Vec<String>>(body) {
        Ok(messages) => messages.join(": "),
        Err(_) if body.is_empty() => "it gives no reason".to_owned(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
    reason
}

/// A stream whose first bytes carry descriptors: the hypervisor takes them for the request that it reads then.
struct Carrier {
    stream: UnixStream,
    descriptors: Vec<OwnedFd>,
}

impl Carrier {
    fn send_with_descriptors(&self, bytes: &[u8]) -> io::Result<usize> {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if descriptors.len() > MAX_DESCRIPTORS || !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            let problem = format!("{} descriptors in one call; at most {MAX_DESCRIPTORS}", descriptors.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        let sent = rustix::net::sendmsg(&self.stream, &[io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
        Ok(sent?)
    }
}

impl AsyncRead for Carrier {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.descriptors.is_empty() {
            return Pin::new(&mut self.stream).poll_write(cx, bytes);
        }
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_io(Interest::WRITABLE, || self.send_with_descriptors(bytes)) {
                Ok(sent) => {
                    self.descriptors.clear();
                    return Poll::Ready(Ok(sent));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
