//! The guest's disks beside its root: found by their serial numbers, mounted where jobs see them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blixard::{
    error::{Error, invalid},
    id::{NAME_ALLOWED, is_name},
    limits::MAX_VOLUMES,
    pb::guest::v1 as pb,
    volume::is_mount_path,
};
use rustix::mount::{MountFlags, mount};

use crate::boot;

/// Where the kernel lists disks.
const DISKS: &str = "/sys/block";
/// How long it may take to find one: virtio_blk has done so when the agent serves; the rest is for a loaded host. Less than the host waits
/// for an answer.
const DISK_PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// A disk and where it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    serial: String,
    filesystem: String,
    /// Absolute.
    pub(crate) mount_path: String,
    read_only: bool,
}

impl Volume {
    /// Checks the mounts of a request.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub(crate) fn parse_all(mounts: Vec<pb::Mount>) -> Result<Vec<Self>, Error> {
        if mounts.len() > MAX_VOLUMES {
            return Err(invalid("mounts", mounts.len(), &format!("at most {MAX_VOLUMES}")));
        }
        mounts.into_iter().enumerate().map(|(at, mount)| Self::parse(&format!("mounts[{at}]"), mount)).collect()
    }

    fn parse(field: &str, mount: pb::Mount) -> Result<Self, Error> {
        let pb::Mount { serial, filesystem, mount_path, read_only } = mount;
        for (name, value) in [("serial", &serial), ("filesystem", &filesystem)] {
            if !is_name(value) {
                return Err(invalid(&format!("{field}.{name}"), value.escape_debug(), NAME_ALLOWED));
            }
        }
        if !is_mount_path(&mount_path) {
            let allowed = "an absolute path, not below /dev, /proc or /sys";
            return Err(invalid(&format!("{field}.mount_path"), mount_path.escape_debug(), allowed));
        }
        Ok(Self { serial, filesystem, mount_path, read_only })
    }

    /// Mounts it. What cannot be is said in words.
    pub(crate) fn mount(&self) -> io::Result<()> {
        let device = self.find_device()?;
        boot::have_filesystem(&self.filesystem);
        let at = |what: &str, error: io::Error| io::Error::other(format!("{what} {}: {error}", self.mount_path));
        fs::create_dir_all(&self.mount_path).map_err(|error| at("make", error))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        let flags = if self.read_only { flags | MountFlags::RDONLY } else { flags };
        mount(&device, self.mount_path.as_str(), self.filesystem.as_str(), flags, None)
            .map_err(|error| at(&format!("mount a file system of {} at", self.filesystem), error.into()))
    }

    fn find_device(&self) -> io::Result<PathBuf> {
        let deadline = Instant::now() + DISK_PATIENCE;
        loop {
            if let Some(device) = device_of(Path::new(DISKS), &self.serial).filter(|device| device.exists()) {
                return Ok(device);
            }
            if Instant::now() >= deadline {
                return Err(io::Error::other(format!("there is no disk with the serial number {}", self.serial)));
            }
            std::thread::sleep(LOOK_AGAIN_AFTER);
        }
    }
}

/// The device of the disk with this serial number.
fn device_of(disks: &Path, serial: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(disks).ok()?.flatten();
    let is_it =
        |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("serial")).is_ok_and(|of| of.trim() == serial);
    entries.find(is_it).map(|entry| Path::new("/dev").join(entry.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_number_and_by_all_of_it() {
        let disks = tempfile::tempdir().expect("tempdir");
        for (name, serial) in [("vda", ""), ("vdb", "volume10"), ("vdc", "volume1\n")] {
            fs::create_dir(disks.path().join(name)).expect("mkdir");
            fs::write(disks.path().join(name).join("serial"), serial).expect("writes");
        }
        fs::create_dir(disks.path().join("loop0")).expect("mkdir");
        assert_eq!(device_of(disks.path(), "volume1"), Some("/dev/vdc".into()));
        assert_eq!(device_of(disks.path(), "volume10"), Some("/dev/vdb".into()));
        assert_eq!(device_of(disks.path(), "volume"), None);
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        let good = pb::Mount {
            serial: "volume0".into(),
            filesystem: "ext4".into(),
            mount_path: "/scratch".into(),
            read_only: false,
        };
        Volume::parse_all(vec![good.clone()]).expect("valid");
        type Spoil = fn(&mut pb::Mount);
        let cases: [(&str, Spoil); 4] = [
            ("mounts[1].serial", |mount| mount.serial.clear()),
            ("mounts[1].filesystem", |mount| mount.filesystem = "../ext4".into()),
            ("mounts[1].mount_path", |mount| mount.mount_path = "/proc".into()),
            ("mounts[1].mount_path", |mount| mount.mount_path = "scratch".into()),
        ];
        for (field, spoil) in cases {
            let mut bad = good.clone();
            spoil(&mut bad);
            let error = Volume::parse_all(vec![good.clone(), bad]).expect_err(field);
            assert_eq!(error.metadata.get("field").map(String::as_str), Some(field), "{error}");
        }
        let error = Volume::parse_all(vec![good; 17]).expect_err("too many");
        assert_eq!(error.metadata["field"], "mounts");
    }
}
