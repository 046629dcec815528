//! How the engine decides.

use std::{collections::BTreeMap, time::Duration};

use blixard::{
    config::{Config, PlacementChoice},
    limits,
    vm::Defaults,
};

/// How the engine decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How many VMs may live at once, on all nodes together.
    pub max_vms: u32,
    /// Whether service VMs are started for jobs that need one, and idle ones ended.
    pub auto_scaling: bool,
    /// By image: how many service VMs of the default size are kept warm.
    pub pre_warm: BTreeMap<String, u32>,
    /// How many service VMs of one image are started at most; 0: as many as there is room for.
    pub max_service_vms: u32,
    /// How long a VM of ours beyond those kept warm stays idle before it is ended.
    pub scale_down_after: Duration,
    /// After so many jobs a service VM of ours is replaced; 0: never.
    pub recycle_after_jobs: u32,
    /// At this age a service VM of ours is replaced.
    pub recycle_after: Option<Duration>,
    /// Which of the nodes that fit a VM is put on.
    pub placement: PlacementChoice,
    /// The size of a VM that asks for none.
    pub defaults: Defaults,
    /// How many jobs may wait. The front door keeps it; the engine only counts.
    pub max_queued_jobs: u32,
    /// How many jobs of one tenant may be assigned or running; 0: no limit.
    pub tenant_max_jobs: u32,
    /// The same for some tenants.
    pub tenant_limits: BTreeMap<String, u32>,
    /// So long in the queue is worth one level of priority.
    pub ageing: Duration,
    /// How long a Lost node may come back before its jobs are taken for lost.
    pub lost_node_grace: Duration,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        let (vms, jobs) = (&config.vm_manager, &config.scheduler);
        let mut pre_warm = vms.pre_warm_images.0.clone();
        if vms.pre_warm_count > 0 {
            pre_warm.insert(limits::DEFAULT_IMAGE.to_owned(), vms.pre_warm_count);
        }
        let minutes = |count: u32| Duration::from_secs(60 * u64::from(count));
        Self {
            max_vms: config.firecracker.max_concurrent_vms,
            auto_scaling: vms.auto_scaling,
            pre_warm,
            max_service_vms: vms.max_service_vms,
            scale_down_after: Duration::from_secs(vms.scale_down_seconds.into()),
            recycle_after_jobs: vms.recycle_after_jobs,
            recycle_after: (vms.recycle_after_minutes > 0).then(|| minutes(vms.recycle_after_minutes)),
            placement: vms.placement,
            defaults: config.defaults(),
            max_queued_jobs: jobs.max_queued_jobs,
            tenant_max_jobs: jobs.tenant_max_jobs,
            tenant_limits: jobs.tenant_limits.0.clone(),
            ageing: Duration::from_secs(jobs.ageing_seconds.into()),
            lost_node_grace: Duration::from_secs(jobs.lost_node_grace_seconds.into()),
        }
    }
}
