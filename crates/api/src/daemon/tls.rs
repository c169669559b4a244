//! Mutual TLS for TCP sockets: who connects shows a certificate of the daemon's own authority, or gets nothing.
//!
//! Invariant: there is no TCP without it. A socket that everybody may use is root for everybody.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

/// The files of `--tlscacert`, `--tlscert` and `--tlskey`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read {}", .path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("there is no certificate in {}", .0.display())]
    Empty(PathBuf),
    #[error("the authority's certificate in {} is not usable", .path.display())]
    Authority { path: PathBuf, source: rustls::Error },
    #[error("verify clients' certificates")]
    Verifier(#[from] VerifierBuilderError),
    #[error("use the certificate in {}", .path.display())]
    Certificate { path: PathBuf, source: rustls::Error },
    #[error("choose TLS versions")]
    Versions(#[source] rustls::Error),
}

/// The daemon's side of every connection.
pub fn server_config(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.authority)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Authority { path: files.authority.clone(), source })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|source| TlsError::Pem { path: files.key.clone(), source })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Versions)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&files.certificate)?, key)
        .map_err(|source| TlsError::Certificate { path: files.certificate.clone(), source })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::Pem { path: path.to_owned(), source };
    let all: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}
