//! `mvm-ci registry backup` and `mvm-ci registry restore`.

use std::{path::Path, process::ExitCode};

use blixard::{config::Config, pb::registry::v1::backup_response::Message};
use blixard_chassis::with_causes;
use blixard_registry::{Archive, ArchiveWriter, Manifest, RegistryConfig};
use serde_json::{Value, json};

use super::{
    client::{Client, missing},
    failure::Failure,
    output::Printer,
    progress::Gauge,
};

/// Copies a running registry's database into a directory.
pub(crate) async fn backup(client: Client, dir: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
    let gauge = Gauge::new("backing up", "bytes");
    let manifest = receive(&client, dir, &gauge).await?;
    drop(gauge);
    printer.print(
        || described(&manifest, "dir", dir),
        || format!("revision {}, {} bytes, in {}", manifest.revision, manifest.bytes, dir.display()),
    )?;
    Ok(ExitCode::SUCCESS)
}

async fn receive(client: &Client, dir: &Path, gauge: &Gauge) -> Result<Manifest, Failure> {
    let mut stream = client.backup().await?;
    let (mut writer, mut size, mut done) = (None, 0, 0);
    while let Some(message) = stream.message().await? {
        match (message.message, writer.take()) {
            (Some(Message::Header(header)), None) => {
                size = header.size_bytes;
                writer = Some(ArchiveWriter::create(dir, header).map_err(failed)?);
            }
            (Some(Message::Chunk(chunk)), Some(mut begun)) => {
                begun.write(&chunk).map_err(failed)?;
                done += chunk.len() as u64;
                gauge.show(done, size);
                writer = Some(begun);
            }
            (Some(Message::Digest(digest)), Some(begun)) => return begun.finish(&digest.sha256).map_err(failed),
            (_, begun) => writer = begun,
        }
    }
    Err(missing("digest").into())
}

/// Makes a data directory from a backup, with what the configuration says of replicas.
pub(crate) async fn restore(config: &Config, dir: &Path, printer: &Printer) -> Result<ExitCode, Failure> {
    let own = RegistryConfig::load(config).map_err(|error| Failure::Config(with_causes(&error)))?;
    let gauge = Gauge::new("restoring", "rows");
    let archive = Archive::open(dir).map_err(failed)?;
    let told = |done, of| gauge.show(done, of);
    blixard_registry::restore(&own, &archive, told).await.map_err(|error| Failure::Backup(with_causes(&error)))?;
    drop(gauge);
    let (manifest, data) = (&archive.manifest, &own.data_dir);
    printer.print(
        || described(manifest, "data_dir", data),
        || format!("revision {} of {}, in {}", manifest.revision, manifest.taken_at, data.display()),
    )?;
    Ok(ExitCode::SUCCESS)
}

fn described(manifest: &Manifest, place: &str, path: &Path) -> Value {
    json!({
        place: path.display().to_string(),
        "revision": manifest.revision,
        "schema_version": manifest.schema_version,
        "bytes": manifest.bytes,
        "sha256": manifest.sha256,
        "taken_at": manifest.taken_at,
    })
}

fn failed(error: blixard_registry::ArchiveError) -> Failure {
    Failure::Backup(with_causes(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_for_programs() {
        let manifest = Manifest {
            format_version: 1,
            revision: 7,
            schema_version: 1,
            bytes: 4096,
            sha256: "00ff".into(),
            taken_at: "2026-01-31T12:34:56.789Z".into(),
        };
        insta::assert_snapshot!(format!("{:#}", described(&manifest, "dir", Path::new("/b"))), @r#"
        {
          "bytes": 4096,
          "dir": "/b",
          "revision": 7,
          "schema_version": 1,
          "sha256": "00ff",
          "taken_at": "2026-01-31T12:34:56.789Z"
        }
        "#);
    }
}
