//! What TLS accepts: version 1.2 or newer, and certificates below the system's roots or one given file.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
    version::{TLS12, TLS13},
};

use super::{Error, Options};

/// Sessions kept for resumption: three servers, some tickets each.
const RESUMED_SESSIONS: usize = 8;

/// The configuration of every HTTPS client here.
pub(super) fn config(options: &Options) -> Result<ClientConfig, Error> {
    let roots = match &options.ca_file {
        Some(file) => Arc::new(from_file(file)?),
        None => system()?,
    };
    let mut config = trusting(roots)?;
    config.resumption = Resumption::in_memory_sessions(RESUMED_SESSIONS);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Trusts nobody: for a client that speaks no TLS.
pub(super) fn nobody() -> Result<ClientConfig, Error> {
    trusting(Arc::new(RootCertStore::empty()))
}

fn trusting(roots: Arc<RootCertStore>) -> Result<ClientConfig, Error> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|source| Error::TlsSetup { source })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

fn from_file(file: &Path) -> Result<RootCertStore, Error> {
    let unreadable = |source| Error::CaFile {
        file: file.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).map_err(unreadable)? {
        roots
            .add(certificate.map_err(unreadable)?)
            .map_err(|source| Error::CaCertificate {
                file: file.to_owned(),
                source,
            })?;
    }
    if roots.is_empty() {
        Err(Error::CaEmpty { file: file.to_owned() })
    } else {
        Ok(roots)
    }
}

/// The system's roots, read once in the life of the process.
fn system() -> Result<Arc<RootCertStore>, Error> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    if let Some(roots) = ROOTS.get() {
        return Ok(Arc::clone(roots));
    }
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // A store may hold roots that no longer parse; the others count.
    let (_, ignored) = roots.add_parsable_certificates(loaded.certs);
    if ignored > 0 {
        tracing::debug!(ignored, "system root certificates that do not parse");
    }
    if roots.is_empty() {
        return Err(Error::NoRoots {
            source: loaded.errors.into_iter().next(),
        });
    }
    Ok(Arc::clone(ROOTS.get_or_init(|| Arc::new(roots))))
}
