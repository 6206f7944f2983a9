//! The commands. Each has a file; this one has the arguments and the exit status.

mod api;
mod check;
mod completions;
mod diff;
mod drain;
mod examples;
mod explain;
mod fsck;
mod letters;
mod reload;
mod replay;
mod run;
mod send;
mod status;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressState, ProgressStyle};

use crate::config::{Config, ConfigError};
use crate::document::{Environment, Problem};
use crate::reload::{LoadError, Sources};
use crate::rules::{Rules, RulesError};

/// Exit status for settings or rules that can't be used (`EX_USAGE`).
const BAD_CONFIGURATION: u8 = 64;
/// Exit status for arguments that can't be used, as the parser of the command line has it.
const BAD_ARGUMENTS: u8 = 2;

/// Receives Aivo Engage webhooks, stores them durably, and forwards them to Kafka, RabbitMQ and HTTP.
#[derive(Parser)]
#[command(version, max_term_width = 110, after_help = examples::ALL)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// The file with the settings [default: relay.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The file with the rules; overrides the setting `routes` [default: routes.toml]
    #[arg(long, global = true, value_name = "FILE")]
    routes: Option<PathBuf>,
    /// Where the running relay's admin side is [default: what the settings say]
    #[arg(long, global = true, value_name = "URL")]
    admin: Option<String>,
    /// The token of the admin side [default: that of the settings]
    #[arg(long, global = true, value_name = "TOKEN")]
    admin_token: Option<String>,
    /// PEM file with the authorities to trust on the admin side [default: the system's]
    #[arg(long, global = true, value_name = "FILE")]
    admin_ca: Option<PathBuf>,
    /// PEM file with a client certificate and its private key for the admin side
    #[arg(long, global = true, value_name = "FILE")]
    admin_cert: Option<PathBuf>,
    /// Print JSON instead of text for people
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default)
    #[command(after_help = examples::RUN)]
    Run,
    /// Compile settings and rules, print every problem; exit status 64 if there is an error
    #[command(after_help = examples::CHECK)]
    Check(check::Arguments),
    /// Say which routes an event matches and why, and what each sink would be sent
    #[command(after_help = examples::EXPLAIN)]
    Explain(explain::Arguments),
    /// Say what other rules would change: which events each sink would gain and lose
    #[command(after_help = examples::DIFF)]
    Diff(diff::Arguments),
    /// Post realistic sample events, for trials and load
    #[command(after_help = examples::SEND)]
    Send(send::Arguments),
    /// Show what a running relay and its sinks are doing
    #[command(after_help = examples::STATUS)]
    Status(status::Arguments),
    /// List deliveries that will not be tried again; try them again, or discard them
    #[command(subcommand, after_help = examples::DEAD_LETTERS)]
    DeadLetters(letters::Command),
    /// Send events again that the journal still keeps
    #[command(after_help = examples::REPLAY)]
    Replay(replay::Arguments),
    /// Begin no more attempts for a sink; its events wait
    #[command(after_help = examples::PAUSE)]
    Pause(status::Sink),
    /// Go on after a pause
    #[command(after_help = examples::RESUME)]
    Resume(status::Sink),
    /// Let a running relay read settings, rules, secrets and certificates again; exit status 64 if they can't be used
    #[command(after_help = examples::RELOAD)]
    Reload,
    /// Wait until a running relay has delivered everything, before it is scaled in
    #[command(after_help = examples::DRAIN)]
    Drain(drain::Arguments),
    /// Check what a stopped relay has on disk; exit status 1 if it is damaged
    #[command(after_help = examples::FSCK)]
    Fsck(fsck::Arguments),
    /// Print a script that completes commands and options in a shell
    #[command(after_help = examples::COMPLETIONS)]
    Completions(completions::Completions),
    /// Write the manual pages
    #[command(after_help = examples::MAN)]
    Man(completions::Manual),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.global.json;
    let result = match arguments.command {
        None | Some(Command::Run) => run::run(&arguments.global),
        Some(Command::Check(check)) => check::run(&arguments.global, &check),
        Some(Command::Explain(explain)) => explain::run(&arguments.global, &explain),
        Some(Command::Diff(diff)) => diff::run(&arguments.global, &diff),
        Some(Command::Send(send)) => send::run(&arguments.global, &send),
        Some(Command::Status(status)) => status::run(&arguments.global, &status),
        Some(Command::DeadLetters(command)) => letters::run(&arguments.global, &command),
        Some(Command::Replay(replay)) => replay::run(&arguments.global, &replay),
        Some(Command::Reload) => reload::run(&arguments.global),
        Some(Command::Drain(drain)) => drain::run(&arguments.global, &drain),
        Some(Command::Pause(sink)) => status::switch(&arguments.global, "pause", &sink),
        Some(Command::Fsck(fsck)) => fsck::run(&arguments.global, &fsck),
        Some(Command::Resume(sink)) => status::switch(&arguments.global, "resume", &sink),
        Some(Command::Completions(completions)) => completions::print_script(&completions),
        Some(Command::Man(manual)) => completions::write_manual(&manual),
    };
    match result {
        Ok(code) => code,
        Err(error) => failed(&error, json),
    }
}

/// Says what went wrong on standard error, and what exit status that is.
fn failed(error: &anyhow::Error, json: bool) -> ExitCode {
    // There is nowhere else to say it.
    drop(std::io::stderr().write_all(said(error, json).as_bytes()));
    match error {
        _ if is_configuration(error) => BAD_CONFIGURATION.into(),
        _ if error.is::<Usage>() => BAD_ARGUMENTS.into(),
        _ => ExitCode::FAILURE,
    }
}

/// Arguments that say too little, or do not go together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(&'static str);

/// An error, as JSON or for people.
fn said(error: &anyhow::Error, json: bool) -> String {
    let text = if is_configuration(error) { error.to_string() } else { format!("{error:#}") };
    if json { format!("{}\n", serde_json::json!({ "error": text })) } else { format!("error: {text}\n") }
}

fn is_configuration(error: &anyhow::Error) -> bool {
    error.is::<ConfigError>() || error.is::<RulesError>() || error.is::<LoadError>() || error.is::<api::Refused>()
}

impl Global {
    /// Where settings and rules are written.
    fn sources(&self) -> Sources {
        Sources { config: self.config.clone(), routes: self.routes.clone() }
    }

    /// The settings, with the file of rules that the command line gives; and warnings.
    fn settings(&self) -> Result<(Config, Vec<String>), ConfigError> {
        self.sources().settings(&Environment)
    }

    fn rules(&self, config: &Config) -> Result<(Rules, Vec<Problem>), RulesError> {
        Rules::load(&config.routes, &Environment)
    }
}

/// Where a listener of this machine is reached.
fn url(mut listener: SocketAddr, has_tls: bool) -> String {
    if listener.ip().is_unspecified() {
        listener.set_ip([127, 0, 0, 1].into());
    }
    format!("{}://{listener}", if has_tls { "https" } else { "http" })
}

/// A client that speaks HTTP to the relay and to no proxy. Each file is PEM: with `ca` those authorities are trusted and no
/// others; `cert` is a client certificate with its key.
fn client(ca: Option<&Path>, cert: Option<&Path>) -> anyhow::Result<reqwest::ClientBuilder> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("can't read {}", path.display()));
    crate::sink::install_crypto_provider();
    let mut client = reqwest::Client::builder().no_proxy();
    if let Some(path) = ca {
        let authorities = reqwest::Certificate::from_pem_bundle(&read(path)?).unwrap_or_default();
        if authorities.is_empty() {
            bail!("there is no PEM certificate in {}", path.display());
        }
        client = client.tls_certs_only(authorities);
    }
    if let Some(path) = cert {
        let identity = reqwest::Identity::from_pem(&read(path)?);
        let identity =
            identity.with_context(|| format!("{} must have a certificate and its private key", path.display()))?;
        client = client.identity(identity);
    }
    Ok(client)
}

/// How a long command shows how far it is.
fn bar() -> anyhow::Result<ProgressStyle> {
    let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        // Whoever draws the bar has nowhere to say that it can't.
        write!(out, "{:.0}/s", state.per_sec()).unwrap_or(());
    };
    Ok(ProgressStyle::with_template("{bar:40} {pos}/{len} {rate} {eta}")?.with_key("rate", rate))
}

/// A number of things, by what one of them is called.
fn counted(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

/// Prints to standard output. A reader that has gone away (`| head`) is not an error; then this is false.
fn print(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("can't write to standard output"),
    }
}

/// One line of what senders and destinations wrote, for people: escapes what a terminal would obey, or what would make it
/// look like something else.
fn plain(text: &str) -> String {
    let is_obeyed = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let shown = |c: char| if is_obeyed(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_have_nothing_to_obey() {
        let check = |text: &str, expected: &str| assert_eq!(plain(text), expected);
        check("\u{1b}[2J\u{7}", "\\u{1b}[2J\\u{7}");
        check("a\r\nb\tc", "a\\r\\nb\\tc");
        check("\u{9b}1m\u{7f}", "\\u{9b}1m\\u{7f}");
        check("fdp.\u{202e}exe\u{2069}", "fdp.\\u{202e}exe\\u{2069}");
        check("can't \\n \"é\" नमस्ते 👍🏽", "can't \\n \"é\" नमस्ते 👍🏽");
    }
}
