//! Disks by the numbers that cgroups have for them.
//!
//! `io.max` takes whole disks and refuses their partitions; `io.stat` lists a disk beside those that it is made of.

use std::{fmt, fs, os::linux::fs::MetadataExt as _, path::Path};

/// Where the kernel tells of them, by number.
const BY_NUMBER: &str = "/sys/dev/block";

/// A whole disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Device {
    /// The disk with the file system that this directory is in.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(super) fn of_files_in(dir: &Path) -> Result<Self, String> {
        let device = fs::metadata(dir).map_err(|error| format!("{}: {error}", dir.display()))?.st_dev();
        let device = Self { major: rustix::fs::major(device), minor: rustix::fs::minor(device) };
        device.whole(Path::new(BY_NUMBER)).map_err(|why| format!("{} is on {why}", dir.display()))
    }

    fn parse(number: &str) -> Option<Self> {
        let (major, minor) = number.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// This, or the disk that it is a part of.
    fn whole(self, by_number: &Path) -> Result<Self, String> {
        // The kernel's own numbers for what is on no disk, or on several.
        if self.major == 0 {
            return Err("a file system that has no disk of its own, such as tmpfs, overlay, btrfs or NFS".to_owned());
        }
        let unknown = |error| format!("the disk {self}, of which the kernel does not tell: {error}");
        let entry = fs::canonicalize(by_number.join(self.to_string())).map_err(unknown)?;
        if !entry.join("partition").exists() {
            return Ok(self);
        }
        let number = fs::read_to_string(entry.join("../dev")).map_err(unknown)?;
        Self::parse(&number).ok_or_else(|| format!("a part of a disk whose number is \"{}\"", number.trim()))
    }
}

/// Whether the disk of this number is made of others, as LVM's and RAID's are: what it does, they do.
pub(super) fn is_made_of_others(number: &str) -> bool {
    has_slaves(&Path::new(BY_NUMBER).join(number))
}

fn has_slaves(disk: &Path) -> bool {
    fs::read_dir(disk.join("slaves")).is_ok_and(|mut slaves| slaves.next().is_some())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A disk with a partition, and a volume on that, as sysfs has them.
    fn sysfs() -> tempfile::TempDir {
        let sys = tempfile::tempdir().expect("tempdir");
        let file = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().expect("below")).expect("mkdir");
            fs::write(path, text).expect("writes");
        };
        file("devices/pci0000:00/block/nvme0n1/dev", "259:0\n");
        file("devices/pci0000:00/block/nvme0n1/nvme0n1p2/dev", "259:2\n");
        file("devices/pci0000:00/block/nvme0n1/nvme0n1p2/partition", "2\n");
        file("devices/virtual/block/dm-1/dev", "253:1\n");
        fs::create_dir_all(sys.path().join("devices/pci0000:00/block/nvme0n1/slaves")).expect("mkdir");
        fs::create_dir_all(sys.path().join("devices/virtual/block/dm-1/slaves/nvme0n1p2")).expect("mkdir");
        fs::create_dir_all(sys.path().join("dev/block")).expect("mkdir");
        let link = |to: &str, number: &str| {
            symlink(Path::new("../../devices").join(to), sys.path().join("dev/block").join(number)).expect("links");
        };
        link("pci0000:00/block/nvme0n1", "259:0");
        link("pci0000:00/block/nvme0n1/nvme0n1p2", "259:2");
        link("virtual/block/dm-1", "253:1");
        sys
    }

    #[test]
    fn a_partition_stands_for_its_disk_and_a_volume_for_itself() {
        let sys = sysfs();
        let whole = |major, minor| Device { major, minor }.whole(&sys.path().join("dev/block"));
        assert_eq!(whole(259, 2), Ok(Device { major: 259, minor: 0 }));
        assert_eq!(whole(259, 0), Ok(Device { major: 259, minor: 0 }));
        assert_eq!(whole(253, 1), Ok(Device { major: 253, minor: 1 }));
        assert!(whole(0, 42).expect_err("none").starts_with("a file system that has no disk of its own"));
        let unknown = whole(8, 1).expect_err("not listed");
        assert!(unknown.starts_with("the disk 8:1, of which the kernel does not tell: "), "{unknown}");
        fs::write(sys.path().join("devices/pci0000:00/block/nvme0n1/dev"), "?\n").expect("writes");
        assert_eq!(whole(259, 2).expect_err("nonsense"), "a part of a disk whose number is \"?\"");
    }

    #[test]
    fn what_is_made_of_others_is_known_by_them() {
        let sys = sysfs();
        let made_of_others = |number: &str| has_slaves(&sys.path().join("dev/block").join(number));
        assert!(made_of_others("253:1"));
        assert!(!made_of_others("259:0") && !made_of_others("8:0"));
    }

    #[test]
    fn files_of_the_kernel_are_on_no_disk() {
        let problem = Device::of_files_in(Path::new("/proc")).expect_err("it is on none");
        assert!(problem.starts_with("/proc is on a file system that has no disk of its own"), "{problem}");
        let problem = Device::of_files_in(Path::new("/no/such/directory")).expect_err("it is not there");
        assert!(problem.starts_with("/no/such/directory: "), "{problem}");
    }
}
