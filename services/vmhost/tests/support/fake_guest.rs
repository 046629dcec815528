//! A hypervisor whose machines are nothing but an agent within this process, which does as the test tells it.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use blixard::{
    id::VmId,
    pb::{common::v1::VmUsage, guest::v1 as pb},
};
use blixard_chassis::Tasks;
use blixard_vmhost::hypervisor::{Console, Hypervisor, Launch, LaunchError, Machine, MachineExit, ProcessExit};
use futures::{StreamExt, stream, stream::BoxStream};
use pb::{
    guest_service_server::{GuestService, GuestServiceServer},
    run_response::Message,
};
use tokio::{net::UnixStream, sync::watch};
use tonic::{Request, Response, Status, Streaming};

/// What the one machine's agent does, and what it was asked.
#[derive(Clone, Default)]
pub struct FakeGuest {
    pub tasks: Tasks,
    pub told: Arc<Told>,
}

pub struct Told {
    pub silent: AtomicBool,
    pub hellos: AtomicU64,
    pub memory_available_kib: AtomicU64,
    /// Whether commands end.
    pub end: watch::Sender<bool>,
    killed: watch::Sender<bool>,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            silent: AtomicBool::new(false),
            hellos: AtomicU64::new(0),
            memory_available_kib: AtomicU64::new(60_000),
            end: watch::Sender::new(false),
            killed: watch::Sender::new(false),
        }
    }
}

impl FakeGuest {
    pub fn hellos(&self) -> u64 {
        self.told.hellos.load(Ordering::SeqCst)
    }
}

#[tonic::async_trait]
impl Hypervisor for FakeGuest {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn images(&self) -> Vec<String> {
        vec!["default".to_owned()]
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        Ok(Arc::new(FakeMachine { vm_id: launch.vm_id, guest: self.clone() }))
    }

    async fn adopt(&self, _: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        Ok(None)
    }

    async fn sweep(&self, _: &Launch) -> Result<usize, LaunchError> {
        Ok(0)
    }
}

#[derive(Clone)]
struct FakeMachine {
    vm_id: VmId,
    guest: FakeGuest,
}

#[tonic::async_trait]
impl Machine for FakeMachine {
    fn pids(&self) -> Vec<u32> {
        vec![]
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let incoming = stream::iter([Ok::<_, io::Error>(theirs)]).chain(stream::pending());
        let server = tonic::transport::Server::builder()
            .add_service(GuestServiceServer::new(self.clone()))
            .serve_with_incoming_shutdown(incoming, self.guest.tasks.token().clone().cancelled_owned());
        self.guest.tasks.spawn("fake-guest", async move { drop(server.await) });
        Ok(ours)
    }

    async fn wait(&self) -> MachineExit {
        let _ = self.guest.told.killed.subscribe().wait_for(|&killed| killed).await;
        MachineExit { process: "fake guest", status: ProcessExit::Exited(0), why: None }
    }

    async fn kill(&self) {
        self.guest.told.killed.send_replace(true);
    }

    fn console(&self) -> Console {
        Console::default()
    }

    async fn usage(&self) -> VmUsage {
        VmUsage::default()
    }
}

#[tonic::async_trait]
impl GuestService for FakeMachine {
    async fn hello(&self, _: Request<pb::HelloRequest>) -> Result<Response<pb::HelloResponse>, Status> {
        let told = &self.guest.told;
        told.hellos.fetch_add(1, Ordering::SeqCst);
        if told.silent.load(Ordering::SeqCst) {
            return Err(Status::unavailable("silent for the test"));
        }
        Ok(Response::new(pb::HelloResponse {
            boot_id: "boot-1".to_owned(),
            configured: true,
            vm_id: self.vm_id.to_string(),
            memory_total_kib: 100_000,
            memory_available_kib: told.memory_available_kib.load(Ordering::SeqCst),
            ..Default::default()
        }))
    }

    async fn configure(&self, _: Request<pb::ConfigureRequest>) -> Result<Response<pb::ConfigureResponse>, Status> {
        Ok(Response::new(pb::ConfigureResponse::default()))
    }

    type RunStream = BoxStream<'static, Result<pb::RunResponse, Status>>;
    async fn run(&self, _: Request<Streaming<pb::RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let mut end = self.guest.told.end.subscribe();
        let exited = async move {
            let _ = end.wait_for(|&end| end).await;
            let exit = blixard::pb::common::v1::ExitStatus { exit_code: Some(0), ..Default::default() };
            Message::Exited(pb::RunExited { exit: Some(exit), ..Default::default() })
        };
        let started = stream::iter([Message::Started(pb::RunStarted::default())]);
        let messages = started.chain(stream::once(exited));
        Ok(Response::new(messages.map(|message| Ok(pb::RunResponse { message: Some(message) })).boxed()))
    }

    type GetFileStream = BoxStream<'static, Result<pb::GetFileResponse, Status>>;
    async fn get_file(&self, _: Request<pb::GetFileRequest>) -> Result<Response<Self::GetFileStream>, Status> {
        Err(Status::unimplemented("no test of this guest keeps files"))
    }

    async fn signal(&self, _: Request<pb::SignalRequest>) -> Result<Response<pb::SignalResponse>, Status> {
        Ok(Response::new(pb::SignalResponse {}))
    }

    async fn shutdown(&self, _: Request<pb::ShutdownRequest>) -> Result<Response<pb::ShutdownResponse>, Status> {
        self.guest.told.killed.send_replace(true);
        Ok(Response::new(pb::ShutdownResponse {}))
    }
}
