//! `mvm-ci doctor`: what this machine can run and, where something is missing, the command that mends it.

use std::process::ExitCode;

use blixard::config::{Config, DriverChoice};
use blixard_vmhost::hypervisor::{Check, HypervisorSettings, choose, diagnose};
use serde_json::json;

use super::{
    failure::Failure,
    output::{self, Printer},
};

/// See the module. Fails when only the driver without isolation works.
pub(crate) fn doctor(config: &Config, printer: &Printer) -> Result<ExitCode, Failure> {
    let agent = std::env::current_exe()?.into_os_string();
    let settings = HypervisorSettings {
        image_dir: config.firecracker.image_dir.clone(),
        agent_command: vec![agent, "guest-agent".into()],
        vm_uids: config.firecracker.vm_uids,
    };
    let checks = diagnose(&settings);
    let driver = choose(DriverChoice::Auto, &settings).map(|(_, why)| why).map_err(|error| error.to_string());
    let driver = driver.and_then(|why| has_image(&checks).map(|()| why));
    printer.print(|| report_json(&checks, &driver), || report_text(&checks, &driver))?;
    Ok(if driver.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A driver without anything to boot runs no VM.
fn has_image(checks: &[Check]) -> Result<(), String> {
    match checks.iter().find(|check| check.name == "images" && !check.ok) {
        Some(images) => Err(format!("images: {}", images.detail)),
        None => Ok(()),
    }
}

fn report_json(checks: &[Check], driver: &Result<String, String>) -> serde_json::Value {
    json!({
        "ok": driver.is_ok(),
        "driver": driver.as_ref().ok(),
        "problem": driver.as_ref().err(),
        "checks": checks,
    })
}

fn report_text(checks: &[Check], driver: &Result<String, String>) -> String {
    let row = |check: &Check| {
        let mark = if check.ok { "ok" } else { "missing" };
        vec![check.name.to_owned(), mark.to_owned(), check.detail.clone()]
    };
    let mut text = output::table(&["WHAT", "STATE", "DETAIL"], &checks.iter().map(row).collect::<Vec<_>>());
    let fixes: Vec<_> = checks.iter().filter_map(|check| Some(format!("  {}", check.fix.as_ref()?))).collect();
    if !fixes.is_empty() {
        text += &format!("\nTo have what is missing:\n{}\n", fixes.join("\n"));
    }
    match driver {
        Ok(why) => text + &format!("\nVMs run with {why}\n"),
        Err(problem) => {
            let hint = "To try everything else without VMs: mvm-ci --driver process (no isolation)";
            text + &format!("\nNo VM can run here: {problem}\n{hint}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_comes_with_the_command_that_mends_it() {
        let check = |name, ok, detail: &str, fix: Option<&str>| Check {
            name,
            ok,
            detail: detail.into(),
            fix: fix.map(Into::into),
        };
        let checks = [
            check("/dev/kvm", false, "this CPU offers no hardware virtualization", None),
            check("qemu-system-x86_64", true, "/usr/bin/qemu-system-x86_64", None),
            check("images", false, "none that can be booted in ./images", Some("make guest-image")),
        ];
        let good = Ok("qemu: the best this machine can run; emulation".to_owned());
        let bad = Err("the driver \"qemu\" cannot run here: no image".to_owned());
        insta::assert_snapshot!(format!(
            "{}\n{}\n{:#}",
            report_text(&checks, &good),
            report_text(&checks, &bad),
            report_json(&checks, &good)
        ));
    }
}
