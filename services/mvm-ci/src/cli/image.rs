//! `mvm-ci image`: the images of this machine.

use std::{path::Path, process::ExitCode, time::Duration};

use blixard::{config::Config, time::Timestamp};
use blixard_vmhost::hypervisor::Manifest;
use serde_json::{Value, json};

use super::{
    args::{ImageArgs, ImageCommand, ImageMaking},
    failure::Failure,
    output::{self, Printer},
    progress::Gauge,
};
use crate::image::{self, Entry, Phase, Settings, Source, Store};

/// Enough of a digest to tell images apart.
const SHORT_DIGEST: usize = 12;

/// See the module.
pub(crate) async fn image(config: &Config, args: ImageArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let store = Store::new(&config.firecracker.image_dir);
    match args.command {
        ImageCommand::List => {
            let entries = store.list()?;
            printer.print(|| entries.iter().map(entry_json).collect(), || table(&entries))?;
        }
        ImageCommand::Import { name, source, reference, making } => {
            let settings = Settings { reference, ..settings(name, making, source.clone()) };
            let mut bars = Bars::default();
            let source = Source::parse(&source)?;
            let made =
                image::import(&store, &settings, &source, &mut |phase, done, of| bars.show(phase, done, of)).await?;
            drop(bars);
            print(&made, printer)?;
        }
        ImageCommand::Build { name, dir, making } => {
            let made = build(&store, &config.firecracker.flake_dir, name.zip(dir), making)?;
            print(&made, printer)?;
        }
        ImageCommand::Rm { names } => {
            // All or none, as far as it can be known before.
            names.iter().try_for_each(|name| store.find(name).map(drop))?;
            names.iter().try_for_each(|name| store.remove(name))?;
            printer.print(|| json!({ "removed": names }), || format!("removed {}", names.join(", ")))?;
        }
        ImageCommand::Gc => {
            let removed = store.collect_garbage()?;
            printer.print(|| json!({ "removed": removed }), || format!("removed {removed} unfinished imports"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn build(
    store: &Store,
    flake_dir: &Path,
    from: Option<(String, std::path::PathBuf)>,
    making: ImageMaking,
) -> Result<Entry, Failure> {
    let Some((name, dir)) = from else { return Ok(image::run_script(flake_dir, store)?) };
    let settings = settings(name, making, dir.display().to_string());
    let mut bars = Bars::default();
    Ok(image::from_directory(store, &settings, &dir, &mut |phase, done, of| bars.show(phase, done, of))?)
}

fn settings(name: String, making: ImageMaking, source: String) -> Settings {
    let created_at = output::rfc3339(Timestamp::now());
    Settings { name, base: making.base, replace: making.replace, reference: None, source, created_at }
}

/// One bar at a time.
#[derive(Default)]
struct Bars {
    current: Option<(Phase, Gauge)>,
}

impl Bars {
    fn show(&mut self, phase: Phase, done: u64, of: u64) {
        if self.current.as_ref().is_none_or(|(current, _)| *current != phase) {
            let what = match phase {
                Phase::Download => "downloading",
                Phase::Unpack => "unpacking",
                Phase::Write => "writing",
            };
            // The old one leaves its line first.
            self.current = None;
            self.current = Some((phase, Gauge::new(what, "bytes")));
        }
        if let Some((_, gauge)) = &self.current {
            gauge.show(done, of);
        }
    }
}

fn print(entry: &Entry, printer: &Printer) -> Result<(), Failure> {
    printer.print(|| entry_json(entry), || table(std::slice::from_ref(entry)))
}

fn entry_json(entry: &Entry) -> Value {
    let manifest = entry.manifest.as_ref().ok();
    let text = |field: fn(&Manifest) -> &str| manifest.map(field).filter(|text| !text.is_empty());
    json!({
        "name": entry.name,
        "digest": format!("sha256:{}", entry.digest),
        "size_bytes": entry.bytes,
        "kernel": text(|manifest| &manifest.kernel_release),
        "agent_version": text(|manifest| &manifest.agent_version),
        "root_filesystem": manifest.and_then(|manifest| Some(&manifest.root_disk.as_ref()?.filesystem)),
        "source": text(|manifest| &manifest.source),
        "created_at": text(|manifest| &manifest.created_at),
        "env": manifest.map(|manifest| &manifest.env),
        "working_dir": text(|manifest| &manifest.working_dir),
        "problem": entry.manifest.as_ref().err(),
    })
}

fn table(entries: &[Entry]) -> String {
    let row = |entry: &Entry| {
        let text =
            |field: fn(&Manifest) -> String| output::dash(entry.manifest.as_ref().map(field).unwrap_or_default());
        let source = match &entry.manifest {
            Ok(manifest) => output::dash(manifest.source.clone()),
            Err(problem) => format!("cannot be booted: {problem}"),
        };
        let root = text(|manifest| manifest.root_disk.as_ref().map(|disk| disk.filesystem.clone()).unwrap_or_default());
        vec![
            entry.name.clone(),
            entry.digest.get(..SHORT_DIGEST).unwrap_or_default().to_owned(),
            indicatif::BinaryBytes(entry.bytes).to_string(),
            text(|manifest| manifest.kernel_release.clone()),
            root,
            text(|manifest| age(&manifest.created_at)),
            source,
        ]
    };
    let rows: Vec<_> = entries.iter().map(row).collect();
    output::table(&["NAME", "DIGEST", "SIZE", "KERNEL", "ROOT", "AGE", "SOURCE"], &rows)
}

fn age(created_at: &str) -> String {
    let Ok(created) = created_at.parse::<jiff::Timestamp>() else { return String::new() };
    let seconds = Timestamp::now().0 / 1000 - created.as_second();
    output::age(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_listed_with_what_they_are_and_where_they_come_from() {
        let manifest = Manifest {
            kernel_release: "6.1.0-56-cloud-amd64".into(),
            agent_version: "0.1.0".into(),
            root_disk: Some(blixard_vmhost::hypervisor::RootDisk {
                file: "root.erofs".into(),
                filesystem: "erofs".into(),
            }),
            source: "debian:12 (sha256:ab)".into(),
            env: vec!["A=1".into()],
            ..Manifest::default()
        };
        let entry =
            |name: &str, manifest| Entry { name: name.into(), manifest, digest: "ab".repeat(32), bytes: 83_886_080 };
        let entries = [entry("debian", Ok(manifest)), entry("torn", Err("manifest.json: EOF".into()))];
        insta::assert_snapshot!(format!(
            "{}\n{:#}",
            table(&entries),
            entries.iter().map(entry_json).collect::<Value>()
        ));
    }
}
