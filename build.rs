//! Compiles `proto/` without `protoc`: protox parses, tonic-prost-build generates.

use std::{env, error::Error, fs, path::PathBuf};

const PROTOS: &[&str] = &[
    "blixard/common/v1/error.proto",
    "blixard/common/v1/job.proto",
    "blixard/common/v1/node.proto",
    "blixard/common/v1/vm.proto",
    "blixard/guest/v1/guest.proto",
    "blixard/registry/v1/registry.proto",
    "blixard/registry/v1/replica.proto",
    "blixard/scheduler/v1/scheduler.proto",
    "blixard/vmhost/v1/vmhost.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(PROTOS)?;

    // The compiler's own encoding keeps extension options; reflection serves it as it is.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        // They hold secrets in clear: src/job/input.rs shows them without.
        .skip_debug([".blixard.common.v1.JobInput", ".blixard.guest.v1.GuestInput"])
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
