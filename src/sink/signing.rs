//! Signatures as Standard Webhooks 1.0 defines them: HMAC-SHA256 over id, timestamp and body.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use sha2::Sha256;

use crate::document::Section;

/// The `signing_secret` of a sink: every body is signed with all of them, so that one can be rotated. Debug does not
/// show them.
#[derive(Clone, Default)]
pub(super) struct Secrets(Vec<Hmac<Sha256>>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

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
            match key(&secret) {
                Ok(key) => keys.push(key),
                Err(problem) => section.problem("signing_secret", problem),
            }
        }
        Self(keys)
    }

    /// The value of `webhook-signature`: one signature per secret, separated by spaces. `None` without secrets.
    pub(super) fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> Option<String> {
        let sign = |key: &Hmac<Sha256>| {
            let mac = [id.as_bytes(), timestamp.as_bytes(), body];
            let mac = mac.iter().enumerate().fold(key.clone(), |mac, (position, part)| {
                let mac = if position == 0 { mac } else { mac.chain_update(b".") };
                mac.chain_update(part)
            });
            format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
        };
        (!self.0.is_empty()).then(|| self.0.iter().map(sign).collect::<Vec<_>>().join(" "))
    }
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} secrets", self.0.len())
    }
}

fn key(secret: &str) -> Result<Hmac<Sha256>, &'static str> {
    let encoded = secret.strip_prefix("whsec_").ok_or("a signing secret starts with \"whsec_\"")?;
    let key = STANDARD.decode(encoded).map_err(|_| "what follows \"whsec_\" in a signing secret is base64")?;
    if key.is_empty() {
        return Err("a signing secret is not empty");
    }
    Hmac::new_from_slice(&key).map_err(|_| "a signing secret of this length cannot be used")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    /// The example of the Standard Webhooks specification and its libraries' tests.
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn known_vector() {
        fn check(secrets: &[&str], expected: Option<String>) {
            let secrets = Secrets(secrets.iter().map(|secret| key(secret).unwrap()).collect());
            assert_eq!(secrets.sign(ID, "1614265330", BODY), expected);
        }
        check(&[], None);
        check(&[SECRET], Some(SIGNATURE.into()));
        check(&[SECRET, SECRET], Some(format!("{SIGNATURE} {SIGNATURE}")));
    }

    #[test]
    fn unusable_secrets() {
        fn check(secret: &str, expected: &str) {
            let problem = key(secret).unwrap_err();
            assert!(problem.contains(expected), "{secret}: {problem}");
        }
        check("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "starts with");
        check("whsec_not base64", "is base64");
        check("whsec_", "not empty");
    }
}
