//! Whether a section of a document has changed.

use sha2::{Digest, Sha256};
use toml::de::{DeTable, DeValue};

use super::{Lookup, Piece, Section, pieces};

impl Section<'_> {
    /// A digest of the section's keys and values with `${…}` resolved: equal means an unchanged section (for reload),
    /// wherever it stands and whatever comments it has.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest_table(self.table, self.document.lookup, &mut digest);
        digest.finalize().into()
    }
}

fn digest_table(table: &DeTable<'_>, lookup: &dyn Lookup, digest: &mut Sha256) {
    digest.update((table.len() as u64).to_be_bytes());
    for (key, value) in table {
        digest_text(b'k', key.get_ref(), digest);
        digest_value(value.get_ref(), lookup, digest);
    }
}

fn digest_value(value: &DeValue<'_>, lookup: &dyn Lookup, digest: &mut Sha256) {
    match value {
        DeValue::String(text) => {
            digest_text(b's', &pieces(text, lookup).0.iter().map(Piece::value).collect::<String>(), digest);
        }
        DeValue::Integer(integer) => digest_text(b'i', &integer.to_string(), digest),
        DeValue::Float(float) => digest_text(b'f', float.as_str(), digest),
        DeValue::Boolean(boolean) => digest.update([b'b', u8::from(*boolean)]),
        DeValue::Datetime(time) => digest_text(b'd', &time.to_string(), digest),
        DeValue::Array(array) => {
            digest.update(b"a");
            digest.update((array.len() as u64).to_be_bytes());
            array.iter().for_each(|value| digest_value(value.get_ref(), lookup, digest));
        }
        DeValue::Table(table) => {
            digest.update(b"t");
            digest_table(table, lookup, digest);
        }
    }
}

fn digest_text(tag: u8, text: &str, digest: &mut Sha256) {
    digest.update([tag]);
    digest.update((text.len() as u64).to_be_bytes());
    digest.update(text);
}
