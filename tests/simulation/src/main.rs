//! `make sim`: lives through runs, one seed after the other, until one goes wrong.

use std::{
    process::ExitCode,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use blixard_simulation::{Protection, Settings, run};
use clap::Parser;

/// Lives through years of failures.
#[derive(Parser)]
struct Args {
    /// The first seed; the time of day when it is left out.
    #[arg(long)]
    seed: Option<u64>,
    /// How much happens in a run before the faults stop.
    #[arg(long, default_value_t = 100_000)]
    steps: u64,
    /// How many seeds, one after the other.
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// A protection that is taken away.
    #[arg(long)]
    without: Option<Protection>,
    /// Print all that happens.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let today = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let first = args.seed.unwrap_or(today);
    let mut failed = 0;
    for seed in first..first + args.runs {
        let settings = Settings { seed, steps: args.steps, without: args.without, trace: args.trace };
        let began = Instant::now();
        let outcome = run(settings);
        let took = began.elapsed().max(Duration::from_millis(1));
        let figures = outcome.figures;
        println!(
            "seed {seed}: {:.1} h lived in {:.1} s ({:.0}x), {} events ({:.0}/s), {} jobs, {} runs, {} VMs, digest {:016x}{}",
            outcome.lived.as_secs_f64() / 3600.0,
            took.as_secs_f64(),
            outcome.lived.as_secs_f64() / took.as_secs_f64(),
            outcome.steps,
            outcome.steps as f64 / took.as_secs_f64(),
            figures.jobs,
            figures.runs,
            figures.vms,
            outcome.digest,
            if outcome.broken.is_some() { " FAILED" } else { "" },
        );
        if outcome.broken.is_some() {
            failed += 1;
            eprintln!("{}", outcome.report());
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
