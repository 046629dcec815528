//! The consoles of VMs that failed: what people look at after the VM is gone. The newest ones are kept.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use blixard::id::VmId;

use crate::hypervisor::Console;

/// How many are kept: with 64 KiB each at most 4 MiB.
const KEPT: usize = 64;
/// Before the text: how many bytes of the console were skipped.
const HEADER: usize = 8;

#[derive(Debug)]
pub(crate) struct Consoles {
    dir: PathBuf,
}

impl Consoles {
    /// Opens the directory, making it when it is not there.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Keeps a console, and drops the oldest when there are too many. For people only: an error costs them the text.
    pub(crate) fn keep(&self, vm_id: VmId, console: &Console) {
        let mut bytes = console.skipped.to_le_bytes().to_vec();
        bytes.extend_from_slice(&console.tail);
        let kept = fs::write(self.dir.join(vm_id.to_string()), bytes).and_then(|()| self.drop_oldest());
        if let Err(error) = kept {
            tracing::warn!(%vm_id, %error, "the console of a failed VM could not be kept");
        }
    }

    fn drop_oldest(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            files.push((entry.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
        files.sort();
        let excess = files.len().saturating_sub(KEPT);
        files.iter().take(excess).try_for_each(|(_, path)| fs::remove_file(path))
    }

    /// The VMs whose consoles are kept.
    pub(crate) fn list(&self) -> Vec<VmId> {
        let names = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.to_str()?.parse().ok()).collect()
    }

    /// Drops a console.
    pub(crate) fn delete(&self, vm_id: VmId) {
        // The next cleaning finds it again.
        let _ = fs::remove_file(self.dir.join(vm_id.to_string()));
    }

    /// A console that was kept.
    pub(crate) fn get(&self, vm_id: VmId) -> Option<Console> {
        let mut bytes = fs::read(self.dir.join(vm_id.to_string())).ok()?;
        let skipped = u64::from_le_bytes(bytes.get(..HEADER)?.try_into().ok()?);
        bytes.drain(..HEADER);
        Some(Console { tail: bytes, skipped })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_consoles_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let consoles = Consoles::open(dir.path()).unwrap();
        let ids: Vec<VmId> = (0..KEPT + 3).map(|_| VmId::random()).collect();
        for id in &ids {
            consoles.keep(*id, &Console { tail: id.to_string().into_bytes(), skipped: 7 });
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), KEPT);
        let last = ids[KEPT + 2];
        assert_eq!(consoles.get(last), Some(Console { tail: last.to_string().into_bytes(), skipped: 7 }));
        assert!(consoles.list().len() == KEPT && consoles.list().contains(&last));
        consoles.delete(last);
        assert_eq!(consoles.get(last), None);
    }
}
