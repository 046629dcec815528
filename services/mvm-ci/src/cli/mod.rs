//! The command line: parses arguments, runs one command, turns its outcome into an exit code.
//!
//! Exit codes: `run` has the job's own (see [`run`]); else 0, 1 for a failure, 2 for arguments and configuration.

mod args;
mod array;
mod artifacts;
mod client;
mod config;
mod doctor;
mod explain;
mod failure;
mod group;
mod image;
mod job;
mod log_follower;
mod log_sink;
mod node;
mod output;
mod progress;
mod registry;
mod registry_status;
mod run;
mod serve;
mod sql;
mod stats;
mod submission;
mod usage;
mod vm;

use std::{ffi::OsString, future::Future, io::Write as _, process::ExitCode};

use args::{Arguments, Command, RegistryCommand};
use client::Client;
use failure::Failure;
use output::Printer;

/// Exit code of a wrong argument or configuration.
const USAGE: u8 = 2;

/// Runs the command line; `args` begin with the program's name.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    // Before everything else: two crypto providers are linked in, so rustls cannot choose by itself.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // The agent has its own arguments and its own runtime.
    if args.get(1).is_some_and(|arg| arg == "guest-agent") {
        return blixard_guest_agent::main_with_args(args.into_iter().skip(2));
    }
    if let Some(ended) = blixard_registry::query_worker(args.iter().cloned()) {
        return ended;
    }
    let arguments = match args::parse(args) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    let printer = Printer::new(arguments.output);
    match dispatch(arguments, &printer) {
        Ok(code) => code,
        Err(failure) => {
            if !failure.is_quiet() {
                let _ = writeln!(std::io::stderr(), "{}", failure.render(printer.format()));
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(arguments: Arguments, printer: &Printer) -> Result<ExitCode, Failure> {
    let Arguments { endpoint, command, settings, .. } = arguments;
    match command {
        None if settings.check => config::print(&settings, printer),
        Some(Command::Config) => config::print(&settings, printer),
        None => serve::serve(config::load(&settings)?),
        Some(Command::Doctor) => doctor::doctor(&config::load(&settings)?, printer),
        Some(Command::Run(args)) => block_on(run::run(&endpoint, *args, printer)),
        Some(Command::Job(args)) => {
            block_on(async { job::job(Client::connect(&endpoint).await?, args, printer).await })
        }
        Some(Command::Node(args)) => {
            block_on(async { node::node(Client::connect(&endpoint).await?, args, printer).await })
        }
        Some(Command::Vm(args)) => block_on(async { vm::vm(Client::connect(&endpoint).await?, args, printer).await }),
        Some(Command::Sql(args)) => {
            block_on(async { sql::sql(Client::connect(&endpoint).await?, args, printer).await })
        }
        Some(Command::Registry(args)) => match args.command {
            RegistryCommand::Status => block_on(registry_status::status(&endpoint, printer)),
            RegistryCommand::Backup { dir } => {
                block_on(async { registry::backup(Client::connect(&endpoint).await?, &dir, printer).await })
            }
            RegistryCommand::Restore { dir } => {
                let config = config::load(&settings)?;
                block_on(registry::restore(&config, &dir, printer))
            }
        },
        Some(Command::Image(args)) => block_on(async { image::image(&config::load(&settings)?, args, printer).await }),
        Some(Command::Stats) => block_on(async { stats::stats(Client::connect(&endpoint).await?, printer).await }),
    }
}

/// Runs a client command. Two threads: one may be held by a slow reader of our output while signals are still served.
fn block_on(command: impl Future<Output = Result<ExitCode, Failure>>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(command);
    // A thread that still waits for a terminal must not hold up the exit.
    runtime.shutdown_background();
    result
}
