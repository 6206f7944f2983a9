//! Who may send: all that can change of it while the ingress runs, as one value that is replaced as a whole.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::{ArcSwap, Guard};
use http::HeaderMap;

use super::Config;
use super::auth::{Auth, AuthError};
use super::origin::Origins;
use super::signed::Signed;
use crate::tls::{self, NeedsRestart, TlsError};

/// Where requests may come from, by which token and with which signature, and how the ingress identifies itself.
pub struct Access {
    auth: Auth,
    origins: Option<Origins>,
    signed: Option<Signed>,
    tls: Option<tls::Server>,
}

impl Access {
    /// Compiles the settings, and reads the files of `tls`. With no token configured the one in `data_dir` is used, or
    /// made up and written there, and its file's path is returned too.
    ///
    /// # Errors
    ///
    /// [`AccessError`]: the settings or the files don't work.
    pub fn new(config: &Config, data_dir: &Path) -> Result<(Self, Option<PathBuf>), AccessError> {
        let origins = origins(config).map_err(AccessError::Settings)?;
        let signed = signed(config).map_err(AccessError::Settings)?;
        let tls = config.tls.as_ref().map(tls::Server::load).transpose().map_err(AccessError::Tls)?;
        let (auth, generated) = Auth::new(&config.auth, data_dir)?;
        Ok((Self { auth, origins, signed, tls }, generated))
    }

    /// What is wrong with the settings, without touching any file.
    pub fn problems(config: &Config) -> Vec<String> {
        let auth = Auth::problems(&config.auth).into_iter().map(|problem| problem.to_string());
        let others = [origins(config).err(), signed(config).err()];
        auth.chain(others.into_iter().flatten().flatten()).collect()
    }

    /// What is odd about the settings.
    pub fn warnings(config: &Config) -> Vec<String> {
        let idle = config.allow.is_none() && !config.trusted_proxies.is_empty();
        let idle = idle.then(|| "ingress.trusted_proxies has no effect without ingress.allow".to_owned());
        idle.into_iter().chain(Auth::warnings(&config.auth)).collect()
    }

    /// Whether a request may come from there.
    pub(super) fn allows(&self, peer: IpAddr, headers: &HeaderMap) -> bool {
        self.origins.as_ref().is_none_or(|origins| origins.allows(peer, headers))
    }

    /// The name of the request's token, if it carries one and, where one is wanted, a signature.
    pub(super) fn token(&self, headers: &HeaderMap) -> Option<&str> {
        let token = self.auth.token(headers);
        token.filter(|_| self.signed.as_ref().is_none_or(|signed| signed.is_complete(headers)))
    }

    /// Whether the signature is that of the body, where one is wanted.
    pub(super) fn verify(&self, headers: &HeaderMap, body: &[u8]) -> bool {
        self.signed.as_ref().is_none_or(|signed| signed.verify(headers, body, SystemTime::now()))
    }

    /// What a request needs to be let in, for those who lack it.
    pub(super) fn wanted(&self) -> String {
        let token = self
            .auth
            .header()
            .map(|header| format!("the header {header} with the token that this relay is configured with"));
        let signature = self.signed.as_ref().map(|signed| {
            format!("the header {} with a signature by the secret that this relay is configured with", signed.header())
        });
        let wanted: Vec<_> = token.into_iter().chain(signature).collect();
        format!("send {}", wanted.join(", and "))
    }

    /// The server's side of TLS, if connections begin with it.
    pub(super) fn tls(&self) -> Option<&tls::Server> {
        self.tls.as_ref()
    }
}

fn origins(config: &Config) -> Result<Option<Origins>, Vec<String>> {
    config.allow.as_ref().map(|allow| Origins::new(allow, &config.trusted_proxies)).transpose()
}

fn signed(config: &Config) -> Result<Option<Signed>, Vec<String>> {
    config.signature.as_ref().map(Signed::new).transpose()
}

/// The [`Access`] of a running ingress. Clones are of the same.
#[derive(Clone)]
pub struct Gate(Arc<ArcSwap<Access>>);

impl Gate {
    pub(super) fn new(access: Access) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(access)))
    }

    /// The name of the token by which senders send unless they have several.
    pub fn first_token(&self) -> String {
        self.0.load().auth.first_name().to_owned()
    }

    /// What holds now. Meant to be given back soon.
    pub(super) fn load(&self) -> Guard<Arc<Access>> {
        self.0.load()
    }

    /// From now on this holds: for every request, and for the handshakes of new connections.
    ///
    /// # Errors
    ///
    /// [`NeedsRestart`]: one has TLS and the other has not. All the rest has changed.
    pub fn replace(&self, mut access: Access) -> Result<(), NeedsRestart> {
        let replaced = tls::replace("ingress.tls", self.load().tls(), &mut access.tls);
        self.0.store(Arc::new(access));
        replaced
    }

    /// When the certificate expires, if there is one.
    pub fn certificate_expires(&self) -> Option<SystemTime> {
        self.load().tls().map(tls::Server::expires)
    }
}

/// Why nobody can be let in.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The tokens.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Other settings.
    #[error("{}", .0.join("; "))]
    Settings(Vec<String>),
    /// Certificate and key.
    #[error("ingress.tls does not work")]
    Tls(#[source] TlsError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::{AuthConfig, Scheme, SignatureConfig};

    #[test]
    fn all_but_tls_is_replaced_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(file("cert"), certificate.cert.pem()).unwrap();
        std::fs::write(file("key"), certificate.signing_key.serialize_pem()).unwrap();
        let cleartext = Config { auth: AuthConfig::None, ..Config::default() };
        let tls = Some(tls::Config { cert: file("cert"), key: file("key"), client_ca: None });
        let over_tls = Config { tls, ..cleartext.clone() };
        let closed = Config { allow: Some(vec!["203.0.113.1".to_owned()]), ..cleartext.clone() };
        let access = |config: &Config| Access::new(config, dir.path()).unwrap().0;

        let gate = Gate::new(access(&cleartext));
        let lets_in = |gate: &Gate| gate.load().allows([127, 0, 0, 1].into(), &HeaderMap::new());
        assert!(lets_in(&gate) && gate.certificate_expires().is_none());
        gate.replace(access(&closed)).unwrap();
        assert!(!lets_in(&gate));
        let error = gate.replace(access(&over_tls)).unwrap_err().to_string();
        assert!(error.starts_with("ingress.tls can be turned on and off only by a restart"), "{error}");
        assert!(lets_in(&gate) && gate.certificate_expires().is_none());

        let gate = Gate::new(access(&over_tls));
        assert!(gate.certificate_expires() > Some(SystemTime::now()));
        assert!(gate.replace(access(&closed)).is_err());
        assert!(!lets_in(&gate) && gate.certificate_expires() > Some(SystemTime::now()));
        gate.replace(access(&over_tls)).unwrap();
    }

    #[test]
    fn says_what_is_wanted() {
        let check = |auth: AuthConfig, signature: Option<SignatureConfig>, expected: &str| {
            let dir = tempfile::tempdir().unwrap();
            let config = Config { auth, signature, ..Config::default() };
            assert_eq!(Access::new(&config, dir.path()).unwrap().0.wanted(), expected);
        };
        let signature = || {
            let secret = crate::signature::OneOrMore::One("secret".to_owned());
            Some(SignatureConfig { scheme: Scheme::HubSha256, secret, header: None })
        };
        let token = "the header x-auth-token with the token that this relay is configured with";
        let signed = "the header x-hub-signature-256 with a signature by the secret that this relay is configured with";
        check(AuthConfig::default(), None, &format!("send {token}"));
        check(AuthConfig::None, signature(), &format!("send {signed}"));
        check(AuthConfig::default(), signature(), &format!("send {token}, and {signed}"));
    }
}
