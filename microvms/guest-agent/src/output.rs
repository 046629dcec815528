//! What a command wrote and the host has not stored yet.
//!
//! ```text
//!   acknowledged │ sealed chunks (immutable, shared with streams) │ open run │ not read yet: in the pipe
//!   ─────────────┼────────────────────────────────────────────────┼──────────┤
//!                start                                                       end     end - start ≤ MAX_UNACKED
//! ```
//! Both output streams share one sequence of offsets. The *open run* grows while nobody reads it, so small writes
//! coalesce exactly when the host is slow or away, and leave at once when it is waiting. Bytes are written once, by
//! `read(2)`, into the block that the chunks are later slices of.
//!
//! This module knows no clock, pipe or task: who reads passes in how.

use std::{collections::VecDeque, io};

use blixard::{limits, pb::common::v1::LogStream, time::Timestamp};
use bytes::{BufMut, Bytes, BytesMut, buf::Limit};

/// Most bytes kept for the host. Part of the contract: a command whose host is away blocks when it has written this much.
pub(crate) const MAX_UNACKED: usize = 4 * 1024 * 1024;
/// Most chunks kept, so that a command that alternates one byte of stdout with one of stderr costs no more than that
/// many bookkeeping entries (64 bytes each: 4 MiB) beside its bytes.
pub(crate) const MAX_CHUNKS: usize = 64 * 1024;
/// A block with less room than this is closed and a new one begun: a small read costs a system call like a large one.
const MIN_READ: usize = 16 * 1024;

/// Consecutive bytes of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where they came from.
    pub(crate) stream: LogStream,
    /// Offset of the first one.
    pub(crate) offset: u64,
    /// When the first one was read.
    pub(crate) time: Timestamp,
    /// 1 to 64 KiB of them.
    pub(crate) data: Bytes,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    fn skip_to(&mut self, offset: u64) {
        let skipped = offset.saturating_sub(self.offset);
        self.data = self.data.slice(usize::try_from(skipped).unwrap_or(usize::MAX).min(self.data.len())..);
        self.offset += skipped;
    }
}

/// An offset outside of what is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotKept {
    /// Offset of the first byte kept.
    pub(crate) start: u64,
    /// Offset after the last byte read so far.
    pub(crate) end: u64,
}

/// The bounded buffer of one attempt's output.
#[derive(Debug)]
pub(crate) struct OutputBuffer {
    sealed: VecDeque<Chunk>,
    open: BytesMut,
    open_stream: LogStream,
    open_time: Timestamp,
    start: u64,
    end: u64,
}

impl Default for OutputBuffer {
    fn default() -> Self {
        Self {
            sealed: VecDeque::new(),
            open: BytesMut::new(),
            open_stream: LogStream::Unspecified,
            open_time: Timestamp::default(),
            start: 0,
            end: 0,
        }
    }
}

impl OutputBuffer {
    /// Offset of the first byte kept: the host has all before it.
    #[must_use]
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Offset that the next byte will have.
    #[must_use]
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// How many bytes may be read now; 0 when the host must acknowledge first.
    #[must_use]
    pub(crate) fn room(&self) -> usize {
        if self.sealed.len() >= MAX_CHUNKS {
            return 0;
        }
        let kept = usize::try_from(self.end - self.start).unwrap_or(usize::MAX);
        MAX_UNACKED.saturating_sub(kept)
    }

    /// Appends what `read` puts into the buffer it is given and returns how much that was; `Ok(0)` is the end of the
    /// stream. There must be [room](Self::room).
    ///
    /// # Errors
    /// Those of `read`; nothing is appended then.
    pub(crate) fn append(
        &mut self,
        stream: LogStream,
        now: Timestamp,
        read: impl FnOnce(&mut Limit<&mut BytesMut>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        debug_assert!(self.room() > 0, "the caller waits for room");
        if stream != self.open_stream || self.spare() < MIN_READ {
            self.seal();
        }
        if self.spare() < MIN_READ {
            self.open.reserve(limits::MAX_LOG_CHUNK);
        }
        let limit = self.spare().min(self.room());
        let was_empty = self.open.is_empty();
        let length = read(&mut (&mut self.open).limit(limit))?;
        if was_empty {
            (self.open_stream, self.open_time) = (stream, now);
        }
        self.end += length as u64;
        Ok(length)
    }

    /// Appends bytes that were read elsewhere, all of them: the caller has waited for [room](Self::room), and may exceed it by what
    /// it has held back.
    pub(crate) fn push(&mut self, stream: LogStream, now: Timestamp, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if stream != self.open_stream || self.spare() == 0 {
                self.seal();
            }
            if self.spare() == 0 {
                self.open.reserve(limits::MAX_LOG_CHUNK);
            }
            let (now_fitting, rest) = bytes.split_at(self.spare().min(bytes.len()));
            if self.open.is_empty() {
                (self.open_stream, self.open_time) = (stream, now);
            }
            self.open.extend_from_slice(now_fitting);
            self.end += now_fitting.len() as u64;
            bytes = rest;
        }
    }

    /// The chunk that holds `offset`, from there on; `None` when nothing after it has been read yet.
    ///
    /// # Errors
    /// The offset was acknowledged, or lies beyond the end.
    pub(crate) fn chunk_from(&mut self, offset: u64) -> Result<Option<Chunk>, NotKept> {
        if !(self.start..=self.end).contains(&offset) {
            return Err(self.not_kept());
        }
        if offset == self.end {
            return Ok(None);
        }
        self.seal_if_holding(offset);
        let index = self.sealed.partition_point(|chunk| chunk.end() <= offset);
        let mut chunk = self.sealed.get(index).cloned().ok_or(self.not_kept())?;
        chunk.skip_to(offset);
        Ok(Some(chunk))
    }

    /// Forgets every byte before `offset`; one that was acknowledged before changes nothing.
    ///
    /// # Errors
    /// The offset lies beyond the end.
    pub(crate) fn acknowledge(&mut self, offset: u64) -> Result<(), NotKept> {
        if offset > self.end {
            return Err(self.not_kept());
        }
        if offset <= self.start {
            return Ok(());
        }
        self.seal_if_holding(offset - 1);
        while self.sealed.front().is_some_and(|chunk| chunk.end() <= offset) {
            self.sealed.pop_front();
        }
        if let Some(front) = self.sealed.front_mut() {
            front.skip_to(offset);
        }
        self.start = offset;
        Ok(())
    }

    /// How much the open run can still grow.
    fn spare(&self) -> usize {
        self.open.capacity().min(limits::MAX_LOG_CHUNK) - self.open.len()
    }

    fn not_kept(&self) -> NotKept {
        NotKept { start: self.start, end: self.end }
    }

    fn seal_if_holding(&mut self, offset: u64) {
        if offset >= self.end - self.open.len() as u64 {
            self.seal();
        }
    }

    /// Ends the open run: from here on it is an immutable chunk. The block's unused rest serves the next run.
    fn seal(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let data = self.open.split().freeze();
        self.sealed.push_back(Chunk {
            stream: self.open_stream,
            offset: self.end - data.len() as u64,
            time: self.open_time,
            data,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Appends as much of `bytes` as a single read takes.
    fn push(buffer: &mut OutputBuffer, stream: LogStream, bytes: &[u8]) -> usize {
        let read = |into: &mut Limit<&mut BytesMut>| {
            let length = bytes.len().min(into.remaining_mut());
            into.put_slice(&bytes[..length]);
            Ok(length)
        };
        buffer.append(stream, Timestamp(7), read).expect("reading memory")
    }

    fn everything_from(buffer: &mut OutputBuffer, mut offset: u64) -> Vec<(LogStream, u8)> {
        let mut all = Vec::new();
        while let Some(chunk) = buffer.chunk_from(offset).expect("kept") {
            assert_eq!(chunk.offset, offset, "no gap and no overlap");
            assert!((1..=limits::MAX_LOG_CHUNK).contains(&chunk.data.len()));
            all.extend(chunk.data.iter().map(|&byte| (chunk.stream, byte)));
            offset = chunk.end();
        }
        all
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(LogStream, usize),
        Acknowledge(u64),
        ReadFrom(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let stream = prop_oneof![Just(LogStream::Stdout), Just(LogStream::Stderr)];
        let length = prop_oneof![4 => 1_usize..40, 1 => 1_usize..200_000];
        let step = prop_oneof![
            3 => (stream, length).prop_map(|(stream, length)| Step::Push(stream, length)),
            1 => (0_u64..1 << 20).prop_map(Step::Acknowledge),
            1 => (0_u64..1 << 20).prop_map(Step::ReadFrom),
        ];
        proptest::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn any_interleaving_of_push_acknowledge_and_read_gives_each_byte_once(steps in steps()) {
            let mut buffer = OutputBuffer::default();
            let mut written: Vec<(LogStream, u8)> = Vec::new();
            for step in steps {
                match step {
                    Step::Push(stream, length) => {
                        let bytes: Vec<u8> = (0..length).map(|i| ((written.len() + i) % 251) as u8).collect();
                        let room = buffer.room();
                        let taken = if room == 0 { 0 } else { push(&mut buffer, stream, &bytes) };
                        prop_assert!(taken <= room);
                        prop_assert_eq!(taken == 0, room == 0);
                        written.extend(bytes[..taken].iter().map(|&byte| (stream, byte)));
                    }
                    Step::Acknowledge(offset) => {
                        let offset = offset % (buffer.end() + 2);
                        let before = buffer.start();
                        let result = buffer.acknowledge(offset);
                        prop_assert_eq!(result.is_ok(), offset <= buffer.end());
                        prop_assert_eq!(buffer.start(), if result.is_ok() { before.max(offset) } else { before });
                    }
                    Step::ReadFrom(offset) => {
                        let offset = buffer.start() + offset % (buffer.end() - buffer.start() + 1);
                        prop_assert_eq!(&everything_from(&mut buffer, offset)[..], &written[offset as usize..]);
                    }
                }
                prop_assert_eq!(buffer.end(), written.len() as u64);
                prop_assert!(buffer.end() - buffer.start() <= MAX_UNACKED as u64);
            }
            let start = buffer.start();
            prop_assert_eq!(&everything_from(&mut buffer, start)[..], &written[start as usize..]);
        }
    }

    #[test]
    fn small_writes_coalesce_while_nobody_reads_them() {
        let mut buffer = OutputBuffer::default();
        for _ in 0..1000 {
            push(&mut buffer, LogStream::Stdout, b"ten bytes\n");
        }
        let chunk = buffer.chunk_from(0).expect("kept").expect("there is output");
        assert_eq!(chunk.data.len(), 10_000);
        push(&mut buffer, LogStream::Stdout, b"more");
        let next = buffer.chunk_from(10_000).expect("kept").expect("there is output");
        assert_eq!((next.offset, &next.data[..]), (10_000, &b"more"[..]));
    }

    #[test]
    fn it_is_full_at_four_mebibytes_and_takes_exactly_what_is_acknowledged() {
        let mut buffer = OutputBuffer::default();
        let block = vec![b'x'; 100_000];
        while buffer.room() > 0 {
            push(&mut buffer, LogStream::Stdout, &block);
        }
        assert_eq!(buffer.end(), MAX_UNACKED as u64);
        buffer.acknowledge(5).expect("kept");
        assert_eq!(buffer.room(), 5);
        assert_eq!(push(&mut buffer, LogStream::Stderr, &block), 5);
        assert_eq!(buffer.room(), 0);
    }

    #[test]
    fn streams_that_alternate_byte_by_byte_are_bounded_too() {
        let mut buffer = OutputBuffer::default();
        while buffer.room() > 0 {
            let stream = if buffer.end() % 2 == 0 { LogStream::Stdout } else { LogStream::Stderr };
            push(&mut buffer, stream, b"x");
        }
        assert!(buffer.end() <= MAX_CHUNKS as u64 + 1);
        buffer.acknowledge(buffer.end()).expect("kept");
        assert_eq!(buffer.room(), MAX_UNACKED);
    }

    #[test]
    fn acknowledged_and_future_offsets_are_refused_with_what_is_kept() {
        let mut buffer = OutputBuffer::default();
        push(&mut buffer, LogStream::Stdout, b"0123456789");
        buffer.acknowledge(4).expect("kept");
        let kept = NotKept { start: 4, end: 10 };
        assert_eq!(buffer.chunk_from(3), Err(kept));
        assert_eq!(buffer.chunk_from(11), Err(kept));
        assert_eq!(buffer.acknowledge(11), Err(kept));
        assert_eq!(buffer.acknowledge(2), Ok(()));
        assert_eq!(buffer.start(), 4);
    }

    #[test]
    fn a_failed_read_appends_nothing() {
        let mut buffer = OutputBuffer::default();
        push(&mut buffer, LogStream::Stdout, b"a");
        let blocked = buffer.append(LogStream::Stderr, Timestamp(1), |_| Err(io::ErrorKind::WouldBlock.into()));
        assert!(blocked.is_err());
        push(&mut buffer, LogStream::Stdout, b"b");
        let all = everything_from(&mut buffer, 0);
        assert_eq!(all, [(LogStream::Stdout, b'a'), (LogStream::Stdout, b'b')]);
    }
}
