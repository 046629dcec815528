//! The guest agent: runs jobs for a host and keeps their output until the host has it.
//!
//! ```text
//!                 ┌ listener ┐   ┌ service ┐   ┌──── guest ────┐   ┌────── attempt ──────┐
//!   host ─gRPC──► │ vsock or │──►│ parse,  │──►│ identity,     │──►│ command ─► process  │
//!                 │ unix     │   │ encode  │   │ admission     │   │ pipes ─► output     │
//!                 └──────────┘   └─────────┘   │ (one attempt) │   │   (without secrets) │
//!                                              │               │   └─────────────────────┘
//!                                              └─ processes: reap, signal, end ─┘
//! ```
//! It is PID 1 of the default image (then it mounts, inserts modules and powers off, see `boot`) or, beside the process
//! driver, a plain process on a Unix socket. It knows the contract (`blixard.guest.v1`) and its socket, nothing of the
//! control plane.
//!
//! One thread, no timer on the path of a job, and nothing that wakes up while there is nothing to do.

mod admission;
mod attempt;
mod boot;
mod command;
mod file;
mod guest;
mod hotplug;
mod identity;
mod image;
mod input;
mod lease;
mod listener;
mod network;
mod output;
mod processes;
mod redact;
mod service;
mod volumes;

use std::{ffi::OsString, io, process::ExitCode, sync::Arc, time::Duration};

use blixard::{limits, pb::guest::v1::guest_service_server::GuestServiceServer};
use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    signal::unix::{SignalKind, signal},
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use tonic::transport::{Server, server::Connected};

use crate::{
    guest::Guest,
    identity::Identity,
    image::ImageDefaults,
    listener::{Address, Listener, VSOCK_PORT, connections},
    processes::{Processes, Reach},
    service::Service,
};

const USAGE: &str = "\
Runs jobs for a vmhost and keeps their output until it has it.

usage: blixard-guest-agent --listen vsock:PORT | unix:PATH
       As PID 1 without options: prepares the guest, serves vsock:1024 and powers off at the end.";

/// Between SIGTERM and SIGKILL of the job's processes when the agent itself is told to end by a signal.
const SIGNALLED_GRACE: Duration = Duration::from_secs(2);
/// What the console says once all is ready but there is no vsock device. Part of the contract.
const WAITS_FOR_DEVICE: &str = "blixard-guest-agent: serves, and waits for a vsock device";
/// Between two looks for one: a small part of what restoring a guest takes.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// How long the last answers may take to be sent.
const FLUSH_GRACE: Duration = Duration::from_secs(1);
/// A stream may have this much under way to the host and back, so that output does not wait for round trips.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// The whole program. `args` are its arguments without the program's name. Must not be called within a Tokio runtime; it
/// reaps every child of the calling process, so nothing else may run in it.
pub fn main_with_args(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.collect();
    // The kernel passes PID 1 what it does not understand of its own command line.
    let options = args.iter().any(|arg| arg.as_encoded_bytes().starts_with(b"--"));
    if rustix::process::getpid() == rustix::process::Pid::INIT && !options {
        return be_init();
    }
    let address = match parse(&args) {
        Ok(Some(address)) => address,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blixard-guest-agent: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match be_process(&address) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blixard-guest-agent: cannot serve on {address}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Where to listen; `None` when the question is answered already.
fn parse(args: &[OsString]) -> Result<Option<Address>, String> {
    match args {
        [flag, value] if flag == "--listen" => Address::parse(value).map(Some),
        [flag] if flag == "--help" || flag == "-h" => {
            println!("{USAGE}");
            Ok(None)
        }
        [flag] if flag == "--version" || flag == "-V" => {
            println!("blixard-guest-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(None)
        }
        [] => Err("--listen is required".to_owned()),
        args => Err(format!("cannot make sense of {args:?}")),
    }
}

/// PID 1 must not return: the kernel panics when it does.
fn be_init() -> ExitCode {
    let later = match boot::prepare() {
        Ok(later) => later,
        Err(error) => {
            eprintln!("blixard-guest-agent: cannot have the root disk: {error}");
            boot::power_off();
            return ExitCode::FAILURE;
        }
    };
    let finish = move || boot::finish(&later);
    if let Err(error) = serve(&Address::Vsock(VSOCK_PORT), Reach::WholeGuest, finish) {
        eprintln!("blixard-guest-agent: cannot serve: {error}");
    }
    boot::power_off();
    ExitCode::FAILURE
}

/// The process driver's guest: a session of its own, so that Ctrl-C at the control plane's terminal does not reach it,
/// and the reaper of whatever its jobs leave behind.
fn be_process(address: &Address) -> io::Result<()> {
    // Refused to the leader of a process group, which an interactive shell makes of it: then it stays in that session.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    serve(address, Reach::Descendants, || ())
}

/// Serves until the guest has ended. `when_serving` is run once the host can connect.
fn serve(address: &Address, reach: Reach, when_serving: impl FnOnce()) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let processes = Arc::new(Processes::new(reach));
        // Beside the process driver the root is the host's.
        let image = if reach == Reach::WholeGuest { ImageDefaults::read() } else { ImageDefaults::default() };
        let guest = Guest::new(Identity::read(reach == Reach::WholeGuest), image, processes);
        watch_signals(&guest)?;
        let listener = Listener::bind(address)?;
        eprintln!("blixard-guest-agent {} serves on {address}", env!("CARGO_PKG_VERSION"));
        when_serving();
        match &listener {
            Listener::Vsock(vsock) => {
                guest.spawn(knock(reach == Reach::WholeGuest));
                guest.spawn(hotplug::use_what_comes());
                let accept = || async { vsock.accept().await.map(|(stream, _)| stream) };
                answer(&guest, connections(accept)).await
            }
            Listener::Unix { listener, .. } => {
                let accept = || async { listener.accept().await.map(|(stream, _)| stream) };
                answer(&guest, connections(accept)).await
            }
        }
    })
}

async fn answer<C>(guest: &Arc<Guest>, connections: impl Stream<Item = io::Result<C>>) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let service = GuestServiceServer::new(Service(guest.clone()))
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let server = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_concurrent_streams(limits::MAX_STREAMS_PER_CONNECTION)
        .add_service(service)
        .serve_with_incoming_shutdown(connections, guest.ended());
    let too_late = async {
        guest.ended().await;
        tokio::time::sleep(FLUSH_GRACE).await;
    };
    tokio::select! {
        result = server => result.map_err(io::Error::other),
        () = too_late => Ok(()),
    }
}

/// Tells the host that the guest serves, by a connection to the host's port of the same number that is closed at once.
/// Hypervisors turn it into one to the Unix socket `<vsock socket>_1024`. A host that waits for it need not poll, and
/// must not: vhost-device-vsock 0.3.0 breaks when it is connected to while the guest's driver starts.
///
/// A guest whose host means to save it has no vsock device, and gets one when it has been restored. `may_be_saved`: nothing is in the guest
/// that its clones must not share.
async fn knock(may_be_saved: bool) {
    let mut told = !may_be_saved;
    loop {
        let knock = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, VSOCK_PORT)).await;
        // A host that does not listen is no fault.
        if knock.err().and_then(|error| error.raw_os_error()) != Some(libc::ENODEV) {
            return;
        }
        if !told {
            eprintln!("{WAITS_FOR_DEVICE}");
            told = true;
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        boot::look_for_devices();
    }
}

/// SIGCHLD reaps; SIGTERM and SIGINT end the guest.
fn watch_signals(guest: &Arc<Guest>) -> io::Result<()> {
    let mut child = signal(SignalKind::child())?;
    let reaping = guest.clone();
    guest.spawn(async move {
        while child.recv().await.is_some() {
            reaping.processes().reap();
        }
    });
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut told = signal(kind)?;
        let ending = guest.clone();
        guest.spawn(async move {
            while told.recv().await.is_some() {
                ending.shut_down(SIGNALLED_GRACE);
            }
        });
    }
    Ok(())
}
