//! Puts the control plane's configuration together, and prints it.

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use blixard::config::Config;
use serde_json::Value;

use super::{args::Settings, failure::Failure, output::Printer};

/// Read when it exists and no other file is named.
const DEFAULT_FILE: &str = "./mvm-ci.toml";

/// Defaults < TOML file < environment < flags.
pub(crate) fn load(settings: &Settings) -> Result<Config, Failure> {
    let file = read(settings.file.as_deref())?;
    let file = file.as_ref().map(|(path, text)| (path.to_str().unwrap_or("the configuration file"), text.as_str()));
    for (name, value) in std::env::vars_os() {
        let known = blixard::config::SETTINGS.iter().any(|setting| name == setting.env);
        if known && value.to_str().is_none() {
            let message = format!("environment variable {}: not valid UTF-8", name.to_string_lossy());
            return Err(Failure::Config(message));
        }
    }
    Config::load(file, |name| std::env::var(name).ok(), |flag| settings.flags.get(flag).cloned())
        .map_err(|error| Failure::Config(error.to_string()))
}

fn read(named: Option<&Path>) -> Result<Option<(PathBuf, String)>, Failure> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.to_owned(), text))),
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::Config(format!("cannot read {}: {error}", path.display()))),
    }
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
