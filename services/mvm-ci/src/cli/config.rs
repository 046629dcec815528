//! Puts the control plane's configuration together, and prints it.

use std::process::ExitCode;

use blixard::config::Config;
use serde_json::Value;

use super::{args::Settings, failure::Failure, output::Printer};

/// Defaults < TOML file < environment < flags.
pub(crate) fn load(settings: &Settings) -> Result<Config, Failure> {
    settings.flags.load().map_err(|error| Failure::Config(error.to_string()))
}

/// Prints the effective configuration, which is valid as a file.
pub(crate) fn print(settings: &Settings, printer: &Printer) -> Result<ExitCode, Failure> {
    let config = load(settings)?;
    printer.print(
        || {
            let settings = blixard::config::SETTINGS.iter();
            settings.map(|setting| (setting.key.to_owned(), Value::from(setting.value(&config)))).collect()
        },
        || config.to_toml(),
    )?;
    Ok(ExitCode::SUCCESS)
}
