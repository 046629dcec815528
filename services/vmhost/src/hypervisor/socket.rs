//! Unix sockets in a directory whose path may be longer than a socket's address (107 bytes).
//!
//! Children run *in* the directory, so a bare name always reaches it for them; vmhost goes through
//! `/proc/self/fd/<directory>`. Short paths are used as they are: they are what people look for in `ps` and `ss`.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

/// `sun_path` has 108 bytes, one of them for the final zero, and a vsock proxy appends `_<port>` to the path it is given.
const MAX_PATH_BYTES: usize = 107 - "_1024".len();

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

    /// The socket's path for a process whose working directory is this directory.
    pub(super) fn for_child(&self, name: &str) -> PathBuf {
        self.short(name).unwrap_or_else(|| name.into())
    }

    /// The socket's path for this process, valid as long as `self`.
    pub(super) fn for_us(&self, name: &str) -> PathBuf {
        self.short(name).unwrap_or_else(|| format!("/proc/self/fd/{}/{name}", self.handle.as_raw_fd()).into())
    }

    fn short(&self, name: &str) -> Option<PathBuf> {
        let path = self.path.join(name);
        (path.as_os_str().len() <= MAX_PATH_BYTES).then_some(path)
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
        assert_eq!(dir.for_child("s"), Path::new("s"));
        let _listener = tokio::net::UnixListener::bind(dir.for_us("s")).expect("binds");
        assert!(deep.join("s").exists());
        tokio::net::UnixStream::connect(dir.for_us("s")).await.expect("connects");
    }

    #[test]
    fn a_short_path_is_used_as_it_is() {
        let root = tempfile::tempdir().expect("tempdir");
        let dir = SocketDir::open(root.path()).expect("opens");
        assert_eq!(dir.for_child("s"), root.path().join("s"));
        assert_eq!(dir.for_us("s"), root.path().join("s"));
    }
}
