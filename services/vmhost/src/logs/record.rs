//! One record of a log segment: what lies on disk, byte for byte.
//!
//! ```text
//!  0        4      8      12       20       28
//!  | "BLX"k | len  | crc  | offset | time   | data (len bytes)
//! ```
//! Little-endian. `k` is the kind, `len` and `offset` count bytes, `time` is in milliseconds of Unix time. The CRC-32 covers
//! the header without itself, and the data. The last record of a finished log is of kind End: its data is the JSON of an
//! [`EndRecord`](super::EndRecord), and its offset is the log's length.

use blixard::{pb::common::v1 as pb, time::Timestamp};

/// Bytes before a record's data.
pub(super) const HEADER: usize = 28;
/// Most data bytes in a record: a chunk of output, or an end record with its reason.
pub(super) const MAX_DATA: usize = blixard::limits::MAX_LOG_CHUNK;

const MAGIC: [u8; 3] = *b"BLX";

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Stdout,
    Stderr,
    End,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::End => 3,
        }
    }

    /// The wire's name of an output stream; an end record is none.
    pub(super) fn stream(self) -> Option<pb::LogStream> {
        match self {
            Self::Stdout => Some(pb::LogStream::Stdout),
            Self::Stderr => Some(pb::LogStream::Stderr),
            Self::End => None,
        }
    }
}

/// A parsed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) len: usize,
    pub(super) offset: u64,
    pub(super) time: Timestamp,
    crc: u32,
}

impl Header {
    /// Parses a header; `None` when the bytes are none of ours.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let field = |from: usize, to: usize| bytes.get(from..to);
        let kind = match (field(0, 3)?, bytes.get(3)?) {
            (magic, 1) if magic == MAGIC => Kind::Stdout,
            (magic, 2) if magic == MAGIC => Kind::Stderr,
            (magic, 3) if magic == MAGIC => Kind::End,
            _ => return None,
        };
        let len = u32::from_le_bytes(field(4, 8)?.try_into().ok()?) as usize;
        (len <= MAX_DATA).then_some(Self {
            kind,
            len,
            crc: u32::from_le_bytes(field(8, 12)?.try_into().ok()?),
            offset: u64::from_le_bytes(field(12, 20)?.try_into().ok()?),
            time: Timestamp(i64::from_le_bytes(field(20, 28)?.try_into().ok()?)),
        })
    }

    /// Where the log goes on after this record. An end record takes no place in it.
    pub(super) fn end_offset(&self) -> u64 {
        match self.kind {
            Kind::Stdout | Kind::Stderr => self.offset.saturating_add(self.len as u64),
            Kind::End => self.offset,
        }
    }

    /// Whether header and data are what was written.
    pub(super) fn matches(&self, header: &[u8], data: &[u8]) -> bool {
        header.len() == HEADER && checksum(&header[..8], &header[12..], data) == self.crc
    }
}

/// Appends a record to `buffer`.
pub(super) fn encode(buffer: &mut Vec<u8>, kind: Kind, offset: u64, time: Timestamp, data: &[u8]) {
    let [a, b, c] = MAGIC;
    let mut head = [a, b, c, kind.byte(), 0, 0, 0, 0];
    head[4..].copy_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
    let mut tail = [0; 16];
    tail[..8].copy_from_slice(&offset.to_le_bytes());
    tail[8..].copy_from_slice(&time.0.to_le_bytes());
    buffer.extend_from_slice(&head);
    buffer.extend_from_slice(&checksum(&head, &tail, data).to_le_bytes());
    buffer.extend_from_slice(&tail);
    buffer.extend_from_slice(data);
}

fn checksum(head: &[u8], tail: &[u8], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(tail);
    hasher.update(data);
    hasher.finalize()
}
