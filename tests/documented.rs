//! Tables in the documentation that stand in the code too: they must say the same.

use std::{fs, path::Path};

use blixard::config::{Config, SETTINGS};

#[test]
fn every_setting_is_documented_with_its_names_default_and_what_is_allowed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md");
    let text = fs::read_to_string(&path).expect("the page");
    let defaults = Config::default();
    let mut missing = String::new();
    for setting in SETTINGS {
        let (key, env, flag) = (setting.key, setting.env, setting.flag);
        let default = match setting.value(&defaults) {
            none if none.is_empty() => "(none)".to_owned(),
            value => format!("`{value}`"),
        };
        let row = format!("| `{key}` | `{env}` | `--{flag}` | {default} | {} | {} |", setting.help, setting.allowed);
        if !text.contains(&row) {
            missing += &format!("{row}\n");
        }
    }
    assert!(missing.is_empty(), "docs/CONFIGURATION.md lacks these rows:\n{missing}");
}
