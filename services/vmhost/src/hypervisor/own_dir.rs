//! The directory that a machine's processes run in, `run/` in its launch's: whose it is, and when.
//!
//! ```text
//!   made ── hand_over: its user's, to make its sockets in ── they are bound, the agent serves ── take_back: vmhost's again
//! ```
//! What a user owns nobody keeps it from filling: each file and each socket is an inode of the host's. So it owns the directory no longer than
//! it takes. Afterwards it goes on using what is there, and vmhost makes and removes what it needs to. Where VMs have no users of their own
//! all of it is vmhost's user's from beginning to end.
//!
//! What lies beside the directory is vmhost's and closed to others, so nobody puts anything in the directory's own place.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown},
    path::Path,
};

/// Of a directory that its group may use what is in, and nothing else.
pub(super) const USED: u32 = 0o750;
/// Of one that its group may write to.
pub(super) const LENT: u32 = 0o770;

/// Gives the directory and what is in it to a user; of the directories in it, their use. Nothing of that user's may run yet.
pub(super) fn hand_over(dir: &Path, user: u32) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            lchown(entry.path(), None, Some(user))?;
            fs::set_permissions(entry.path(), Permissions::from_mode(USED))?;
        } else {
            lchown(entry.path(), Some(user), Some(user))?;
        }
    }
    lchown(dir, Some(user), Some(user))
}

/// Takes the directory back, and every directory that its user has made in it. Again is no harm. Blocking.
pub(super) fn take_back(dir: &Path, user: u32) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let mut dirs = vec![dir.to_owned()];
    // From above: what stands in a directory that is vmhost's is replaced by nobody.
    while let Some(dir) = dirs.pop() {
        lchown(&dir, Some(own), Some(user))?;
        fs::set_permissions(&dir, Permissions::from_mode(USED))?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            // Not those that vmhost made: one of them may be lent.
            if entry.file_type()?.is_dir() && entry.metadata()?.uid() == user {
                dirs.push(entry.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind::PermissionDenied,
        os::unix::net::{UnixListener, UnixStream},
    };

    use blixard::config::UserRange;
    use rustix::{
        process::{Gid, Uid},
        thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
    };

    use super::*;
    use crate::hypervisor::may_change_user;

    const USER: u32 = 1_879_048_193;

    /// Does something as a VM's user.
    fn as_user<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
        let work = || {
            set_thread_groups(&[]).expect("no other groups");
            set_thread_res_gid(gid, gid, gid).expect("the group");
            set_thread_res_uid(uid, uid, uid).expect("the user");
            work()
        };
        std::thread::scope(|scope| scope.spawn(work).join()).expect("it ends")
    }

    fn denied<T>(result: io::Result<T>, what: &str) {
        assert_eq!(result.map(drop).map_err(|error| error.kind()), Err(PermissionDenied), "{what}");
    }

    #[test]
    fn a_directory_that_is_taken_back_is_used_and_nothing_is_made_in_it() {
        if let Err(problem) = may_change_user(UserRange { first: USER, last: USER }, false) {
            return eprintln!("SKIPPED: nothing is done as another user: {problem}");
        }
        let root = tempfile::tempdir().expect("tempdir");
        fs::set_permissions(root.path(), Permissions::from_mode(0o711)).expect("chmod");
        let dir = root.path().join("run");
        let at = |name: &str| dir.join(name);
        for made in [&dir, &at("disks"), &at("saved")] {
            fs::create_dir(made).expect("mkdir");
        }
        fs::write(at("disks/shared"), "shared").expect("writes");
        fs::write(at("scratch"), "").expect("writes");
        hand_over(&dir, USER).expect("is given");
        fs::set_permissions(at("saved"), Permissions::from_mode(LENT)).expect("is lent");

        // What it may do while it starts.
        let listener = as_user(|| {
            fs::create_dir_all(at("own/deeper")).expect("mkdir");
            fs::write(at("own/deeper/file"), "").expect("writes");
            denied(fs::remove_file(at("disks/shared")), "a disk of others");
            denied(fs::write(at("disks/more"), ""), "a file beside them");
            UnixListener::bind(at("socket")).expect("binds")
        });

        // Twice: as by a vmhost that is killed in between, and the next.
        for _ in 0..2 {
            take_back(&dir, USER).expect("is taken back");
        }
        as_user(|| {
            denied(fs::write(at("more"), ""), "a file");
            denied(UnixListener::bind(at("another")), "a socket");
            denied(fs::create_dir(at("directory")), "a directory");
            denied(fs::hard_link(at("scratch"), at("link")), "a link");
            denied(fs::rename(at("socket"), at("renamed")), "another name");
            denied(fs::remove_file(at("socket")), "no socket");
            denied(fs::write(at("own/more"), ""), "a file in what it made");
            denied(fs::write(at("own/deeper/more"), ""), "a file below that");
            denied(fs::set_permissions(&dir, Permissions::from_mode(0o777)), "another mode");
            fs::write(at("scratch"), "written").expect("its own file");
            fs::write(at("saved/state"), "saved").expect("a file where it is lent room");
            assert_eq!(fs::read(at("disks/shared")).expect("may be read"), b"shared");
            UnixStream::connect(at("socket")).expect("connects");
        });
        listener.accept().expect("somebody connected");

        // And vmhost goes on as before.
        let _knocks = UnixListener::bind(at("knocks")).expect("binds");
        fs::remove_file(at("socket")).expect("removes");
        assert_eq!(fs::read(at("saved/state")).expect("reads"), b"saved");
        fs::remove_dir_all(&dir).expect("removes");
    }
}
