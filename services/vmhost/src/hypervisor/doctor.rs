//! What this machine can run, and what makes it run more.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::thread::{CapabilitySet, capabilities};

use crate::containment;

use super::{
    HypervisorSettings, cloud_hypervisor, confine, image,
    nic::TUN_DEVICE,
    tools::{self, NFT},
};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// Whether it is there and works.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// The command that fixes it; `None` when it is fine, or when no command can.
    pub fix: Option<String>,
}

impl Check {
    fn good(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, ok: true, detail: detail.into(), fix: None }
    }

    fn bad(name: &'static str, detail: impl Into<String>, fix: Option<String>) -> Self {
        Self { name, ok: false, detail: detail.into(), fix }
    }
}

/// Looks at everything that a driver needs or could use.
#[must_use]
pub fn diagnose(settings: &HypervisorSettings) -> Vec<Check> {
    vec![
        check_kvm(),
        check_tool(tools::QEMU),
        check_tool(tools::VHOST_DEVICE_VSOCK),
        check_images(&settings.image_dir),
        check_cloud_hypervisor(),
        check_network(),
        check_containment(settings),
    ]
}

fn check_kvm() -> Check {
    match kvm() {
        Ok(()) => Check::good("/dev/kvm", "hardware virtualization works"),
        Err(problem) => {
            let denied = problem.contains("Permission denied");
            let fix = denied.then(|| "sudo usermod -aG kvm $USER (and log in again)".to_owned());
            Check::bad("/dev/kvm", format!("{problem}; QEMU emulates instead, which is slower"), fix)
        }
    }
}

fn check_network() -> Check {
    const NAME: &str = "guest networks";
    match NetworkTools::find() {
        Ok(_) => Check::good(NAME, "possible; network.subnet switches them on"),
        Err((problem, fix)) => {
            Check::bad(NAME, format!("{problem}; jobs with --egress other than none can't run"), Some(fix))
        }
    }
}

fn check_containment(settings: &HypervisorSettings) -> Check {
    const NAME: &str = "containment";
    // QEMU runs without KVM, too.
    let (whole, what) = containment::look(settings.vm_uids, kvm().is_ok());
    if !whole {
        let fix = "run vmhost as root, or as a systemd service with Delegate=yes (docs/OPERATIONS.md, \"Containment\")";
        return Check::bad(NAME, format!("VMs run in a reduced form: {what}"), Some(fix.to_owned()));
    }
    match confine::closed_to_others(&settings.image_dir) {
        Some(closed) => {
            let detail = format!("{what}; but {} is closed to their users", closed.display());
            Check::bad(NAME, detail, Some(format!("chmod o+rx {}", closed.display())))
        }
        None => Check::good(NAME, what),
    }
}

/// What giving guests a network takes.
pub(crate) struct NetworkTools {
    /// The program that loads firewall rules.
    pub(crate) nft: PathBuf,
}

impl NetworkTools {
    /// Looks for it.
    ///
    /// # Errors
    /// What is missing, and the command that fixes it.
    pub(crate) fn find() -> Result<Self, (String, String)> {
        let nft = NFT.find().ok_or_else(|| (NFT.missing(), NFT.fix.to_owned()))?;
        if let Err(error) = fs::File::options().read(true).write(true).open(TUN_DEVICE) {
            return Err((format!("{TUN_DEVICE} cannot be opened: {error}"), "modprobe tun, as root".to_owned()));
        }
        let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
        if !may {
            let program = std::env::current_exe().unwrap_or_default();
            let fix = format!("sudo setcap cap_net_admin+ep {}", program.display());
            return Err(("this process has not the right CAP_NET_ADMIN".to_owned(), fix));
        }
        Ok(Self { nft })
    }
}

fn check_tool(tool: tools::Tool) -> Check {
    match tool.find() {
        Some(path) => Check::good(tool.name, path.display().to_string()),
        None => Check::bad(tool.name, tool.missing(), Some(tool.fix.to_owned())),
    }
}

fn check_cloud_hypervisor() -> Check {
    let tool = tools::CLOUD_HYPERVISOR;
    match cloud_hypervisor::installed() {
        Ok((path, version)) => {
            let confinement = cloud_hypervisor::confinement(cloud_hypervisor::has_landlock());
            Check::good(tool.name, format!("{}, version {version}, {confinement}", path.display()))
        }
        Err(problem) => Check::bad(tool.name, problem, Some(tool.fix.to_owned())),
    }
}

fn check_images(image_dir: &Path) -> Check {
    let images = image::names(image_dir);
    if images.is_empty() {
        let detail = format!("none that can be booted in {}", image_dir.display());
        Check::bad("images", detail, Some("make guest-image".to_owned()))
    } else {
        Check::good("images", format!("{} in {}", images.join(", "), image_dir.display()))
    }
}

/// Whether KVM can run a stock guest; if not, why.
///
/// A `/dev/kvm` that opens does not say so: there are hosts whose KVM emulates the guest's kernel in software, and a
/// stock kernel dies on it. The CPU's flags decide.
pub(super) fn kvm() -> Result<(), String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualization(&cpuinfo) {
        return Err("this CPU offers no hardware virtualization (neither vmx nor svm in /proc/cpuinfo)".to_owned());
    }
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/kvm cannot be opened: {error}")),
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.next().is_some_and(|line| line.split_ascii_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_flags_themselves_count_as_hardware_virtualization() {
        assert!(has_virtualization("model name\t: vmx\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm"));
        assert!(!has_virtualization("model name\t: svm\nflags\t\t: fpu svm_lock\nvmx flags\t: vnmi"));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn whatever_is_missing_names_the_command_that_fixes_it() {
        let settings =
            HypervisorSettings { image_dir: "/does/not/exist".into(), agent_command: Vec::new(), vm_uids: None };
        let checks = diagnose(&settings);
        let images = checks.iter().find(|check| check.name == "images").expect("checked");
        assert_eq!(images.fix.as_deref(), Some("make guest-image"));
        for check in checks.iter().filter(|check| !check.ok && check.name != "/dev/kvm") {
            assert!(check.fix.is_some(), "{check:?}");
        }
    }
}
