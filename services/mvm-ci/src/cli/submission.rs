//! What `mvm-ci run` asks the control plane for: spec and input, from the command line, our environment and our files.

use std::{collections::BTreeMap, fs, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use blixard::{
    error::{Error, Reason, invalid},
    id::{JobId, VmId},
    job::TENANT_LABEL,
    limits,
    pb::common::v1 as common,
    time::millis,
};
use bytes::Bytes;

use super::{
    args::{Place, RunArgs},
    failure::Failure,
};

/// What to run.
pub(crate) fn spec(args: &RunArgs) -> Result<common::JobSpec, Error> {
    let Place { ephemeral, service, vm } = &args.place;
    let isolation = match (ephemeral, service) {
        (true, _) => common::Isolation::Maximum,
        (false, true) => common::Isolation::Minimal,
        (false, false) => common::Isolation::Standard,
    };
    if let Some(vm) = vm {
        VmId::parse("--vm", vm)?;
    }
    let after = |id: &String| {
        let job_id = JobId::parse("--after", id)?.to_string();
        Ok::<_, Error>(common::Dependency { job_id, condition: common::DependencyCondition::Succeeded.into() })
    };
    let tenant = args.tenant.iter().map(|tenant| (TENANT_LABEL.to_owned(), tenant.clone()));
    Ok(common::JobSpec {
        command: args.command.clone(),
        env: map(&args.env),
        working_dir: args.workdir.clone(),
        image: args.image.clone(),
        vcpus: args.vcpus,
        memory_mib: args.memory,
        isolation: isolation.into(),
        priority: args.priority,
        timeout_ms: millis_or_none(args.timeout),
        max_attempts: args.retries.map_or(args.max_attempts.unwrap_or(1), |retries| retries.saturating_add(1)),
        retry_on: args.retry_on.iter().map(|&on| common::RetryOn::from(on).into()).collect(),
        backoff_ms: millis_or_none(args.backoff),
        queue_timeout_ms: millis_or_none(args.queue_timeout),
        start_timeout_ms: millis_or_none(args.start_timeout),
        labels: args.label.iter().cloned().chain(tenant).collect(),
        node_id: args.node.clone(),
        egress: args.egress.clone().map(Into::into),
        volumes: args.volumes.clone().into_pb(),
        node_labels: map(&args.node_label),
        preferred_node_labels: map(&args.prefer_node_label),
        target_vm_id: vm.clone().unwrap_or_default(),
        depends_on: args.after.iter().map(after).collect::<Result<_, _>>()?,
        artifacts: args.artifact.clone(),
        result_ttl_ms: millis_or_none(args.ttl),
        ..Default::default()
    })
}

fn map(pairs: &[(String, String)]) -> BTreeMap<String, String> {
    pairs.iter().cloned().collect()
}

/// 0 for none, as the contract has it.
pub(crate) fn millis_or_none(duration: Option<Duration>) -> u64 {
    duration.map_or(0, millis)
}

/// What it is given besides; `None`: nothing.
pub(crate) fn input(args: &RunArgs) -> Result<Option<common::JobInput>, Failure> {
    let mut input = common::JobInput::default();
    if args.stdin {
        input.stdin = bounded("--stdin", std::io::stdin().lock())?;
    }
    for (local, guest) in &args.file {
        let file = fs::File::open(local).map_err(|error| unreadable(local, &error))?;
        let mode = file.metadata().map_err(|error| unreadable(local, &error))?.permissions().mode() & 0o777;
        let content = bounded(&format!("--file {}", local.display()), file)?;
        input.files.push(common::InputFile { path: guest.clone(), content, mode });
    }
    for (name, file) in &args.secret {
        let value = match file {
            Some(path) => {
                let value = fs::read_to_string(path).map_err(|error| unreadable(path, &error))?;
                value.strip_suffix('\n').map(str::to_owned).unwrap_or(value)
            }
            None => std::env::var(name).map_err(|_| {
                Failure::NotRun(invalid(
                    &format!("--secret {name}"),
                    "",
                    "a variable that is set in our environment, or NAME=@FILE",
                ))
            })?,
        };
        input.secrets.insert(name.clone(), value);
    }
    Ok((input != common::JobInput::default()).then_some(input))
}

/// Reads no more than a job may be given.
fn bounded(what: &str, source: impl std::io::Read) -> Result<Bytes, Failure> {
    let most = limits::MAX_INPUT_BYTES;
    let mut bytes = Vec::new();
    source.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(Failure::NotRun(invalid(
            what,
            "more",
            &format!("at most {most} bytes, with all files and secrets"),
        )));
    }
    Ok(bytes.into())
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::NotRun(Error::new(Reason::InvalidField, format!("cannot read {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Command, parse};

    fn run(line: &[&str]) -> RunArgs {
        let args = ["mvm-ci", "run"].into_iter().chain(line.iter().copied()).map(Into::into).collect();
        match parse(args).map(|arguments| arguments.command) {
            Ok(Some(Command::Run(run))) => *run,
            _ => panic!("{line:?}"),
        }
    }

    #[test]
    fn every_flag_reaches_the_spec() {
        let id = "00000000-0000-0000-0000-000000000017";
        let line = format!(
            "--service --image i --vcpus 3 --memory 256 --egress allow=10.0.0.0/8:443 --volume tools:/t --scratch 10G --scratch 512M:/s --env A=1 --timeout 2s --workdir /w --priority -5 --retries 2 \
             --retry-on lost,failed --backoff 1s --queue-timeout 1m --start-timeout 30s --label a=b --tenant ci --node n \
             --node-label disk=ssd --prefer-node-label rack=1 --after {id} --artifact /out --ttl 1d -- make test"
        );
        let spec = spec(&run(&line.split_whitespace().collect::<Vec<_>>())).expect("valid");
        let expected = common::JobSpec {
            command: vec!["make".into(), "test".into()],
            env: BTreeMap::from([("A".into(), "1".into())]),
            working_dir: "/w".into(),
            image: "i".into(),
            vcpus: Some(3),
            memory_mib: Some(256),
            isolation: common::Isolation::Minimal.into(),
            priority: -5,
            timeout_ms: 2000,
            max_attempts: 3,
            labels: BTreeMap::from([("a".into(), "b".into()), ("tenant".into(), "ci".into())]),
            node_id: "n".into(),
            egress: Some(common::Egress {
                policy: common::EgressPolicy::AllowList.into(),
                allow: vec![common::EgressRule { cidr: "10.0.0.0/8".into(), port: 443 }],
            }),
            volumes: [
                ("/t", common::volume::Source::Name("tools".into())),
                ("/scratch", common::volume::Source::ScratchMib(10_240)),
                ("/s", common::volume::Source::ScratchMib(512)),
            ]
            .map(|(path, source)| common::Volume { mount_path: path.into(), source: Some(source) })
            .into(),
            retry_on: vec![common::RetryOn::Lost.into(), common::RetryOn::Failed.into()],
            backoff_ms: 1000,
            queue_timeout_ms: 60_000,
            start_timeout_ms: 30_000,
            node_labels: BTreeMap::from([("disk".into(), "ssd".into())]),
            preferred_node_labels: BTreeMap::from([("rack".into(), "1".into())]),
            depends_on: vec![common::Dependency { job_id: id.into(), condition: 1 }],
            artifacts: vec!["/out".into()],
            result_ttl_ms: 86_400_000,
            ..Default::default()
        };
        assert_eq!(spec, expected);
    }

    #[test]
    fn files_keep_their_bytes_and_modes_and_secrets_lose_one_newline() {
        let dir = tempfile::tempdir().expect("a directory");
        let (script, token) = (dir.path().join("a:b.sh"), dir.path().join("token"));
        fs::write(&script, b"\xff\0#!").expect("written");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o750)).expect("changed");
        fs::write(&token, "hunter22\n\n").expect("written");
        let file = format!("{}:/run.sh", script.display());
        let secret = format!("TOKEN=@{}", token.display());
        let input = input(&run(&["--file", &file, "--secret", &secret, "--", "true"])).expect("read").expect("some");
        let expected = common::InputFile { path: "/run.sh".into(), content: b"\xff\0#!"[..].into(), mode: 0o750 };
        assert_eq!((input.files, input.secrets["TOKEN"].as_str()), (vec![expected], "hunter22\n"));
    }

    #[test]
    fn what_is_not_there_or_too_much_is_refused_before_anything_is_sent() {
        let dir = tempfile::tempdir().expect("a directory");
        let large = dir.path().join("large");
        fs::write(&large, vec![0; limits::MAX_INPUT_BYTES + 1]).expect("written");
        let large = format!("{}:/large", large.display());
        for (line, says) in [
            (["--file", "/nowhere:/x"], "cannot read /nowhere"),
            (["--file", &large], "at most 524288 bytes"),
            (["--secret", "MVM_CI_TEST_NOT_SET"], "--secret MVM_CI_TEST_NOT_SET"),
            (["--secret", "A=@/nowhere"], "cannot read /nowhere"),
        ] {
            let failure = input(&run(&[&line[..], &["--", "true"]].concat())).expect_err(says);
            let text = failure.render(crate::cli::args::Format::Table);
            assert!(text.contains(says), "{text}");
            assert_eq!(failure.exit_code(), 125);
        }
        assert_eq!(input(&run(&["--", "true"])).expect("nothing to read"), None);
    }
}
