//! The jobs of a trial: each writes down what it does, and prints what can be foretold.
//!
//! A job's file has a line for each thing that one of its attempts did, in the order in which they did it: they all append to
//! it. So no clock is needed to tell whether two of them lived at once.

use std::{collections::BTreeMap, fmt::Write as _, fs, io, path::Path, str::FromStr};

use blixard::pb::common::v1::{Isolation, JobSpec, RetryOn};
use blixard_chaos_kit::Rng;

/// What a job does, in the shell of its VM. Its arguments: the file, how many times it goes on after 0.2 s, and how many lines
/// it prints each time.
const SCRIPT: &str = r#"
mark() { echo "$1 $BLIXARD_ATTEMPT $$" >> "$file"; }
file=$1 beats=$2 lines=$3 line=0
print() {
    end=$((line + lines))
    while [ $line -lt $end ]; do
        echo "$BLIXARD_JOB_ID line $line: the quick brown fox jumps over the lazy dog"
        line=$((line + 1))
    done
}
mark begin
print
while [ $beats -gt 0 ]; do
    sleep 0.2
    mark beat
    print
    beats=$((beats - 1))
done
mark end
"#;

/// How many attempts may start. One that meets this many faults has met too many.
pub(crate) const MAX_ATTEMPTS: u32 = 20;

/// One job.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: String,
    isolation: Isolation,
    beats: u64,
    lines: u64,
    /// It is to be cancelled so many milliseconds after its submission.
    pub(crate) cancel_after_ms: Option<u64>,
    /// Somebody follows its output from the beginning.
    pub(crate) followed: bool,
}

impl Plan {
    pub(crate) fn choose(rng: &mut Rng) -> Self {
        // Most are short, some last seconds, and a few longer than it takes to begin again elsewhere.
        let beats = match rng.within(0..100) {
            0..60 => 0,
            60..96 => rng.within(1..10),
            _ => rng.within(100..260),
        };
        let isolation = match rng.within(0..100) {
            0..40 => Isolation::Minimal,
            40..75 => Isolation::Standard,
            _ => Isolation::Maximum,
        };
        Self {
            id: rng.uuid(),
            isolation,
            beats,
            lines: rng.within(8..64),
            cancel_after_ms: rng.percent(3).then(|| rng.within(0..3_000)),
            followed: rng.percent(5),
        }
    }

    /// The same, but so long that it still runs when a node that is cut off is given up: should the node not end it, it and the next
    /// attempt live at once.
    pub(crate) fn choose_long(rng: &mut Rng) -> Self {
        Self { beats: rng.within(300..400), cancel_after_ms: None, ..Self::choose(rng) }
    }

    pub(crate) fn spec(&self, effects: &Path) -> JobSpec {
        let file = effects.join(&self.id);
        let arguments = [file.to_str().unwrap(), &self.beats.to_string(), &self.lines.to_string()].map(str::to_owned);
        let command = ["sh", "-c", SCRIPT, "job"].map(str::to_owned);
        JobSpec {
            command: command.into_iter().chain(arguments).collect(),
            isolation: self.isolation.into(),
            max_attempts: MAX_ATTEMPTS,
            retry_on: vec![RetryOn::Lost.into()],
            ..Default::default()
        }
    }

    /// What it prints.
    pub(crate) fn output(&self) -> Vec<u8> {
        let mut output = String::new();
        for line in 0..(self.beats + 1) * self.lines {
            writeln!(output, "{} line {line}: the quick brown fox jumps over the lazy dog", self.id).unwrap();
        }
        output.into_bytes()
    }
}

/// What an attempt did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Begin,
    /// It was still there.
    Beat,
    End,
}

/// A line of a job's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Effect {
    pub(crate) mark: Mark,
    pub(crate) attempt: u32,
}

impl FromStr for Effect {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let strange = || format!("not a line of a job: {line:?}");
        let mut words = line.split(' ');
        let mark = match words.next() {
            Some("begin") => Mark::Begin,
            Some("beat") => Mark::Beat,
            Some("end") => Mark::End,
            _ => return Err(strange()),
        };
        let attempt = words.next().and_then(|word| word.parse().ok()).ok_or_else(strange)?;
        Ok(Self { mark, attempt })
    }
}

/// What all jobs did, by job, in the order in which they did it.
pub(crate) fn effects(directory: &Path) -> io::Result<BTreeMap<String, Vec<Effect>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let effects: Result<Vec<Effect>, _> = text.lines().map(Effect::from_str).collect();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        all.insert(name.to_owned(), effects.map_err(|error| io::Error::other(format!("{name}: {error}")))?);
    }
    Ok(all)
}
