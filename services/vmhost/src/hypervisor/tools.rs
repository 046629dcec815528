//! Where the programs are that a hypervisor needs, and what makes each of them appear.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use rustix::fs::Access;

/// A program that a driver needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tool {
    /// Its file name.
    pub(super) name: &'static str,
    /// The environment variable that says where it is.
    env: &'static str,
    /// The command that installs it.
    pub(super) fix: &'static str,
}

pub(super) const QEMU: Tool =
    Tool { name: "qemu-system-x86_64", env: "QEMU_SYSTEM_X86_64", fix: "apt-get install qemu-system-x86" };
pub(super) const VHOST_DEVICE_VSOCK: Tool =
    Tool { name: "vhost-device-vsock", env: "VHOST_DEVICE_VSOCK", fix: "make tools" };
pub(super) const NFT: Tool = Tool { name: "nft", env: "NFT", fix: "apt-get install nftables" };
pub(super) const CLOUD_HYPERVISOR: Tool = Tool {
    name: "cloud-hypervisor",
    env: "CLOUD_HYPERVISOR",
    fix: "see https://github.com/cloud-hypervisor/cloud-hypervisor/releases/tag/v53.0",
};

impl Tool {
    /// Its absolute path: from its environment variable (and then from nowhere else), `PATH`, `/usr/sbin`, or `target/tools/bin` of
    /// the project that this program or the current directory belongs to.
    pub(super) fn find(&self) -> Option<PathBuf> {
        if let Some(path) = env::var_os(self.env).filter(|path| !path.is_empty()) {
            return program(Path::new(&path));
        }
        let on_path = env::var_os("PATH").unwrap_or_default();
        let on_path: Vec<PathBuf> = env::split_paths(&on_path).collect();
        on_path.into_iter().chain(["/usr/sbin".into()]).chain(tool_dirs()).find_map(|dir| program(&dir.join(self.name)))
    }

    /// Why [`Tool::find`] found nothing, and what to do.
    pub(super) fn missing(&self) -> String {
        match env::var_os(self.env).filter(|path| !path.is_empty()) {
            Some(path) => format!("{}: \"{}\" is not a program", self.env, Path::new(&path).display()),
            None => format!("{} is not installed ({}, or set {})", self.name, self.fix, self.env),
        }
    }
}

/// The absolute path of a file that can be executed.
pub(super) fn program(path: &Path) -> Option<PathBuf> {
    let executable = path.is_file() && rustix::fs::access(path, Access::EXEC_OK).is_ok();
    if executable { std::path::absolute(path).ok() } else { None }
}

fn tool_dirs() -> impl Iterator<Item = PathBuf> {
    let exe = env::current_exe().unwrap_or_default();
    let targets: Vec<PathBuf> =
        exe.ancestors().filter(|dir| dir.file_name() == Some(OsStr::new("target"))).map(Path::to_owned).collect();
    let current = env::current_dir().unwrap_or_default();
    let projects: Vec<PathBuf> = current.ancestors().map(|dir| dir.join("target")).collect();
    targets.into_iter().chain(projects).map(|target| target.join("tools/bin"))
}
