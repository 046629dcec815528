use std::io::Cursor;

use proptest::prelude::*;

use super::*;

fn tar(path: &str, kind: EntryType, records: &[(&str, &[u8])], bytes: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    if !records.is_empty() {
        builder.append_pax_extensions(records.iter().copied()).expect("appends");
    }
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_size(bytes.len() as u64);
    header.set_path(path).expect("a path");
    header.set_cksum();
    builder.append(&header, bytes).expect("appends");
    builder.into_inner().expect("finishes")
}

fn read(archive: &[u8]) -> Result<Vec<Change>, String> {
    let beside = tempfile::tempdir().expect("tempdir");
    let mut allowance = Allowance::default();
    let unpacked =
        unpack(Cursor::new(archive), beside.path(), &mut allowance, |_| ()).map_err(|error| error.to_string())?;
    changes(0, &unpacked.file, &mut allowance).map_err(|error| error.to_string())
}

fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut reader = packed;
    let mut bytes = Vec::new();
    decoder(&mut reader).expect("a decoder").read_to_end(&mut bytes).expect("unpacks");
    bytes
}

#[test]
fn zstd_frames_follow_each_other_and_those_without_data_are_skipped() {
    let frame = |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
    let large = vec![7; 1_000_000];
    let packed = [skipped.clone(), frame(&large), skipped, frame(b"end")].concat();
    assert!(unpacked(&packed) == [&large[..], b"end"].concat());
    let mut cut = frame(&large);
    cut.truncate(cut.len() - 1);
    let error = decoder(&mut &cut[..]).expect("a decoder").read_to_end(&mut Vec::new()).expect_err("cut off");
    assert!(error.to_string().contains("read"), "{error}");
}

#[test]
fn pax_records_say_more_than_a_header_can() {
    let long = "d/".repeat(200) + "file";
    let records: [(&str, &[u8]); 6] = [
        ("path", long.as_bytes()),
        ("uid", b"4000000000"),
        ("SCHILY.xattr.user.a", b"1\n2 =3\n"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.com.apple.provenance", b"x"),
        ("comment", b"none"),
    ];
    let changes = read(&tar("short", EntryType::Regular, &records, b"bytes")).expect("reads");
    let [Change::Add(path, inode)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((path.len(), show(path)), (201, format!("/{long}")));
    assert_eq!((inode.attributes.uid, inode.attributes.gid), (4_000_000_000, 2));
    assert_eq!(inode.attributes.xattrs, [(b"user.a".to_vec(), b"1\n2 =3\n".to_vec())].into());
    assert!(matches!(inode.kind, Kind::File(Content::Layer { layer: 0, len: 5, .. })), "{:?}", inode.kind);
}

#[test]
fn what_a_layer_must_not_have_is_refused_by_name() {
    let refused = |archive: &[u8]| read(archive).expect_err("refused");
    assert!(refused(&tar("x", EntryType::GNUSparse, &[], b"")).contains("has /x, a sparse file"));
    let records: [(&str, &[u8]); 1] = [("GNU.sparse.major", b"1")];
    assert!(refused(&tar("x", EntryType::Regular, &records, b"")).contains("has /x, a sparse file"));
    assert!(
        refused(&tar("x", EntryType::new(b'Z'), &[], b"")).contains("has /x, of a kind that layers do not have ('Z')")
    );
    assert!(refused(&tar("a/.wh..", EntryType::Regular, &[], b"")).contains("a whiteout of nothing"));
    assert!(
        refused(&tar("l", EntryType::Symlink, &[], b"")).contains("has /l, a symbolic link whose target is no path")
    );
    let long: [(&str, &[u8]); 1] = [("path", &[b'n'; 256])];
    assert!(refused(&tar("x", EntryType::Regular, &long, b"")).contains("a name longer than 255 bytes"));
    let huge: [(&str, &[u8]); 1] = [("size", b"99999999999999")];
    assert!(refused(&tar("x", EntryType::Regular, &huge, b"")).contains("is no tar archive"));
    assert!(refused(&[b'x'; 2000]).contains("is no tar archive"));
}

#[test]
fn an_image_is_unpacked_to_its_limits_and_no_further() {
    let mut allowance = Allowance { bytes: 999, metadata: 1000 };
    let beside = tempfile::tempdir().expect("tempdir");
    let error = unpack(Cursor::new([0; 1000]), beside.path(), &mut allowance, |_| ()).map(drop).expect_err("too large");
    assert!(error.to_string().starts_with("the unpacked image is more than is allowed"), "{error}");
    let three = [0, 1, 2].map(|_| tar("x", EntryType::Regular, &[], b"")).map(|tar| tar[..512].to_vec()).concat();
    let mut allowance = Allowance { bytes: 100_000, metadata: 700 };
    let file = unpack(Cursor::new(three), beside.path(), &mut allowance, |_| ()).expect("unpacks").file;
    let error = changes(0, &file, &mut allowance).expect_err("too many");
    assert!(error.to_string().starts_with("what the image says of its files"), "{error}");
}

proptest! {
    /// Whatever comes, there is an answer.
    #[test]
    fn no_archive_breaks_the_reader(changed in prop::collection::vec((0..3000_usize, any::<u8>()), 0..20), length in 0..4000_usize) {
        let records: [(&str, &[u8]); 2] = [("path", b"a/b"), ("size", b"700")];
        let mut archive = tar("x", EntryType::Regular, &records, &[1; 700]);
        for (at, byte) in changed {
            if let Some(place) = archive.get_mut(at) {
                *place = byte;
            }
        }
        archive.truncate(length);
        let _ = read(&archive);
    }
}
