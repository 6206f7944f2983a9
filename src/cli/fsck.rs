//! `engage-relay fsck`: damage to what a stopped relay has on disk.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use serde_json::{Value, json};

use super::{Global, print};
use crate::event::Event;
use crate::journal::disk::OpenError;
use crate::journal::disk::recovery::{self, Finding, Inspection, Kind, Known};
use crate::journal::{self, Position};
use crate::ledger::check::{self, Report, Salvaged};
use crate::relay::{lock_data_dir, share_data_dir};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The relay's data directory [default: that of the settings]
    data_dir: Option<PathBuf>,
    /// Repair what is damaged; what can't be read goes to the folder quarantine
    #[arg(long)]
    repair: bool,
}

/// What a repair has done, in sentences.
#[derive(Default)]
struct Done {
    repaired: Vec<String>,
    lost: Vec<String>,
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
    let (mut found, mut done) = (Found::look(&dir), Done::default());
    let is_unreadable = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(OpenError::Unreadable { .. }));
    if arguments.repair && found.as_ref().is_err_and(is_unreadable) {
        let blanked = recovery::blank_unreadable(&dir.join("journal")).context("can't repair the journal")?;
        done.repaired.extend(blanked.iter().map(|(file, bytes)| {
            format!("journal: {bytes} bytes of {} that could not be read are zeros now", file.display())
        }));
        found = Found::look(&dir);
    }
    let mut found = found?;
    if arguments.repair && !found.is_clean() {
        found.repair(&dir, &mut done)?;
        found = Found::look(&dir)?;
    }
    let clean = found.is_clean();
    print(&match global.json {
        true => format!("{}\n", found.json(clean, &done)),
        false => found.text(clean, &done, arguments.repair)?,
    })?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Done {
    fn salvaged(&mut self, salvaged: &Salvaged) {
        let Salvaged { cursors, parked, dead_letters, aside } = salvaged;
        let cursors = match cursors {
            true => "all cursors",
            false => "no cursors (every sink begins again at the oldest event that is kept)",
        };
        self.repaired.push(format!(
            "ledger: made anew with {cursors}, {} parked deliveries and {} dead letters; the old one is {}",
            parked.rows,
            dead_letters.rows,
            aside.display()
        ));
        let parked_again = "those that the journal still keeps are delivered again";
        let replayed = "`engage-relay replay` sends again what the journal still keeps";
        for (saved, what, then) in
            [(parked, "parked deliveries", parked_again), (dead_letters, "dead letters", replayed)]
        {
            if !saved.is_all() {
                let lost = saved.of.map_or("an unknown number".to_owned(), |of| (of - saved.rows).to_string());
                self.lost.push(format!("ledger: {lost} of the {what}; {then}"));
            }
        }
    }
}

impl Found {
    fn look(dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join("ledger.sqlite");
        let gone = |how| Report { problems: vec![format!("ledger.sqlite is {how}")], ..Report::default() };
        let ledger = match fs::metadata(&file).map(|file| file.len()) {
            Err(_) => gone("missing"),
            Ok(0) => gone("empty"),
            Ok(_) => check::check(&file, is_event)?,
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
        let ledger = &self.ledger;
        let is_ledger_clean = ledger.problems.is_empty() && ledger.unreadable.is_empty();
        !self.journal.needs_repair() && is_ledger_clean && self.disagreements.is_empty()
    }

    fn repair(&mut self, dir: &Path, done: &mut Done) -> anyhow::Result<()> {
        let (quarantine, file) = (dir.join("quarantine"), dir.join("ledger.sqlite"));
        if !self.ledger.problems.is_empty() {
            done.salvaged(&check::salvage(&file, &quarantine)?);
            // What the journal has to have is known only now.
            *self = Self::look(dir)?;
        }
        if self.journal.needs_repair() {
            self.journal.repair(&quarantine).context("can't repair the journal")?;
            let repaired = self.journal.findings().iter().filter(|finding| finding.kind != Kind::Foreign);
            let aside = match repaired.clone().any(|finding| finding.kept.is_some()) {
                true => format!("; what was damaged is in {}", quarantine.display()),
                // Of a file that is missing nothing is left.
                false => String::new(),
            };
            let lost = repaired.clone().filter_map(|finding| finding.lost);
            done.lost.extend(lost.map(|lost| format!("journal: {}", entries(lost))));
            done.repaired.push(format!("journal: {} repaired{aside}", repaired.count()));
        }
        let buried = check::bury_unreadable(&file, is_event)?;
        if buried > 0 {
            done.repaired.push(format!("ledger: {buried} events that can't be read are dead letters now"));
        }
        // What is no longer there counts as well.
        let known = Known { needed: None, floor: self.journal.end() };
        let oldest = Inspection::new(&dir.join("journal"), Position::ZERO, known)?.oldest();
        for (lane, cursor) in check::raise_cursors(&file, oldest)? {
            let unread = entries((cursor, oldest));
            done.repaired
                .push(format!("ledger: {lane} begins at the oldest event that is kept; it had not read {unread}"));
        }
        Ok(())
    }

    /// The sinks that have events in the journal to read yet, and how many.
    fn unread(&self) -> impl Iterator<Item = (&str, u64)> {
        let end = self.journal.end();
        let unread = self.ledger.cursors.iter().map(move |(lane, cursor)| (lane.as_str(), end.since(*cursor)));
        unread.filter(|(_, events)| *events > 0)
    }

    fn problems(&self) -> impl Iterator<Item = &String> {
        self.ledger.problems.iter().chain(&self.ledger.unreadable)
    }

    fn json(&self, clean: bool, done: &Done) -> Value {
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
            "repaired": done.repaired,
            "lost": done.lost,
            "journal": {
                "oldest": self.journal.oldest().to_stored(),
                "end": self.journal.end().to_stored(),
                "events": self.journal.events(),
                "findings": self.journal.findings().iter().map(finding).collect::<Vec<_>>(),
            },
            "ledger": {
                "cursors": cursors.collect::<serde_json::Map<_, _>>(),
                "unread": self.unread().map(|(lane, events)| (lane.to_owned(), json!(events))).collect::<serde_json::Map<_, _>>(),
                "parked": self.ledger.parked,
                "dead_letters": self.ledger.dead_letters,
                "problems": self.problems().collect::<Vec<_>>(),
            },
            "disagreements": self.disagreements,
        })
    }

    fn text(&self, clean: bool, done: &Done, repaired: bool) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        for (what, lines) in [("repaired", &done.repaired), ("lost", &done.lost)] {
            lines.iter().try_for_each(|line| writeln!(text, "{what}: {line}"))?;
        }
        let (events, end) = (self.journal.events(), self.journal.end());
        writeln!(text, "journal: {events} events, up to position {}", end.to_stored())?;
        for Finding { kind, file, offset, bytes, lost, kept: _ } in self.journal.findings() {
            let (kind, file) = (kind.as_str(), file.display());
            let lost = lost.map_or_else(String::new, |lost| format!(": {} are lost", entries(lost)));
            writeln!(text, "  {kind}: {file}, {bytes} bytes at {offset}{lost}")?;
        }
        let ledger = &self.ledger;
        let (sinks, parked, dead) = (ledger.cursors.len(), ledger.parked, ledger.dead_letters);
        writeln!(text, "ledger: {sinks} sinks, {parked} parked deliveries, {dead} dead letters")?;
        for (lane, events) in self.unread() {
            writeln!(text, "  {lane} has {events} events to read yet: start a relay to deliver what is left of them")?;
        }
        for problem in self.problems().chain(&self.disagreements) {
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

fn is_event(record: Bytes) -> bool {
    Event::decode(record).is_ok()
}

fn entries((from, to): (Position, Position)) -> String {
    format!("{} events from position {}", to.since(from), from.to_stored())
}
