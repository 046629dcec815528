//! Where the agent listens: a vsock port in a guest, a Unix socket beside the process driver.

use std::{
    ffi::OsString,
    fmt, fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{Stream, stream};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// Where the host finds the agent of a guest. Part of the contract.
pub(crate) const VSOCK_PORT: u32 = 1024;
/// How long to wait after a connection could not be accepted (no descriptors left).
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// An address to listen on: `vsock:PORT` or `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A port of the guest's vsock.
    Vsock(u32),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl Address {
    /// Parses the value of `--listen`.
    ///
    /// # Errors
    /// What would have been allowed.
    pub(crate) fn parse(value: &OsString) -> Result<Self, String> {
        let text = value.to_string_lossy();
        let error = || format!("--listen: \"{text}\" is not allowed: vsock:PORT or unix:PATH");
        match text.split_once(':') {
            Some(("vsock", port)) => port.parse().map(Self::Vsock).map_err(|_| error()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(_) | None => Err(error()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A bound socket. A Unix socket's file is removed when it is dropped.
#[derive(Debug)]
pub(crate) enum Listener {
    /// In a guest.
    Vsock(VsockListener),
    /// Beside the process driver.
    Unix { listener: UnixListener, _file: SocketFile },
}

/// A socket's file, removed when dropped.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Binds. A socket file that nobody listens on any more is replaced. Must be called within the runtime.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Vsock(port) => Ok(Self::Vsock(VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port))?)),
            Address::Unix(path) => {
                remove_stale(path);
                let listener = UnixListener::bind(path)?;
                let _file = SocketFile(path.clone());
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                Ok(Self::Unix { listener, _file })
            }
        }
    }
}

/// Every connection from now on. Never ends and never fails: the server would end with it.
pub(crate) fn connections<C, F>(accept: impl Fn() -> F) -> impl Stream<Item = io::Result<C>>
where
    F: Future<Output = io::Result<C>>,
{
    stream::unfold(accept, |accept| async move {
        loop {
            match accept().await {
                Ok(connection) => return Some((Ok(connection), accept)),
                Err(error) => eprintln!("blixard-guest-agent: cannot accept a connection: {error}"),
            }
            tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
        }
    })
}

fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused) {
        let _ = fs::remove_file(path);
    }
}
