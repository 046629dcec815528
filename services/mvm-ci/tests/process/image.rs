//! `mvm-ci image`: from OCI images to root disks, and what is refused on the way.

#[path = "image/oci.rs"]
mod oci;
#[path = "image/registry.rs"]
mod registry;

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::{
    oci::{Image, Layer, Pack, gzip, sha256, zstd},
    registry::{PASSWORD, Registry, USER, Wants},
};
use crate::{
    guest,
    support::{mvm_ci, output, stdout, tempdir, text, wait_for},
};

const PLAIN: Pack = <[u8]>::to_vec;

/// A directory of images with a base that nobody boots.
struct House {
    dir: TempDir,
}

impl House {
    fn new() -> Self {
        let dir = tempdir();
        let base = dir.path().join("images/default");
        fs::create_dir_all(&base).expect("mkdir");
        fs::write(base.join("vmlinux"), "kernel").expect("writes");
        fs::write(base.join("initramfs"), "initramfs").expect("writes");
        let manifest = json!({
            "kernel": "vmlinux", "initramfs": "initramfs", "cmdline": "quiet", "kernel_release": "6.1.0-test",
            "root_filesystems": ["erofs"],
            "sha256": {"vmlinux": &sha256(b"kernel")[7..], "initramfs": &sha256(b"initramfs")[7..]},
        });
        fs::write(base.join("manifest.json"), manifest.to_string()).expect("writes");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, args: &[&str]) -> Command {
        let mut command = mvm_ci(["image"]);
        let images = self.path("images");
        command.arg(args[0]).arg("--image-dir").arg(images).args(&args[1..]);
        command
    }

    /// Imports and says the digest of the root disk.
    fn import(&self, name: &str, source: &str, more: &[&str]) -> String {
        stdout(self.image(&[&["import", name, source], more].concat()));
        let manifest = self.manifest(name);
        let root = fs::read(self.path("images").join(name).join("root.erofs")).expect("a root disk");
        assert_eq!(manifest["sha256"]["root.erofs"], sha256(&root)[7..]);
        sha256(&root)
    }

    fn manifest(&self, name: &str) -> Value {
        let text = fs::read(self.path("images").join(name).join("manifest.json")).expect("a manifest");
        serde_json::from_slice(&text).expect("JSON")
    }

    /// Runs an import that has to fail and leave nothing, and says why it failed.
    fn refused(&self, source: &Path) -> String {
        let Output { status, stderr, .. } = output(self.image(&["import", "bad", source.to_str().expect("UTF-8")]));
        assert_eq!(status.code(), Some(1), "{}", text(&stderr));
        assert_eq!(self.names(), ["default"]);
        text(&stderr)
    }

    /// Everything in the directory of images.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("images")).expect("a directory").flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }
}

/// Two layers of busybox; the second takes away and adds.
fn layers() -> [Vec<u8>; 2] {
    let busybox = fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox")).unwrap_or_else(|_| noise_binary());
    let first = Layer::new()
        .directory("bin/", 0o755)
        .file("bin/busybox", 0o755, &busybox)
        .symlink("bin/sh", "/bin/busybox")
        .symlink("bin/ls", "busybox")
        .symlink("bin/cat", "busybox")
        .symlink("bin/stat", "busybox")
        .directory("etc", 0o755)
        .file("etc/os-release", 0o644, b"ID=imported\n")
        .file("etc/gone", 0o644, b"gone\n")
        .directory("opt/full", 0o755)
        .file("opt/full/old", 0o644, b"old\n")
        .directory("srv", 0o2770)
        .owned_file("srv/owned", 70_000, 80_000, b"owned\n")
        .tar();
    let many = (0..600).fold(Layer::new(), |layer, number| {
        layer.file(&format!("many/file-with-a-rather-long-name-{number:04}"), 0o644, format!("{number}\n").as_bytes())
    });
    let second = many
        .file("etc/.wh.gone", 0o644, b"")
        .file("opt/full/.wh..wh..opq", 0o644, b"")
        .file("opt/full/new", 0o600, &vec![b'n'; 10_000])
        .hard_link("opt/full/other", "opt/full/new")
        .directory("work", 0o755)
        .xattr("user.note", b"line one\nline two")
        .file("work/noted", 0o644, b"noted\n")
        .tar();
    [first, second]
}

/// Where there is no busybox nothing is booted either.
fn noise_binary() -> Vec<u8> {
    crate::support::noise(2_000_000)
}

fn example(packs: [Pack; 2]) -> Image {
    let [first, second] = layers();
    let execution = json!({
        "Env": ["GREETING=from the image", "PATH=/bin"], "WorkingDir": "/work", "Entrypoint": ["/bin/false"], "User": "7",
    });
    Image::new(&[(first, packs[0]), (second, packs[1])], &execution)
}

#[test]
fn every_form_of_an_image_gives_the_same_root_whatever_its_layers_are_packed_with() {
    let house = House::new();
    example([gzip, zstd]).write_layout(&house.path("layout"));
    fs::write(house.path("plain.tar"), example([PLAIN, PLAIN]).archive()).expect("writes");
    fs::write(house.path("packed.tar.gz"), gzip(&example([zstd, gzip]).archive())).expect("writes");
    fs::write(house.path("docker.tar"), example([PLAIN, PLAIN]).docker_archive(&layers())).expect("writes");
    let source = |name: &str| house.path(name).to_str().expect("UTF-8").to_owned();
    let first = house.import("one", &source("layout"), &[]);
    assert_eq!(house.import("two", &source("plain.tar"), &[]), first);
    assert_eq!(house.import("three", &source("packed.tar.gz"), &[]), first);
    assert_eq!(house.import("four", &source("docker.tar"), &["--ref", "me/app:1"]), first);

    let manifest = house.manifest("one");
    assert_eq!(manifest["root_disk"], json!({"file": "root.erofs", "filesystem": "erofs"}));
    assert_eq!((&manifest["working_dir"], &manifest["kernel_release"]), (&json!("/work"), &json!("6.1.0-test")));
    // The kernel is the base's own file.
    let inode = |name: &str| fs::metadata(house.path("images").join(name).join("vmlinux")).expect("a kernel").ino();
    assert_eq!(inode("one"), inode("default"));

    check_with_erofs_utils(&house.path("images/one/root.erofs"), &house.path("extracted"));
}

/// A second opinion on the file system, where `erofs-utils` is installed.
fn check_with_erofs_utils(root: &Path, to: &Path) {
    let mut fsck = Command::new("fsck.erofs");
    fsck.arg(format!("--extract={}", to.display())).arg("--no-preserve").arg(root);
    if Command::new("fsck.erofs").arg("-V").output().is_err() {
        eprintln!("SKIPPED: no second opinion without fsck.erofs (apt-get install erofs-utils)");
        return;
    }
    let Output { status, stdout, stderr } = output(fsck);
    assert!(status.success(), "{}{}", text(&stdout), text(&stderr));
    let read = |path: &str| fs::read_to_string(to.join(path)).unwrap_or_else(|error| format!("{path}: {error}"));
    assert_eq!(read("etc/os-release"), "ID=imported\n");
    assert_eq!(read("opt/full/other"), "n".repeat(10_000));
    assert_eq!(read("srv/owned"), "owned\n");
    assert_eq!(fs::read_link(to.join("bin/sh")).expect("a link"), Path::new("/bin/busybox"));
    assert!(!to.join("etc/gone").exists() && !to.join("opt/full/old").exists());
    for number in 0..600 {
        assert_eq!(read(&format!("many/file-with-a-rather-long-name-{number:04}")), format!("{number}\n"));
    }
    assert_eq!(read(".blixard/env"), "GREETING=from the image\0PATH=/bin\0");
    assert_eq!(read(".blixard/workdir"), "/work");
}

#[test]
fn images_are_listed_replaced_removed_and_what_a_crash_left_is_collected() {
    let house = House::new();
    example([gzip, gzip]).write_layout(&house.path("layout"));
    let layout = house.path("layout").to_str().expect("UTF-8").to_owned();
    house.import("app", &layout, &[]);
    let again = output(house.image(&["import", "app", &layout]));
    assert!(text(&again.stderr).contains("there is an image \"app\" already"), "{}", text(&again.stderr));

    // A VM that runs has the old one open.
    let path = house.path("images/app/root.erofs");
    let open = fs::File::open(&path).expect("opens");
    house.import("app", &layout, &["--replace"]);
    assert_ne!(open.metadata().expect("metadata").ino(), fs::metadata(&path).expect("metadata").ino());
    assert_eq!(house.names(), ["app", "default"]);

    let listed: Value = serde_json::from_str(&stdout(house.image(&["list", "--output", "json"]))).expect("JSON");
    assert_eq!(listed.as_array().expect("a list").len(), 2);
    assert_eq!((&listed[0]["name"], &listed[0]["problem"]), (&json!("app"), &Value::Null));
    assert!(listed[0]["source"].as_str().expect("a source").starts_with(&layout), "{listed}");

    fs::create_dir_all(house.path("images/.draft-dead/image")).expect("mkdir");
    assert!(stdout(house.image(&["gc"])).contains("removed 1 "));
    stdout(house.image(&["rm", "app"]));
    assert_eq!(house.names(), ["default"]);
    let gone = output(house.image(&["rm", "app"]));
    assert!(text(&gone.stderr).contains("there is no image \"app\"; there are: default"), "{}", text(&gone.stderr));
}

#[test]
fn bytes_that_are_not_those_that_were_asked_for_are_refused() {
    let house = House::new();
    // 0 is the configuration, 1 and 2 are the layers, 3 is the manifest.
    for (number, length_stays) in [(0, true), (1, true), (2, true), (2, false), (3, true)] {
        let mut image = example([gzip, PLAIN]);
        let blob = image.blob_mut(number);
        let middle = blob.len() / 2;
        blob[middle] ^= 1;
        if !length_stays {
            blob.push(0);
        }
        let layout = house.path(&format!("layout-{number}-{length_stays}"));
        image.write_layout(&layout);
        let refused = house.refused(&layout);
        assert!(refused.contains("is not what was asked for"), "{number}: {refused}");
    }
    // The layer is the one that the manifest names, and not the one that the configuration has.
    let [first, second] = layers();
    let mut docker = example([PLAIN, PLAIN]).docker_archive(&[second, first]);
    fs::write(house.path("swapped.tar"), &docker).expect("writes");
    assert!(house.refused(&house.path("swapped.tar")).contains("an unpacked layer is not what was asked for"));
    docker.truncate(docker.len() / 2);
    fs::write(house.path("short.tar"), docker).expect("writes");
    house.refused(&house.path("short.tar"));
}

#[test]
fn a_layer_reaches_nothing_outside_its_root() {
    let house = House::new();
    let outside = house.path("outside");
    fs::create_dir(&outside).expect("mkdir");
    let import = |layer: Layer| {
        let image = Image::new(&[(layer.tar(), PLAIN)], &json!({}));
        fs::write(house.path("archive.tar"), image.archive()).expect("writes");
    };
    let climbing = [
        Layer::new().file("../../outside/x", 0o644, b"x"),
        Layer::new().file("a/../../x", 0o644, b"x"),
        Layer::new().file("x", 0o644, b"x").hard_link("y", "../../etc/passwd"),
        Layer::new().directory("a/..", 0o777),
    ];
    for layer in climbing {
        import(layer);
        let refused = house.refused(&house.path("archive.tar"));
        assert!(refused.contains("leads out of the image"), "{refused}");
    }
    // What is not there is not taken from the host.
    import(Layer::new().hard_link("passwd", "/etc/passwd"));
    assert!(house.refused(&house.path("archive.tar")).contains("is not there or is a directory"));
    // Links that point outside are kept, for inside they point inside; writing through them stays inside.
    let target = outside.to_str().expect("UTF-8");
    import(
        Layer::new()
            .symlink("out", target)
            .symlink("up", "../../../..")
            .file("out/x", 0o644, b"x")
            .file("up/y", 0o644, b"y"),
    );
    house.import("inside", house.path("archive.tar").to_str().expect("UTF-8"), &[]);
    assert_eq!(fs::read_dir(&outside).expect("reads").count(), 0);
}

#[test]
fn a_registry_gives_an_image_to_who_has_a_token_or_a_password() {
    let house = House::new();
    let image = example([gzip, gzip]);
    let registry = Registry::serve(&image, Wants::Token);
    let source = format!("docker://{}/team/app:1", registry.address);
    let pulled = house.import("pulled", &source, &[]);
    image.write_layout(&house.path("layout"));
    assert_eq!(house.import("laid", house.path("layout").to_str().expect("UTF-8"), &[]), pulled);
    let asked = registry.requests();
    let token = "/token?scope=repository%3Ateam%2Fapp%3Apull&service=test".to_owned();
    assert_eq!(asked.iter().filter(|path| **path == token).count(), 1, "{asked:?}");
    let digest = image.manifest["digest"].as_str().expect("a digest");
    house.import("exact", &format!("{}/team/app@{digest}", registry.address), &[]);

    let nothing = output(house.image(&["import", "x", &format!("{}/team/other:1", registry.address)]));
    assert!(text(&nothing.stderr).contains("there is no such image"), "{}", text(&nothing.stderr));

    let registry = Registry::serve(&image, Wants::Password);
    let source = format!("{}/team/app:1", registry.address);
    let stranger = output(house.image(&["import", "x", &source]));
    assert!(text(&stranger.stderr).contains("it wants a name and a password"), "{}", text(&stranger.stderr));
    let auth = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    fs::write(house.path("config.json"), json!({"auths": {&registry.address: {"auth": auth}}}).to_string())
        .expect("writes");
    let mut friend = house.image(&["import", "friend", &source]);
    friend.env("DOCKER_CONFIG", house.dir.path());
    stdout(friend);
}

#[test]
fn a_registry_that_sends_something_else_is_not_believed() {
    let house = House::new();
    for number in [0, 1, 3] {
        let mut image = example([gzip, gzip]);
        let blob = image.blob_mut(number);
        let middle = blob.len() / 2;
        blob[middle] ^= 1;
        let registry = Registry::serve(&image, Wants::Token);
        let failed = output(house.image(&["import", "x", &format!("{}/team/app:1", registry.address)]));
        assert!(text(&failed.stderr).contains("is not what was asked for"), "{number}: {}", text(&failed.stderr));
        assert_eq!(house.names(), ["default"]);
    }
}

#[test]
fn an_image_is_made_from_a_directory_and_taken_from_one_of_ours() {
    let house = House::new();
    let tree = house.path("tree");
    fs::create_dir_all(tree.join("etc")).expect("mkdir");
    fs::write(tree.join("etc/hello"), "hello").expect("writes");
    fs::hard_link(tree.join("etc/hello"), tree.join("etc/again")).expect("links");
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).expect("links");
    fs::set_permissions(tree.join("etc/hello"), fs::Permissions::from_mode(0o640)).expect("chmod");
    stdout(house.image(&["build", "made", tree.to_str().expect("UTF-8")]));
    let disk = fs::read(house.path("images/made/root.erofs")).expect("a root disk");
    assert!(disk.windows(5).any(|part| part == b"hello"));

    let made = house.path("images/made");
    stdout(house.image(&["import", "copy", made.to_str().expect("UTF-8")]));
    assert_eq!(house.manifest("copy")["sha256"], house.manifest("made")["sha256"]);
    fs::write(made.join("root.erofs"), "spoiled").expect("writes");
    let spoiled = output(house.image(&["import", "again", made.to_str().expect("UTF-8")]));
    assert!(text(&spoiled.stderr).contains("is not what was asked for"), "{}", text(&spoiled.stderr));
    let neither = output(house.image(&["import", "x", house.path("tree").to_str().expect("UTF-8")]));
    assert!(text(&neither.stderr).contains("neither oci-layout nor manifest.json"), "{}", text(&neither.stderr));
}

/// A directory of images with the real default image, for a test that adds to it; `None` where no real guest can run.
fn real_images() -> Option<TempDir> {
    let images = guest::images()?;
    let dir = tempdir();
    let default = dir.path().join("default");
    fs::create_dir(&default).expect("mkdir");
    for file in ["vmlinux", "initramfs", "manifest.json"] {
        fs::copy(images.join("default").join(file), default.join(file)).expect("copies");
    }
    Some(dir)
}

#[test]
fn an_imported_image_boots_and_its_jobs_run_in_its_root() {
    let Some(dir) = real_images() else { return };
    let image_dir = dir.path().to_str().expect("UTF-8");
    let plane =
        crate::plane::Plane::with_flags(&["--driver", "qemu", "--image-dir", image_dir, "--default-memory-mb", "256"]);

    // That the node registers again means nothing to what runs there.
    let script = "for i in $(seq 50); do echo $i; sleep 0.1; done";
    let before = stdout(plane.cli(["run", "--service", "--detach", "--", "sh", "-c", script])).trim().to_owned();

    let layout = tempdir();
    example([gzip, zstd]).write_layout(layout.path());
    let source = layout.path().to_str().expect("UTF-8");
    stdout(mvm_ci(["image", "import", "--image-dir", image_dir, "app", source]));
    wait_for("the node to have the image", || {
        let nodes = plane.json(["node", "list"]);
        if nodes[0]["images"] == json!(["app", "default"]) { Ok(()) } else { Err(nodes.to_string()) }
    });

    let script = "cat /etc/os-release; pwd; echo $GREETING; echo /opt/full/*; cat noted; stat -c '%u %g %a' /srv/owned /srv; \
        stat -c %h /opt/full/new; echo more > /etc/os-release && cat /etc/os-release; echo x > /tmp/x && ls /etc; ls -d /dev/vda; set -- /many/*; \
        echo $#; for file; do read -r number < $file; sum=$((sum + number)); done; echo $sum";
    let out = stdout(plane.cli(["run", "--image", "app", "--env", "PATH=/bin", "--", "/bin/sh", "-c", script]));
    let expected = "ID=imported\n/work\nfrom the image\n/opt/full/new /opt/full/other\nnoted\n70000 80000 640\n0 0 2770\n2\nmore\n\
        machine-id\nos-release\n/dev/vda\n600\n179700\n";
    assert_eq!(out, expected);
    // Another VM of the image has the disk as it was.
    let again =
        ["run", "--ephemeral", "--image", "app", "--workdir", "/", "--", "sh", "-c", "cat /etc/os-release; pwd"];
    assert_eq!(stdout(plane.cli(again)), "ID=imported\n/\n");
    let job = plane.wait_for_job(&before, "Succeeded");
    assert_eq!(job["attempt"], 1, "{job}");
}

#[test]
fn a_root_disk_that_can_not_be_had_ends_the_vm_rather_than_run_jobs_among_other_files() {
    let Some(dir) = real_images() else { return };
    let image_dir = dir.path().to_str().expect("UTF-8");
    let layout = tempdir();
    example([PLAIN, PLAIN]).write_layout(layout.path());
    let source = layout.path().to_str().expect("UTF-8");
    stdout(mvm_ci(["image", "import", "--image-dir", image_dir, "torn", source]));
    fs::write(dir.path().join("torn/root.erofs"), vec![0; 1_048_576]).expect("writes");

    let flags = ["--driver", "qemu", "--image-dir", image_dir, "--default-memory-mb", "256"];
    let plane = crate::plane::Plane::with_flags(&flags);
    let failed = output(plane.cli(["vm", "create", "--service", "--image", "torn", "--wait"]));
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed.stdout));
    let vms = plane.json(["vm", "list", "--all"]);
    assert_eq!(vms[0]["state"], "Failed", "{vms}");
    let console = stdout(plane.cli(["vm", "console", vms[0]["id"].as_str().expect("an id")]));
    assert!(console.contains("cannot have the root disk: mount /dev/vda (erofs): "), "{console}");
}
