//! Certificates and keys in a directory, under the names that QEMU's `tls-creds-x509` gives them.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most bytes of a file with certificates or a key.
const MAX_FILE: u64 = 4 << 20;
/// Certificates of the authorities, in QEMU's words.
const AUTHORITIES: &str = "ca-cert.pem";
/// Certificates that an authority has taken back; there need not be any.
const REVOKED: &str = "ca-crl.pem";

/// A side of a TLS session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// The source of a migration, which connects.
    Client,
    /// The destination, which listens.
    Server,
}

impl Endpoint {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Endpoint::Client => "client",
            Endpoint::Server => "server",
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Versions of TLS that are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// TLS 1.2.
    pub tls12: bool,
    /// TLS 1.3.
    pub tls13: bool,
}

impl Default for Versions {
    /// Both.
    fn default() -> Self {
        Versions { tls12: true, tls13: true }
    }
}

impl Versions {
    fn list(self) -> Vec<&'static SupportedProtocolVersion> {
        [(self.tls12, &TLS12), (self.tls13, &TLS13)]
            .into_iter()
            .filter_map(|(on, version)| on.then_some(version))
            .collect()
    }
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("Unable to access credentials {}: {}", path.display(), crate::reason::reason(source))]
    Access {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is no PEM, or has nothing of what is looked for in it.
    #[error("credentials {}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificates and key do not go together, or are of a kind that is not known.
    #[error("credentials in {}: {reason}", directory.display())]
    Use {
        /// Where the files are.
        directory: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
}

/// What a side of a TLS session shows of itself, and whom it believes (`tls-creds-x509`).
#[derive(Clone)]
pub struct Credentials(Side);

#[derive(Clone)]
pub(super) enum Side {
    Client(Arc<ClientConfig>),
    Server(Arc<ServerConfig>),
}

impl fmt::Debug for Credentials {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.endpoint()).finish()
    }
}

impl Credentials {
    /// Reads `ca-cert.pem`, `ca-crl.pem` if there is one, and `server-cert.pem` with `server-key.pem`, or
    /// `client-cert.pem` with `client-key.pem`, which a client need not have. With `verify_peer` a server asks for a
    /// certificate that an authority of `ca-cert.pem` has signed, and a client for one that names the server as well;
    /// without it any process can be the peer.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn x509(
        directory: &Path,
        endpoint: Endpoint,
        verify_peer: bool,
        versions: Versions,
    ) -> Result<Self, CredentialsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let unusable = |reason: &dyn fmt::Display| CredentialsError::Use {
            directory: directory.to_owned(),
            reason: reason.to_string(),
        };
        let authorities = Arc::new(authorities(&directory.join(AUTHORITIES))?);
        let revoked = revoked(&directory.join(REVOKED))?;
        let own = own(directory, endpoint)?;
        let side = match endpoint {
            Endpoint::Server => {
                let clients: Arc<dyn ClientCertVerifier> = if verify_peer {
                    let builder = WebPkiClientVerifier::builder_with_provider(authorities, provider.clone());
                    let builder = builder.with_crls(revoked).allow_unknown_revocation_status();
                    builder.build().map_err(|error| unusable(&error))?
                } else {
                    WebPkiClientVerifier::no_client_auth()
                };
                let (chain, key) = own.ok_or_else(|| CredentialsError::Access {
                    path: directory.join("server-cert.pem"),
                    source: io::ErrorKind::NotFound.into(),
                })?;
                let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&versions.list());
                let builder = builder.map_err(|error| unusable(&error))?.with_client_cert_verifier(clients);
                let mut config = builder.with_single_cert(chain, key).map_err(|error| unusable(&error))?;
                // No session is taken up again.
                config.send_tls13_tickets = 0;
                Side::Server(Arc::new(config))
            }
            Endpoint::Client => {
                let builder =
                    ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&versions.list());
                let builder = builder.map_err(|error| unusable(&error))?;
                let builder = if verify_peer {
                    let servers = WebPkiServerVerifier::builder_with_provider(authorities, provider);
                    let servers = servers.with_crls(revoked).allow_unknown_revocation_status().build();
                    builder.with_webpki_verifier(servers.map_err(|error| unusable(&error))?)
                } else {
                    builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
                };
                let config = match own {
                    Some((chain, key)) => {
                        builder.with_client_auth_cert(chain, key).map_err(|error| unusable(&error))?
                    }
                    None => builder.with_no_client_auth(),
                };
                Side::Client(Arc::new(config))
            }
        };
        Ok(Credentials(side))
    }

    /// For which side they are.
    pub fn endpoint(&self) -> Endpoint {
        match self.0 {
            Side::Client(_) => Endpoint::Client,
            Side::Server(_) => Endpoint::Server,
        }
    }

    pub(super) fn side(&self) -> &Side {
        &self.0
    }
}

/// The bytes of a file; `None` if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, CredentialsError> {
    let failed = |source| CredentialsError::Access { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(content(path, &format!("it is longer than {MAX_FILE} bytes")));
    }
    Ok(Some(bytes))
}

fn read_needed(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let missing =
        || CredentialsError::Access { path: path.to_owned(), source: io::Error::from_raw_os_error(libc::ENOENT) };
    read(path)?.ok_or_else(missing)
}

fn content(path: &Path, reason: &dyn fmt::Display) -> CredentialsError {
    CredentialsError::Content { path: path.to_owned(), reason: reason.to_string() }
}

fn items<T: PemObject>(path: &Path, bytes: &[u8], what: &str) -> Result<Vec<T>, CredentialsError> {
    let items = T::pem_slice_iter(bytes).collect::<Result<Vec<_>, pem::Error>>();
    let items = items.map_err(|error| content(path, &error))?;
    if items.is_empty() {
        return Err(content(path, &format!("it has no {what} in PEM form")));
    }
    Ok(items)
}

fn authorities(path: &Path) -> Result<RootCertStore, CredentialsError> {
    let mut store = RootCertStore::empty();
    for certificate in items::<CertificateDer<'static>>(path, &read_needed(path)?, "certificate")? {
        store.add(certificate).map_err(|error| content(path, &error))?;
    }
    Ok(store)
}

fn revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
    read(path)?.map_or(Ok(Vec::new()), |bytes| items(path, &bytes, "revocation list"))
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The certificates of this side, its own first, and its key.
fn own(directory: &Path, endpoint: Endpoint) -> Result<Option<Own>, CredentialsError> {
    let [certificate, key] = ["cert", "key"].map(|what| directory.join(format!("{endpoint}-{what}.pem")));
    let Some(chain) = read(&certificate)? else {
        return match endpoint {
            Endpoint::Client => Ok(None),
            Endpoint::Server => read_needed(&certificate).map(|_| None),
        };
    };
    let chain = items(&certificate, &chain, "certificate")?;
    let bytes = read_needed(&key)?;
    if bytes.windows(9).any(|window| window == b"ENCRYPTED") {
        return Err(content(&key, &"it is encrypted, and 'passwordid' is not supported here: decrypt it"));
    }
    let own = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| content(&key, &error))?;
    Ok(Some((chain, own)))
}

/// Takes any server for the right one, as the operator has said (`verify-peer=off`).
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
