//! Signatures of webhooks: HMAC-SHA256 as Standard Webhooks 1.0 and as WebSub ("hub") define it. Made for what is sent,
//! and compared with what has come; keys and bytes are all that this knows.

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use sha2::Sha256;

/// A secret, or several of them: one of the two while it is rotated.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(untagged, expecting = "should be text, or a list of texts")]
pub enum OneOrMore {
    /// The text.
    One(String),
    /// The list.
    More(Vec<String>),
}

/// A key to sign with. Debug does not show it.
#[derive(Clone)]
pub struct Key(Hmac<Sha256>);

impl Key {
    /// The key of a secret as Standard Webhooks writes it: `whsec_` and base64.
    ///
    /// # Errors
    ///
    /// What is wrong with the secret, without the secret.
    pub fn standard(secret: &str) -> Result<Self, &'static str> {
        let encoded = secret.strip_prefix("whsec_").ok_or("a signing secret starts with \"whsec_\"")?;
        let key = STANDARD.decode(encoded).map_err(|_| "what follows \"whsec_\" in a signing secret is base64")?;
        Self::new(&key)
    }

    /// The key of a secret that is taken as it is.
    ///
    /// # Errors
    ///
    /// What is wrong with the secret.
    pub fn plain(secret: &str) -> Result<Self, &'static str> {
        Self::new(secret.as_bytes())
    }

    fn new(key: &[u8]) -> Result<Self, &'static str> {
        if key.is_empty() {
            return Err("a signing secret is not empty");
        }
        Hmac::new_from_slice(key).map(Self).map_err(|_| "a signing secret of this length cannot be used")
    }

    /// A signature for the header `webhook-signature`.
    pub fn sign_standard(&self, id: &str, timestamp: &str, body: &[u8]) -> String {
        let mac = [id.as_bytes(), b".", timestamp.as_bytes(), b".", body]
            .iter()
            .fold(self.0.clone(), |mac, part| mac.chain_update(part));
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }

    /// A signature for the header `x-hub-signature-256`.
    pub fn sign_hub(&self, body: &[u8]) -> String {
        let mac = self.0.clone().chain_update(body).finalize().into_bytes();
        format!("sha256={:x}", Bytes::copy_from_slice(&mac))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Seconds since 1970, rounded down.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_vectors() {
        // The example of the Standard Webhooks specification and its libraries' tests.
        let key = Key::standard("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = key.sign_standard("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        // The example of GitHub's documentation on validating webhooks.
        let key = Key::plain("It's a Secret to Everybody").unwrap();
        let expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        assert_eq!(key.sign_hub(b"Hello, World!"), expected);
        assert_eq!(format!("{key:?}"), "Key(…)");
    }

    #[test]
    fn unusable_secrets() {
        fn check(secret: &str, expected: &str) {
            let problem = Key::standard(secret).unwrap_err();
            assert!(problem.contains(expected), "{secret}: {problem}");
        }
        check("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "starts with");
        check("whsec_not base64", "is base64");
        check("whsec_", "not empty");
        assert_eq!(Key::plain("").unwrap_err(), "a signing secret is not empty");
    }
}
