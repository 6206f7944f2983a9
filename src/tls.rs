//! TLS for what listens: the certificate, its key and the authorities of clients, from PEM files.
//!
//! TLS 1.2 and 1.3, HTTP/2 and HTTP/1.1 by ALPN. Session tickets are of one [`Server`]: with a new one every client proves
//! itself again. What is done with a connection after its handshake, and how long that may take, is for others to say.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer as _, X509Certificate};

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The `tls` setting of a listener: PEM files.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The certificate chain, the listener's own first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that clients' certificates must come from. With it clients must have one.
    pub client_ca: Option<PathBuf>,
}

impl Config {
    /// The files that it is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).map(PathBuf::as_path)
    }
}

/// The server's side of TLS. Clones share their sessions.
#[derive(Clone)]
pub struct Server {
    acceptor: TlsAcceptor,
    expires: SystemTime,
}

impl Server {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// [`TlsError`]: which file is wrong, and what is wrong with it.
    pub fn load(config: &Config) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&config.cert)?;
        let expires =
            chain.first().and_then(not_after).ok_or_else(|| TlsError::Certificate { path: config.cert.clone() })?;
        let key = PrivateKeyDer::from_pem_slice(&read(&config.key)?)
            .map_err(|_| TlsError::Key { path: config.key.clone() })?;
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source: rustls::Error| TlsError::Unusable { path, source: source.into() }
        };
        let versions = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable(&config.cert))?;
        let clients = match &config.client_ca {
            None => versions.with_no_client_auth(),
            Some(path) => versions.with_client_cert_verifier(verifier(path, provider)?),
        };
        let mut server = clients.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::Mismatch { cert: config.cert.clone(), key: config.key.clone() }
            }
            error => unusable(&config.key)(error),
        })?;
        server.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        Ok(Self { acceptor: Arc::new(server).into(), expires })
    }

    /// Makes the handshake; it ends only with the client's help.
    ///
    /// # Errors
    ///
    /// The client went away, or does not agree.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<TlsStream<S>> {
        self.acceptor.accept(stream).await
    }

    /// When the certificate expires.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }
}

/// Whether client and server agreed to speak HTTP/2.
pub fn is_http2<S>(stream: &TlsStream<S>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(HTTP2)
}

/// What a listener that runs goes on with: the old, if only one of the two is there.
///
/// # Errors
///
/// [`NeedsRestart`]: it was the old.
pub fn replace(setting: &'static str, old: Option<&Server>, new: &mut Option<Server>) -> Result<(), NeedsRestart> {
    if old.is_some() == new.is_some() {
        return Ok(());
    }
    *new = old.cloned();
    Err(NeedsRestart { setting })
}

/// TLS was turned on or off while running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting} can be turned on and off only by a restart, and stays as it is until then")]
pub struct NeedsRestart {
    setting: &'static str,
}

/// Which file is wrong, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no certificate.
    #[error("there is no PEM certificate in {}, or a broken one", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
    },
    /// It is no key.
    #[error("there is no PEM private key in {}, or a broken one, or it has a password", path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// They are not a pair.
    #[error("the key in {} does not belong to the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// The file with the certificate.
        cert: PathBuf,
        /// The file with the key.
        key: PathBuf,
    },
    /// It is what it should be, but of a kind that can't be used.
    #[error("{} can't be used for TLS", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match found {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) | Err(_) => Err(TlsError::Certificate { path: path.to_owned() }),
    }
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Takes clients whose certificates come from the authorities in a file.
fn verifier(
    path: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, TlsError> {
    let unusable = |source| TlsError::Unusable { path: path.to_owned(), source };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(error.into()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| unusable(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files(tempfile::TempDir);

    impl Files {
        /// A certificate, its key, and another key.
        fn new() -> Self {
            let files = Self(tempfile::tempdir().unwrap());
            let one = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            files.write("cert", &one.cert.pem());
            files.write("key", &one.signing_key.serialize_pem());
            files.write("other", &rcgen::KeyPair::generate().unwrap().serialize_pem());
            files.write("text", "no PEM");
            files.write("broken", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
            files.write("locked", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
            files
        }

        fn write(&self, name: &str, content: &str) {
            std::fs::write(self.0.path().join(name), content).unwrap();
        }

        fn load(&self, cert: &str, key: &str, client_ca: Option<&str>) -> Result<Server, String> {
            let path = |name: &str| self.0.path().join(name);
            let config = Config { cert: path(cert), key: path(key), client_ca: client_ca.map(path) };
            let shorter = |error: TlsError| error.to_string().replace(&format!("{}/", self.0.path().display()), "");
            Server::load(&config).map_err(shorter)
        }
    }

    #[test]
    fn says_which_file_is_wrong() {
        let files = Files::new();
        assert!(files.load("cert", "key", None).is_ok());
        assert!(files.load("cert", "key", Some("cert")).is_ok());
        let check = |cert: &str, key: &str, client_ca: Option<&str>, expected: &str| {
            assert_eq!(files.load(cert, key, client_ca).err().as_deref(), Some(expected));
        };
        let no_certificate = |name| format!("there is no PEM certificate in {name}, or a broken one");
        let no_key = |name| format!("there is no PEM private key in {name}, or a broken one, or it has a password");
        check("none", "key", None, "can't read none");
        check("cert", "none", None, "can't read none");
        check("cert", "key", Some("none"), "can't read none");
        check("text", "key", None, &no_certificate("text"));
        check("key", "key", None, &no_certificate("key"));
        check("broken", "key", None, &no_certificate("broken"));
        check("cert", "key", Some("text"), &no_certificate("text"));
        check("cert", "key", Some("broken"), "broken can't be used for TLS");
        check("cert", "text", None, &no_key("text"));
        check("cert", "cert", None, &no_key("cert"));
        check("cert", "locked", None, &no_key("locked"));
        check("cert", "other", None, "the key in other does not belong to the certificate in cert");
    }

    #[test]
    fn knows_when_the_certificate_expires() {
        let files = Files::new();
        let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        parameters.not_after = rcgen::date_time_ymd(2031, 2, 3);
        let key = rcgen::KeyPair::generate().unwrap();
        files.write("dated", &parameters.self_signed(&key).unwrap().pem());
        files.write("its-key", &key.serialize_pem());
        let expires = files.load("dated", "its-key", None).unwrap().expires();
        assert_eq!(expires, humantime::parse_rfc3339("2031-02-03T00:00:00Z").unwrap());
    }

    #[test]
    fn tls_is_not_turned_on_while_running() {
        let server = || Some(Files::new().load("cert", "key", None).unwrap());
        for (old, mut new) in [(None, None), (server(), server())] {
            assert_eq!(replace("ingress.tls", old.as_ref(), &mut new), Ok(()));
        }
        for (old, mut new) in [(None, server()), (server(), None)] {
            let error = replace("ingress.tls", old.as_ref(), &mut new).unwrap_err().to_string();
            assert!(error.starts_with("ingress.tls can be turned on and off only by a restart"), "{error}");
            assert_eq!(new.is_some(), old.is_some());
        }
    }
}
