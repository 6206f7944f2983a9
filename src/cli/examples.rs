//! What `--help` shows of each command beside its options: one to three ways to use it.

pub(super) const ALL: &str = "\
Examples:
  engage-relay                                   serve, with relay.toml and routes.toml of this folder if they are there
  engage-relay check --routes new-routes.toml    say everything that is wrong with a file of rules
  engage-relay explain event.json                say where an event would go, and what each sink would be sent
  engage-relay diff new-routes.toml              say what other rules would change, by the events that are kept
  engage-relay send --count 1000 --rate 50       post sample events to a running relay
  engage-relay status --watch                    what the relay and its sinks are doing
  engage-relay dead-letters list --sink crm      what will not be tried again
  engage-relay dead-letters replay --sink crm    try it again
  engage-relay replay --sink crm --since 2h      send what was received in the last two hours again
  engage-relay reload                            read the files again; that happens by itself when they change
  engage-relay drain --timeout 10m               wait until everything is delivered

Every setting can be given as a variable too: RELAY_INGRESS__LISTEN=0.0.0.0:8080";

pub(super) const RUN: &str = "\
Examples:
  engage-relay run                                    with relay.toml and routes.toml of this folder if they are there
  engage-relay run --config /etc/engage-relay.toml    with other settings";

pub(super) const CHECK: &str = "\
Examples:
  engage-relay check                             the settings and rules of this folder
  engage-relay check --routes new-routes.toml    other rules, before they come into force
  engage-relay check --connect                   ask the brokers of a journal on Kafka too";

pub(super) const EXPLAIN: &str = "\
Examples:
  engage-relay explain event.json                where the event in a file would go
  engage-relay explain -                         where one on standard input would
  engage-relay explain --token test event.json   where it would if the sender had used the token `test`";

pub(super) const DIFF: &str = "\
Examples:
  engage-relay diff new-routes.toml                      by all events that the running relay still keeps
  engage-relay diff new-routes.toml --since 2h           by those of the last two hours
  engage-relay diff new-routes.toml --file events.json   by those of a file; needs no relay";

pub(super) const SEND: &str = "\
Examples:
  engage-relay send                              100 events to the relay on this machine
  engage-relay send --count 1000 --rate 50       50 a second
  engage-relay send --url https://relay.example.com/webhooks/engage --token secret";

pub(super) const STATUS: &str = "\
Examples:
  engage-relay status --watch                    every two seconds, until interrupted
  engage-relay status --json                     for scripts
  engage-relay status --admin http://10.0.0.7:9090 --admin-token secret";

pub(super) const DEAD_LETTERS: &str = "\
Examples:
  engage-relay dead-letters list --sink crm      what will not be tried again
  engage-relay dead-letters show 42              one of them, with its event
  engage-relay dead-letters replay --sink crm    try them again";

pub(super) const LIST: &str = "\
Examples:
  engage-relay dead-letters list --sink crm --since 2h
  engage-relay dead-letters list --reason rejected --error-kind http_400
  engage-relay dead-letters list --after 100     the next page";

pub(super) const SHOW: &str = "\
Examples:
  engage-relay dead-letters show 42
  engage-relay dead-letters show 42 --json       for scripts";

pub(super) const REPLAY_LETTERS: &str = "\
Examples:
  engage-relay dead-letters replay 42 43                     these two
  engage-relay dead-letters replay --sink crm --rate 100     those of a sink, 100 a second
  engage-relay dead-letters replay --sink old --to new       to another sink";

pub(super) const DISCARD: &str = "\
Examples:
  engage-relay dead-letters discard 42
  engage-relay dead-letters discard --sink unrouted --until 7d";

pub(super) const REPLAY: &str = "\
Examples:
  engage-relay replay --sink crm --since 2h      what was received in the last two hours
  engage-relay replay --sink crm --since 2026-01-31T12:00:00Z --until 2026-01-31T13:00:00Z
  engage-relay replay --sink crm --when 'status = \"error\"' --rate 100";

pub(super) const PAUSE: &str = "\
Example:
  engage-relay pause crm                         until `engage-relay resume crm`";

pub(super) const RESUME: &str = "\
Example:
  engage-relay resume crm";

pub(super) const RELOAD: &str = "\
Example:
  engage-relay reload                            now; it happens by itself when a file changes";

pub(super) const DRAIN: &str = "\
Examples:
  engage-relay drain                             wait as long as it takes
  engage-relay drain --timeout 10m               exit status 1 if something is left then";

pub(super) const FSCK: &str = "\
Examples:
  engage-relay fsck                              the data directory of the settings; changes nothing
  engage-relay fsck /var/lib/engage-relay        another
  engage-relay fsck --repair                     mend what can be mended";

pub(super) const COMPLETIONS: &str = "\
Example:
  engage-relay completions bash                  write it to /etc/bash_completion.d/engage-relay";

pub(super) const MAN: &str = "\
Example:
  engage-relay man /usr/local/share/man/man1     a page for each command";

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _, Parser as _};

    use super::super::Arguments;

    /// Each command, with the words that lead to it.
    fn commands(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
        found.push((path.to_owned(), command.clone()));
        for command in command.get_subcommands() {
            commands(command, &format!("{path} {}", command.get_name()), found);
        }
    }

    /// The words of a line: what comes after two spaces is a comment, and quotes keep a word together.
    fn words(line: &str) -> Vec<String> {
        let parts = line.trim().split("  ").next().unwrap_or_default().split('\'').enumerate();
        let split = |(place, part): (usize, &str)| match place % 2 {
            0 => part.split_whitespace().map(str::to_owned).collect(),
            _ => vec![part.to_owned()],
        };
        parts.flat_map(split).collect()
    }

    #[test]
    fn every_command_has_examples_that_work() {
        let mut found = Vec::new();
        commands(&Arguments::command(), "engage-relay", &mut found);
        assert!(found.len() > 15);
        for (path, command) in found {
            let help = command.get_after_help().unwrap_or_else(|| panic!("{path} has no examples")).to_string();
            let examples: Vec<_> = help.lines().filter(|line| line.starts_with("  ")).map(words).collect();
            assert!(!examples.is_empty(), "{path}: {help}");
            for example in examples {
                assert!(example.join(" ").starts_with(&path), "{example:?} is none of {path}");
                if let Err(error) = Arguments::try_parse_from(&example) {
                    panic!("{example:?}: {error}");
                }
            }
        }
    }
}
