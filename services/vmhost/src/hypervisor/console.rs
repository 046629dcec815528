//! A machine's console: everything it and its host processes print, in a ring that cannot grow.
//!
//! ```text
//!   guest's serial port ─┬─ QEMU: socket chardev ────────────┐
//!                        └─ Cloud Hypervisor: its stdout ─┐  │
//!   stdout, stderr of the host processes ── FIFO `output` ┴──┴─► ring in memory (64 KiB) ─► segments `console.<offset>`
//!                                                                              (two of 64 KiB, a new vmhost reads them)
//! ```
//!
//! Why these two ways in:
//! - A *file* given to the hypervisor is unbounded: a guest that prints for a day fills the disk.
//! - QEMU's own `ringbuf` dies with QEMU, and a console is wanted most after a crash.
//! - A *pipe* breaks when vmhost dies, and its writers with it. A **FIFO** that the writers themselves hold open for
//!   reading too never breaks: while vmhost is away it keeps the first 64 KiB, and since it does not block, what is
//!   beyond that is lost and nobody waits for vmhost. It suits messages of programs.
//! - A guest's serial port must not be held up either. Into a FIFO that nobody reads, QEMU would: the guest then waits
//!   10 ms for each byte. A **socket** chardev throws bytes away while nobody is connected and hands over the last ones
//!   after QEMU's death. So the only bytes lost are those that a guest prints while vmhost is down.
//! - Cloud Hypervisor's socket is no such thing: what it could not write yet is lost when it ends, a panic's last lines
//!   first, and a reader that dies with bytes unread ends the port for good. The FIFO it writes to without waiting, as
//!   its stdout. Version 53 raises no interrupt for a byte that found no room, though: after 64 KiB without vmhost the
//!   guest's kernel prints on, but a program that prints to the console waits, until vmhost is back and says Hello (the
//!   agent then sets the console going again).

use std::{
    collections::VecDeque,
    fs::{self, File},
    future::poll_fn,
    io::{self, Write as _},
    mem::MaybeUninit,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::unix::pipe,
    sync::Notify,
};

/// How much of a console is kept in memory, and so how much one can read: a kernel's boot messages and a crash fit.
pub const CONSOLE_TAIL_BYTES: usize = 64 * 1024;
/// A segment on disk is closed at this size. Two are kept, so the last [`CONSOLE_TAIL_BYTES`] always stand on disk.
const SEGMENT_BYTES: u64 = CONSOLE_TAIL_BYTES as u64;
const SEGMENT_PREFIX: &str = "console.";
/// The FIFO that the host processes write to.
pub(super) const OUTPUT_FIFO: &str = "output";
/// Between two reads. QEMU writes a serial port byte by byte; reading byte by byte would cost the guest CPU. A Unix
/// socket holds about 280 one-byte writes, so the guest still prints 140 KB/s.
const READ_PAUSE: Duration = Duration::from_millis(2);
/// Bytes taken in one read.
const READ_BYTES: usize = 16 * 1024;
/// How old bytes may become before they are written to disk: what a kill -9 of vmhost can lose of a console.
const PERSIST_EVERY: Duration = Duration::from_millis(250);

/// The end of a console.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Console {
    /// The last bytes, at most [`CONSOLE_TAIL_BYTES`].
    pub tail: Vec<u8>,
    /// How many bytes came before them.
    pub skipped: u64,
}

impl Console {
    /// What a launch left in its directory; empty when it left nothing. For a machine that is gone.
    #[must_use]
    pub fn of_dir(dir: &Path) -> Self {
        load(dir).console()
    }
}

/// The last bytes, and how many there have ever been.
#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    total: u64,
}

impl Ring {
    fn push(&mut self, data: &[u8]) {
        self.total += data.len() as u64;
        let data = &data[data.len().saturating_sub(CONSOLE_TAIL_BYTES)..];
        let excess = (self.bytes.len() + data.len()).saturating_sub(CONSOLE_TAIL_BYTES);
        self.bytes.drain(..excess);
        self.bytes.extend(data);
    }

    fn start(&self) -> u64 {
        self.total - self.bytes.len() as u64
    }

    /// The bytes from `offset` on, or from the first that is left; with their offset.
    fn since(&self, offset: u64) -> (u64, Vec<u8>) {
        let from = offset.max(self.start());
        let skip = usize::try_from(from - self.start()).unwrap_or(usize::MAX);
        (from, self.bytes.iter().copied().skip(skip).collect())
    }

    fn console(&self) -> Console {
        Console { tail: self.bytes.iter().copied().collect(), skipped: self.start() }
    }
}

/// The segments on disk.
#[derive(Debug)]
struct Store {
    dir: PathBuf,
    file: Option<File>,
    /// Offset of the open segment's first byte.
    segment_start: u64,
    /// Everything before this offset is on disk, or was overwritten in the ring before it could be.
    end: u64,
}

impl Store {
    fn append(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let full = self.end - self.segment_start >= SEGMENT_BYTES;
        if self.file.is_none() || full || offset != self.end {
            self.file = Some(File::create(self.dir.join(format!("{SEGMENT_PREFIX}{offset:020}")))?);
            self.segment_start = offset;
            self.drop_old_segments();
        }
        if let Some(file) = &mut self.file {
            file.write_all(data)?;
        }
        self.end = offset + data.len() as u64;
        Ok(())
    }

    fn drop_old_segments(&self) {
        for (_, path) in segments(&self.dir).iter().rev().skip(2) {
            let _ = fs::remove_file(path);
        }
    }
}

fn segments(dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut segments: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let offset = entry.file_name().to_str()?.strip_prefix(SEGMENT_PREFIX)?.parse().ok()?;
            Some((offset, entry.path()))
        })
        .collect();
    segments.sort();
    segments
}

fn load(dir: &Path) -> Ring {
    let mut ring = Ring::default();
    for (offset, path) in segments(dir) {
        // Where bytes are missing between two segments, the ring must not hold what is before the gap.
        if offset != ring.total {
            ring = Ring { bytes: VecDeque::new(), total: offset };
        }
        ring.push(&fs::read(path).unwrap_or_default());
    }
    ring
}

/// A console that is being written. Clones are handles to the same one.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ring: Mutex<Ring>,
    store: Mutex<Store>,
    grown: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A ring is whole after every statement: a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// Goes on where an earlier vmhost stopped.
    pub(super) fn open(dir: &Path) -> Self {
        let ring = load(dir);
        let store = Store { dir: dir.to_owned(), file: None, segment_start: ring.total, end: ring.total };
        Self { shared: Arc::new(Shared { ring: Mutex::new(ring), store: Mutex::new(store), grown: Notify::new() }) }
    }

    pub(super) fn snapshot(&self) -> Console {
        lock(&self.shared.ring).console()
    }

    /// Writes to disk what is not there yet. Blocks: a few system calls.
    pub(super) fn persist(&self) {
        let mut store = lock(&self.shared.store);
        let (offset, data) = lock(&self.shared.ring).since(store.end);
        if !data.is_empty()
            && let Err(error) = store.append(offset, &data)
        {
            tracing::warn!(dir = %store.dir.display(), %error, "cannot write the console to disk");
        }
    }

    /// Records everything that comes out of `source`, until its end.
    pub(super) async fn record(&self, mut source: impl AsyncRead + Unpin) {
        while let Ok(1..) = poll_fn(|context| self.poll_read(Pin::new(&mut source), context)).await {
            self.shared.grown.notify_one();
            tokio::time::sleep(READ_PAUSE).await;
        }
    }

    /// Takes what is there: its length. The buffer is on the stack, so that a silent console has none.
    fn poll_read(&self, source: Pin<&mut impl AsyncRead>, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut buffer = [MaybeUninit::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut buffer);
        ready!(source.poll_read(context, &mut buffer))?;
        lock(&self.shared.ring).push(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Writes to disk what is recorded, for ever.
    pub(super) async fn keep_persisting(&self) {
        loop {
            self.shared.grown.notified().await;
            tokio::time::sleep(PERSIST_EVERY).await;
            let recorder = self.clone();
            let _ = tokio::task::spawn_blocking(move || recorder.persist()).await;
        }
    }
}

/// Makes the FIFO. The file is what the host processes get as stdout and stderr; the receiver sees its end when the
/// last of them has ended and the file is dropped.
pub(super) fn make_output(dir: &Path) -> io::Result<(File, pipe::Receiver)> {
    let path = dir.join(OUTPUT_FIFO);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR)?;
    // For reading too, so that it never breaks; not blocking, so that nobody waits for vmhost.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let writer = rustix::fs::open(&path, flags, Mode::empty())?;
    Ok((writer.into(), open_output(dir)?))
}

/// The FIFO of a machine that an earlier vmhost launched.
pub(super) fn open_output(dir: &Path) -> io::Result<pipe::Receiver> {
    pipe::OpenOptions::new().open_receiver(dir.join(OUTPUT_FIFO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_bytes_and_counts_the_others() {
        let mut ring = Ring::default();
        let data: Vec<u8> = (0..CONSOLE_TAIL_BYTES * 3).map(|i| (i % 251) as u8).collect();
        for chunk in data.chunks(1000) {
            ring.push(chunk);
        }
        let console = ring.console();
        assert_eq!(console.skipped, (CONSOLE_TAIL_BYTES * 2) as u64);
        assert!(console.tail == data[CONSOLE_TAIL_BYTES * 2..]);
        ring.push(&data);
        assert!(ring.console().tail == data[CONSOLE_TAIL_BYTES * 2..]);
        assert_eq!(ring.total, data.len() as u64 * 2);
    }

    #[test]
    fn a_new_vmhost_reads_the_same_tail_from_disk_and_the_disk_stays_bounded() {
        let dir = tempfile::tempdir().expect("tempdir");
        let recorder = Recorder::open(dir.path());
        for round in 0..1000_u32 {
            lock(&recorder.shared.ring).push(round.to_string().repeat(200).as_bytes());
            recorder.persist();
            if round % 100 == 0 {
                assert_eq!(Recorder::open(dir.path()).snapshot(), recorder.snapshot());
            }
        }
        assert_eq!(Recorder::open(dir.path()).snapshot(), recorder.snapshot());
        assert_eq!(Console::of_dir(dir.path()), recorder.snapshot());
        let on_disk: u64 = segments(dir.path()).iter().map(|(_, path)| path.metadata().expect("there").len()).sum();
        assert!(on_disk <= 3 * SEGMENT_BYTES, "{on_disk}");
    }

    #[test]
    fn bytes_that_never_reached_the_disk_are_counted_as_skipped() {
        let dir = tempfile::tempdir().expect("tempdir");
        let recorder = Recorder::open(dir.path());
        lock(&recorder.shared.ring).push(b"first");
        recorder.persist();
        lock(&recorder.shared.ring).push(&vec![b'x'; CONSOLE_TAIL_BYTES]);
        lock(&recorder.shared.ring).push(b"last");
        recorder.persist();
        let console = Console::of_dir(dir.path());
        assert_eq!(console, recorder.snapshot());
        assert_eq!(console.skipped, 9);
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_neither_blocks_nor_breaks_its_writer() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut writer, receiver) = make_output(dir.path()).expect("makes");
        writer.write_all(b"before ").expect("writes");
        drop(receiver);
        writer.write_all(b"while nobody reads").expect("no broken pipe");
        let full = (0..1000).find_map(|_| writer.write_all(&[b'.'; 1000]).err()).expect("fills up");
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);

        let recorder = Recorder::open(dir.path());
        let receiver = open_output(dir.path()).expect("opens");
        drop(writer);
        recorder.record(receiver).await;
        assert!(recorder.snapshot().tail.starts_with(b"before while nobody reads"));
    }
}
