//! An empty ext4 file system: what `mke2fs` would make, written by ourselves.
//!
//! ```text
//!   group 0   superblock, group descriptors, block bitmap, inode bitmap, inode table, the root directory's one block
//!   group n   block bitmap, inode bitmap, inode table: none of it written, but for the last group's block bitmap
//! ```
//! Own code, because what an empty file system takes is little: a sparse file is zeros, and so is an inode table that nobody has used, and
//! group descriptors with checksums may say so (`uninit_bg`). 64 GiB take 40 KiB of writing, and vmhost needs no tool of its host for them.
//! Neither a journal nor spare copies: what is on a scratch disk does not outlive its VM. No `lost+found` either, so that it is empty. The
//! format is Linux' `fs/ext4/ext4.h`.

use std::{fs::File, io, os::unix::fs::FileExt as _};

const BLOCK: u64 = 4096;
const BLOCKS_PER_MIB: u64 = 256;
/// As many as a bitmap of one block has bits.
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
const INODE_BYTES: u64 = 256;
const INODES_PER_BLOCK: u64 = BLOCK / INODE_BYTES;
/// An inode for each 16 KiB, as `mke2fs` has it.
const BLOCKS_PER_INODE: u64 = 4;
const DESCRIPTOR_BYTES: u64 = 32;
/// A last group with less room than this beside its own blocks is not worth having.
const LEAST_ROOM: u64 = 50;

const ROOT_INODE: u64 = 2;
/// The first one that is not reserved.
const FIRST_INODE: u64 = 11;
const RESERVED: u64 = FIRST_INODE - 1;

/// Descriptor flags: the inode table was never used; the block bitmap is not written and follows from the layout; the table is zeros.
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const ITABLE_ZEROED: u16 = 4;

/// dir_index; sparse_super2, with no spare superblock at all.
const COMPATIBLE: u32 = 0x20 | 0x200;
/// filetype, extents.
const INCOMPATIBLE: u32 = 0x2 | 0x40;
/// sparse_super, large_file, huge_file, gdt_csum, dir_nlink, extra_isize.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40;

/// Makes the file so many MiB long, sparse, with an empty file system on it. `id` names it, and is what its hashes begin with.
///
/// # Errors
/// The file can't be written.
pub fn create(file: &File, mib: u64, id: &[u8; 16]) -> io::Result<()> {
    file.set_len(mib * BLOCKS_PER_MIB * BLOCK)?;
    let layout = Layout::of(mib * BLOCKS_PER_MIB);
    file.write_all_at(&layout.superblock(id), 1024)?;
    file.write_all_at(&layout.descriptors(id), BLOCK)?;
    let (block_bitmap, inode_bitmap, inode_table) = layout.place(0);
    file.write_all_at(&bitmap(layout.overhead(0), layout.blocks_of(0)), block_bitmap * BLOCK)?;
    file.write_all_at(&bitmap(RESERVED, layout.inodes_per_group), inode_bitmap * BLOCK)?;
    file.write_all_at(&layout.root_inode(), inode_table * BLOCK + (ROOT_INODE - 1) * INODE_BYTES)?;
    file.write_all_at(&root_directory(), layout.root_block() * BLOCK)?;
    let last = layout.groups - 1;
    if last > 0 {
        // The one group whose bitmap must be there: it may be shorter than the others.
        let (block_bitmap, ..) = layout.place(last);
        file.write_all_at(&bitmap(layout.overhead(last), layout.blocks_of(last)), block_bitmap * BLOCK)?;
    }
    Ok(())
}

/// What lies where.
struct Layout {
    blocks: u64,
    groups: u64,
    inodes_per_group: u64,
    descriptor_blocks: u64,
}

impl Layout {
    fn of(blocks: u64) -> Self {
        let inodes = blocks.min(BLOCKS_PER_GROUP) / BLOCKS_PER_INODE;
        let inodes_per_group = inodes.next_multiple_of(INODES_PER_BLOCK);
        let mut layout =
            Self { blocks, groups: blocks.div_ceil(BLOCKS_PER_GROUP), inodes_per_group, descriptor_blocks: 0 };
        let last = layout.groups - 1;
        if last > 0 && layout.blocks_of(last) < 2 + layout.table_blocks() + LEAST_ROOM {
            (layout.groups, layout.blocks) = (last, last * BLOCKS_PER_GROUP);
        }
        layout.descriptor_blocks = (layout.groups * DESCRIPTOR_BYTES).div_ceil(BLOCK);
        layout
    }

    fn table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    fn blocks_of(&self, group: u64) -> u64 {
        BLOCKS_PER_GROUP.min(self.blocks - group * BLOCKS_PER_GROUP)
    }

    /// Block bitmap, inode bitmap, inode table.
    fn place(&self, group: u64) -> (u64, u64, u64) {
        let first = group * BLOCKS_PER_GROUP + if group == 0 { 1 + self.descriptor_blocks } else { 0 };
        (first, first + 1, first + 2)
    }

    fn root_block(&self) -> u64 {
        self.place(0).2 + self.table_blocks()
    }

    /// How many blocks at the beginning of a group are taken.
    fn overhead(&self, group: u64) -> u64 {
        if group == 0 { self.root_block() + 1 } else { 2 + self.table_blocks() }
    }

    fn superblock(&self, id: &[u8; 16]) -> Vec<u8> {
        let free_blocks: u64 = (0..self.groups).map(|group| self.blocks_of(group) - self.overhead(group)).sum();
        let inodes = self.groups * self.inodes_per_group;
        let mut bytes = Record::new(1024);
        bytes.u32(0, inodes);
        bytes.u32(4, self.blocks);
        bytes.u32(12, free_blocks);
        bytes.u32(16, inodes - RESERVED);
        bytes.u32(24, 2); // 1024 << 2: the block's size, and that of what is allocated at once.
        bytes.u32(28, 2);
        bytes.u32(32, BLOCKS_PER_GROUP);
        bytes.u32(36, BLOCKS_PER_GROUP);
        bytes.u32(40, self.inodes_per_group);
        bytes.u16(54, 0xffff); // Never to be checked for having been mounted often.
        bytes.u16(56, 0xef53);
        bytes.u16(58, 1); // Clean.
        bytes.u16(60, 1); // After an error it goes on: the job's disk is the job's.
        bytes.u32(76, 1); // The revision with features.
        bytes.u32(84, FIRST_INODE);
        bytes.u16(88, 256);
        bytes.u32(92, COMPATIBLE.into());
        bytes.u32(96, INCOMPATIBLE.into());
        bytes.u32(100, READ_ONLY_COMPATIBLE.into());
        bytes.bytes(104, id);
        bytes.bytes(236, id); // What hashes of names begin with.
        bytes.0[252] = 1; // They are half MD4, …
        bytes.u32(352, 1); // … of signed bytes.
        bytes.u16(348, 32);
        bytes.u16(350, 32);
        bytes.0
    }

    fn descriptors(&self, id: &[u8; 16]) -> Vec<u8> {
        (0..self.groups).flat_map(|group| self.descriptor(group, id)).collect()
    }

    fn descriptor(&self, group: u64, id: &[u8; 16]) -> Vec<u8> {
        let (block_bitmap, inode_bitmap, inode_table) = self.place(group);
        let (used, flags) = match group {
            0 => (RESERVED, ITABLE_ZEROED),
            last if last == self.groups - 1 => (0, INODE_UNINIT | ITABLE_ZEROED),
            _ => (0, INODE_UNINIT | BLOCK_UNINIT | ITABLE_ZEROED),
        };
        let mut bytes = Record::new(32);
        bytes.u32(0, block_bitmap);
        bytes.u32(4, inode_bitmap);
        bytes.u32(8, inode_table);
        bytes.u16(12, self.blocks_of(group) - self.overhead(group));
        bytes.u16(14, self.inodes_per_group - used);
        bytes.u16(16, u64::from(group == 0)); // Directories.
        bytes.u16(18, flags.into());
        bytes.u16(28, self.inodes_per_group - used);
        let number = u32::try_from(group).unwrap_or(u32::MAX).to_le_bytes();
        let sum = [&id[..], &number, &bytes.0[..30]].into_iter().fold(0xffff, crc16);
        bytes.u16(30, sum.into());
        bytes.0
    }

    fn root_inode(&self) -> Vec<u8> {
        let mut bytes = Record::new(256);
        bytes.u16(0, 0o041_777); // A directory for everybody, like /tmp.
        bytes.u32(4, BLOCK);
        bytes.u16(26, 2);
        bytes.u32(28, BLOCK / 512);
        bytes.u32(32, 0x8_0000); // It is in extents: a header, and one.
        bytes.u16(40, 0xf30a);
        bytes.u16(42, 1);
        bytes.u16(44, 4);
        bytes.u16(56, 1); // So many blocks, …
        bytes.u32(60, self.root_block()); // … from this one on.
        bytes.u16(128, 32);
        bytes.0
    }
}

fn root_directory() -> Vec<u8> {
    let mut bytes = Record::new(4096);
    for (at, length, name) in [(0, 12, "."), (12, BLOCK - 12, "..")] {
        bytes.u32(at, ROOT_INODE);
        bytes.u16(at + 4, length);
        bytes.bytes(at + 6, &[u8::try_from(name.len()).unwrap_or(0), 2]);
        bytes.bytes(at + 8, name.as_bytes());
    }
    bytes.0
}

/// Bits for what is taken, at the beginning, and for what there is none of, at the end.
fn bitmap(taken: u64, there: u64) -> Vec<u8> {
    let bit = |at: u64| at < taken || at >= there;
    let byte = |at: u64| (0..8).fold(0, |byte, bit_at| byte | u8::from(bit(at * 8 + bit_at)) << bit_at);
    (0..BLOCK).map(byte).collect()
}

fn crc16(sum: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(sum, |sum, &byte| {
        (0..8).fold(sum ^ u16::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xa001 } else { sum >> 1 })
    })
}

/// A record of the format, whose numbers are little-endian.
struct Record(Vec<u8>);

impl Record {
    fn new(length: usize) -> Self {
        Self(vec![0; length])
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// No number here is larger: 1 TiB has 2^28 blocks.
    fn u32(&mut self, at: usize, value: u64) {
        self.bytes(at, &u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn u16(&mut self, at: usize, value: u64) {
        self.bytes(at, &u16::try_from(value).unwrap_or(u16::MAX).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt as _, process::Command};

    use super::*;

    /// Every size at which the layout could differ: one group and more, a last group that is dropped and one that is kept.
    #[test]
    fn e2fsck_finds_nothing_to_repair() {
        if Command::new("/usr/sbin/e2fsck").arg("-V").output().is_err() {
            eprintln!("SKIPPED: no second opinion without e2fsck (apt-get install e2fsprogs)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for mib in [16, 17, 63, 127, 128, 129, 130, 131, 256, 300, 16_384, 16_512, 100_000, 1_048_576] {
            let path = dir.path().join(format!("{mib}.ext4"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            create(&file, mib, b"0123456789abcdef").unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), mib << 20);
            assert!(metadata.blocks() * 512 < 400 << 10, "{mib}: {} bytes are on disk", metadata.blocks() * 512);
            let output = Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&path).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            // It says what it looks at, and at the end how much there is.
            let found = text.lines().filter(|line| !line.starts_with("Pass ")).count();
            assert_eq!((found, output.status.code()), (1, Some(0)), "{mib}: {text}");
            std::fs::remove_file(path).unwrap();
        }
    }
}
