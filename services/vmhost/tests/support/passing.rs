//! The real hypervisor, but for what it says of itself: plain processes that pass for something else.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use blixard::vm::VmShape;
use blixard_vmhost::hypervisor::{Contained, Hypervisor, Launch, LaunchError, Machine, ResizeError};
use tokio::sync::watch;

pub struct Passing {
    pub inner: Arc<dyn Hypervisor>,
    /// The test itself is what they would be given: at the other end of a TAP, for one.
    pub takes_devices: bool,
    /// The test itself makes their cgroups.
    pub containment: Contained,
    /// A list that the test changes.
    pub images: Arc<Mutex<Vec<String>>>,
    /// How its machines are resized, if they can be.
    pub resizes: Option<Arc<Resizes>>,
}

/// What machines were to be given, and what comes of it.
pub struct Resizes {
    pub asked: Mutex<Vec<VmShape>>,
    /// While it is closed nothing comes of anything.
    pub open: watch::Sender<bool>,
    /// Failures to come.
    failures: Mutex<VecDeque<ResizeError>>,
}

impl Resizes {
    /// The next one fails; the machine has this then, and was told to have so many vCPUs.
    pub fn fail(&self, has: Option<VmShape>, told: Option<u32>) {
        let error = ResizeError { problem: "it fails for the test".to_owned(), has, told };
        self.failures.lock().expect("whole").push_back(error);
    }
}

impl Default for Resizes {
    fn default() -> Self {
        Self { asked: Mutex::default(), open: watch::Sender::new(true), failures: Mutex::default() }
    }
}

impl Passing {
    pub fn new(inner: Arc<dyn Hypervisor>) -> Self {
        let (takes_devices, containment) = (inner.takes_devices(), inner.containment());
        let images = Arc::new(Mutex::new(inner.images()));
        Self { inner, takes_devices, containment, images, resizes: None }
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

    fn most(&self, shape: VmShape) -> Option<VmShape> {
        self.resizes.as_ref().map(|_| VmShape { vcpus: 4 * shape.vcpus, memory_mib: 4 * shape.memory_mib })
    }

    async fn resize(&self, _: &Launch, to: VmShape, room: VmShape) -> Result<VmShape, ResizeError> {
        let resizes = self.resizes.as_ref().expect("they can be");
        assert_eq!(to.max(room), room, "there is room for it");
        resizes.asked.lock().expect("whole").push(to);
        let _ = resizes.open.subscribe().wait_for(|open| *open).await;
        match resizes.failures.lock().expect("whole").pop_front() {
            Some(error) => Err(error),
            None => Ok(to),
        }
    }
}
