//! The real hypervisor, but for what it says of itself: plain processes that pass for something else.

use std::sync::{Arc, Mutex};

use blixard_vmhost::hypervisor::{Contained, Hypervisor, Launch, LaunchError, Machine};

pub struct Passing {
    pub inner: Arc<dyn Hypervisor>,
    /// The test itself is what they would be given: at the other end of a TAP, for one.
    pub takes_devices: bool,
    /// The test itself makes their cgroups.
    pub containment: Contained,
    /// A list that the test changes.
    pub images: Arc<Mutex<Vec<String>>>,
}

impl Passing {
    pub fn new(inner: Arc<dyn Hypervisor>) -> Self {
        let (takes_devices, containment) = (inner.takes_devices(), inner.containment());
        let images = Arc::new(Mutex::new(inner.images()));
        Self { inner, takes_devices, containment, images }
    }
}

#[tonic::async_trait]
impl Hypervisor for Passing {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn takes_devices(&self) -> bool {
        self.takes_devices
    }

    fn containment(&self) -> Contained {
        self.containment
    }

    fn images(&self) -> Vec<String> {
        self.images.lock().expect("whole").clone()
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        self.inner.launch(launch).await
    }

    async fn adopt(&self, launch: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        self.inner.adopt(launch).await
    }

    async fn sweep(&self, launch: &Launch) -> Result<usize, LaunchError> {
        self.inner.sweep(launch).await
    }
}
