//! See `mvm_ci::cli`.

fn main() -> std::process::ExitCode {
    mvm_ci::cli::main(std::env::args_os().collect())
}
