//! The guests' network: a bridge of this node's own, a TAP and addresses for each VM that asks for a network, and what may leave them.
//!
//! ```text
//!   guest ─ virtio-net ─ hypervisor ─ TAP ─┐ isolated ports     nftables: own addresses only, egress policy, NAT
//!   guest ─ virtio-net ─ hypervisor ─ TAP ─┴─ bridge (gateway) ─────────────────────────────────────────► outside
//! ```
//! A lease is in the VM's record before anything of it is made, rules are in force before the TAP is, and the TAP goes before the lease
//! does. So whatever a kill -9 leaves is either somebody's by record or an interface with our prefix that is nobody's, which the
//! sweep deletes; it never touches another. TAPs are persistent: they outlive vmhost as their machines do, and a VM that is adopted keeps
//! its own untouched.
//!
//! `plan` and `rules` decide and are pure; `kernel` does. None of it knows jobs or hypervisors.

mod kernel;
mod plan;
mod rules;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blixard::{
    config::NetworkConfig,
    egress::Egress,
    error::{Error, Reason},
    id::{NodeId, VmId},
    pb::guest::v1 as guest,
};
use blixard_chassis::Tasks;

pub use self::plan::Mac;
pub(crate) use self::plan::{Lease, node_tag};
use self::{
    kernel::{Kernel, KernelError},
    plan::{Names, Plan, orphans},
    rules::{Guest, reachable_resolvers, render, render_nothing},
};
use crate::{
    driver::with_sources,
    hypervisor::{Hypervisor, NetworkTools, Nic},
};

/// How often it is made sure that rules and bridge are there: a firewall that is reloaded may flush them, and until they are back guests
/// reach whatever the machine does.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Why guests have no network here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unavailable {
    /// Nobody wants it.
    #[error("network.subnet is not set")]
    Off,
    /// Nothing to give it to.
    #[error("the driver \"{0}\" has no network to give")]
    Driver(&'static str),
    /// A tool or a right is missing.
    #[error("{0}")]
    Missing(String),
    /// IPv6 would reach nobody.
    #[error(
        "network.subnet6 is set, but this machine forwards no IPv6 (sysctl -w net.ipv6.conf.all.forwarding=1, and accept_ra=2 for interfaces that need it)"
    )]
    NoForwarding,
    /// The kernel refused.
    #[error("{}", with_sources(.0))]
    Kernel(#[from] KernelError),
}

/// Takes away what an earlier vmhost made whose guests had a network, now that nobody's is to have one. Whoever still has a
/// TAP keeps it, with the rules it has: then all of it stays until a later start.
pub(crate) async fn take_away(node: &NodeId, state_dir: &Path, tasks: &Tasks) -> Result<(), Unavailable> {
    let names = Names::new(node, state_dir);
    let Ok(tools) = NetworkTools::find() else { return Ok(()) };
    let kernel = Kernel::connect(tools.nft, tasks)?;
    let links = kernel.names().await?;
    if !links.contains(&names.bridge()) {
        return Ok(());
    }
    tracing::info!(bridge = names.bridge(), "guests have no network any more: bridge, TAPs and rules are taken away");
    for link in orphans(&names, links, &BTreeSet::new()).into_iter().chain([names.bridge()]) {
        kernel.delete(&link).await?;
    }
    Ok(kernel.apply(render_nothing(&names)).await?)
}

/// The network of one node's guests.
pub(crate) struct Network {
    plan: Plan,
    kernel: Kernel,
    guests: Mutex<Guests>,
    /// The rules in force. Held while they are replaced: whoever waits finds that the one before has taken care of it.
    applied: tokio::sync::Mutex<Option<String>>,
}

/// Who has what.
#[derive(Default)]
struct Guests {
    by_vm: BTreeMap<VmId, Held>,
    /// The index that was given last.
    last: u32,
}

struct Held {
    guest: Guest,
    /// Whether rules let anything through: from before its TAP is made until after it is deleted.
    attached: bool,
}

impl Network {
    /// Looks for what it takes, and makes the bridge. Rules follow with [`Network::settle`].
    pub(crate) async fn open(
        config: &NetworkConfig,
        node: &NodeId,
        state_dir: &Path,
        hypervisor: &dyn Hypervisor,
        tasks: &Tasks,
    ) -> Result<Self, Unavailable> {
        let plan = Plan::new(config, Names::new(node, state_dir)).ok_or(Unavailable::Off)?;
        if !hypervisor.takes_devices() {
            return Err(Unavailable::Driver(hypervisor.name()));
        }
        let tools = NetworkTools::find().map_err(|(problem, _)| Unavailable::Missing(problem))?;
        if plan.subnet6.is_some() && !kernel::forwards_ipv6() {
            return Err(Unavailable::NoForwarding);
        }
        let kernel = Kernel::connect(tools.nft, tasks)?;
        kernel.has_tables(&plan.names).await?;
        kernel.ensure_bridge(&plan).await?;
        if kernel::forward_ipv4()? {
            tracing::warn!("switched on net.ipv4.ip_forward: guests reach nobody without it");
        }
        Ok(Self { plan, kernel, guests: Mutex::default(), applied: tokio::sync::Mutex::default() })
    }

    /// Never held across an await.
    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps addresses for a VM. Nothing is made yet: first they must be on disk.
    pub(crate) fn lease(&self, vm_id: VmId, egress: &Egress) -> Result<Lease, Error> {
        let mut guests = self.guests();
        let taken: BTreeSet<u32> = guests.by_vm.values().map(|held| held.guest.lease.index).collect();
        let index = self.plan.free_index(&taken, guests.last).ok_or_else(|| {
            let message = format!("all addresses of {} are taken (network.subnet)", self.plan.subnet);
            Error::new(Reason::Overloaded, message).with("limit", taken.len())
        })?;
        let lease = self.plan.lease(index);
        guests.last = index;
        let guest = Guest { lease: lease.clone(), egress: egress.clone() };
        guests.by_vm.insert(vm_id, Held { guest, attached: false });
        Ok(lease)
    }

    /// A VM of an earlier vmhost has these.
    pub(crate) fn restore(&self, vm_id: VmId, lease: Lease, egress: Egress) {
        if self.plan.lease(lease.index) != lease {
            let (address, subnet) = (lease.address, self.plan.subnet);
            tracing::warn!(%vm_id, %address, %subnet, "a VM is of another network than this node has now: it reaches nobody");
        }
        self.guests().by_vm.insert(vm_id, Held { guest: Guest { lease, egress }, attached: true });
    }

    /// Whom addresses are kept for, and the first of them.
    pub(crate) fn leases(&self) -> BTreeMap<VmId, String> {
        let guests = self.guests();
        guests.by_vm.iter().map(|(vm_id, held)| (*vm_id, held.guest.lease.address.to_string())).collect()
    }

    /// A VM's record is gone, and so is its TAP.
    pub(crate) fn give_back(&self, vm_id: VmId) {
        self.guests().by_vm.remove(&vm_id);
    }

    /// Makes a VM's TAP, under its rules.
    pub(crate) async fn attach(&self, vm_id: VmId) -> Result<(), KernelError> {
        let Some(lease) = self.set_attached(vm_id, true) else { return Ok(()) };
        self.apply().await?;
        self.kernel.add_tap(&self.plan, &lease).await
    }

    /// Deletes a VM's TAP and its rules. What can't be deleted now is swept up later.
    pub(crate) async fn detach(&self, vm_id: VmId) {
        let Some(lease) = self.guests().by_vm.get(&vm_id).map(|held| held.guest.lease.clone()) else { return };
        if let Err(error) = self.kernel.delete(&lease.tap).await {
            tracing::error!(%vm_id, error = with_sources(&error), "a VM's TAP is left; it is tried again");
        }
        self.set_attached(vm_id, false);
        if let Err(error) = self.apply().await {
            tracing::error!(%vm_id, error = with_sources(&error), "a VM's rules are left; it is tried again");
        }
    }

    fn set_attached(&self, vm_id: VmId, attached: bool) -> Option<Lease> {
        let mut guests = self.guests();
        let held = guests.by_vm.get_mut(&vm_id)?;
        held.attached = attached;
        Some(held.guest.lease.clone())
    }

    /// Puts the rules in force that those have who are attached now.
    async fn apply(&self) -> Result<(), KernelError> {
        let mut applied = self.applied.lock().await;
        let rules = render(&self.plan, &self.attached());
        if applied.as_ref() != Some(&rules) {
            // Whatever comes of it, these may not be in force any more.
            *applied = None;
            self.kernel.apply(rules.clone()).await?;
            *applied = Some(rules);
        }
        Ok(())
    }

    fn attached(&self) -> BTreeMap<u32, Guest> {
        let of_plan = |guest: &Guest| self.plan.lease(guest.lease.index) == guest.lease;
        let guests = self.guests();
        let attached = guests.by_vm.values().filter(|held| held.attached && of_plan(&held.guest));
        attached.map(|held| (held.guest.lease.index, held.guest.clone())).collect()
    }

    /// Makes everything as it should be: bridge, rules, and no TAP of ours that nobody owns.
    pub(crate) async fn settle(&self) -> Result<(), KernelError> {
        self.kernel.ensure_bridge(&self.plan).await?;
        if !self.kernel.has_tables(&self.plan.names).await? {
            let lost = self.applied.lock().await.take().is_some();
            if lost {
                tracing::error!("the guests' firewall rules were gone, as after a flush; they are put back");
            }
        }
        self.apply().await?;
        // In this order: whoever has a TAP by now has had its lease before.
        let links = self.kernel.names().await?;
        let owned = self.guests().by_vm.values().map(|held| held.guest.lease.tap.clone()).collect();
        for name in orphans(&self.plan.names, links, &owned) {
            tracing::warn!(name, "a TAP of ours that no VM owns is deleted");
            self.kernel.delete(&name).await?;
        }
        Ok(())
    }

    /// The TAPs of this node that are there.
    pub(crate) async fn taps(&self) -> Result<BTreeSet<String>, KernelError> {
        Ok(orphans(&self.plan.names, self.kernel.names().await?, &BTreeSet::new()).into_iter().collect())
    }

    /// Settles again and again.
    pub(crate) async fn keep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(error) = self.settle().await {
                tracing::error!(error = with_sources(&error), "the guests' network can't be kept; it is tried again");
            }
        }
    }

    /// What a guest's agent is told.
    pub(crate) fn configuration(&self, lease: &Lease, egress: &Egress) -> guest::GuestNetwork {
        let plan = &self.plan;
        let v6 = lease.address6.zip(plan.subnet6).zip(plan.gateway6());
        let mut addresses = vec![format!("{}/{}", lease.address, plan.subnet.prefix_len())];
        addresses.extend(v6.map(|((address, subnet), _)| format!("{address}/{}", subnet.prefix_len())));
        let mut gateways = vec![plan.gateway().to_string()];
        gateways.extend(v6.map(|(_, gateway)| gateway.to_string()));
        let resolvers = reachable_resolvers(plan, egress).iter().map(IpAddr::to_string).collect();
        guest::GuestNetwork { mac: lease.mac.to_string(), addresses, gateways, mtu: plan.mtu, resolvers }
    }

    /// In a few words, for the log.
    pub(crate) fn describe(&self) -> String {
        let v6 = self.plan.subnet6.map_or_else(String::new, |net| format!(" and {net}"));
        format!("{}{v6} on the bridge {}", self.plan.subnet, self.plan.names.bridge())
    }
}

impl Lease {
    /// The machine's interface.
    pub(crate) fn nic(&self) -> Nic {
        Nic { tap: self.tap.clone(), mac: self.mac }
    }

    /// Its addresses, as people read them.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let v6 = self.address6.map(|address| address.to_string());
        [self.address.to_string()].into_iter().chain(v6).collect()
    }
}
