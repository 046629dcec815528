//! The guest agent's binary: `/init` of the default image. See the library for what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    blixard_guest_agent::main_with_args(std::env::args_os().skip(1))
}
