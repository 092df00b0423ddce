//! TLS around the connections of a migration: what QEMU's `tls-creds`, `tls-hostname` and `tls-authz` say.
//!
//! ```text
//!  source (client)                                   destination (server)
//!  Credentials + host name ─▶ Tls                    Credentials + authorization ─▶ Tls
//!  Socket ─▶ handshake ─▶ TlsChannel                 UnidentifiedConns: Socket ─▶ Accepting ─▶ TlsChannel
//! ```
//!
//! Every connection has a session of its own: the main channel, each page channel, and the preempt channel. Inside a
//! session the bytes are those of the plain format. A session ends with `close_notify`. Many releases close page
//! channels without it (`multifd-clean-tls-termination`), and nothing is lost by that: each channel's own format says
//! where it ends, so that an end before that is an error, sealed or not.

mod accepting;
mod channel;
mod credentials;
mod stream;

pub(crate) use accepting::{Accepting, Received};
#[cfg(test)]
mod tests;

pub use channel::TlsChannel;
pub use credentials::{Credentials, CredentialsError, Endpoint, Versions};
pub use stream::TlsSocket;

use rustls::pki_types::ServerName;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How often who waits for a peer in its handshake looks how long that may take.
pub(crate) const LOOK: Duration = Duration::from_millis(250);

type Authorization = dyn Fn(&str) -> bool + Send + Sync;

/// How the connections of a migration are secured.
///
/// ```no_run
/// use qevm_migration::{Credentials, Endpoint, Job, Tls, Versions};
/// use std::sync::Arc;
///
/// let client = Credentials::x509("/etc/pki/qemu".as_ref(), Endpoint::Client, true, Versions::default())?;
/// let job = Job::default();
/// job.set_tls(Some(Tls::new(Arc::new(client)).with_hostname("there.example.org")?));
/// # Ok::<(), qevm_migration::TlsError>(())
/// ```
#[derive(Clone)]
pub struct Tls {
    credentials: Arc<Credentials>,
    hostname: Option<ServerName<'static>>,
    authorization: Option<Arc<Authorization>>,
}

/// Why a connection has no TLS session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The credentials cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Credentials for the other side.
    #[error("Expected TLS credentials for a {expected} endpoint")]
    Endpoint {
        /// The side that the credentials are needed for.
        expected: Endpoint,
    },
    /// A name that no certificate is valid for.
    #[error("'{0}' is neither a DNS name nor an IP address, so no certificate is valid for it: set 'tls-hostname'")]
    Hostname(String),
    /// It is not known whom the destination's certificate has to name.
    #[error("the destination's address has no host name to check its certificate against: set 'tls-hostname'")]
    NoHostname,
    /// The sessions's own error: the peer's certificate, its alert, or bytes that are no TLS.
    #[error("TLS handshake failed: {0}")]
    Handshake(rustls::Error),
    /// The peer's certificate is valid, and the operator does not want the peer.
    #[error("TLS x509 authz check for {0} is denied")]
    Denied(String),
    /// The peer's certificate has no name that can be read.
    #[error("the peer's certificate has no distinguished name that can be read: {0}")]
    Name(String),
}

impl Tls {
    /// Sessions with these credentials.
    pub fn new(credentials: Arc<Credentials>) -> Self {
        Tls { credentials, hostname: None, authorization: None }
    }

    /// The name or address that the destination's certificate has to have (`tls-hostname`), whatever the destination's
    /// address is.
    ///
    /// # Errors
    /// [`TlsError::Hostname`].
    pub fn with_hostname(self, name: &str) -> Result<Self, TlsError> {
        Ok(Tls { hostname: Some(server_name(name)?), ..self })
    }

    /// Only sources with a certificate whose distinguished name is allowed may send a guest (`tls-authz`). As with
    /// QEMU, the name has its parts in the order of the certificate: `C=DE,O=example,CN=source`, usually.
    #[must_use]
    pub fn with_authorization(self, allows: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Tls { authorization: Some(Arc::new(allows)), ..self }
    }

    /// For which side the credentials are.
    pub fn endpoint(&self) -> Endpoint {
        self.credentials.endpoint()
    }

    /// Whether the owner of this certificate (DER) may send a guest.
    fn authorize(&self, certificate: Option<&[u8]>) -> Result<(), TlsError> {
        let Some(allows) = &self.authorization else { return Ok(()) };
        let name = match certificate {
            Some(certificate) => distinguished_name(certificate)?,
            None => return Err(TlsError::Denied("a source without a certificate".into())),
        };
        if allows(&name) { Ok(()) } else { Err(TlsError::Denied(name)) }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("endpoint", &self.endpoint())
            .field("hostname", &self.hostname)
            .finish_non_exhaustive()
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Hostname(name.to_owned()))
}

/// The name as GnuTLS writes it for `tls-authz`: in the order of the certificate, which is not that of RFC 4514.
fn distinguished_name(certificate: &[u8]) -> Result<String, TlsError> {
    use x509_cert::der::Decode;
    let certificate =
        x509_cert::Certificate::from_der(certificate).map_err(|error| TlsError::Name(error.to_string()))?;
    let parts: Vec<_> = certificate.tbs_certificate.subject.0.iter().map(ToString::to_string).collect();
    Ok(parts.join(","))
}
