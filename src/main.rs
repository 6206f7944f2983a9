//! The command line: see `engage-relay --help`.

use std::process::ExitCode;

use engage_relay::cli;
use tikv_jemallocator::Jemalloc;

/// What events are read and sent with is allocated on one thread and freed on another, at which the system's allocator is
/// slow: with it HTTP deliveries take a fifth more time.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    cli::main()
}
