//! Reads one attempt's log from any offset. Blocking: callers run it on the blocking pool.

use std::{fs::File, io, path::PathBuf};

use blixard::{pb::common::v1 as pb, time::Timestamp};
use bytes::{Bytes, BytesMut};

use super::{
    record::{HEADER, Header, Kind},
    segment,
};

/// Records below this size are joined with their neighbours of the same stream: a message per line would cost far more
/// than the copy.
const JOIN_BELOW: usize = 8 * 1024;
/// How large joined records grow.
const JOIN_UP_TO: usize = 32 * 1024;

/// What is at an offset.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Item {
    Chunk(pb::LogChunk),
    Gap(pb::LogGap),
}

/// A place in a log.
#[derive(Debug)]
pub(crate) struct LogReader {
    dir: PathBuf,
    offset: u64,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    base: u64,
    position: u64,
}

/// What the open segment had to say about the offset.
enum Step {
    /// Read on in this segment.
    Read,
    /// It ends here.
    EndOfSegment,
    /// It is damaged here.
    Damaged,
}

impl LogReader {
    pub(super) fn new(dir: PathBuf, offset: u64) -> Self {
        Self { dir, offset, open: None }
    }

    /// The offset of the next byte.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// What there is between the offset and `until`: at most one block of it, and nothing only when they are equal.
    pub(crate) fn read(&mut self, until: u64) -> io::Result<Vec<Item>> {
        let mut items = Joiner::default();
        while self.offset < until && items.is_empty() {
            let Some(open) = self.open.take().map_or_else(|| self.open_segment(), |open| Ok(Some(open)))? else {
                items.push_gap(self.skip_to_next_segment(until, DROPPED)?);
                continue;
            };
            match self.read_block(open, until, &mut items)? {
                Step::Read | Step::EndOfSegment => {}
                Step::Damaged => items.push_gap(self.skip_to_next_segment(until, DAMAGED)?),
            }
        }
        Ok(items.finish())
    }

    /// Opens the segment that holds the offset.
    fn open_segment(&self) -> io::Result<Option<Open>> {
        loop {
            let segments = segment::list(&self.dir)?;
            let Some(found) = segments.iter().rev().find(|segment| segment.base <= self.offset) else {
                return Ok(None);
            };
            match File::open(&found.path) {
                Ok(file) => return Ok(Some(Open { file, base: found.base, position: 0 })),
                // Dropped since it was listed: look again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Moves the offset to the next segment after it, or to `until` when there is none; returns what was passed over.
    fn skip_to_next_segment(&mut self, until: u64, reason: &str) -> io::Result<pb::LogGap> {
        let next = segment::list(&self.dir)?.into_iter().map(|segment| segment.base).find(|base| *base > self.offset);
        let to_offset = next.unwrap_or(until).min(until);
        let gap = pb::LogGap { from_offset: self.offset, to_offset, reason: reason.to_owned() };
        self.offset = to_offset;
        Ok(gap)
    }

    fn read_block(&mut self, mut open: Open, until: u64, items: &mut Joiner) -> io::Result<Step> {
        let block = Bytes::from(segment::read_block(&open.file, open.position)?);
        let mut at = 0;
        while let Some((header, data)) = segment::record_at(&block, at) {
            if header.offset >= until || header.kind == Kind::End {
                break;
            }
            let next = at + HEADER + header.len;
            if header.end_offset() > self.offset {
                if header.offset > self.offset || !header.matches(&block[at..at + HEADER], data) {
                    return Ok(Step::Damaged);
                }
                // Below `len`, because the record ends after the offset.
                let known = usize::try_from(self.offset - header.offset).unwrap_or(header.len);
                items.push(&header, self.offset, block.slice(at + HEADER + known..next));
                self.offset = header.end_offset();
            }
            at = next;
        }
        if at > 0 {
            open.position += at as u64;
            self.open = Some(open);
            return Ok(Step::Read);
        }
        // Nothing whole is left: fine when another segment begins just here.
        let reopened = self.open_segment()?;
        match reopened {
            Some(next) if next.base > open.base => {
                self.open = Some(next);
                Ok(Step::EndOfSegment)
            }
            _ => Ok(Step::Damaged),
        }
    }
}

const DROPPED: &str = "the node has dropped this part, to bound what logs take of its disk";
const DAMAGED: &str = "this part of the log is damaged on the node's disk";

/// Joins small neighbours.
#[derive(Default)]
struct Joiner {
    items: Vec<Item>,
    joined: Option<(Header, u64, BytesMut)>,
}

impl Joiner {
    fn is_empty(&self) -> bool {
        self.items.is_empty() && self.joined.is_none()
    }

    fn push(&mut self, header: &Header, offset: u64, data: Bytes) {
        if data.len() >= JOIN_BELOW {
            self.flush();
            return self.push_chunk(header.kind, offset, header.time, data);
        }
        match &mut self.joined {
            Some((first, _, joined)) if first.kind == header.kind && joined.len() + data.len() <= JOIN_UP_TO => {
                joined.extend_from_slice(&data);
            }
            Some(_) | None => {
                self.flush();
                self.joined = Some((*header, offset, BytesMut::from(data.as_ref())));
            }
        }
    }

    fn push_gap(&mut self, gap: pb::LogGap) {
        self.flush();
        if gap.to_offset > gap.from_offset {
            self.items.push(Item::Gap(gap));
        }
    }

    fn push_chunk(&mut self, kind: Kind, offset: u64, time: Timestamp, data: Bytes) {
        let stream = kind.stream().unwrap_or(pb::LogStream::Unspecified).into();
        self.items.push(Item::Chunk(pb::LogChunk { stream, offset, time: Some(time.into()), data }));
    }

    fn flush(&mut self) {
        if let Some((header, offset, data)) = self.joined.take() {
            self.push_chunk(header.kind, offset, header.time, data.freeze());
        }
    }

    fn finish(mut self) -> Vec<Item> {
        self.flush();
        self.items
    }
}
