//! The guest agent as a program of this machine.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

/// The guest agent's program. A run over the whole workspace has built it; a run of this crate alone has not.
pub fn agent() -> PathBuf {
    static BUILD: Once = Once::new();
    let test = env::current_exe().expect("the test has a path");
    let agent = test.ancestors().nth(2).expect("target/debug/deps").join("blixard-guest-agent");
    BUILD.call_once(|| {
        if !agent.exists() {
            let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let build = ["build", "--quiet", "-p", "blixard-guest-agent", "--bin", "blixard-guest-agent"];
            let project = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two deep");
            let built = Command::new(cargo).args(build).current_dir(project).status().expect("cargo runs");
            assert!(built.success(), "the guest agent does not build");
        }
    });
    agent
}
