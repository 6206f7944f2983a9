//! `engage-relay completions SHELL` and `engage-relay man DIRECTORY`: what packages install beside the program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

use super::print;

#[derive(clap::Args)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

#[derive(clap::Args)]
pub(super) struct Manual {
    /// Where to write a page for each command
    directory: PathBuf,
}

pub(super) fn print_script(arguments: &Completions) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::Arguments::command(), "engage-relay", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn write_manual(arguments: &Manual) -> anyhow::Result<ExitCode> {
    let directory = &arguments.directory;
    clap_mangen::generate_to(super::Arguments::command(), directory)
        .with_context(|| format!("can't write to {}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}
