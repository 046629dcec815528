//! The control plane's settings on the command line of every binary: made from [`config::SETTINGS`], so there is one table.

use std::{
    io,
    path::{Path, PathBuf},
};

use blixard::config::{self, Config, ConfigError};
use clap::{Arg, ArgMatches, Command};

/// Read when it exists and no other file is named.
const DEFAULT_FILE: &str = "./mvm-ci.toml";
const HEADING: &str = "Settings";

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A variable holds bytes that are no text.
    #[error("environment variable {0}: not valid UTF-8")]
    NotUtf8(&'static str),
    /// A setting is unknown or has a value that is not allowed.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Adds `--config FILE` and a flag for each setting.
#[must_use]
pub fn add_flags(mut command: Command) -> Command {
    command = command.arg(
        Arg::new("config")
            .long("config")
            .env("BLIXARD_CONFIG")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help(format!("TOML file [default: {DEFAULT_FILE} when there is one]"))
            .help_heading(HEADING),
    );
    for setting in config::SETTINGS {
        let help = format!("{} ({}) [env: {}]", setting.help, setting.allowed, setting.env);
        let arg = Arg::new(setting.flag).long(setting.flag).value_name("VALUE").help(help);
        command = command.arg(arg.allow_hyphen_values(true).help_heading(HEADING));
    }
    command
}

/// Puts the configuration together: defaults < TOML file < environment < flags.
///
/// # Errors
/// The first setting that is refused, in words for its user.
pub fn load(matches: &ArgMatches) -> Result<Config, SettingsError> {
    let file = read(matches.get_one::<PathBuf>("config").map(PathBuf::as_path))?;
    let file = file.as_ref().map(|(path, text)| (path.as_str(), text.as_str()));
    for setting in config::SETTINGS {
        if matches!(std::env::var(setting.env), Err(std::env::VarError::NotUnicode(_))) {
            return Err(SettingsError::NotUtf8(setting.env));
        }
    }
    Ok(Config::load(file, |name| std::env::var(name).ok(), |flag| matches.get_one::<String>(flag).cloned())?)
}

fn read(named: Option<&Path>) -> Result<Option<(String, String)>, SettingsError> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.display().to_string(), text))),
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SettingsError::File { path: path.to_owned(), source }),
    }
}
