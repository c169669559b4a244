//! TLS of the registry: its certificate, read again when the file changes.
//!
//! Invariant: a certificate that does not load leaves the one that was.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};

use super::options::Tls;
use crate::Error;

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

pub(super) fn config(tls: &Tls) -> Result<ServerConfig, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let invalid = |error: rustls::Error| Error::Invalid(format!("TLS: {error}"));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(invalid)?;
    let builder = match &tls.client_authority {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(invalid)?;
            }
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
            let verifier =
                verifier.map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(Reloading::open(tls)?));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let invalid =
        |error: rustls::pki_types::pem::Error| Error::Invalid(format!("{}: {error}", path.display()));
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(invalid)?.collect::<Result<_, _>>().map_err(invalid)?;
    if found.is_empty() {
        return Err(Error::Invalid(format!("{}: holds no certificate in PEM", path.display())));
    }
    Ok(found)
}

#[derive(Debug)]
struct Reloading {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    version: Option<(SystemTime, SystemTime)>,
    looked: Instant,
}

impl Reloading {
    fn open(tls: &Tls) -> Result<Self, Error> {
        let version = version(&tls.certificate, &tls.key).ok();
        let key = load(&tls.certificate, &tls.key)?;
        let current = Current { key: Arc::new(key), version, looked: Instant::now() };
        Ok(Self { certificate: tls.certificate.clone(), key: tls.key.clone(), current: Mutex::new(current) })
    }
}

impl ResolvesServerCert for Reloading {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() > LOOK_EVERY {
            current.looked = Instant::now();
            let version = version(&self.certificate, &self.key).ok();
            if version != current.version {
                match load(&self.certificate, &self.key) {
                    Ok(key) => {
                        current.key = Arc::new(key);
                        current.version = version;
                    }
                    Err(error) => tracing::error!(error = %error.report(), "the certificate stays as it was"),
                }
            }
        }
        Some(Arc::clone(&current.key))
    }
}

fn version(certificate: &Path, key: &Path) -> io::Result<(SystemTime, SystemTime)> {
    Ok((fs::metadata(certificate)?.modified()?, fs::metadata(key)?.modified()?))
}

fn load(certificate: &Path, key: &Path) -> Result<CertifiedKey, Error> {
    let chain = certificates(certificate)?;
    let invalid = |error: &dyn std::fmt::Display| Error::Invalid(format!("{}: {error}", key.display()));
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| invalid(&error))?;
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, private, &provider).map_err(|error| invalid(&error))
}
