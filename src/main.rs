//! The command line: see `engage-relay --help`.

use std::process::ExitCode;

use engage_relay::cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::main()
}
