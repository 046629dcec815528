//! A hypervisor whose connections to the guest can be cut: the real one behind a relay.

use std::{io, sync::Arc};

use blixard::pb::common::v1::VmUsage;
use blixard_chassis::Tasks;
use blixard_vmhost::hypervisor::{Console, Hypervisor, Launch, LaunchError, Machine, MachineExit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::UnixStream,
};

pub struct Faulty {
    pub inner: Arc<dyn Hypervisor>,
    pub tasks: Tasks,
    /// Each connection is cut after the guest has sent so many bytes.
    pub cut_after: u64,
}

#[tonic::async_trait]
impl Hypervisor for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn images(&self) -> Vec<String> {
        self.inner.images()
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        self.inner.launch(launch).await.map(|machine| self.wrap(machine))
    }

    async fn adopt(&self, launch: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        Ok(self.inner.adopt(launch).await?.map(|machine| self.wrap(machine)))
    }

    async fn sweep(&self, launch: &Launch) -> Result<usize, LaunchError> {
        self.inner.sweep(launch).await
    }
}

impl Faulty {
    fn wrap(&self, inner: Arc<dyn Machine>) -> Arc<dyn Machine> {
        Arc::new(FaultyMachine { inner, tasks: self.tasks.clone(), cut_after: self.cut_after })
    }
}

struct FaultyMachine {
    inner: Arc<dyn Machine>,
    tasks: Tasks,
    cut_after: u64,
}

#[tonic::async_trait]
impl Machine for FaultyMachine {
    fn pids(&self) -> Vec<u32> {
        self.inner.pids()
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let (mut from_guest, mut to_guest) = self.inner.connect().await?.into_split();
        let (ours, theirs) = UnixStream::pair()?;
        let (mut from_host, mut to_host) = theirs.into_split();
        let cut_after = self.cut_after;
        self.tasks.spawn("relay", async move {
            let down = async { drop(copy(&mut (&mut from_guest).take(cut_after), &mut to_host).await) };
            let up = async {
                let _ = copy(&mut from_host, &mut to_guest).await;
                let _ = to_guest.shutdown().await;
            };
            // Whichever ends takes the other with it: the connection is gone.
            tokio::select! { () = down => {}, () = up => {} }
        });
        Ok(ours)
    }

    async fn wait(&self) -> MachineExit {
        self.inner.wait().await
    }

    async fn kill(&self) {
        self.inner.kill().await;
    }

    fn console(&self) -> Console {
        self.inner.console()
    }

    async fn usage(&self) -> VmUsage {
        self.inner.usage().await
    }
}
