//! Reading settings with all their problems, not only the first: what has one is left out, and the rest is read again.

use std::rc::Rc;

use figment::error::{Actual, Kind};

use super::given::{Given, Origin};
use super::{Config, Problem, TABLES};
use crate::document::{Document, Lookup, Section};

/// After so many problems the rest is not looked at; each costs a reading.
const MAX_PROBLEMS: usize = 100;
/// Between the levels of a variable's name.
const LEVEL: &str = "__";
/// What the names of variables begin with that may be settings.
pub(super) const PREFIX: &str = "RELAY_";

/// Settings as far as they can be used.
pub struct Read {
    /// Those that can be; in place of the others the defaults.
    pub config: Config,
    /// What is wrong with the others.
    pub problems: Vec<Problem>,
    /// What is odd.
    pub warnings: Vec<String>,
    /// Whether the name of the file with the rules is what was meant.
    pub knows_routes: bool,
}

impl Read {
    /// Reads the text of a file, and variables, whatever those of this process are.
    pub(super) fn new(
        file: &str,
        source: &str,
        variables: impl Iterator<Item = (String, String)>,
        lookup: &dyn Lookup,
    ) -> Self {
        let document = Document::parse(file, source, lookup);
        let root = document.root();
        let mut reader = Reader { given: Given::in_file(&root), root, problems: Vec::new(), warnings: Vec::new() };
        reader.put_variables(variables, lookup);
        let config = reader.extract();
        config.problems().into_iter().for_each(|problem| reader.judge(problem));
        let warnings = config.warnings().into_iter();
        let warnings: Vec<_> = warnings.filter(|warning| !reader.follows(warning)).collect();
        reader.warnings.extend(warnings);
        let knows_routes = !reader.is_lost(&["routes".to_owned()]);
        let Reader { problems, warnings, .. } = reader;
        let problems = document.into_problems().into_iter().map(Problem::InFile).chain(problems).collect();
        Self { config, problems, warnings, knows_routes }
    }
}

struct Reader<'d> {
    given: Given,
    /// The file, for problems that are in it.
    root: Section<'d>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Reader<'_> {
    /// Puts those variables that are settings over what the file has. A misspelt setting is a problem. Other `RELAY_…`
    /// variables are not ours: Kubernetes sets `RELAY_PORT` and the like for a service that is called relay.
    fn put_variables(&mut self, variables: impl Iterator<Item = (String, String)>, lookup: &dyn Lookup) {
        let mut variables: Vec<_> = variables.collect();
        // Their order in the environment means nothing.
        variables.sort();
        for (name, text) in variables {
            let Some(key) = name.strip_prefix(PREFIX).map(str::to_ascii_lowercase) else { continue };
            let path: Vec<_> = key.split(LEVEL).collect();
            let message = || format!("{name}: there is no such setting; known are {}", TABLES.join(", "));
            if path.first().is_some_and(|top| TABLES.contains(top)) {
                let (given, problems) = Given::of_variable(&Rc::from(name.as_str()), &text, lookup);
                let origin = given.origin.clone();
                let replaced = self.given.put(path.iter().copied(), given);
                let ignored =
                    replaced.map(|whole| format!("{whole} has no effect beside {name}, which is more precise"));
                self.warnings.extend(ignored);
                problems.into_iter().for_each(|problem| self.report(&origin, format!("{}: {problem}", path.join("."))));
            } else if path.len() > 1 {
                self.problems.push(message().into());
            } else {
                self.warnings.push(format!("{} (ignored)", message()));
            }
        }
    }

    /// The settings without those that have a problem.
    fn extract(&mut self) -> Config {
        for _ in 0..MAX_PROBLEMS {
            match self.given.value().deserialize() {
                Ok(config) => return config,
                Err(error) => self.leave_out(&error),
            }
        }
        self.problems.push("too many problems: the rest was not looked at".to_owned().into());
        self.given.leave_out();
        Config::default()
    }

    /// Leaves out what has the error, unless it can be read in another way.
    fn leave_out(&mut self, error: &figment::Error) {
        let way = self.given.way(&error.path);
        let follows = match &error.kind {
            Kind::MissingField(field) => self.is_lost(&[&way[..], &[field.to_string()]].concat()),
            _ => false,
        };
        let Some(given) = self.given.at_mut(&way) else { return };
        // Only the type can have been mistaken; what else is wrong is so in every reading.
        let mistaken = way.len() == error.path.len() && matches!(error.kind, Kind::InvalidType(..));
        if mistaken && given.reread() {
            return;
        }
        given.leave_out();
        let origin = match &error.kind {
            Kind::UnknownField(..) => given.origin.of_key(),
            _ => given.origin.clone(),
        };
        if !follows {
            self.report(&origin, [&way.join("."), ": ", &describe(&error.kind)].concat());
        }
    }

    /// Says what is wrong with settings that can be read, unless that follows from what can't.
    fn judge(&mut self, problem: String) {
        if self.follows(&problem) {
            return;
        }
        // What goes wrong with a default is the fault of another setting.
        let settings = settings_in(&problem);
        let given = settings.iter().find(|setting| self.given.at(setting).is_some());
        let setting = given.or(settings.first()).cloned().unwrap_or_default();
        let way = self.given.way(&setting);
        match self.given.at(&way).map(|given| (given, given.origin.clone())) {
            Some((given, origin)) if way == setting => {
                let shown = given.is_shown_by(&problem);
                let hidden =
                    || format!("{}: the value is not valid after its `${{…}}` have been put in", way.join("."));
                self.report(&origin, if shown { hidden() } else { problem });
            }
            // The table that it is not in.
            Some((_, origin @ Origin::File { .. })) if !way.is_empty() => self.report(&origin, problem),
            Some(_) | None => self.problems.push(problem.into()),
        }
    }

    fn report(&mut self, origin: &Origin, message: String) {
        match origin {
            Origin::File { value, .. } => self.root.problem_at(value, message),
            Origin::Variable(name) => self.problems.push(format!("{name}: {message}").into()),
        }
    }

    /// Whether what the message says may follow from what could not be read.
    fn follows(&self, message: &str) -> bool {
        settings_in(message).iter().any(|setting| self.is_lost(setting))
    }

    /// Whether the setting was left out or can't be read, or something in it.
    fn is_lost(&self, setting: &[String]) -> bool {
        !self.given.is_whole(setting) || setting.last().is_some_and(|word| self.root.lost(word))
    }
}

/// The settings that a message names: the first word may be one outside of tables.
fn settings_in(message: &str) -> Vec<Vec<String>> {
    let words = message.split(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_'));
    let paths = words.map(|word| word.trim_matches('.').split('.').map(str::to_owned).collect::<Vec<_>>());
    let is_known = |path: &[String]| path.first().is_some_and(|top| TABLES.contains(&top.as_str()));
    let named = paths.enumerate().filter(|(place, path)| is_known(path) && (path.len() > 1 || *place == 0));
    named.map(|(_, path)| path).collect()
}

/// What an error says, without the value that it is about, which may be a secret.
fn describe(kind: &Kind) -> String {
    match kind {
        Kind::InvalidType(actual, expected) => format!("is {}, should be {}", type_of(actual), plain(expected)),
        Kind::InvalidValue(Actual::Unsigned(_) | Actual::Signed(_) | Actual::Float(_), _) => {
            "is a number that is too small or too large".to_owned()
        }
        Kind::InvalidValue(_, expected) => format!("is not {}", plain(expected)),
        Kind::InvalidLength(_, expected) => format!("should be {}", plain(expected)),
        Kind::UnknownField(field, expected) => {
            format!("there is no setting `{field}` here; known are {}", quoted(expected))
        }
        Kind::UnknownVariant(_, expected) => format!("is none of {}", quoted(expected)),
        Kind::MissingField(field) => format!("`{field}` is missing"),
        Kind::Message(message) if message == "invalid socket address syntax" => {
            format!("is not {}", plain("socket address"))
        }
        other => other.to_string(),
    }
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn type_of(actual: &Actual) -> &'static str {
    match actual {
        Actual::Bool(_) => "true or false",
        Actual::Unsigned(_) | Actual::Signed(_) => "a whole number",
        Actual::Float(_) => "a number with a fraction",
        Actual::Char(_) | Actual::Str(_) => "text",
        Actual::Seq => "a list",
        Actual::Map => "a table",
        _ => "of another type",
    }
}

/// What a deserializer expects, in the words of those who write settings.
fn plain(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "text",
        "a sequence" => "a list",
        "a map" => "a table",
        "socket address" => "an address with a port, such as \"127.0.0.1:8080\"",
        "a duration" => "a time such as \"10s\"",
        "parsable string" | "an integer or string" => "a size such as \"64KiB\"",
        _ if expected.starts_with("struct ") => "a table",
        _ if expected.starts_with("enum ") || expected.starts_with("variant ") => "text",
        _ => expected,
    }
}
