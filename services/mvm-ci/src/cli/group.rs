//! `mvm-ci job group FILE`: jobs that depend on each other, from a TOML file.

use std::{collections::BTreeMap, fs, path::Path};

use blixard::{
    egress::Egress,
    id::JobId,
    pb::{common::v1 as common, scheduler::v1 as pb},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    args,
    client::{Client, parse_job},
    failure::Failure,
    output::{self, Printer},
    submission::millis_or_none,
};

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    job: Vec<Entry>,
}

/// A job of it, or an array of jobs. Names as the flags of `mvm-ci run` have them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    command: Vec<String>,
    /// Names of jobs that must have succeeded before.
    #[serde(default)]
    after: Vec<String>,
    /// Names of jobs that must have ended before, however.
    #[serde(default)]
    after_end: Vec<String>,
    /// `1-100`.
    array: Option<String>,
    #[serde(default)]
    image: String,
    vcpus: Option<u32>,
    memory: Option<u32>,
    egress: Option<Egress>,
    #[serde(default)]
    volume: Vec<String>,
    #[serde(default)]
    scratch: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    workdir: String,
    #[serde(default)]
    ephemeral: bool,
    #[serde(default)]
    service: bool,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    retries: u32,
    #[serde(default)]
    retry_on: Vec<String>,
    timeout: Option<String>,
    #[serde(default)]
    label: BTreeMap<String, String>,
    #[serde(default)]
    node_label: BTreeMap<String, String>,
    #[serde(default)]
    artifact: Vec<String>,
}

/// See the module.
pub(crate) async fn group(client: &Client, path: &Path, printer: &Printer) -> Result<(), Failure> {
    let text = fs::read_to_string(path)?;
    let jobs = parse(&text).map_err(|why| Failure::Config(format!("{}: {why}", path.display())))?;
    let request = pb::SubmitJobGroupRequest { request_id: JobId::random().to_string(), jobs };
    let answer = client.call(request, async |mut stub, request| stub.submit_job_group(request).await).await?;
    let jobs = answer.jobs.into_iter().map(|job| parse_job(Some(job))).collect::<Result<Vec<_>, _>>()?;
    let group_id = answer.group_id;
    printer.print(
        || json!({ "group_id": group_id, "jobs": Value::Array(jobs.iter().map(output::job_json).collect()) }),
        || group_id.clone(),
    )
}

fn parse(text: &str) -> Result<Vec<pb::GroupJob>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    file.job
        .into_iter()
        .map(|entry| {
            let name = entry.name.clone();
            job(entry).map_err(|why| format!("job \"{name}\": {why}"))
        })
        .collect()
}

fn job(entry: Entry) -> Result<pb::GroupJob, String> {
    let isolation = match (entry.ephemeral, entry.service) {
        (true, true) => return Err("ephemeral and service exclude each other".to_owned()),
        (true, false) => common::Isolation::Maximum,
        (false, true) => common::Isolation::Minimal,
        (false, false) => common::Isolation::Standard,
    };
    let (array_first, array_last) = match entry.array.as_deref().map(args::array).transpose()? {
        Some(indexes) => (*indexes.start(), *indexes.end()),
        None => (0, 0),
    };
    let retry_on = entry.retry_on.iter().map(|on| args::retry_on(on).map(|on| common::RetryOn::from(on).into()));
    let volumes = entry.volume.iter().map(|text| args::volume(text));
    let volumes = volumes.chain(entry.scratch.iter().map(|text| args::scratch(text)));
    let spec = common::JobSpec {
        command: entry.command,
        env: entry.env,
        working_dir: entry.workdir,
        image: entry.image,
        vcpus: entry.vcpus,
        memory_mib: entry.memory,
        isolation: isolation.into(),
        egress: entry.egress.map(Into::into),
        volumes: volumes.collect::<Result<_, String>>()?,
        priority: entry.priority,
        timeout_ms: millis_or_none(entry.timeout.as_deref().map(args::duration).transpose()?),
        max_attempts: entry.retries.saturating_add(1),
        retry_on: retry_on.collect::<Result<_, String>>()?,
        labels: entry.label,
        node_labels: entry.node_label,
        artifacts: entry.artifact,
        ..Default::default()
    };
    let on = |names: Vec<String>, condition: common::DependencyCondition| {
        names.into_iter().map(move |name| pb::GroupDependency { name, condition: condition.into() })
    };
    let succeeded = on(entry.after, common::DependencyCondition::Succeeded);
    let depends_on = succeeded.chain(on(entry.after_end, common::DependencyCondition::Ended)).collect();
    Ok(pb::GroupJob { name: entry.name, spec: Some(spec), input: None, array_first, array_last, depends_on })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_becomes_the_jobs_of_a_group() {
        let jobs = parse(
            r#"
            [[job]]
            name = "test"
            command = ["make", "test"]
            array = "1-3"
            retries = 1
            retry_on = ["lost", "failed"]
            timeout = "10m"
            volume = ["tools:/opt/tools"]
            scratch = ["2G"]

            [[job]]
            name = "report"
            command = ["make", "report"]
            after_end = ["test"]
            service = true
            egress = "internet"
            "#,
        )
        .expect("valid");
        assert_eq!((jobs[0].array_first, jobs[0].array_last), (1, 3));
        let spec = jobs[0].spec.as_ref().expect("a spec");
        assert_eq!((spec.max_attempts, &spec.retry_on[..], spec.timeout_ms), (2, &[1, 2][..], 600_000));
        let volumes = [
            ("/opt/tools", common::volume::Source::Name("tools".into())),
            ("/scratch", common::volume::Source::ScratchMib(2048)),
        ];
        let volume = |(path, source): (&str, _)| common::Volume { mount_path: path.into(), source: Some(source) };
        assert_eq!(spec.volumes, volumes.map(volume));
        let on = pb::GroupDependency { name: "test".into(), condition: common::DependencyCondition::Ended.into() };
        assert_eq!(jobs[1].depends_on, [on]);
        assert_eq!(jobs[1].spec.as_ref().expect("a spec").isolation(), common::Isolation::Minimal);
        assert_eq!(jobs[1].spec.as_ref().expect("a spec").egress, Some(Egress::Internet.into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let head = "[[job]]\nname = \"a\"\ncommand = [\"true\"]\n";
        for (line, says) in [
            ("wait = true", "unknown field `wait`"),
            ("array = \"0-1\"", "job \"a\": expected FIRST-LAST"),
            ("egress = \"all\"", "none, internet, or allow="),
            ("scratch = [\"5\"]", "job \"a\": expected a size"),
            ("timeout = \"5\"", "job \"a\": expected a duration"),
            ("retry_on = [\"x\"]", "job \"a\": expected lost, failed or timed-out"),
            ("service = true\nephemeral = true", "exclude each other"),
        ] {
            let refused = parse(&format!("{head}{line}\n")).expect_err(line);
            assert!(refused.contains(says), "{refused}");
        }
    }
}
