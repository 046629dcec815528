//! Unix sockets in a directory whose path may be longer than a socket's address (107 bytes).
//!
//! Children run *in* the directory, so a bare name reaches a socket for them, also where they may not pass the directories above; vmhost goes
//! through `/proc/self/fd/<directory>` when the path is too long. The directory may be a hypervisor's own: vmhost never follows a link in it.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags};
use tokio::net::UnixStream;

/// `sun_path` has 108 bytes, one of them for the final zero.
const MAX_PATH_BYTES: usize = 107;

/// A directory with sockets in it.
#[derive(Debug)]
pub(super) struct SocketDir {
    path: PathBuf,
    handle: OwnedFd,
}

impl SocketDir {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { path: path.to_owned(), handle: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// The directory, for a child to be started in.
    pub(super) fn for_start(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.handle.as_raw_fd()).into()
    }

    /// A file's path for this process, valid as long as `self`.
    pub(super) fn for_us(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        if path.as_os_str().len() <= MAX_PATH_BYTES { path } else { self.for_start().join(name) }
    }

    /// Connects to a socket.
    pub(super) async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let socket = self.hold(name)?;
        UnixStream::connect(socket.path()).await
    }

    /// Takes hold of a socket, for whoever connects to it by a path.
    pub(super) fn hold(&self, name: &str) -> io::Result<HeldSocket> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(&self.handle, name, flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is no socket")));
        }
        Ok(HeldSocket(socket))
    }
}

/// A socket, whatever becomes of its name.
#[derive(Debug)]
pub(super) struct HeldSocket(OwnedFd);

impl HeldSocket {
    /// A path of it for this process, valid as long as `self`.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_in_a_deep_directory_can_be_reached() {
        let root = tempfile::tempdir().expect("tempdir");
        let deep = root.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).expect("mkdir");
        let dir = SocketDir::open(&deep).expect("opens");
        let _listener = tokio::net::UnixListener::bind(dir.for_us("s")).expect("binds");
        assert!(deep.join("s").exists());
        dir.connect("s").await.expect("connects");
    }

    #[tokio::test]
    async fn a_link_to_somebody_elses_socket_is_not_followed() {
        let root = tempfile::tempdir().expect("tempdir");
        let _others = tokio::net::UnixListener::bind(root.path().join("others")).expect("binds");
        let own = root.path().join("own");
        std::fs::create_dir(&own).expect("mkdir");
        std::os::unix::fs::symlink("../others", own.join("s")).expect("links");
        let dir = SocketDir::open(&own).expect("opens");
        assert_eq!(dir.connect("s").await.expect_err("refused").kind(), io::ErrorKind::InvalidInput);
        assert_eq!(dir.connect("none").await.expect_err("none").kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_short_path_is_used_as_it_is() {
        let root = tempfile::tempdir().expect("tempdir");
        let dir = SocketDir::open(root.path()).expect("opens");
        assert_eq!(dir.for_us("s"), root.path().join("s"));
    }
}
