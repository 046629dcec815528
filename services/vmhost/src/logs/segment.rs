//! The files of one attempt's log: `<offset of the first byte, 20 digits>.seg`, so that sorted names are sorted offsets.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rustix::{buffer::spare_capacity, io::Errno};

use super::{
    EndRecord,
    record::{HEADER, Header, Kind, MAX_DATA},
};

const EXTENSION: &str = ".seg";
/// How much of a segment is read at once: four of the largest records, and little enough to hold per reader. What is left of a record at the
/// end is read again.
pub(super) const READ_BLOCK: usize = 4 * (HEADER + MAX_DATA);

/// A file and the offset of its first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) base: u64,
    pub(super) path: PathBuf,
}

impl Segment {
    pub(super) fn new(dir: &Path, base: u64) -> Self {
        Self { base, path: dir.join(format!("{base:020}{EXTENSION}")) }
    }
}

/// The segments of a log in the order of their offsets.
pub(super) fn list(dir: &Path) -> io::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(EXTENSION));
        if let Some(base) = name.and_then(|name| name.parse().ok()) {
            segments.push(Segment { base, path });
        }
    }
    segments.sort_by_key(|segment| segment.base);
    Ok(segments)
}

/// What a segment holds up to its first torn or damaged record.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// Bytes of good records from the file's start.
    pub(super) good_bytes: u64,
    /// Where the log goes on.
    pub(super) end_offset: u64,
    /// The attempt's end, when this segment holds it.
    pub(super) end: Option<EndRecord>,
}

/// Reads a whole segment, checking every record.
pub(super) fn scan(file: &File, base: u64) -> io::Result<Scan> {
    let mut scan = Scan { good_bytes: 0, end_offset: base, end: None };
    loop {
        let block = read_block(file, scan.good_bytes)?;
        let mut at = 0;
        while let Some((header, data)) = record_at(&block, at) {
            let good = header.matches(&block[at..at + HEADER], data) && header.offset == scan.end_offset;
            if !good || scan.end.is_some() {
                return Ok(scan);
            }
            if header.kind == Kind::End {
                let Ok(end) = serde_json::from_slice(data) else { return Ok(scan) };
                scan.end = Some(end);
            }
            at += HEADER + header.len;
            scan.good_bytes += (HEADER + header.len) as u64;
            scan.end_offset = header.end_offset();
        }
        if at == 0 {
            return Ok(scan);
        }
    }
}

/// The next block of a file, as long as it has bytes.
pub(super) fn read_block(file: &File, position: u64) -> io::Result<Vec<u8>> {
    let left = file.metadata()?.len().saturating_sub(position);
    let wanted = usize::try_from(left).unwrap_or(READ_BLOCK).min(READ_BLOCK);
    let mut block = Vec::with_capacity(wanted);
    while block.len() < wanted {
        let at = position + block.len() as u64;
        // Into what has not been written to: zeros first would cost a twentieth of all that a follower costs.
        match rustix::io::pread(file, spare_capacity(&mut block), at) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(block)
}

/// The record at `at`, when the block holds all of it.
pub(super) fn record_at(block: &[u8], at: usize) -> Option<(Header, &[u8])> {
    let header = Header::parse(block.get(at..at + HEADER)?)?;
    let data = block.get(at + HEADER..at + HEADER + header.len)?;
    Some((header, data))
}
