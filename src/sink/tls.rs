//! The `tls` table of a sink: which certificate authorities to trust, and a client certificate.

use std::path::{Path, PathBuf};

use super::BuildError;
use crate::document::Section;

/// PEM files. With `ca` those authorities are trusted and no others.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tls {
    ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

/// What the files hold.
pub(super) struct Pem {
    /// Certificate authorities.
    pub(super) ca: Option<String>,
    /// The client's certificate chain and its private key.
    pub(super) identity: Option<(String, String)>,
}

impl Tls {
    /// Reads the table `tls`; absent: the system's authorities, no client certificate.
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let Some(mut table) = section.table("tls") else { return Self::default() };
        let ca = table.get("ca");
        let identity = match (table.get("cert"), table.get("key")) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => {
                table.problem("cert", "a client certificate needs its private key, `key`");
                None
            }
            (None, Some(_)) => {
                table.problem("key", "a private key needs its client certificate, `cert`");
                None
            }
        };
        table.finish();
        Self { ca, identity }
    }

    /// Whether anything is set.
    pub(super) fn is_set(&self) -> bool {
        self.ca.is_some() || self.identity.is_some()
    }

    /// The files that are read.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert, key]);
        self.ca.iter().chain(identity).map(PathBuf::as_path)
    }

    /// Reads the files.
    pub(super) fn load(&self) -> Result<Pem, BuildError> {
        let ca = self.ca.as_deref().map(|path| read(path, "CERTIFICATE", "certificate")).transpose()?;
        let identity = match &self.identity {
            Some((cert, key)) => {
                Some((read(cert, "CERTIFICATE", "certificate")?, read(key, "PRIVATE KEY", "private key")?))
            }
            None => None,
        };
        Ok(Pem { ca, identity })
    }
}

fn read(path: &Path, label: &str, expected: &'static str) -> Result<String, BuildError> {
    let pem = std::fs::read_to_string(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })?;
    let found = pem.lines().any(|line| line.starts_with("-----BEGIN ") && line.contains(label));
    if found { Ok(pem) } else { Err(BuildError::Pem { path: path.to_owned(), expected }) }
}

/// Makes ring the process's cryptography, unless the program has chosen one already.
pub(crate) fn install_crypto_provider() {
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::trace!("the process has a cryptography provider already");
    }
}
