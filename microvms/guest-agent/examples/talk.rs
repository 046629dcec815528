//! Talks to one guest agent by hand: Hello, Configure, Run, and Shutdown if asked to. Says how long each took.
//!
//! ```text
//! talk unix:/path/agent.sock -- uname -r          # the process driver's agent
//! talk vsock:/path/vsock.sock -- uname -r         # a guest's, through a hypervisor's hybrid vsock socket, port 1024
//! talk --boot vsock:/path/vsock.sock -- true      # waits for it to boot before, and ends it after
//! ```
//! The job's exit code is its own.

use std::{
    env,
    error::Error,
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use blixard::{
    id::{JobId, VmId},
    limits,
    pb::{
        common::v1::{JobSpec, LogStream},
        guest::v1::{self as pb, guest_service_client::GuestServiceClient, run_request, run_response::Message},
    },
    time::Timestamp,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Uri};

const BOOT_PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut args: Vec<String> = env::args().skip(1).collect();
    let boot = args.first().is_some_and(|arg| arg == "--boot");
    args.drain(..usize::from(boot));
    let Some(((address, dashes), command)) = args.split_first().and_then(|(address, rest)| {
        let (dashes, command) = rest.split_first()?;
        Some(((address.clone(), dashes.clone()), command.to_vec()))
    }) else {
        return Err("usage: talk [--boot] unix:PATH|vsock:PATH -- COMMAND…".into());
    };
    if dashes != "--" || command.is_empty() {
        return Err("a command must follow --".into());
    }

    let begun = Instant::now();
    if boot {
        wait_for_knock(&address).await?;
    }
    let mut client = hello(&address, begun).await?;
    let configure = pb::ConfigureRequest {
        vm_id: VmId::random().to_string(),
        hostname: "guest".into(),
        time: Some(Timestamp::now().into()),
        entropy: [*VmId::random().0.as_bytes(), *VmId::random().0.as_bytes()].concat().into(),
        network: None,
        mounts: vec![],
    };
    let skipped = client.configure(configure).await?.into_inner().skipped;
    eprintln!("[{:?}] configured, skipped {skipped:?}", begun.elapsed());
    let code = run(&mut client, command).await?;
    if boot {
        client.shutdown(pb::ShutdownRequest { grace_ms: 1000 }).await?;
        eprintln!("[{:?}] shutdown accepted", begun.elapsed());
    }
    Ok(code)
}

/// The agent connects to the host's port 1024 once it serves. Polling instead would break vhost-device-vsock.
async fn wait_for_knock(address: &str) -> Result<(), Box<dyn Error>> {
    let path = address.strip_prefix("vsock:").ok_or("--boot goes with vsock:PATH")?;
    let listener = UnixListener::bind(format!("{path}_1024"))?;
    tokio::time::timeout(BOOT_PATIENCE, listener.accept()).await??;
    Ok(())
}

async fn hello(address: &str, begun: Instant) -> Result<GuestServiceClient<Channel>, Box<dyn Error>> {
    let (kind, path) = address.split_once(':').ok_or("an address is unix:PATH or vsock:PATH")?;
    let (hybrid, path) = (kind == "vsock", path.to_owned());
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { connect(&path, hybrid).await.map(TokioIo::new) }
    });
    let channel = Channel::from_static("http://guest")
        .initial_stream_window_size(4 * 1024 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .connect_with_connector_lazy(connector);
    let mut client = GuestServiceClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
    let hello = client.hello(pb::HelloRequest {}).await?.into_inner();
    eprintln!("[{:?}] {hello:?}", begun.elapsed());
    Ok(client)
}

async fn connect(path: &str, hybrid: bool) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    if hybrid {
        stream.write_all(b"CONNECT 1024\n").await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") {
            answer.push(stream.read_u8().await?);
        }
        if !answer.starts_with(b"OK ") {
            return Err(io::Error::other(format!("refused: {}", String::from_utf8_lossy(&answer))));
        }
    }
    Ok(stream)
}

async fn run(client: &mut GuestServiceClient<Channel>, command: Vec<String>) -> Result<ExitCode, Box<dyn Error>> {
    let begun = Instant::now();
    let spec = JobSpec { command, vcpus: Some(1), memory_mib: Some(128), ..JobSpec::default() };
    let start =
        pb::RunStart { job_id: JobId::random().to_string(), attempt: 1, spec: Some(spec), ..pb::RunStart::default() };
    let (requests, receiver) = mpsc::unbounded_channel();
    requests.send(pb::RunRequest { message: Some(run_request::Message::Start(start)) })?;
    let mut responses = client.run(UnboundedReceiverStream::new(receiver)).await?.into_inner();
    let mut bytes = 0;
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(Message::Started(_)) => eprintln!("[{:?}] started", begun.elapsed()),
            Some(Message::Output(chunk)) => {
                if bytes == 0 {
                    eprintln!("[{:?}] first output", begun.elapsed());
                }
                match chunk.stream() {
                    LogStream::Stderr => io::stderr().write_all(&chunk.data)?,
                    LogStream::Stdout | LogStream::Unspecified => io::stdout().write_all(&chunk.data)?,
                }
                bytes += chunk.data.len();
                let offset = chunk.offset + chunk.data.len() as u64;
                let ack = run_request::Message::Ack(pb::RunAck { offset });
                requests.send(pb::RunRequest { message: Some(ack) })?;
            }
            Some(Message::Exited(exited)) => {
                let seconds = begun.elapsed().as_secs_f64();
                let rate = bytes as f64 / seconds / (1024.0 * 1024.0);
                eprintln!("[{:?}] {exited:?}: {bytes} bytes, {rate:.1} MiB/s", begun.elapsed());
                let code = exited.exit.and_then(|exit| exit.exit_code).and_then(|code| u8::try_from(code).ok());
                return Ok(ExitCode::from(code.unwrap_or(255)));
            }
            None => return Err("an empty message".into()),
        }
    }
    Err("the stream ended before the command did".into())
}
