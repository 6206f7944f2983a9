//! What a deserializer says, in the words of those who write TOML.

/// An error about a value of the wrong type or out of range, without the value; any other as it is.
pub(super) fn plain(message: &str) -> String {
    if let Some((found, expected)) = told(message, "invalid type: ") {
        return format!("should be {}, is {}", wanted(expected), kind(found));
    }
    match told(message, "invalid value: ") {
        Some((found, _)) if kind(found) == "an integer" => "is a number that is too small or too large".to_owned(),
        Some(_) | None => message.to_owned(),
    }
}

/// What was found and what was expected.
fn told<'m>(message: &'m str, prefix: &str) -> Option<(&'m str, &'m str)> {
    // The value may have the words in it.
    message.strip_prefix(prefix)?.rsplit_once(", expected ")
}

fn kind(found: &str) -> &str {
    match found.split([' ', '`']).next() {
        Some("string") => "a string",
        Some("integer") => "an integer",
        Some("floating") => "a float",
        Some("boolean") => "a boolean",
        Some("sequence") => "an array",
        // So a date or a time is deserialized, too.
        Some("map") => "a table",
        _ => found,
    }
}

fn wanted(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => "an integer",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a map" => "a table",
        _ if expected.starts_with("struct ") => "a table",
        _ => expected,
    }
}
