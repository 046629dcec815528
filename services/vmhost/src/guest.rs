//! The conversation with the agent in the guest: one connection, made anew when it breaks.
//!
//! Nothing here decides what a broken connection means for the VM or its job.

use std::{
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use blixard::{
    error::{Error, Reason},
    id::{JobId, VmId},
    limits::MAX_MESSAGE_BYTES,
    pb::guest::v1 as pb,
    time::{Timestamp, millis},
};
use blixard_chassis::client;
use hyper_util::rt::TokioIo;
use pb::guest_service_client::GuestServiceClient;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::hypervisor::Machine;

/// How long the agent has to answer a short call. A guest under emulation on a busy host needs a second or two.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries to reach an agent that refuses: [`Machine::connect`] itself waits for one that is not up yet.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(50);
/// How much randomness a guest is given.
const ENTROPY_BYTES: usize = 64;

/// One connection to an agent, on which it has said Hello.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    /// For calls.
    pub(crate) client: GuestServiceClient<Channel>,
    /// What it said.
    pub(crate) hello: Arc<pb::HelloResponse>,
}

impl Agent {
    /// Connects and says Hello.
    pub(crate) async fn connect(machine: &dyn Machine) -> Result<Self, Error> {
        let unreachable = |problem: String| {
            Error::new(Reason::PeerUnavailable, format!("the guest agent can't be reached: {problem}"))
                .with("peer", "guest agent")
        };
        let stream = machine.connect().await.map_err(|error| unreachable(error.to_string()))?;
        // One stream, one channel: a broken one must not be made anew silently, because whoever answers on the next one has
        // to say Hello first.
        let mut stream = Some(TokioIo::new(stream));
        let connector = service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe));
            std::future::ready(stream)
        });
        let endpoint = client::tune(Endpoint::from_static("http://guest"));
        let channel =
            endpoint.connect_with_connector(connector).await.map_err(|error| unreachable(error.to_string()))?;
        let mut client = GuestServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let hello = client.hello(client::request(pb::HelloRequest {}, CALL_TIMEOUT)).await?.into_inner();
        Ok(Self { client, hello: Arc::new(hello) })
    }

    /// Gives the guest its identity, if it has none yet.
    async fn configure(&self, vm_id: VmId, network: Option<&pb::GuestNetwork>) -> Result<(), Error> {
        if self.hello.configured {
            return if self.hello.vm_id == vm_id.to_string() {
                Ok(())
            } else {
                Err(refused(vm_id, &format!("the guest says that it is VM {}", self.hello.vm_id)))
            };
        }
        let mut entropy = vec![0; ENTROPY_BYTES];
        let random = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut entropy));
        random.map_err(|error| refused(vm_id, &format!("no entropy to give to the guest: {error}")))?;
        let request = pb::ConfigureRequest {
            vm_id: vm_id.to_string(),
            hostname: format!("vm-{}", &vm_id.to_string()[..8]),
            time: Some(Timestamp::now().into()),
            entropy: entropy.into(),
            network: network.cloned(),
        };
        let answer = self.client.clone().configure(client::request(request, CALL_TIMEOUT)).await?.into_inner();
        tracing::debug!(%vm_id, skipped = ?answer.skipped, kernel = self.hello.kernel_release, "guest configured");
        Ok(())
    }
}

fn refused(vm_id: VmId, problem: &str) -> Error {
    Error::new(Reason::GuestRefused, problem).with("vm_id", vm_id)
}

/// The way to one VM's agent, shared by those who talk to it.
pub(crate) struct AgentLink {
    vm_id: VmId,
    machine: Arc<dyn Machine>,
    network: Option<pb::GuestNetwork>,
    current: Mutex<Option<Agent>>,
}

impl AgentLink {
    /// A way to the agent of `machine`; nothing is connected yet.
    pub(crate) fn new(vm_id: VmId, machine: Arc<dyn Machine>, network: Option<pb::GuestNetwork>) -> Self {
        Self { vm_id, machine, network, current: Mutex::default() }
    }

    /// Waits until the agent answers, and gives it its identity. Tries for ever: the caller has the deadline. An error is final.
    pub(crate) async fn introduce(&self) -> Result<Agent, Error> {
        loop {
            let agent = match self.agent().await {
                Ok(agent) => agent.configure(self.vm_id, self.network.as_ref()).await.map(|()| agent),
                Err(error) => Err(error),
            };
            match agent {
                Ok(agent) => return Ok(agent),
                Err(error) if matches!(error.reason, Reason::GuestRefused | Reason::InvalidField) => return Err(error),
                Err(error) => tracing::debug!(vm_id = %self.vm_id, %error, "the guest agent does not answer yet"),
            }
            self.forget();
            tokio::time::sleep(TRY_AGAIN_AFTER).await;
        }
    }

    /// The connection, made if there is none.
    pub(crate) async fn agent(&self) -> Result<Agent, Error> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(agent) = current {
            return Ok(agent);
        }
        let agent = Agent::connect(&*self.machine).await?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent.clone());
        Ok(agent)
    }

    /// Gives up the connection: the next user makes a new one.
    pub(crate) fn forget(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Sends a signal to every process of an attempt.
    pub(crate) async fn signal(&self, job: JobId, attempt: u32, signal: i32) -> Result<(), Error> {
        let request = pb::SignalRequest { job_id: job.to_string(), attempt, signal };
        self.call(|mut client| {
            let request = client::request(request.clone(), CALL_TIMEOUT);
            async move { client.signal(request).await.map(drop) }
        })
        .await
    }

    /// Asks it how it is.
    pub(crate) async fn hello(&self) -> Result<pb::HelloResponse, Error> {
        self.call(|mut client| {
            let request = client::request(pb::HelloRequest {}, CALL_TIMEOUT);
            async move { client.hello(request).await.map(tonic::Response::into_inner) }
        })
        .await
    }

    /// Tells the guest to end.
    pub(crate) async fn shut_down(&self, grace: Duration) -> Result<(), Error> {
        let grace_ms = millis(grace).min(60_000);
        self.call(|mut client| {
            let request = client::request(pb::ShutdownRequest { grace_ms }, CALL_TIMEOUT);
            async move { client.shutdown(request).await.map(drop) }
        })
        .await
    }

    /// One call, once more on a fresh connection when the old one was broken.
    async fn call<T, F>(&self, call: impl Fn(GuestServiceClient<Channel>) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, tonic::Status>>,
    {
        let status = match call(self.agent().await?.client).await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        tracing::debug!(vm_id = %self.vm_id, %status, "a call to the guest agent failed; trying on a new connection");
        self.forget();
        call(self.agent().await?.client).await.map_err(Error::from)
    }
}
