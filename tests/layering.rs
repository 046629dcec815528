//! Who may depend on whom, read from `cargo metadata` (the rule stands in docs/ARCHITECTURE.md).

use std::{collections::BTreeMap, process::Command};

use serde_json::Value;

/// Our packages and those of ours that they may depend on, build and dev dependencies of tests aside.
const ALLOWED: &[(&str, &[&str])] = &[
    ("blixard", &[]),
    ("blixard-chaos-kit", &[]),
    ("blixard-chassis", &["blixard"]),
    ("blixard-guest-agent", &["blixard"]),
    // Its trial kills and cuts off real processes.
    ("blixard-registry", &["blixard", "blixard-chassis", "blixard-chaos-kit"]),
    ("blixard-scheduler", &["blixard", "blixard-chassis"]),
    // Its guests' network is tried in namespaces.
    ("blixard-vmhost", &["blixard", "blixard-chassis", "blixard-chaos-kit"]),
    (
        "mvm-ci",
        &[
            "blixard",
            "blixard-chassis",
            "blixard-chaos-kit",
            "blixard-guest-agent",
            "blixard-registry",
            "blixard-scheduler",
            "blixard-vmhost",
        ],
    ),
    ("blixard-simulation", &["blixard", "blixard-registry", "blixard-scheduler", "blixard-vmhost"]),
];

/// What a service may use of others in its tests: nothing but what it may depend on anyway. The root package's tests may
/// use anything.
fn names(package: &Value) -> impl Iterator<Item = &str> {
    let dependencies = package["dependencies"].as_array().expect("dependencies");
    let is_root = package["name"] == "blixard";
    let counted = dependencies.iter().filter(move |dependency| !(is_root && dependency["kind"] == "dev"));
    counted
        .filter(|dependency| dependency["path"].is_string())
        .map(|dependency| dependency["name"].as_str().expect("name"))
}

#[test]
fn services_meet_only_through_their_contracts() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");

    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let packages = metadata["packages"].as_array().expect("packages");
    assert_eq!(packages.len(), allowed.len(), "a package was added or lost: say here what it may depend on");
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} is not in the table"));
        for dependency in names(package) {
            assert!(may.contains(&dependency), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn every_package_inherits_the_lints_or_says_which_it_changes() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for directory in [
        ".",
        "services/chassis",
        "services/registry",
        "services/scheduler",
        "services/vmhost",
        "services/mvm-ci",
        "microvms/guest-agent",
        "tests/simulation",
        "tests/chaos-kit",
    ] {
        let text = std::fs::read_to_string(root.join(directory).join("Cargo.toml")).expect("a manifest");
        let manifest: toml::Table = text.parse().expect("TOML");
        let inherits = manifest["lints"].get("workspace").and_then(toml::Value::as_bool) == Some(true);
        // The agent and vmhost talk to the kernel: unsafe is denied there rather than forbidden, so that single blocks can say why.
        let denies = manifest["lints"].get("rust").and_then(|rust| rust.get("unsafe_code")).is_some();
        let may_deny = matches!(directory, "microvms/guest-agent" | "services/vmhost");
        assert!(inherits || (may_deny && denies), "{directory} does not inherit the lints");
    }
}
