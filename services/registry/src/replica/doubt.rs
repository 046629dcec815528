//! What a replica does about data that it does not get any further with: first another start, then a start without it.
//!
//! Data is only ever set aside while the others, without this replica, are a majority with a leader; and it is moved, not
//! deleted.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::peers::{Answer, Peers};
use crate::StartError;

/// The data directory of a replica, and whether its data was in doubt before.
#[derive(Debug, Clone)]
pub(crate) struct Doubt {
    dir: PathBuf,
    marker: PathBuf,
}

impl Doubt {
    pub(crate) fn of(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), marker: dir.join("stuck") }
    }

    /// The process before this one ended because it did not get any further.
    pub(crate) fn was_there_before(&self) -> bool {
        self.marker.exists()
    }

    /// This process ends because it does not get any further.
    pub(crate) fn note(&self) {
        if let Err(error) = fs::write(&self.marker, "") {
            tracing::warn!(%error, "cannot note that this replica was stuck");
        }
    }

    /// It got further.
    pub(crate) fn dispel(&self) {
        let _ = fs::remove_file(&self.marker);
    }

    /// Sets the data aside, if the others are well: then the reason to end the process.
    pub(crate) async fn begin_again(&self, peers: &Peers, majority: usize) -> Result<(), StartError> {
        let answers = peers.ask_all().await.unwrap_or_default();
        let well = answers.iter().filter(|answer| answer.is_well()).count();
        if well < majority || !answers.iter().any(Answer::leads) {
            tracing::warn!(
                well,
                "this replica does not catch up, and too few of the others are well for it to begin again"
            );
            return Ok(());
        }
        let aside = self.set_aside().map_err(|source| StartError::DataDir { path: self.dir.clone(), source })?;
        tracing::error!(aside = %aside.display(), "this replica does not catch up; its data was set aside, and its next start takes the leader's");
        Err(StartError::Stuck("its data was set aside"))
    }

    /// Moves the data beside where it was; what was set aside before goes.
    fn set_aside(&self) -> io::Result<PathBuf> {
        let aside = self.dir.with_extension("aside");
        match fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::rename(&self.dir, &aside)?;
        fs::File::open(self.dir.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(aside)
    }
}
