//! Signatures of senders: whether a body is what somebody wrote who has the secret.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName};
use serde::Deserialize;
use subtle::{Choice, ConstantTimeEq as _};

use crate::signature::{Key, OneOrMore, unix_seconds};

/// How far a signed time may be from ours, as the libraries of Standard Webhooks have it.
const TOLERANCE: Duration = Duration::from_secs(5 * 60);
const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");

/// The `ingress.signature` setting.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignatureConfig {
    /// What is signed, and how it is written.
    pub scheme: Scheme,
    /// One secret or several, any of which will do.
    pub secret: OneOrMore,
    /// The header with the signature; the scheme's own where it is left out.
    pub header: Option<String>,
}

/// How webhooks are signed.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// `sha256=…`, of the body, as GitHub, Meta and WebSub hubs have it.
    HubSha256,
    /// Standard Webhooks 1.0: of the webhook's id, its time and the body.
    StandardWebhooks,
}

impl fmt::Debug for SignatureConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignatureConfig").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl Scheme {
    fn header(self) -> HeaderName {
        HeaderName::from_static(match self {
            Self::HubSha256 => "x-hub-signature-256",
            Self::StandardWebhooks => "webhook-signature",
        })
    }
}

/// The check of a request's signature, and how to make one.
pub struct Signed {
    scheme: Scheme,
    header: HeaderName,
    keys: Vec<Key>,
}

impl Signed {
    /// Compiles the setting.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn new(config: &SignatureConfig) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let given = config.header.as_ref().map(|name| {
            let problem = || format!("ingress.signature.header is {name:?}, which is not a header name");
            HeaderName::try_from(name.as_str()).map_err(|_| problems.push(problem())).ok()
        });
        let header = given.flatten().unwrap_or_else(|| config.scheme.header());
        let secrets = match &config.secret {
            OneOrMore::One(secret) => std::slice::from_ref(secret),
            OneOrMore::More(secrets) => secrets,
        };
        let key = |secret: &String| match config.scheme {
            Scheme::HubSha256 => Key::plain(secret),
            Scheme::StandardWebhooks => Key::standard(secret),
        };
        let keys = secrets.iter().filter_map(|secret| key(secret).map_err(|e| problems.push(in_setting(e))).ok());
        let keys: Vec<_> = keys.collect();
        if secrets.is_empty() {
            problems.push(in_setting("the list of secrets is empty"));
        }
        if problems.is_empty() { Ok(Self { scheme: config.scheme, header, keys }) } else { Err(problems) }
    }

    /// The header that a request must carry.
    pub(super) fn header(&self) -> &HeaderName {
        &self.header
    }

    /// Whether a request can be signed at all, as far as its headers tell: then its body need not be read.
    pub(super) fn is_complete(&self, headers: &HeaderMap) -> bool {
        let names = match self.scheme {
            Scheme::HubSha256 => &[][..],
            Scheme::StandardWebhooks => &[ID, TIMESTAMP],
        };
        names.iter().chain([&self.header]).all(|name| headers.contains_key(name))
    }

    /// Whether one of the signatures is that of one of the keys. Takes the same time whichever it is.
    pub(super) fn verify(&self, headers: &HeaderMap, body: &[u8], now: SystemTime) -> bool {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let Some(given) = text(&self.header) else { return false };
        match self.scheme {
            Scheme::HubSha256 => {
                let given = given.to_ascii_lowercase();
                self.is_any(&[&given], |key| key.sign_hub(body))
            }
            Scheme::StandardWebhooks => {
                let (Some(id), Some(timestamp)) = (text(&ID), text(&TIMESTAMP)) else { return false };
                let given: Vec<_> = given.split(' ').collect();
                is_current(timestamp, now) & self.is_any(&given, |key| key.sign_standard(id, timestamp, body))
            }
        }
    }

    /// The headers with which a sender signs a body, by the first of the secrets.
    pub fn sign(&self, id: &str, body: &[u8], now: SystemTime) -> Vec<(HeaderName, String)> {
        let Some(key) = self.keys.first() else { return Vec::new() };
        match self.scheme {
            Scheme::HubSha256 => vec![(self.header.clone(), key.sign_hub(body))],
            Scheme::StandardWebhooks => {
                let timestamp = unix_seconds(now).to_string();
                let signature = key.sign_standard(id, &timestamp, body);
                vec![(ID, id.to_owned()), (TIMESTAMP, timestamp), (self.header.clone(), signature)]
            }
        }
    }

    fn is_any(&self, given: &[&str], sign: impl Fn(&Key) -> String) -> bool {
        let mut found = Choice::from(0);
        for expected in self.keys.iter().map(sign) {
            for given in given {
                found |= expected.as_bytes().ct_eq(given.as_bytes());
            }
        }
        found.into()
    }
}

fn in_setting(problem: &str) -> String {
    format!("ingress.signature.secret: {problem}")
}

fn is_current(timestamp: &str, now: SystemTime) -> bool {
    timestamp.parse::<u64>().is_ok_and(|timestamp| timestamp.abs_diff(unix_seconds(now)) <= TOLERANCE.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const OTHER: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;

    fn config(scheme: Scheme, secrets: &[&str]) -> SignatureConfig {
        let secrets = secrets.iter().map(|secret| (*secret).to_owned()).collect();
        SignatureConfig { scheme, secret: OneOrMore::More(secrets), header: None }
    }

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn of_the_body() {
        let signed = Signed::new(&config(Scheme::HubSha256, &["other", "It's a Secret to Everybody"])).unwrap();
        let check = |value: &str, body: &[u8], expected| {
            let headers = headers(&[("x-hub-signature-256", value)]);
            assert!(signed.is_complete(&headers));
            assert_eq!(signed.verify(&headers, body, SystemTime::UNIX_EPOCH), expected, "{value}");
        };
        let good = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        check(good, b"Hello, World!", true);
        check(&good.to_ascii_uppercase(), b"Hello, World!", true);
        check(good, b"Hello, World", false);
        for wrong in ["", "sha256=", &good[..70], &good[7..], &good.replace("e17", "e18"), &format!("{good}0")] {
            check(wrong, b"Hello, World!", false);
        }
        let missing = headers(&[("x-hub-signature", good)]);
        assert!(!signed.is_complete(&missing) && !signed.verify(&missing, b"Hello, World!", SystemTime::UNIX_EPOCH));
    }

    #[test]
    fn of_id_time_and_body() {
        const ID: (&str, &str) = ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek");
        const TIME: (&str, &str) = ("webhook-timestamp", "1614265330");
        const GOOD: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        let check = |secrets: &[&str], pairs: &[(&str, &str)], after_seconds: i64, expected: bool| {
            let signed = Signed::new(&config(Scheme::StandardWebhooks, secrets)).unwrap();
            let now = SystemTime::UNIX_EPOCH
                + Duration::from_secs(1_614_265_330_u64.checked_add_signed(after_seconds).unwrap());
            assert_eq!(signed.verify(&headers(pairs), BODY, now), expected, "{pairs:?} {after_seconds}");
        };
        fn signature(value: &str) -> (&str, &str) {
            ("webhook-signature", value)
        }
        let all = [ID, TIME, signature(GOOD)];
        check(&[STANDARD], &all, 0, true);
        check(&[OTHER, STANDARD], &all, 0, true);
        check(&[OTHER], &all, 0, false);
        check(&[STANDARD], &all, 300, true);
        check(&[STANDARD], &all, -300, true);
        check(&[STANDARD], &all, 301, false);
        check(&[STANDARD], &all, -301, false);
        check(&[STANDARD], &[ID, TIME, signature(&format!("v1,AAAA v2,x {GOOD}"))], 0, true);
        check(&[STANDARD], &[ID, TIME, signature("v1,AAAA")], 0, false);
        check(&[STANDARD], &[ID, TIME, signature("")], 0, false);
        check(&[STANDARD], &[("webhook-id", "msg_other"), TIME, signature(GOOD)], 0, false);
        check(&[STANDARD], &[ID, ("webhook-timestamp", "1614265331"), signature(GOOD)], 0, false);
        check(&[STANDARD], &[ID, ("webhook-timestamp", "now"), signature(GOOD)], 0, false);
        for missing in 0..all.len() {
            let some: Vec<_> = (0..all.len()).filter(|kept| *kept != missing).map(|kept| all[kept]).collect();
            check(&[STANDARD], &some, 0, false);
            let signed = Signed::new(&config(Scheme::StandardWebhooks, &[STANDARD])).unwrap();
            assert!(!signed.is_complete(&headers(&some)), "{some:?}");
        }
    }

    #[test]
    fn what_is_signed_is_verified() {
        for (scheme, secrets) in [(Scheme::HubSha256, ["a", "b"]), (Scheme::StandardWebhooks, [STANDARD, OTHER])] {
            let signed = Signed::new(&config(scheme, &secrets)).unwrap();
            let now = SystemTime::now();
            let pairs = signed.sign("id", BODY, now);
            let headers = pairs.into_iter().map(|(name, value)| (name, value.parse().unwrap())).collect();
            assert!(signed.is_complete(&headers) && signed.verify(&headers, BODY, now), "{scheme:?}");
            assert!(!signed.verify(&headers, b"{}", now), "{scheme:?}");
        }
    }

    #[test]
    fn settings_that_do_not_work() {
        let check = |config: SignatureConfig, expected: &str| {
            assert_eq!(Signed::new(&config).err(), Some(vec![expected.to_owned()]));
        };
        let secret = |problem| format!("ingress.signature.secret: {problem}");
        check(config(Scheme::HubSha256, &[]), &secret("the list of secrets is empty"));
        check(config(Scheme::HubSha256, &["a", ""]), &secret("a signing secret is not empty"));
        check(config(Scheme::StandardWebhooks, &["a"]), &secret("a signing secret starts with \"whsec_\""));
        let header = SignatureConfig { header: Some("no header".into()), ..config(Scheme::HubSha256, &["a"]) };
        check(header, "ingress.signature.header is \"no header\", which is not a header name");
        let both =
            SignatureConfig { header: Some("no header".into()), ..config(Scheme::StandardWebhooks, &["a", "b"]) };
        assert_eq!(Signed::new(&both).err().map(|problems| problems.len()), Some(3));
        assert!(!format!("{:?}", config(Scheme::HubSha256, &["s3cret"])).contains("s3cret"));
    }
}
