//! How much memory the process has taken since a moment.
//!
//! SQLite's own count and its heap limit are the whole process's, Hiqlite's writer included, so a limit there would fail
//! commits. The kernel's count serves as well: queries that grow are the only thing here that grows fast.

use std::{fs::File, os::unix::fs::FileExt as _};

/// The resident memory at a moment, to compare with later.
pub(crate) struct ResidentMemory {
    statm: Option<File>,
    before: u64,
}

impl ResidentMemory {
    pub(crate) fn now() -> Self {
        let mut memory = Self { statm: File::open("/proc/self/statm").ok(), before: 0 };
        memory.before = memory.resident();
        memory
    }

    /// Bytes that were taken since, as far as they were not given back.
    pub(crate) fn growth(&self) -> u64 {
        self.resident().saturating_sub(self.before)
    }

    /// The second number of `statm`, in pages; without `/proc` nothing is known.
    fn resident(&self) -> u64 {
        let mut text = [0; 128];
        let read = self.statm.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        let pages =
            std::str::from_utf8(&text[..read]).ok().and_then(|text| text.split_whitespace().nth(1)?.parse().ok());
        pages.unwrap_or(0_u64) * rustix::param::page_size() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_written_is_seen() {
        let memory = ResidentMemory::now();
        let taken = vec![1_u8; 64 << 20];
        assert!(memory.growth() > 32 << 20, "{}", memory.growth());
        drop(taken);
    }
}
