//! A machine's network interface on the host: a TAP, opened here so that the hypervisor needs no right of its own.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};

use crate::net::Mac;

/// What the kernel gives TAPs by.
pub(crate) const TUN_DEVICE: &str = "/dev/net/tun";
/// The longest name of an interface, without the NUL behind it.
const MAX_NAME_BYTES: usize = 15;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
/// Packets have a header that says what the other side still has to do (checksums, segmentation): virtio-net's own.
const IFF_VNET_HDR: u16 = 0x4000;
/// Fail when there is one of this name.
const IFF_TUN_EXCL: u16 = 0x8000;

/// A network interface to give a machine: a TAP that is there already, persistent, and nobody's yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The TAP's name.
    pub tap: String,
    /// The guest's hardware address.
    pub mac: Mac,
}

impl Nic {
    /// Attaches to the TAP: whoever holds the descriptor sends and receives for the guest. It takes CAP_NET_ADMIN. At most one is
    /// open at a time; the TAP itself stays when it is closed. Closed on exec.
    ///
    /// # Errors
    /// There is no such TAP, or it is taken.
    pub fn open(&self) -> io::Result<OwnedFd> {
        attach(&self.tap, 0)
    }
}

/// Makes a TAP that stays when its descriptor is closed. Fails when there is an interface of that name.
pub(crate) fn create_tap(name: &str) -> io::Result<()> {
    const TUNSETPERSIST: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 203);
    let tap = attach(name, IFF_TUN_EXCL)?;
    // SAFETY: TUNSETPERSIST takes a number and no pointer.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    Ok(unsafe { ioctl(&tap, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }?)
}

fn attach(name: &str, flags: u16) -> io::Result<OwnedFd> {
    /// `struct ifreq`, with as much of its union as the ioctl reads.
    #[repr(C)]
    struct InterfaceRequest {
        name: [u8; MAX_NAME_BYTES + 1],
        flags: u16,
        rest: [u8; 22],
    }
    const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("\"{name}\" is no interface's name")));
    }
    let mut request = InterfaceRequest {
        name: [0; MAX_NAME_BYTES + 1],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let tun = File::options().read(true).write(true).open(TUN_DEVICE)?;
    // SAFETY: TUNSETIFF reads a `struct ifreq`, which is 40 bytes laid out as above, and keeps no pointer to it.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    unsafe { ioctl(tun.as_fd(), Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }?;
    Ok(tun.into())
}
