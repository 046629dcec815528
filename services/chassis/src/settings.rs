//! The control plane's settings on the command line of every binary: made from [`config::SETTINGS`], so there is one table.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use blixard::config::{self, Config, ConfigError};
use clap::{Arg, ArgMatches, Command};

/// Read when it exists and no other file is named.
const DEFAULT_FILE: &str = "./mvm-ci.toml";
const HEADING: &str = "Control plane";

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
        // As everywhere, the last of several wins.
        let arg = arg.overrides_with(setting.flag).allow_hyphen_values(true);
        command = command.arg(arg.help_heading(HEADING));
    }
    command
}

/// What a command line said of the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// The value of each flag that was given, by its name without dashes.
    pub values: BTreeMap<&'static str, String>,
}

impl Flags {
    /// Takes over what was given; later ones win.
    pub fn add(&mut self, matches: &ArgMatches) {
        if let Some(file) = matches.get_one::<PathBuf>("config") {
            self.file = Some(file.clone());
        }
        for setting in config::SETTINGS {
            if let Some(value) = matches.get_one::<String>(setting.flag) {
                self.values.insert(setting.flag, value.clone());
            }
        }
    }

    /// Puts the configuration together: defaults < TOML file < environment < flags.
    ///
    /// # Errors
    /// The first setting that is refused, in words for its user.
    pub fn load(&self) -> Result<Config, SettingsError> {
        let file = read(self.file.as_deref())?;
        let file = file.as_ref().map(|(path, text)| (path.as_str(), text.as_str()));
        for setting in config::SETTINGS {
            if matches!(std::env::var(setting.env), Err(std::env::VarError::NotUnicode(_))) {
                return Err(SettingsError::NotUtf8(setting.env));
            }
        }
        Ok(Config::load(file, |name| std::env::var(name).ok(), |flag| self.values.get(flag).cloned())?)
    }
}

/// The configuration that this command line asks for.
///
/// # Errors
/// As [`Flags::load`].
pub fn load(matches: &ArgMatches) -> Result<Config, SettingsError> {
    let mut flags = Flags::default();
    flags.add(matches);
    flags.load()
}

fn read(named: Option<&Path>) -> Result<Option<(String, String)>, SettingsError> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path.display().to_string(), text))),
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SettingsError::File { path: path.to_owned(), source }),
    }
}
