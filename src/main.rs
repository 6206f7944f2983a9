//! The command line: see `engage-relay --help`.

use std::process::ExitCode;

use engage_relay::cli;

fn main() -> ExitCode {
    cli::main()
}
