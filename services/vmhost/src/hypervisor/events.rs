//! What a hypervisor tells about its machine as it happens, through a FIFO: JSON objects with a blank line after each.
//!
//! Hints only. The hypervisor drops what does not fit, and all of it while vmhost is down. That a machine has ended is
//! known by its pidfd; an event can tell *why*, and that a guest is over whose hypervisor would go on.

use std::{io, path::Path, time::Duration};

use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    net::unix::pipe,
};

/// The longest event that is listened to. They have about 200 bytes.
const MAX_EVENT_BYTES: usize = 16 * 1024;
/// After as many bytes: one that has been taken over by its guest may tell without end, and vmhost has other things to do.
const PAUSE: Duration = Duration::from_millis(10);

/// How a driver's hypervisor tells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Events {
    /// The FIFO's name in the directory that the hypervisor runs in.
    pub(super) fifo: &'static str,
    /// Why the machine is over, if the event says that it is.
    pub(super) verdict: fn(&str) -> Option<&'static str>,
}

impl Events {
    /// Makes the FIFO. It must be open for reading before the hypervisor opens it for writing, or that one waits.
    pub(super) fn make(&self, dir: &Path) -> io::Result<pipe::Receiver> {
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.join(self.fifo), Mode::RUSR | Mode::WUSR)?;
        self.open(dir)
    }

    /// The FIFO in the directory that the hypervisor runs in.
    pub(super) fn open(&self, dir: &Path) -> io::Result<pipe::Receiver> {
        // The directory is the hypervisor's: what stands there may lead elsewhere.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        pipe::Receiver::from_owned_fd(rustix::fs::open(dir.join(self.fifo), flags, Mode::empty())?)
    }

    /// Listens until an event says that the machine is over; `None` when the hypervisor has ended first.
    pub(super) async fn await_verdict(&self, source: impl AsyncRead + Unpin) -> Option<&'static str> {
        let mut source = BufReader::new(source);
        let (mut event, mut heard) = (String::new(), 0);
        loop {
            if heard >= MAX_EVENT_BYTES {
                heard = 0;
                tokio::time::sleep(PAUSE).await;
            }
            let mut line = Vec::new();
            let read = (&mut source).take(MAX_EVENT_BYTES as u64).read_until(b'\n', &mut line).await.ok()?;
            if read == 0 {
                return None;
            }
            heard += read;
            if !line.trim_ascii().is_empty() {
                if event.len() + line.len() <= MAX_EVENT_BYTES {
                    event.push_str(&String::from_utf8_lossy(&line));
                }
                continue;
            }
            if let Some(why) = (self.verdict)(&event) {
                return Some(why);
            }
            event.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Events {
        Events { fifo: "events", verdict: |event| event.contains("panic").then_some("it panicked") }
    }

    #[tokio::test]
    async fn the_first_event_that_is_a_verdict_counts_whatever_came_before() {
        let noise = format!("{{\n  \"a\": 1\n}}\n\nnot json\n\n{}\n\n\n", "x".repeat(3 * MAX_EVENT_BYTES));
        let text = format!("{noise}{{\n  \"event\": \"panic\"\n}}\n\n");
        assert_eq!(events().await_verdict(text.as_bytes()).await, Some("it panicked"));
        assert_eq!(events().await_verdict(noise.as_bytes()).await, None);
        // Not whole: the hypervisor died in the middle of it.
        assert_eq!(events().await_verdict("{\n  \"event\": \"panic\"\n".as_bytes()).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_tells_without_end_is_listened_to_now_and_then() {
        let begun = tokio::time::Instant::now();
        let chatter = "{}\n\n".repeat(50 * MAX_EVENT_BYTES / 4);
        assert_eq!(events().await_verdict(chatter.as_bytes()).await, None);
        assert_eq!(begun.elapsed(), 50 * PAUSE);
    }
}
