//! The files of an image while it is made: layers are merged here, in memory, and nothing of them is ever a file of the
//! host's. A path that climbs, or a symbolic link that points at the host's files, leads nowhere but into this tree.
//!
//! ```text
//!   layer 1, layer 2, …  ── changes ──►  Tree: inodes, and directories that name them  ──►  erofs
//!                                          └─ contents: where their bytes are, not the bytes
//! ```
//!
//! What a path means is what it would mean to a process whose root this is: a symbolic link on the way is followed, `/`
//! and `..` end at this root. The last name of a path is never followed. As in containerd, and so in Docker.

use std::collections::BTreeMap;

/// One name in a path: neither empty nor `.` nor `..`, without `/` and NUL.
pub type Name = Vec<u8>;
/// A path from the root on; the root has none.
pub type Path = Vec<Name>;
/// An inode's place in [`Tree::inodes`].
pub type InodeId = usize;

/// The root directory.
pub const ROOT: InodeId = 0;
/// As many symbolic links as Linux follows in one path.
const MAX_LINKS_FOLLOWED: u32 = 40;

/// Where the bytes of a file are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// In the unpacked layer of this number, from an offset on.
    Layer { layer: usize, offset: u64, len: u64 },
    /// In a file of the host, below a directory whose owner told us to take it.
    Host { path: Path, len: u64 },
    /// Here.
    Bytes(Vec<u8>),
}

impl Content {
    /// How many there are.
    pub fn size(&self) -> u64 {
        match self {
            Self::Layer { len, .. } | Self::Host { len, .. } => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory(BTreeMap<Name, InodeId>),
    File(Content),
    Symlink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// What every inode has beside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permissions with set-uid, set-gid and sticky: the lower 12 bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u64,
    /// By their full names: `user.x`, `security.capability`.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    pub kind: Kind,
    pub attributes: Attributes,
}

impl Inode {
    /// A directory that nobody described.
    fn directory() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        Self { kind: Kind::Directory(BTreeMap::new()), attributes }
    }
}

/// What a layer does to what is below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Whiteout: this path of the layers below is gone.
    Remove(Path),
    /// Opaque whiteout: what the layers below have in this directory is gone.
    Empty(Path),
    /// This is here now. A directory keeps the names that it has.
    Add(Path, Inode),
    /// The first path is another name of the second.
    Link(Path, Path),
}

/// A layer that makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    #[error("{} is on the way to another file, and no directory", show(.0))]
    NotADirectory(Path),
    #[error("{} leads through more than {MAX_LINKS_FOLLOWED} symbolic links", show(.0))]
    TooManyLinks(Path),
    #[error("{} is to be another name of {}, which is not there or is a directory", show(.0), show(.1))]
    BadLink(Path, Path),
    #[error("the root is not a directory")]
    RootReplaced,
}

/// A path, for people.
pub fn show(path: &[Name]) -> String {
    let text = path.iter().map(|name| String::from_utf8_lossy(name).escape_debug().to_string());
    text.fold(String::new(), |text, name| text + "/" + &name)
}

/// The files of an image.
#[derive(Debug)]
pub struct Tree {
    /// Some may have lost all their names.
    inodes: Vec<Inode>,
}

impl Default for Tree {
    fn default() -> Self {
        Self { inodes: vec![Inode::directory()] }
    }
}

impl Tree {
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id]
    }

    /// Applies a layer. Whiteouts speak of the layers below only, wherever in the layer they stand.
    pub fn apply(&mut self, changes: Vec<Change>) -> Result<(), Conflict> {
        for change in &changes {
            match change {
                Change::Remove(path) => self.remove(path),
                Change::Empty(path) => self.empty(path),
                Change::Add(..) | Change::Link(..) => {}
            }
        }
        for change in changes {
            match change {
                Change::Remove(_) | Change::Empty(_) => {}
                Change::Add(path, inode) => self.add(&path, inode)?,
                Change::Link(path, target) => self.link(&path, &target)?,
            }
        }
        Ok(())
    }

    /// A whiteout of what is not there is no mistake: tools write them to be sure.
    fn remove(&mut self, path: &[Name]) {
        let Some((last, parent)) = path.split_last() else { return };
        if let Ok(Some(parent)) = self.walk(parent, false)
            && let Kind::Directory(names) = &mut self.inodes[parent].kind
        {
            names.remove(last);
        }
    }

    fn empty(&mut self, path: &[Name]) {
        if let Ok(Some(id)) = self.walk(path, false)
            && let Kind::Directory(names) = &mut self.inodes[id].kind
        {
            names.clear();
        }
    }

    pub fn add(&mut self, path: &[Name], inode: Inode) -> Result<(), Conflict> {
        let Some((last, parent)) = path.split_last() else {
            return self.update(ROOT, inode).map_err(|_| Conflict::RootReplaced);
        };
        let parent = self.directory(parent)?;
        let old = self.names(parent).get(last).copied();
        if let Some(old) = old {
            match self.update(old, inode) {
                Ok(()) => Ok(()),
                Err(inode) => self.insert(parent, last, inode),
            }
        } else {
            self.insert(parent, last, inode)
        }
    }

    /// A directory over a directory changes its attributes; anything else is handed back.
    fn update(&mut self, id: InodeId, inode: Inode) -> Result<(), Inode> {
        match (&self.inodes[id].kind, &inode.kind) {
            (Kind::Directory(_), Kind::Directory(_)) => {
                self.inodes[id].attributes = inode.attributes;
                Ok(())
            }
            _ => Err(inode),
        }
    }

    fn insert(&mut self, parent: InodeId, name: &[u8], inode: Inode) -> Result<(), Conflict> {
        let id = self.inodes.len();
        self.inodes.push(inode);
        self.name(parent, name, id);
        Ok(())
    }

    fn link(&mut self, path: &[Name], target: &[Name]) -> Result<(), Conflict> {
        let bad = || Conflict::BadLink(path.to_owned(), target.to_owned());
        let found = self.find(target)?.ok_or_else(bad)?;
        let (Some((last, parent)), false) = (path.split_last(), self.is_directory(found)) else { return Err(bad()) };
        let parent = self.directory(parent)?;
        self.name(parent, last, found);
        Ok(())
    }

    /// What a path names; a symbolic link at its end is not followed.
    pub fn find(&mut self, path: &[Name]) -> Result<Option<InodeId>, Conflict> {
        let Some((last, parent)) = path.split_last() else { return Ok(Some(ROOT)) };
        let parent = self.walk(parent, false)?;
        Ok(parent.and_then(|parent| self.names(parent).get(last).copied()))
    }

    /// The directory at a path, made with all above it if it is not there.
    fn directory(&mut self, path: &[Name]) -> Result<InodeId, Conflict> {
        self.walk(path, true)?.ok_or_else(|| Conflict::NotADirectory(path.to_owned()))
    }

    /// Walks along a path to a directory, through symbolic links, never above the root.
    fn walk(&mut self, path: &[Name], make: bool) -> Result<Option<InodeId>, Conflict> {
        let mut above = vec![];
        let mut here = ROOT;
        let mut links = 0;
        // The names still to go, last first.
        let mut ahead: Vec<Name> = path.iter().rev().cloned().collect();
        while let Some(name) = ahead.pop() {
            if name == b".." {
                here = above.pop().unwrap_or(ROOT);
                continue;
            }
            let next = match self.names(here).get(&name) {
                Some(&next) => next,
                None if make => {
                    let made = self.inodes.len();
                    self.inodes.push(Inode::directory());
                    self.name(here, &name, made);
                    made
                }
                None => return Ok(None),
            };
            match &self.inodes[next].kind {
                Kind::Directory(_) => above.push(std::mem::replace(&mut here, next)),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS_FOLLOWED {
                        return Err(Conflict::TooManyLinks(path.to_owned()));
                    }
                    if target.starts_with(b"/") {
                        above.clear();
                        here = ROOT;
                    }
                    let names = target.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
                    ahead.extend(names.rev().map(<[u8]>::to_vec));
                }
                Kind::File(_) | Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => {
                    return Err(Conflict::NotADirectory(path.to_owned()));
                }
            }
        }
        Ok(Some(here))
    }

    fn is_directory(&self, id: InodeId) -> bool {
        matches!(self.inodes[id].kind, Kind::Directory(_))
    }

    fn names(&self, id: InodeId) -> &BTreeMap<Name, InodeId> {
        static NONE: BTreeMap<Name, InodeId> = BTreeMap::new();
        if let Kind::Directory(names) = &self.inodes[id].kind { names } else { &NONE }
    }

    fn name(&mut self, directory: InodeId, name: &[u8], id: InodeId) {
        if let Kind::Directory(names) = &mut self.inodes[directory].kind {
            names.insert(name.to_owned(), id);
        }
    }
}

#[cfg(test)]
mod tests;
