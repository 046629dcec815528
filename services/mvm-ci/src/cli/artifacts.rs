//! The files that a job left: listed, printed, and fetched into a directory, each whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Component, Path, PathBuf},
};

use blixard::{
    error::{Error, Reason},
    pb::{common::v1 as common, scheduler::v1 as pb},
};
use ring::digest;
use serde_json::{Value, json};

use super::{
    args::ArtifactArgs,
    client::{Client, is_transient},
    failure::Failure,
    log_follower::Outage,
    output::{self, Printer},
};

/// `mvm-ci job artifacts`.
pub(crate) async fn artifacts(client: Client, args: ArtifactArgs, printer: &Printer) -> Result<(), Failure> {
    if let Some(path) = args.path {
        let mut stdout = io::stdout().lock();
        return receive(&client, &args.id, args.attempt, &path, &mut |bytes| stdout.write_all(bytes)).await;
    }
    if let Some(dir) = args.dir {
        let mut note = |text: &str| writeln!(io::stderr(), "mvm-ci: {text}");
        return fetch_all(&client, &args.id, args.attempt, &dir, &mut note).await;
    }
    let listed = list(&client, &args.id, args.attempt).await?;
    printer.print(|| Value::Array(listed.artifacts.iter().map(artifact_json).collect()), || table(&listed.artifacts))
}

async fn list(client: &Client, job_id: &str, attempt: u32) -> Result<pb::ListArtifactsResponse, Error> {
    let request = pb::ListArtifactsRequest { job_id: job_id.to_owned(), attempt };
    client.call(request, async |mut stub, request| stub.list_artifacts(request).await).await
}

/// Fetches every file of an attempt (0: the latest) to its path below `dir`. What was not kept, or never written, is noted; a job
/// without an attempt has none.
pub(crate) async fn fetch_all(
    client: &Client,
    job_id: &str,
    attempt: u32,
    dir: &Path,
    note: &mut impl FnMut(&str) -> io::Result<()>,
) -> Result<(), Failure> {
    let listed = match list(client, job_id, attempt).await {
        Ok(listed) => listed,
        Err(error) if error.reason == Reason::ArtifactNotFound => {
            note(&error.message)?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    for artifact in &listed.artifacts {
        if artifact.problem.is_empty() {
            fetch(client, job_id, listed.attempt, artifact, dir).await?;
        } else {
            note(&format!("{} was not kept: {}", artifact.path, artifact.problem))?;
        }
    }
    Ok(())
}

/// Writes beside its place, checks, then moves there: nobody ever sees a part.
async fn fetch(
    client: &Client,
    job_id: &str,
    attempt: u32,
    artifact: &common::Artifact,
    dir: &Path,
) -> Result<(), Failure> {
    let target = place(dir, &artifact.path)?;
    let parent = target.parent().unwrap_or(dir);
    fs::create_dir_all(parent)?;
    let mut part = Part::create(&target, job_id)?;
    let mut sum = digest::Context::new(&digest::SHA256);
    receive(client, job_id, attempt, &artifact.path, &mut |bytes| {
        sum.update(bytes);
        part.file.write_all(bytes)
    })
    .await?;
    if !artifact.sha256.is_empty() && sum.finish().as_ref() != &artifact.sha256[..] {
        let message = format!("{} arrived damaged: its SHA-256 is another one", artifact.path);
        return Err(Error::new(Reason::Internal, message).into());
    }
    part.finish(&target)?;
    Ok(())
}

/// Receives a file from the first byte to the last, across broken connections.
async fn receive(
    client: &Client,
    job_id: &str,
    attempt: u32,
    path: &str,
    write: &mut impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut outage = Outage::default();
    let mut offset = 0;
    loop {
        let request = pb::GetArtifactRequest { job_id: job_id.to_owned(), attempt, path: path.to_owned(), offset };
        let status = match client.get_artifact(request).await {
            Err(status) => status,
            Ok(mut parts) => loop {
                match parts.message().await {
                    Ok(Some(part)) => {
                        outage = Outage::default();
                        offset += part.data.len() as u64;
                        write(&part.data)?;
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => break status,
                }
            },
        };
        if !is_transient(&status) {
            return Err(Error::from_status(&status).into());
        }
        outage.wait(&status).await?;
    }
}

/// Where a guest's path goes. A path that climbs stays below `dir` or is refused.
fn place(dir: &Path, guest: &str) -> Result<PathBuf, Error> {
    let mut target = dir.to_owned();
    for component in Path::new(guest).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => target.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                let message =
                    format!("{guest} has \"..\" in it, and is not fetched: print it with mvm-ci job artifacts");
                return Err(Error::new(Reason::InvalidField, message).with("path", guest));
            }
        }
    }
    Ok(target)
}

/// A file that goes away unless it is finished.
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn create(target: &Path, job_id: &str) -> io::Result<Self> {
        let name = target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let path = target.with_file_name(format!(".{name}.{job_id}.{}.part", std::process::id()));
        let file = File::create(&path)?;
        Ok(Self { path, file })
    }

    fn finish(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It is not there any more when it was finished.
        let _ = fs::remove_file(&self.path);
    }
}

fn artifact_json(artifact: &common::Artifact) -> Value {
    let sha256 = hex::encode(&artifact.sha256);
    json!({
        "path": artifact.path,
        "size_bytes": artifact.size_bytes,
        "sha256": (!sha256.is_empty()).then_some(sha256),
        "problem": artifact.problem,
    })
}

fn table(artifacts: &[common::Artifact]) -> String {
    let row = |artifact: &common::Artifact| {
        let size = if artifact.problem.is_empty() { artifact.size_bytes.to_string() } else { "-".to_owned() };
        vec![artifact.path.clone(), size, artifact.problem.clone()]
    };
    output::table(&["PATH", "BYTES", "PROBLEM"], &artifacts.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_for_people_and_for_programs() {
        let kept = common::Artifact {
            path: "/out/a.txt".into(),
            size_bytes: 12,
            sha256: vec![0, 255].into(),
            problem: String::new(),
        };
        let lost = common::Artifact { path: "/out/b".into(), problem: "not there".into(), ..Default::default() };
        let json: Vec<_> = [&kept, &lost].map(artifact_json).into();
        insta::assert_snapshot!(format!("{}\n{:#}", table(&[kept, lost]), Value::Array(json)));
    }

    #[test]
    fn no_path_leads_out_of_the_directory() {
        assert_eq!(place(Path::new("d"), "/out/./a").expect("inside"), Path::new("d/out/a"));
        assert_eq!(place(Path::new("d"), "/a/../../etc/passwd").expect_err("refused").reason, Reason::InvalidField);
    }

    #[test]
    fn a_file_that_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = dir.path().join("a");
        drop(Part::create(&target, "job").expect("created"));
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
        let mut part = Part::create(&target, "job").expect("created");
        part.file.write_all(b"whole").expect("written");
        part.finish(&target).expect("moved");
        assert_eq!(fs::read(&target).expect("a file"), b"whole");
    }
}
