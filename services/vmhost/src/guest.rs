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
/// What makes a guest one of its own, beside its network.
const STEPS: [&str; 5] = ["entropy", "boot-id", "clock", "hostname", "machine-id"];
/// What is asked for when it has volumes.
const VOLUMES: &str = "volumes";
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

    /// Gives the guest its identity, if it has none yet, and has each step of it confirmed.
    async fn configure(
        self,
        vm_id: VmId,
        network: Option<&pb::GuestNetwork>,
        mounts: &[pb::Mount],
        restored: bool,
    ) -> Result<Self, Error> {
        if self.hello.configured {
            return if self.hello.vm_id == vm_id.to_string() {
                Ok(self)
            } else {
                Err(refused(vm_id, &format!("the guest says that it is VM {}", self.hello.vm_id)))
            };
        }
        if restored && !self.hello.boot_id.is_empty() {
            return Err(refused(vm_id, "the guest was saved with an identity, which it shares with others"));
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
            mounts: mounts.to_vec(),
        };
        let answer = self.client.clone().configure(client::request(request, CALL_TIMEOUT)).await?.into_inner();
        let asked = [network.map(|_| "network"), (!mounts.is_empty()).then_some(VOLUMES)];
        confirmed(&answer, asked.into_iter().flatten(), restored).map_err(|problem| refused(vm_id, &problem))?;
        tracing::debug!(%vm_id, skipped = ?answer.skipped, kernel = self.hello.kernel_release, "guest configured");
        let hello = pb::HelloResponse {
            configured: true,
            vm_id: vm_id.to_string(),
            boot_id: answer.boot_id,
            ..(*self.hello).clone()
        };
        Ok(Self { hello: Arc::new(hello), ..self })
    }
}

/// Whether every step of an identity was done. A guest that was booted may have skipped one, if it says so: it is not another's. One that was
/// restored shares with all the others what is not its own since. Volumes may be missing in none: a job must not find a directory in
/// their place.
fn confirmed<'a>(
    answer: &pb::ConfigureResponse,
    asked: impl Iterator<Item = &'a str>,
    restored: bool,
) -> Result<(), String> {
    if answer.boot_id.is_empty() {
        return Err("the guest has no boot id after Configure; make its image anew (make guest-image)".to_owned());
    }
    let done = |step: &str| answer.done.iter().any(|done| done == step);
    let skipped = |step: &str| answer.skipped.iter().any(|skipped| skipped.split(':').next() == Some(step));
    let steps = STEPS.into_iter().chain(asked);
    let missing: Vec<&str> =
        steps.filter(|step| !done(step) && (restored || *step == VOLUMES || !skipped(step))).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("the guest has not confirmed: {}", missing.join(", "))) }
}

fn refused(vm_id: VmId, problem: &str) -> Error {
    Error::new(Reason::GuestRefused, problem).with("vm_id", vm_id)
}

/// The way to one VM's agent, shared by those who talk to it.
pub(crate) struct AgentLink {
    vm_id: VmId,
    machine: Arc<dyn Machine>,
    network: Option<pb::GuestNetwork>,
    mounts: Vec<pb::Mount>,
    /// Whether the guest's memory was others', too.
    restored: bool,
    current: Mutex<Option<Agent>>,
}

impl AgentLink {
    /// A way to the agent of `machine`; nothing is connected yet. `restored`: from the memory of a template.
    pub(crate) fn new(
        vm_id: VmId,
        machine: Arc<dyn Machine>,
        network: Option<pb::GuestNetwork>,
        mounts: Vec<pb::Mount>,
        restored: bool,
    ) -> Self {
        Self { vm_id, machine, network, mounts, restored, current: Mutex::default() }
    }

    /// Waits until the agent answers, and gives it its identity. Tries for ever: the caller has the deadline. An error is final.
    pub(crate) async fn introduce(&self) -> Result<Agent, Error> {
        loop {
            let agent = match self.agent().await {
                Ok(agent) => agent.configure(self.vm_id, self.network.as_ref(), &self.mounts, self.restored).await,
                Err(error) => Err(error),
            };
            match agent {
                Ok(agent) => {
                    *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent.clone());
                    return Ok(agent);
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(done: &[&str], skipped: &[&str]) -> pb::ConfigureResponse {
        let done = done.iter().map(ToString::to_string).collect();
        let skipped = skipped.iter().map(|step| format!("{step}: it may not")).collect();
        pb::ConfigureResponse { done, skipped, boot_id: "1".to_owned() }
    }

    #[test]
    fn a_restored_guest_must_have_done_every_step_and_a_booted_one_may_say_that_it_has_not() {
        let all = [&STEPS[..], &["network", VOLUMES]].concat();
        let both = ["network", VOLUMES];
        let confirmed = |answer: &pb::ConfigureResponse, asked: &[&'static str], restored| {
            confirmed(answer, asked.iter().copied(), restored)
        };
        assert_eq!(confirmed(&answer(&all, &[]), &both, true), Ok(()));
        assert_eq!(confirmed(&answer(&STEPS, &[]), &[], true), Ok(()));
        for at in 0..all.len() {
            let (mut done, missing) = (all.clone(), all[at]);
            done.remove(at);
            let problem = Err(format!("the guest has not confirmed: {missing}"));
            assert_eq!(confirmed(&answer(&done, &[]), &both, true), problem);
            assert_eq!(confirmed(&answer(&done, &[]), &both, false), problem);
            assert_eq!(confirmed(&answer(&done, &[missing]), &both, true), problem);
            let may_be_skipped = if missing == VOLUMES { problem } else { Ok(()) };
            assert_eq!(confirmed(&answer(&done, &[missing]), &both, false), may_be_skipped);
        }
        let unnamed = pb::ConfigureResponse { boot_id: String::new(), ..answer(&all, &[]) };
        assert!(confirmed(&unnamed, &both, true).is_err() && confirmed(&unnamed, &both, false).is_err());
    }
}
