use std::fs;

use blixard::pb::common::v1::{LogChunk, LogStream};
use bytes::Bytes;
use proptest::prelude::*;

use super::*;

const SMALL: LogLimits = LogLimits { segment_bytes: 300, attempt_bytes: u64::MAX, node: NodeLogs::Bytes(u64::MAX) };

fn open(dir: &Path) -> LogStore {
    LogStore::open(dir, LogLimits::from(&blixard::config::Config::default().retention)).unwrap()
}

fn job() -> JobId {
    JobId(uuid::Uuid::from_u128(1))
}

fn chunk(offset: u64, stream: LogStream, data: &[u8]) -> LogChunk {
    let time = Some(Timestamp(i64::try_from(offset).unwrap()).into());
    LogChunk { stream: stream.into(), offset, time, data: Bytes::copy_from_slice(data) }
}

fn end(outcome: Outcome, end_offset: u64) -> EndRecord {
    EndRecord { outcome, end_offset, finished_at: Timestamp(5), started_at: Some(Timestamp(4)) }
}

fn succeeded() -> Outcome {
    Outcome::Result { state: JobState::Succeeded, exit: None, reason: String::new() }
}

/// Reads from an offset to what the log has now, checking that nothing is missing or twice.
fn read_all(store: &LogStore, from: u64) -> (Vec<(i32, u8)>, Vec<pb::LogGap>) {
    read_all_of(store, job(), from)
}

fn read_all_of(store: &LogStore, job: JobId, from: u64) -> (Vec<(i32, u8)>, Vec<pb::LogGap>) {
    let (mut reader, state) = store.read(job, 1, from).unwrap().expect("the log is there");
    let until = state.borrow().next;
    let (mut bytes, mut gaps, mut at) = (Vec::new(), Vec::new(), from);
    while reader.offset() < until {
        for item in reader.read(until).unwrap() {
            match item {
                Item::Chunk(chunk) => {
                    assert_eq!(chunk.offset, at, "the next chunk begins where the last one ended");
                    assert!((1..=record::MAX_DATA).contains(&chunk.data.len()));
                    at += chunk.data.len() as u64;
                    bytes.extend(chunk.data.iter().map(|byte| (chunk.stream, *byte)));
                }
                Item::Gap(gap) => {
                    assert_eq!(gap.from_offset, at);
                    at = gap.to_offset;
                    gaps.push(gap);
                }
            }
        }
    }
    (bytes, gaps)
}

use blixard::pb::common::v1 as pb;

#[derive(Debug, Clone)]
enum Op {
    Append {
        stderr: bool,
        len: usize,
    },
    /// The writer dies; the last segment loses up to so many bytes of its last record.
    Crash {
        torn: u64,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let len = prop_oneof![4 => 1..50usize, 1 => 200..9000usize];
    let append = (any::<bool>(), len).prop_map(|(stderr, len)| Op::Append { stderr, len });
    proptest::collection::vec(prop_oneof![5 => append, 1 => (0..40u64).prop_map(|torn| Op::Crash { torn })], 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The guest sends again what a crash tore off, so that the log is always what it has sent.
    #[test]
    fn any_appends_and_crashes_then_any_read_gives_the_exact_bytes(ops in ops(), from in 0..20_000u64) {
        let dir = tempfile::tempdir().unwrap();
        let store = LogStore::open(dir.path(), SMALL).unwrap();
        let mut writer = store.begin(job(), 1).unwrap().unwrap();
        let mut sent: Vec<(i32, u8)> = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            match op {
                Op::Append { stderr, len } => {
                    let stream = if stderr { LogStream::Stderr } else { LogStream::Stdout };
                    let data: Vec<u8> = (0..len).map(|i| u8::try_from((i * 31 + number * 7) % 256).unwrap()).collect();
                    // The guest may repeat what the log has already.
                    let repeat = sent.iter().rev().take_while(|(s, _)| *s == i32::from(stream)).count().min(5);
                    let mut all: Vec<u8> = sent[sent.len() - repeat..].iter().map(|(_, byte)| *byte).collect();
                    all.extend(&data);
                    writer.append(&[chunk((sent.len() - repeat) as u64, stream, &all)]).unwrap();
                    sent.extend(data.iter().map(|byte| (i32::from(stream), *byte)));
                }
                Op::Crash { torn } => {
                    drop(writer);
                    let last = segment::list(&store.attempt_dir(job(), 1)).unwrap().pop();
                    if let Some(last) = last {
                        let file = File::options().write(true).open(&last.path).unwrap();
                        let bytes = file.metadata().unwrap().len();
                        file.set_len(bytes.saturating_sub(torn)).unwrap();
                    }
                    writer = store.reopen(job(), 1).unwrap();
                    let kept = usize::try_from(writer.next_offset()).unwrap();
                    prop_assert!(kept <= sent.len());
                    sent.truncate(kept);
                }
            }
        }
        let from = from.min(sent.len() as u64);
        let expected = sent[usize::try_from(from).unwrap()..].to_vec();
        prop_assert_eq!(read_all(&store, from), (expected, vec![]));
    }
}

#[tokio::test]
async fn the_end_is_found_after_a_restart_and_closes_the_fence() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    assert_eq!(store.fence(job(), 1).unwrap(), Fence::Open);
    let mut writer = store.begin(job(), 1).unwrap().unwrap();
    assert_eq!(store.fence(job(), 1).unwrap(), Fence::Running);
    writer.append(&[chunk(0, LogStream::Stdout, b"hello")]).unwrap();
    writer.finish(end(succeeded(), 5)).await;
    assert_eq!(store.fence(job(), 1).unwrap(), Fence::Ended);

    let store = open(dir.path());
    assert_eq!(store.fence(job(), 1).unwrap(), Fence::Ended);
    let (_, state) = store.read(job(), 1, 0).unwrap().unwrap();
    assert_eq!(*state.borrow(), LogState { next: 5, end: Some(Arc::new(end(succeeded(), 5))) });
    assert_eq!(read_all(&store, 2).0.len(), 3);

    drop(store.begin(job(), 3).unwrap().unwrap());
    assert_eq!(store.fence(job(), 2).unwrap(), Fence::Stale { current: 3 });
    assert!(matches!(store.begin(job(), 2).unwrap(), Err(Fence::Stale { current: 3 })));
}

#[test]
fn an_attempt_whose_log_was_never_begun_may_begin() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join(job().to_string()).join("1")).unwrap();
    let store = open(dir.path());
    assert_eq!(store.fence(job(), 1).unwrap(), Fence::Open);
    assert!(store.read(job(), 1, 0).unwrap().is_none(), "no log yet");
}

#[test]
fn a_log_beyond_its_limit_loses_its_oldest_part_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = LogStore::open(dir.path(), LogLimits { attempt_bytes: 1000, ..SMALL }).unwrap();
    let mut writer = store.begin(job(), 1).unwrap().unwrap();
    for number in 0..40u64 {
        writer.append(&[chunk(number * 100, LogStream::Stdout, &[b'x'; 100])]).unwrap();
    }
    let kept: u64 = segment::list(&store.attempt_dir(job(), 1))
        .unwrap()
        .iter()
        .map(|segment| fs::metadata(&segment.path).unwrap().len())
        .sum();
    assert!(kept <= 1000, "{kept} bytes are kept");
    let (bytes, gaps) = read_all(&store, 50);
    assert_eq!(gaps.len(), 1);
    assert_eq!((gaps[0].from_offset, gaps[0].to_offset), (50, 4000 - bytes.len() as u64));
}

#[test]
fn damage_in_the_middle_is_a_gap_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = LogStore::open(dir.path(), SMALL).unwrap();
    let mut writer = store.begin(job(), 1).unwrap().unwrap();
    for number in 0..9u64 {
        writer.append(&[chunk(number * 100, LogStream::Stdout, &[b'x'; 100])]).unwrap();
    }
    let segments = segment::list(&store.attempt_dir(job(), 1)).unwrap();
    let mut damaged = fs::read(&segments[1].path).unwrap();
    damaged[record::HEADER + 100 + 10] ^= 1;
    fs::write(&segments[1].path, damaged).unwrap();
    let (bytes, gaps) = read_all(&store, 0);
    let gap = gaps.first().expect("a gap");
    assert_eq!((gap.from_offset, gap.to_offset, gaps.len()), (400, segments[2].base, 1));
    assert_eq!(bytes.len() as u64, 900 - (gap.to_offset - gap.from_offset));
}

#[test]
fn many_small_records_come_out_as_few_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.begin(job(), 1).unwrap().unwrap();
    for number in 0..2000u64 {
        writer.append(&[chunk(number * 10, LogStream::Stdout, b"ten bytes\n")]).unwrap();
    }
    let (mut reader, _) = store.read(job(), 1, 0).unwrap().unwrap();
    let items = reader.read(20_000).unwrap();
    assert_eq!((items.len(), reader.offset()), (1, 20_000));
}

#[tokio::test]
async fn a_follower_is_woken_by_the_writer() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut writer = store.begin(job(), 1).unwrap().unwrap();
    let (mut reader, mut state) = store.read(job(), 1, 0).unwrap().unwrap();
    let mut seen = Vec::new();
    for number in 0..5u64 {
        writer.append(&[chunk(number, LogStream::Stdout, b"x")]).unwrap();
        state.changed().await.unwrap();
        let until = state.borrow_and_update().next;
        seen.extend(reader.read(until).unwrap());
    }
    writer.finish(end(succeeded(), 5)).await;
    state.changed().await.unwrap();
    assert!(state.borrow().end.is_some());
    assert_eq!(seen.len(), 5);
}

#[tokio::test]
async fn a_jobs_directory_is_deleted_unless_an_attempt_is_being_written_and_a_half_deleted_one_goes_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (writing, ended) = (job(), JobId(uuid::Uuid::from_u128(2)));
    let log = store.begin(ended, 1).unwrap().unwrap();
    log.finish(end(succeeded(), 0)).await;
    store.close(ended, 1);
    let _log = store.begin(writing, 1).unwrap().unwrap();
    // A crash left this; the other is nobody's.
    let half = dir.path().join(format!("{}.{DELETED}", JobId(uuid::Uuid::from_u128(3))));
    fs::create_dir_all(half.join("1")).unwrap();
    fs::create_dir(dir.path().join("consoles")).unwrap();
    assert_eq!(store.quiet_jobs().unwrap(), [ended]);
    assert!(!half.exists());
    assert!(!store.delete(writing).unwrap() && store.delete(ended).unwrap() && !store.delete(ended).unwrap());
    assert_eq!(store.fence(ended, 1).unwrap(), Fence::Open);
    assert_eq!(store.fence(writing, 1).unwrap(), Fence::Running);
    assert!(dir.path().join("consoles").exists());
}

/// An attempt that has printed so many bytes, and its end.
async fn ended(store: &LogStore, job: JobId, bytes: u64) {
    let mut writer = store.begin(job, 1).unwrap().unwrap();
    for offset in (0..bytes).step_by(1000) {
        writer.append(&[chunk(offset, LogStream::Stdout, &[b'x'; 1000])]).unwrap();
    }
    writer.finish(end(succeeded(), bytes)).await;
    store.close(job, 1);
    // So that the order of their ends shows in the times of their files.
    let now = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(job.0.as_u128() as u64);
    for segment in segment::list(&store.attempt_dir(job, 1)).unwrap() {
        File::options().append(true).open(segment.path).unwrap().set_modified(now).unwrap();
    }
}

#[tokio::test]
async fn beyond_the_bound_of_a_node_the_oldest_ended_attempts_lose_their_output_and_keep_their_end() {
    let dir = tempfile::tempdir().unwrap();
    let limits = LogLimits { segment_bytes: 4000, attempt_bytes: u64::MAX, node: NodeLogs::Bytes(100_000) };
    let store = LogStore::open(dir.path(), limits).unwrap();
    let jobs = [1, 2, 3, 4].map(|id| JobId(uuid::Uuid::from_u128(id)));
    assert!(store.may_be_crowded().unwrap(), "nobody has looked");
    let mut running = store.begin(jobs[0], 1).unwrap().unwrap();
    for offset in (0..30_000).step_by(1000) {
        running.append(&[chunk(offset, LogStream::Stdout, &[b'r'; 1000])]).unwrap();
    }
    ended(&store, jobs[1], 30_000).await;
    ended(&store, jobs[2], 20_000).await;
    assert_eq!(store.make_room().unwrap(), Dropped::default());
    assert!(!store.may_be_crowded().unwrap());

    let (mut behind, _) = store.read(jobs[1], 1, 0).unwrap().unwrap();
    let first = behind.read(30_000).unwrap();
    assert!(matches!(first.first(), Some(Item::Chunk(_))));
    ended(&store, jobs[3], 30_000).await;
    assert!(store.may_be_crowded().unwrap());
    let dropped = store.make_room().unwrap();
    assert!(dropped.attempts == 1 && dropped.bytes > 30_000 && !dropped.crowded, "{dropped:?}");
    assert!(!store.may_be_crowded().unwrap());

    // The oldest has its end and nothing else, also after a restart; the others are whole.
    let store = LogStore::open(dir.path(), limits).unwrap();
    let (_, state) = store.read(jobs[1], 1, 0).unwrap().unwrap();
    assert_eq!(*state.borrow(), LogState { next: 30_000, end: Some(Arc::new(end(succeeded(), 30_000))) });
    assert_eq!(store.fence(jobs[1], 1).unwrap(), Fence::Ended);
    let (bytes, gaps) = read_all_of(&store, jobs[1], 10);
    assert_eq!((bytes.len(), gaps.len(), gaps[0].from_offset, gaps[0].to_offset), (0, 1, 10, 30_000));
    assert!(read_all_of(&store, jobs[1], 30_000).1.is_empty(), "whoever has all of it misses nothing");
    for (job, whole) in [(jobs[2], 20_000), (jobs[3], 30_000)] {
        let (bytes, gaps) = read_all_of(&store, job, 0);
        assert_eq!((bytes.len(), gaps.len()), (whole, 0));
    }
    // A reader that is behind gets what it still has open, and then the gap.
    let mut at = behind.offset();
    while at < 30_000 {
        for item in behind.read(30_000).unwrap() {
            match item {
                Item::Chunk(chunk) => at = chunk.offset + chunk.data.len() as u64,
                Item::Gap(gap) => {
                    assert_eq!(gap.from_offset, at);
                    at = gap.to_offset;
                }
            }
        }
    }
    assert_eq!(at, 30_000);
}

#[tokio::test]
async fn what_runs_keeps_its_output_and_a_crash_while_room_is_made_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let limits = LogLimits { node: NodeLogs::Bytes(1000), segment_bytes: 4000, attempt_bytes: u64::MAX };
    let store = LogStore::open(dir.path(), limits).unwrap();
    let other = JobId(uuid::Uuid::from_u128(2));
    let mut running = store.begin(job(), 1).unwrap().unwrap();
    running.append(&[chunk(0, LogStream::Stdout, &[b'r'; 9000])]).unwrap();
    ended(&store, other, 20_000).await;
    // As if the crash had fallen between the segment with the end and the deletion of the others.
    let segments = segment::list(&store.attempt_dir(other, 1)).unwrap();
    let saved: Vec<_> =
        segments.iter().map(|segment| (segment.path.clone(), fs::read(&segment.path).unwrap())).collect();
    assert!(store.make_room().unwrap().crowded, "what runs is more than there may be");
    for (path, bytes) in &saved[1..] {
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(store.fence(other, 1).unwrap(), Fence::Ended);
    let (bytes, gaps) = read_all_of(&store, other, 0);
    assert_eq!((gaps.len(), bytes.len() as u64), (1, 20_000 - (gaps[0].to_offset - gaps[0].from_offset)));
    assert!(store.make_room().unwrap().bytes > 4000);
    assert_eq!(segment::list(&store.attempt_dir(other, 1)).unwrap().len(), 1);
    assert_eq!(read_all(&store, 0).0.len(), 9000);
}
