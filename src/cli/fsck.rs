//! `engage-relay fsck`: damage to what a stopped relay has on disk.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::{Global, print};
use crate::event::Event;
use crate::journal::disk::OpenError;
use crate::journal::disk::recovery::{self, Finding, Inspection, Kind, Known};
use crate::journal::{self, Position};
use crate::ledger::check::{self, Report};
use crate::relay::{lock_data_dir, share_data_dir};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The relay's data directory [default: that of the settings]
    data_dir: Option<PathBuf>,
    /// Repair what is damaged; what can't be read goes to the folder quarantine
    #[arg(long)]
    repair: bool,
}

/// What was found on disk.
struct Found {
    journal: Inspection,
    ledger: Report,
    /// Where journal and ledger do not agree.
    disagreements: Vec<String>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let dir = match &arguments.data_dir {
        Some(dir) => dir.clone(),
        None => {
            let config = global.settings()?.0;
            if config.journal.kind == journal::Kind::Kafka {
                bail!(
                    "journal.kind is \"kafka\": there is nothing on disk to check; what brokers have, Kafka's own tools check"
                );
            }
            config.data_dir
        }
    };
    if !dir.join("journal").is_dir() {
        bail!("{} is not the data directory of a relay: it has no journal", dir.display());
    }
    // A look changes nothing, not even the lock file.
    let _lock = if arguments.repair { lock_data_dir(&dir)? } else { share_data_dir(&dir)? };
    let (mut found, mut done) = (Found::look(&dir), Vec::new());
    let is_unreadable = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(OpenError::Unreadable { .. }));
    if arguments.repair && found.as_ref().is_err_and(is_unreadable) {
        let blanked = recovery::blank_unreadable(&dir.join("journal")).context("can't repair the journal")?;
        done.extend(blanked.iter().map(|(file, bytes)| {
            format!("journal: {bytes} bytes of {} that could not be read are zeros now", file.display())
        }));
        found = Found::look(&dir);
    }
    let mut found = found?;
    if arguments.repair && !found.is_clean() {
        done.extend(found.repair(&dir)?);
        found = Found::look(&dir)?;
    }
    let clean = found.is_clean();
    print(&match global.json {
        true => format!("{}\n", found.json(clean, &done)),
        false => found.text(clean, &done, arguments.repair)?,
    })?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Found {
    fn look(dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join("ledger.sqlite");
        let ledger = match file.exists() {
            true => check::check(&file, |record| Event::decode(record).is_ok())
                .context("can't copy the ledger to a temporary folder (TMPDIR)")?,
            false => Report { problems: vec!["ledger.sqlite is missing".to_owned()], ..Report::default() },
        };
        let needed = ledger.cursors.iter().map(|(_, cursor)| *cursor).min();
        let known = Known { needed, floor: ledger.floor };
        let journal = Inspection::new(&dir.join("journal"), Position::ZERO, known).context("can't read the journal")?;
        let oldest = journal.oldest();
        let behind = ledger.cursors.iter().filter(|(_, cursor)| *cursor < oldest);
        let disagreement = |(lane, cursor): &(String, Position)| {
            format!("{lane} has not read {} events that are no longer there", oldest.since(*cursor))
        };
        let disagreements = behind.map(disagreement).collect();
        Ok(Self { journal, ledger, disagreements })
    }

    fn is_clean(&self) -> bool {
        !self.journal.needs_repair() && self.ledger.problems.is_empty() && self.disagreements.is_empty()
    }

    /// Repairs; what was done, in sentences.
    fn repair(&mut self, dir: &Path) -> anyhow::Result<Vec<String>> {
        let (quarantine, file) = (dir.join("quarantine"), dir.join("ledger.sqlite"));
        let mut done = Vec::new();
        if self.journal.needs_repair() {
            self.journal.repair(&quarantine).context("can't repair the journal")?;
            let repaired = self.journal.findings().iter().filter(|finding| finding.kind != Kind::Foreign);
            let aside = match repaired.clone().any(|finding| finding.kept.is_some()) {
                true => format!("; what was damaged is in {}", quarantine.display()),
                // Of a file that is missing nothing is left.
                false => String::new(),
            };
            done.push(format!("journal: {} repaired{aside}", repaired.count()));
        }
        if !self.ledger.problems.is_empty() {
            let saved = check::salvage(&file, &quarantine)?;
            let cursors = match saved.cursors {
                true => "all cursors",
                false => "no cursors (every sink begins again at the oldest event that is kept)",
            };
            done.push(format!(
                "ledger: made anew with {cursors}, {} parked deliveries and {} dead letters; the old one is {}",
                saved.parked,
                saved.dead_letters,
                saved.aside.display()
            ));
        }
        // What is no longer there counts as well.
        let known = Known { needed: None, floor: self.journal.end() };
        let oldest = Inspection::new(&dir.join("journal"), Position::ZERO, known)?.oldest();
        check::raise_cursors(&file, oldest)?;
        Ok(done)
    }

    fn json(&self, clean: bool, done: &[String]) -> Value {
        let finding = |finding: &Finding| {
            json!({
                "kind": finding.kind.as_str(),
                "file": finding.file,
                "offset": finding.offset,
                "bytes": finding.bytes,
                "lost_from": finding.lost.map(|(from, _)| from.to_stored()),
                "lost_events": finding.lost.map_or(0, |(from, to)| to.since(from)),
            })
        };
        let cursors = self.ledger.cursors.iter().map(|(lane, cursor)| (lane.clone(), json!(cursor.to_stored())));
        json!({
            "ok": clean,
            "repaired": done,
            "journal": {
                "oldest": self.journal.oldest().to_stored(),
                "end": self.journal.end().to_stored(),
                "events": self.journal.events(),
                "findings": self.journal.findings().iter().map(finding).collect::<Vec<_>>(),
            },
            "ledger": {
                "cursors": cursors.collect::<serde_json::Map<_, _>>(),
                "parked": self.ledger.parked,
                "dead_letters": self.ledger.dead_letters,
                "problems": self.ledger.problems,
            },
            "disagreements": self.disagreements,
        })
    }

    fn text(&self, clean: bool, done: &[String], repaired: bool) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        for line in done {
            writeln!(text, "repaired: {line}")?;
        }
        let (events, end) = (self.journal.events(), self.journal.end());
        writeln!(text, "journal: {events} events, up to position {}", end.to_stored())?;
        for Finding { kind, file, offset, bytes, lost, kept: _ } in self.journal.findings() {
            let (kind, file) = (kind.as_str(), file.display());
            let lost = lost.map_or_else(String::new, |(from, to)| {
                format!(": {} events are lost, from position {}", to.since(from), from.to_stored())
            });
            writeln!(text, "  {kind}: {file}, {bytes} bytes at {offset}{lost}")?;
        }
        let ledger = &self.ledger;
        let (sinks, parked, dead) = (ledger.cursors.len(), ledger.parked, ledger.dead_letters);
        writeln!(text, "ledger: {sinks} sinks, {parked} parked deliveries, {dead} dead letters")?;
        for problem in ledger.problems.iter().chain(&self.disagreements) {
            writeln!(text, "  {problem}")?;
        }
        writeln!(
            text,
            "{}",
            match (clean, repaired) {
                (true, _) => "ok",
                (false, false) => "damaged; `--repair` mends what can be mended",
                (false, true) => "damaged, and not all of it could be mended",
            }
        )?;
        Ok(text)
    }
}
