//! The `signing_secret` of a sink: signatures as Standard Webhooks 1.0 defines them.

use crate::document::Section;
use crate::signature::{Key, OneOrMore};

/// Every body is signed with all secrets, so that one can be rotated.
#[derive(Clone, Debug, Default)]
pub(super) struct Secrets(Vec<Key>);

impl Secrets {
    /// Reads `signing_secret`, one secret or a list of them; none where it is absent.
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let secrets = match section.get("signing_secret") {
            None => Vec::new(),
            Some(OneOrMore::One(secret)) => vec![secret],
            Some(OneOrMore::More(secrets)) => {
                if secrets.is_empty() {
                    section.problem("signing_secret", "the list of secrets is empty");
                }
                secrets
            }
        };
        let mut keys = Vec::new();
        for secret in secrets {
            match Key::standard(&secret) {
                Ok(key) => keys.push(key),
                Err(problem) => section.problem("signing_secret", problem),
            }
        }
        Self(keys)
    }

    /// The value of `webhook-signature`: one signature per secret, separated by spaces. `None` without secrets.
    pub(super) fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> Option<String> {
        let sign = |key: &Key| key.sign_standard(id, timestamp, body);
        (!self.0.is_empty()).then(|| self.0.iter().map(sign).collect::<Vec<_>>().join(" "))
    }
}

impl PartialEq for Secrets {
    /// The same secrets sign alike; they are not kept themselves.
    fn eq(&self, other: &Self) -> bool {
        self.sign("", "", b"") == other.sign("", "", b"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_for_each_secret() {
        let key = || Key::standard("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let one = key().sign_standard("id", "1", b"{}");
        assert_eq!(Secrets::default().sign("id", "1", b"{}"), None);
        assert_eq!(Secrets(vec![key()]).sign("id", "1", b"{}"), Some(one.clone()));
        assert_eq!(Secrets(vec![key(), key()]).sign("id", "1", b"{}"), Some(format!("{one} {one}")));
    }
}
