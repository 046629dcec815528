//! What the drivers whose machines boot an image have in common.
//!
//! ```text
//!   Vmm<Boot> ── find the image ── Boot::start, or what saves and restores ─► machine
//! ```
//! A hypervisor is a [`Boot`]: how one machine is started. Its [`Templates`] are for each to know.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use blixard::vm::VmShape;
use blixard_chassis::Tasks;

use super::{
    Contained, Hypervisor, Launch, LaunchError, Machine, ResizeError, Templates,
    image::{self, Image},
    machine::{self, Kind, Starting},
};

/// A hypervisor's programs, and how they are started.
#[tonic::async_trait]
pub(super) trait Boot: Clone + Send + Sync + 'static {
    /// What its machines are.
    const KIND: Kind;

    /// Whether they need /dev/kvm.
    fn uses_kvm(&self) -> bool;

    /// Starts a machine's processes, contained. Blocks.
    fn start(&self, starting: &mut Starting, image: Image, launch: &Launch) -> Result<(), LaunchError>;

    /// See [`Hypervisor::most`].
    fn most(_: VmShape) -> Option<VmShape> {
        None
    }

    /// See [`Hypervisor::resize`].
    async fn resize(_: &Launch, _: VmShape, _: VmShape) -> Result<VmShape, ResizeError> {
        let problem = format!("the driver \"{}\" can't change a machine that runs", Self::KIND.driver);
        Err(ResizeError { problem, has: None, told: None })
    }
}

/// Machines that a hypervisor boots from images.
pub(super) struct Vmm<B> {
    pub(super) boot: B,
    pub(super) image_dir: PathBuf,
    tasks: Tasks,
}

impl<B: Boot> Vmm<B> {
    pub(super) fn new(boot: B, image_dir: &Path) -> Self {
        let image_dir = std::path::absolute(image_dir).unwrap_or_else(|_| image_dir.to_owned());
        Self { boot, image_dir, tasks: Tasks::new() }
    }

    /// Makes a machine of what `start` starts, on a thread that may block. When it fails, nothing is left.
    pub(super) async fn launch_with(
        &self,
        kind: Kind,
        launch: &Launch,
        start: impl FnOnce(&B, &mut Starting, Image, &Launch) -> Result<(), LaunchError> + Send + 'static,
    ) -> Result<Arc<dyn Machine>, LaunchError> {
        let (boot, image_dir, what) = (self.boot.clone(), self.image_dir.clone(), launch.clone());
        machine::launch(kind, launch, &self.tasks, move |starting| {
            let image = image::find(&image_dir, &what.image)?;
            image.check(&what.image, &what.disks)?;
            start(&boot, starting, image, &what)
        })
        .await
    }
}

#[tonic::async_trait]
impl<B: Boot> Hypervisor for Vmm<B>
where
    Self: Templates,
{
    fn name(&self) -> &'static str {
        B::KIND.driver
    }

    fn containment(&self) -> Contained {
        Contained::Yes { kvm: self.boot.uses_kvm() }
    }

    fn templates(&self) -> Option<&dyn Templates> {
        Some(self)
    }

    fn images(&self) -> Vec<String> {
        image::names(&self.image_dir)
    }

    async fn launch(&self, launch: &Launch) -> Result<Arc<dyn Machine>, LaunchError> {
        self.launch_with(B::KIND, launch, B::start).await
    }

    async fn adopt(&self, launch: &Launch) -> Result<Option<Arc<dyn Machine>>, LaunchError> {
        machine::adopt(B::KIND, launch, &self.tasks).await
    }

    async fn sweep(&self, launch: &Launch) -> Result<usize, LaunchError> {
        machine::sweep(launch).await
    }

    fn most(&self, shape: VmShape) -> Option<VmShape> {
        B::most(shape)
    }

    async fn resize(&self, launch: &Launch, to: VmShape, room: VmShape) -> Result<VmShape, ResizeError> {
        B::resize(launch, to, room).await
    }
}
