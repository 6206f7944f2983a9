//! What a broker says, as far as it may be shown.
//!
//! A broker quotes names in its errors: of users, virtual hosts, exchanges, routing keys. Those that came from a variable, a
//! file or an event are left out of its words.

use std::cmp::Reverse;

use lapin::ErrorKind;

/// Names that are not to be shown. Debug does not show them either.
#[derive(Clone, PartialEq)]
pub(super) struct Unsaid(Vec<String>);

/// What stands for such a name.
const NAME: &str = "…";

impl Unsaid {
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<_> = names.into_iter().filter(|name| !name.is_empty()).collect();
        // One may be a part of another.
        names.sort_by_key(|name| Reverse(name.len()));
        Self(names)
    }

    /// These names too.
    pub(super) fn and<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Self {
        Self::new(self.0.iter().cloned().chain(names.into_iter().map(str::to_owned)))
    }

    /// An error that is about no message, or about one whose names are among these.
    pub(super) fn describe(&self, error: &lapin::Error) -> String {
        said(error, |text| self.0.iter().fold(text.to_owned(), |text, name| text.replace(name, NAME)))
    }

    /// An error that may be about any message: of what the broker says about a channel only the error's name is shown.
    pub(super) fn describe_shared(&self, error: &lapin::Error) -> String {
        if error.is_amqp_soft_error() { said(error, |text| name_of(text).to_owned()) } else { self.describe(error) }
    }
}

impl std::fmt::Debug for Unsaid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} names", self.0.len())
    }
}

fn said(error: &lapin::Error, shown: impl Fn(&str) -> String) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => {
            let text = amqp.get_message().as_str();
            // A long text is cut short, perhaps within a name.
            let shown = if text.ends_with("...") { name_of(text).to_owned() } else { shown(text) };
            format!("the broker said: {} {shown}", amqp.get_id())
        }
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// `ACCESS_REFUSED` of "ACCESS_REFUSED - write access to exchange …".
fn name_of(text: &str) -> &str {
    text.split_once(" - ").map_or("", |(name, _)| name)
}

#[cfg(test)]
pub(super) mod tests {
    use lapin::protocol::AMQPError;

    use super::*;

    /// What lapin makes of a broker's words.
    pub(in super::super) fn error(code: u16, text: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::from_id(code, text.into()).unwrap()).into()
    }

    #[test]
    fn names_stay_unsaid() {
        fn check(code: u16, text: &str, expected: &str, shared: &str) {
            let unsaid = Unsaid::new(["tops", "", "topsecret"].map(str::to_owned)).and(["key"]);
            let error = error(code, text);
            assert_eq!(unsaid.describe(&error), format!("the broker said: {expected}"));
            assert_eq!(unsaid.describe_shared(&error), format!("the broker said: {shared}"));
            assert_eq!(format!("{unsaid:?}"), "3 names");
        }
        let same = "530 NOT_ALLOWED - vhost … not found";
        check(530, "NOT_ALLOWED - vhost topsecret not found", same, same);
        check(
            403,
            "ACCESS_REFUSED - write access to topic 'key' in exchange 'e' in vhost 'topsecret' refused for user 'tops'",
            "403 ACCESS_REFUSED - write access to topic '…' in exchange 'e' in vhost '…' refused for user '…'",
            "403 ACCESS_REFUSED",
        );
        check(530, "NOT_ALLOWED - vhost topsec...", "530 NOT_ALLOWED", "530 NOT_ALLOWED");
        check(406, "whatever", "406 whatever", "406 ");
    }
}
