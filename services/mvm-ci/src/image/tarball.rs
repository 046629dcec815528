//! Members of a tar archive in a file: their names and where their bytes are.
//!
//! The headers are the `tar` crate's; the walk over them is ours, for that crate (0.4.46) takes PAX records apart at
//! newlines, which the values of extended attributes may have, and does not apply a size from one that it can't parse.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
};

use tar::{EntryType, Header};

const BLOCK: u64 = 512;
/// Names and extended attributes of one member: more than Linux allows of either.
const MAX_EXTENSION_BYTES: u64 = 1024 * 1024;

/// A member, with what the headers before it said of it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) header: Header,
    /// PAX records.
    pub(super) records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Where its bytes are in the archive.
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Member {
    pub(super) fn kind(&self) -> EntryType {
        self.header.entry_type()
    }

    /// A number that a PAX record has, or else the header.
    pub(super) fn number(&self, key: &[u8], header: impl Fn(&Header) -> io::Result<u64>) -> io::Result<u64> {
        match self.records.get(key) {
            Some(value) => number(value).ok_or_else(|| malformed("a PAX number")),
            None => header(&self.header),
        }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} makes no sense"))
}

/// The members of an archive, in order.
pub(super) struct Members<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl<'a> Members<'a> {
    pub(super) fn of(file: &'a File) -> io::Result<Self> {
        Ok(Self { file, at: 0, end: file.metadata()?.len() })
    }

    fn read(&mut self) -> io::Result<Option<Member>> {
        let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let (mut path, mut link) = (None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let kind = header.entry_type();
            let described = !(kind.is_pax_local_extensions() || kind.is_gnu_longname() || kind.is_gnu_longlink());
            let own = header.entry_size()?;
            let len = match records.get(&b"size"[..]) {
                Some(size) if described => number(size).ok_or_else(|| malformed("a PAX size"))?,
                _ => own,
            };
            let offset = self.at;
            if len > self.end - offset {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // The last member may lack its padding.
            self.at = (offset + len).next_multiple_of(BLOCK).min(self.end);
            if kind.is_pax_local_extensions() {
                records = parse_records(&self.extension(offset, len)?)?;
            } else if kind.is_gnu_longname() {
                path = Some(until_nul(self.extension(offset, len)?));
            } else if kind.is_gnu_longlink() {
                link = Some(until_nul(self.extension(offset, len)?));
            } else {
                let own_path = || header.path_bytes().into_owned();
                let path = path.or_else(|| records.get(&b"path"[..]).cloned()).unwrap_or_else(own_path);
                let own_link = || header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default();
                let link = link.or_else(|| records.get(&b"linkpath"[..]).cloned()).unwrap_or_else(own_link);
                return Ok(Some(Member { path, link, header, records, offset, len }));
            }
        }
    }

    /// The next header; `None` at the archive's end, which is a block of zeros or the file's.
    fn header(&mut self) -> io::Result<Option<Header>> {
        if self.at == self.end {
            return Ok(None);
        }
        let mut header = Header::new_old();
        self.file.read_exact_at(header.as_mut_bytes(), self.at)?;
        self.at += BLOCK;
        let bytes = header.as_bytes();
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        // The checksum counts its own field as spaces.
        let sum: u32 =
            bytes.iter().enumerate().map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { byte.into() }).sum();
        if header.cksum()? == sum { Ok(Some(header)) } else { Err(malformed("a header")) }
    }

    fn extension(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        if len > MAX_EXTENSION_BYTES {
            return Err(malformed("an extension of more than 1 MiB"));
        }
        let mut bytes = Vec::new();
        ReadAt { file: self.file, at: offset }.take(len).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Iterator for Members<'_> {
    type Item = io::Result<Member>;

    /// After an error there is no more.
    fn next(&mut self) -> Option<Self::Item> {
        let member = self.read();
        if !matches!(member, Ok(Some(_))) {
            self.at = self.end;
        }
        member.transpose()
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
    bytes
}

/// Each is `<its length in all> <key>=<value>\n`.
fn parse_records(mut rest: &[u8]) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut records = BTreeMap::new();
    while !rest.is_empty() {
        let record = || {
            let space = rest.iter().position(|&byte| byte == b' ')?;
            let length = usize::try_from(number(&rest[..space])?).ok()?;
            let line = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = line.iter().position(|&byte| byte == b'=')?;
            Some((length, line[..equals].to_vec(), line[equals + 1..].to_vec()))
        };
        let (length, key, value) = record().ok_or_else(|| malformed("a PAX record"))?;
        records.insert(key, value);
        rest = &rest[length..];
    }
    Ok(records)
}

/// Reads a file at a place of its own, so that many can read it.
pub(super) struct ReadAt<'a> {
    pub(super) file: &'a File,
    pub(super) at: u64,
}

impl Read for ReadAt<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
