//! By which tokens one may send: they have names, and are compared in constant time.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

/// Name of the file in the data directory with the token that was made up when none was configured.
const GENERATED: &str = "ingress-token";

/// What rules have for a token's name where none is asked for, and for the one that was made up.
const NO_TOKEN: &str = "none";
const MADE_UP: &str = "generated";

/// The `ingress.auth` setting: `"none"`, or a table.
#[derive(Clone, Debug, PartialEq)]
pub enum AuthConfig {
    /// Anyone may send. Has to be written out: `auth = "none"`.
    None,
    /// Whoever has one of the tokens.
    Tokens {
        /// The header that carries the token.
        header: String,
        /// The tokens; with none, one is made up on first start.
        tokens: Vec<TokenConfig>,
    },
}

/// A token and what it is called in metrics and rules.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// Its name.
    pub name: String,
    /// The header's whole value.
    pub value: String,
}

impl fmt::Debug for TokenConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenConfig").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Table {
    header: String,
    tokens: Vec<TokenConfig>,
}

impl Default for Table {
    fn default() -> Self {
        Self { header: "x-auth-token".to_owned(), tokens: Vec::new() }
    }
}

impl Default for AuthConfig {
    fn default() -> Self {
        Table::default().into()
    }
}

impl AuthConfig {
    /// The name of the token by which senders send unless they have several.
    pub fn first_name(&self) -> &str {
        match self {
            Self::None => NO_TOKEN,
            Self::Tokens { tokens, .. } => tokens.first().map_or(MADE_UP, |token| &token.name),
        }
    }

    /// Whether events may come with a token of this name.
    pub fn has_name(&self, name: &str) -> bool {
        match self {
            Self::Tokens { tokens, .. } if !tokens.is_empty() => tokens.iter().any(|token| token.name == name),
            Self::None | Self::Tokens { .. } => name == self.first_name(),
        }
    }

    /// Whether a token is made up where none is kept yet.
    pub fn is_generated(&self) -> bool {
        matches!(self, Self::Tokens { tokens, .. } if tokens.is_empty())
    }
}

impl From<Table> for AuthConfig {
    fn from(table: Table) -> Self {
        Self::Tokens { header: table.header, tokens: table.tokens }
    }
}

impl<'de> Deserialize<'de> for AuthConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NoneOrTable)
    }
}

struct NoneOrTable;

impl<'de> Visitor<'de> for NoneOrTable {
    type Value = AuthConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"none\", or a table with `header` and `tokens`")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<AuthConfig, E> {
        match text {
            "none" => Ok(AuthConfig::None),
            _ => Err(E::invalid_value(serde::de::Unexpected::Other("another string"), &self)),
        }
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<AuthConfig, M::Error> {
        Table::deserialize(MapAccessDeserializer::new(map)).map(AuthConfig::from)
    }
}

/// The check of a request's token.
pub(super) struct Auth(Option<Tokens>);

struct Tokens {
    header: HeaderName,
    known: Vec<(String, [u8; 32])>,
}

impl Auth {
    /// Compiles the setting. With no token configured the one in `data_dir` is used, or made up and written there, and
    /// its file's path is returned too.
    ///
    /// # Errors
    ///
    /// [`AuthError`]: the setting does not work, or the file can't be read or written.
    pub(super) fn new(config: &AuthConfig, data_dir: &Path) -> Result<(Self, Option<PathBuf>), AuthError> {
        if let Some(problem) = Self::problems(config).into_iter().next() {
            return Err(problem);
        }
        let AuthConfig::Tokens { header, tokens } = config else { return Ok((Self(None), None)) };
        let header = HeaderName::try_from(header.as_str()).map_err(|_| AuthError::Header(header.clone()))?;
        let mut known: Vec<_> = tokens.iter().map(|token| (token.name.clone(), digest(&token.value))).collect();
        let mut generated = None;
        if known.is_empty() {
            let path = generated_token_path(data_dir);
            let token = generated_token(&path).map_err(|source| AuthError::File { path: path.clone(), source })?;
            known.push((MADE_UP.to_owned(), digest(&token)));
            generated = Some(path);
        }
        Ok((Self(Some(Tokens { header, known })), generated))
    }

    /// What is wrong with the setting, without touching any file.
    pub(super) fn problems(config: &AuthConfig) -> Vec<AuthError> {
        let AuthConfig::Tokens { header, tokens } = config else { return Vec::new() };
        let mut problems = Vec::new();
        if HeaderName::try_from(header.as_str()).is_err() {
            problems.push(AuthError::Header(header.clone()));
        }
        for (index, token) in tokens.iter().enumerate() {
            let name = || token.name.clone();
            if token.name.is_empty() || tokens.iter().take(index).any(|other| other.name == token.name) {
                problems.push(AuthError::Name(name()));
            }
            if let Some(problem) = problem_of_token(&token.value) {
                problems.push(AuthError::Value(name(), problem));
            }
        }
        problems
    }

    /// What is odd about the setting.
    pub(super) fn warnings(config: &AuthConfig) -> Vec<String> {
        let AuthConfig::Tokens { tokens, .. } = config else { return Vec::new() };
        let same = tokens.iter().enumerate().filter_map(|(index, token)| {
            let other = tokens.iter().take(index).find(|other| other.value == token.value)?;
            let (one, other) = (&other.name, &token.name);
            Some(format!(
                "ingress.auth.tokens: {one:?} and {other:?} have the same value, which counts as the last of them"
            ))
        });
        same.collect()
    }

    /// The name of the token that the request carries; `None` if it carries none, or a wrong one. Takes the same time
    /// whichever it is.
    pub(super) fn token(&self, headers: &HeaderMap) -> Option<&str> {
        let Some(tokens) = &self.0 else { return Some(NO_TOKEN) };
        let given = headers.get(&tokens.header).map(HeaderValue::as_bytes).unwrap_or_default();
        let given: [u8; 32] = Sha256::digest(given).into();
        let mut found = u64::MAX;
        for (index, (_, digest)) in (0..).zip(&tokens.known) {
            let equal: Choice = given.ct_eq(digest);
            found.conditional_assign(&index, equal);
        }
        let (name, _) = tokens.known.get(usize::try_from(found).ok()?)?;
        Some(name)
    }

    /// [`AuthConfig::first_name`] of what it was made of.
    pub(super) fn first_name(&self) -> &str {
        self.0.as_ref().and_then(|tokens| tokens.known.first()).map_or(NO_TOKEN, |(name, _)| name)
    }

    /// The header that a request must carry, if any.
    pub(super) fn header(&self) -> Option<&HeaderName> {
        self.0.as_ref().map(|tokens| &tokens.header)
    }
}

/// Why no request can carry this token, if so. Never says what it is.
pub fn problem_of_token(token: &str) -> Option<&'static str> {
    if token.trim().is_empty() {
        Some("is empty")
    } else if token.trim() != token {
        Some("begins or ends with white space, which does not arrive with a request")
    } else if HeaderValue::from_bytes(token.as_bytes()).is_err() {
        Some("has a control character, which a header can't have")
    } else {
        None
    }
}

/// Where the token is that was made up, if there is one.
pub fn generated_token_path(data_dir: &Path) -> PathBuf {
    data_dir.join(GENERATED)
}

fn digest(value: &str) -> [u8; 32] {
    Sha256::digest(value.as_bytes()).into()
}

/// Reads the token file, or makes one with 256 random bits that only this user can read.
fn generated_token(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Ok(token) if !token.trim().is_empty() => return Ok(token.trim().to_owned()),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut random = [0_u8; 32];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // An empty file may have been there, for others to read.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    writeln!(file, "{token}")?;
    file.sync_all()?;
    Ok(token)
}

/// Why requests can't be authenticated.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// Not a header.
    #[error("ingress.auth.header is {0:?}, which is not a header name")]
    Header(String),
    /// A name twice, or none.
    #[error("ingress.auth.tokens: the name {0:?} is empty or used twice")]
    Name(String),
    /// A value that no request can have.
    #[error("ingress.auth.tokens: the value of {0:?} {1}")]
    Value(String, &'static str),
    /// The token file.
    #[error("{} can't be read or written", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(tokens: &[(&str, &str)]) -> AuthConfig {
        let token = |(name, value): &(&str, &str)| TokenConfig { name: (*name).into(), value: (*value).into() };
        AuthConfig::Tokens { header: "x-auth-token".into(), tokens: tokens.iter().map(token).collect() }
    }

    #[test]
    fn each_token_is_known_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (auth, generated) = Auth::new(&tokens(&[("old", "one"), ("new", "two")]), dir.path()).unwrap();
        assert_eq!(generated, None);
        let check = |value: Option<&str>, expected| {
            let headers = value.map(|v| ("x-auth-token".parse().unwrap(), HeaderValue::from_str(v).unwrap()));
            assert_eq!(auth.token(&headers.into_iter().collect()), expected, "{value:?}");
        };
        check(Some("one"), Some("old"));
        check(Some("two"), Some("new"));
        check(Some("onf"), None);
        check(Some("on"), None);
        check(Some("one "), None);
        check(Some(""), None);
        check(None, None);
    }

    #[test]
    fn senders_have_the_first_token() {
        let dir = tempfile::tempdir().unwrap();
        let check = |config: AuthConfig, expected: &str| {
            assert_eq!(config.first_name(), expected);
            assert_eq!(Auth::new(&config, dir.path()).unwrap().0.first_name(), expected);
        };
        check(tokens(&[("old", "one"), ("new", "two")]), "old");
        check(AuthConfig::default(), "generated");
        check(AuthConfig::None, "none");
    }

    #[test]
    fn a_token_is_made_up_once() {
        let dir = tempfile::tempdir().unwrap();
        // There may be an empty file already, which others may read.
        let path = generated_token_path(dir.path());
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let (auth, generated) = Auth::new(&AuthConfig::default(), dir.path()).unwrap();
        assert_eq!(generated.as_ref(), Some(&path));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let token = fs::read_to_string(&path).unwrap();
        assert_eq!(token.trim().len(), 64);
        let headers = |value: &str| HeaderMap::from_iter([("x-auth-token".parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(auth.token(&headers(token.trim())), Some("generated"));
        let (again, _) = Auth::new(&AuthConfig::default(), dir.path()).unwrap();
        assert_eq!(again.token(&headers(token.trim())), Some("generated"));
        assert_eq!(again.token(&headers("guess")), None);
    }

    #[test]
    fn settings_that_do_not_work() {
        let check = |config, expected: &[&str]| {
            let problems: Vec<_> = Auth::problems(&config).iter().map(ToString::to_string).collect();
            assert_eq!(problems, expected);
        };
        let name = |name| format!("ingress.auth.tokens: the name {name:?} is empty or used twice");
        check(tokens(&[("a", "1"), ("b", "2"), ("ü", "ü x")]), &[]);
        check(tokens(&[("a", "1"), ("a", "2"), ("", "3")]), &[&name("a"), &name("")]);
        check(
            tokens(&[("a", " "), ("b", " x"), ("c", "x\n"), ("d", "x\0y"), ("e", "x\u{7f}")]),
            &[
                "ingress.auth.tokens: the value of \"a\" is empty",
                "ingress.auth.tokens: the value of \"b\" begins or ends with white space, which does not arrive with a request",
                "ingress.auth.tokens: the value of \"c\" begins or ends with white space, which does not arrive with a request",
                "ingress.auth.tokens: the value of \"d\" has a control character, which a header can't have",
                "ingress.auth.tokens: the value of \"e\" has a control character, which a header can't have",
            ],
        );
        let twice = tokens(&[("old", "s3cret"), ("new", "s3cret")]);
        let warning = "ingress.auth.tokens: \"old\" and \"new\" have the same value, which counts as the last of them";
        assert_eq!(Auth::warnings(&twice), [warning]);
        check(twice, &[]);
        let header = AuthConfig::Tokens { header: "no header".into(), tokens: vec![] };
        check(header, &["ingress.auth.header is \"no header\", which is not a header name"]);
    }
}
