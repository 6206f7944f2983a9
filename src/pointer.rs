//! JSON pointers (RFC 6901) into an event's body.
//!
//! A pointer is followed in the text itself, without building a tree: numbers keep the digits they were written with,
//! and what lies beside the path is only skipped. It does not know who asks.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize as _;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A compiled JSON pointer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pointer {
    tokens: Vec<String>,
}

impl Pointer {
    /// Compiles `/a/b`.
    ///
    /// # Errors
    ///
    /// When it does not begin with `/`, or has a `~` that is followed by neither `0` nor `1`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let tokens = text.strip_prefix('/').ok_or("a JSON pointer begins with `/`")?;
        let token = |token: &str| {
            let escapes_well = token.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
            escapes_well.then(|| token.replace("~1", "/").replace("~0", "~"))
        };
        let tokens = tokens.split('/').map(token).collect::<Option<_>>();
        Ok(Self { tokens: tokens.ok_or("in a JSON pointer `~` is written `~0`, and `/` in a name `~1`")? })
    }

    /// What the pointer leads to in a JSON text: a string's content, a number or boolean as it was written, an array or
    /// object without white space. `None` where there is nothing, or null. Of a repeated key the last counts.
    pub fn find<'j>(&self, json: &'j str) -> Option<Cow<'j, str>> {
        let mut at = json.trim_ascii();
        for token in &self.tokens {
            at = step(at, token)?;
        }
        match at.as_bytes().first()? {
            b'n' => None,
            b'"' => text(at),
            b'{' | b'[' => Some(Cow::Owned(compact(at))),
            _ => Some(Cow::Borrowed(at)),
        }
    }
}

/// What a JSON string says, quotes around it; `None` where an escape in it stands for no character.
pub(crate) fn text(string: &str) -> Option<Cow<'_, str>> {
    match string.contains('\\') {
        false => Some(Cow::Borrowed(string.strip_prefix('"')?.strip_suffix('"')?)),
        true => serde_json::from_str(string).ok().map(Cow::Owned),
    }
}

/// The value that one token leads to.
fn step<'j>(json: &'j str, token: &str) -> Option<&'j str> {
    let mut input = serde_json::Deserializer::from_str(json);
    let found = match json.as_bytes().first()? {
        b'{' => input.deserialize_map(Member(token)),
        b'[' => input.deserialize_seq(Element(index(token)?)),
        _ => return None,
    };
    found.ok()?.map(RawValue::get)
}

/// An array index of RFC 6901: no sign, no leading zero.
fn index(token: &str) -> Option<usize> {
    let plain = token == "0" || !token.starts_with(['0', '+']);
    plain.then(|| token.parse().ok())?
}

/// Finds the last member of that name.
struct Member<'t>(&'t str);

impl<'j> Visitor<'j> for Member<'_> {
    type Value = Option<&'j RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'j>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut found = None;
        while let Some(is_it) = map.next_key_seed(Is(self.0))? {
            if is_it {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Finds the element at that index.
struct Element(usize);

impl<'j> Visitor<'j> for Element {
    type Value = Option<&'j RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<S: SeqAccess<'j>>(self, mut seq: S) -> Result<Self::Value, S::Error> {
        let mut found = None;
        let mut place = 0;
        while let Some(element) = seq.next_element()? {
            if place == self.0 {
                found = Some(element);
            }
            place += 1;
        }
        Ok(found)
    }
}

/// Whether a key is that text.
struct Is<'t>(&'t str);

impl<'j> DeserializeSeed<'j> for Is<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'j>>(self, key: D) -> Result<bool, D::Error> {
        let key = <&RawValue>::deserialize(key)?;
        Ok(text(key.get()).is_some_and(|key| key == self.0))
    }
}

/// Valid JSON without the white space between its tokens.
fn compact(json: &str) -> String {
    let mut in_string = false;
    let mut escaped = false;
    let keep = |c: &char| {
        match (*c, escaped) {
            ('"', false) => in_string = !in_string,
            (c, _) => escaped = c == '\\' && !escaped,
        }
        escaped &= *c == '\\';
        in_string || !c.is_ascii_whitespace()
    };
    json.chars().filter(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_pointers() {
        let body = concat!(
            r#"{"a":{"b":"x","n":1.50,"big":123456789012345678901234,"t":true,"z":null,"e":"\u00e9\"","":"empty"},"#,
            r#""l":[1, "two", {"k" : "v\" w \\" , "l":[ ]}],"a/b":"slash","m~n":"tilde","d":1,"d":2,"q\"":"quote","\ud800":"no text","s\u0061me":"escaped"}"#
        );
        let check = |pointer: &str, expected: Option<&str>| {
            assert_eq!(Pointer::parse(pointer).unwrap().find(body).as_deref(), expected, "{pointer}");
        };
        check("/a/b", Some("x"));
        check("/a/n", Some("1.50"));
        check("/a/big", Some("123456789012345678901234"));
        check("/a/t", Some("true"));
        check("/a/z", None);
        check("/a/z/z", None);
        check("/a/e", Some("é\""));
        check("/a/", Some("empty"));
        check("/a/b/c", None);
        check("/none", None);
        check("/", None);
        check("/l/0", Some("1"));
        check("/l/1", Some("two"));
        check("/l/2", Some(r#"{"k":"v\" w \\","l":[]}"#));
        check("/l", Some(r#"[1,"two",{"k":"v\" w \\","l":[]}]"#));
        check("/l/2/k", Some("v\" w \\"));
        check("/l/3", None);
        check("/l/01", None);
        check("/l/+1", None);
        check("/l/-", None);
        check("/l/18446744073709551616", None);
        check("/a~1b", Some("slash"));
        check("/m~0n", Some("tilde"));
        check("/d", Some("2"));
        check("/q\"", Some("quote"));
        check("/same", Some("escaped"));
        check("/\u{fffd}", None);
    }

    #[test]
    fn rejects_what_is_no_pointer() {
        for text in ["", "a", "a/b", "/~", "/~2", "/a~/b"] {
            assert!(Pointer::parse(text).is_err(), "{text}");
        }
        assert_eq!(Pointer::parse("/~01").unwrap().find(r#"{"~1":"x"}"#).as_deref(), Some("x"));
    }

    #[test]
    fn allows_white_space_around_the_body() {
        assert_eq!(Pointer::parse("/a").unwrap().find(" \r\n{ \"a\" : 1 } \n").as_deref(), Some("1"));
    }
}
