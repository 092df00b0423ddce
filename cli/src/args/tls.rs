//! TLS of `qevm send` and `qevm receive`.

use crate::failure::Stop;
use clap::Args;
use qevm_migration::{Credentials, Endpoint, Tls, TlsError, Versions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a source says of TLS.
#[derive(Debug, Args)]
pub struct ClientTls {
    /// Send over TLS, with the certificates in DIR as QEMU's `tls-creds-x509` names them: `ca-cert.pem`, and where the
    /// destination asks for one, `client-cert.pem` with `client-key.pem`.
    #[arg(long, value_name = "DIR")]
    pub tls_creds: Option<PathBuf>,
    /// The name or address that the destination's certificate must have, as QEMU's `tls-hostname`; without it, the host
    /// of ADDRESS. A UNIX socket has none.
    #[arg(long, value_name = "NAME", requires = "tls_creds")]
    pub tls_hostname: Option<String>,
}

/// What a destination says of TLS.
#[derive(Debug, Args)]
pub struct ServerTls {
    /// Receive over TLS, with the certificates in DIR as QEMU's `tls-creds-x509` names them: `ca-cert.pem`,
    /// `server-cert.pem` and `server-key.pem`. The source has to have a certificate of that authority.
    #[arg(long, value_name = "DIR")]
    pub tls_creds: Option<PathBuf>,
    /// Receive only from a source whose certificate has this distinguished name, such as `C=DE,O=example,CN=source`, in
    /// the order of the certificate (QEMU's `tls-authz` with `authz-simple`). May be given several times.
    #[arg(long, value_name = "IDENTITY", requires = "tls_creds")]
    pub tls_authz: Vec<String>,
}

impl ClientTls {
    /// The sessions that were asked for.
    ///
    /// # Errors
    /// [`Stop::Usage`]: the certificates cannot be used, or the name is none.
    pub fn sessions(&self) -> Result<Option<Tls>, Stop> {
        let Some(directory) = &self.tls_creds else { return Ok(None) };
        let tls = sessions(directory, Endpoint::Client)?;
        match &self.tls_hostname {
            Some(name) => tls.with_hostname(name).map(Some).map_err(|error| usage(&error)),
            None => Ok(Some(tls)),
        }
    }
}

impl ServerTls {
    /// The sessions that were asked for.
    ///
    /// # Errors
    /// [`Stop::Usage`]: the certificates cannot be used.
    pub fn sessions(&self) -> Result<Option<Tls>, Stop> {
        let Some(directory) = &self.tls_creds else { return Ok(None) };
        let tls = sessions(directory, Endpoint::Server)?;
        if self.tls_authz.is_empty() {
            return Ok(Some(tls));
        }
        let allowed = self.tls_authz.clone();
        Ok(Some(tls.with_authorization(move |name| allowed.iter().any(|identity| identity == name))))
    }
}

fn sessions(directory: &Path, endpoint: Endpoint) -> Result<Tls, Stop> {
    let credentials = Credentials::x509(directory, endpoint, true, Versions::default());
    Ok(Tls::new(Arc::new(credentials.map_err(|error| usage(&error.into()))?)))
}

fn usage(error: &TlsError) -> Stop {
    Stop::Usage(format!("--tls-creds: {error}"))
}
