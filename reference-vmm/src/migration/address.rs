//! Where a migration goes to or comes from: QEMU's URIs.

use std::{fmt, path::PathBuf, str::FromStr};

/// The address of a migration peer, in the notation of QEMU's `-incoming` and `migrate`.
///
/// ```
/// use reference_vmm::migration::Address;
///
/// let address: Address = "tcp:127.0.0.1:4444".parse()?;
/// assert_eq!(address, Address::Tcp { host: "127.0.0.1".into(), port: 4444 });
/// assert_eq!("unix:/run/vm.sock".parse::<Address>()?.to_string(), "unix:/run/vm.sock");
/// assert_eq!("tcp:[::1]:4444".parse::<Address>()?.to_string(), "tcp:[::1]:4444");
/// # Ok::<(), reference_vmm::migration::BadAddress>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// `tcp:HOST:PORT`. An empty host listens on every interface; an IPv6 address stands in brackets.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 listens on a free one.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// A text that is no address of a migration peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddress {
    /// No transport of QEMU starts like this.
    #[error("unknown migration protocol: {0}")]
    Unknown(String),
    /// A transport of QEMU's that this monitor does not have.
    #[error("migration protocol '{transport}' is not supported here; use tcp: or unix:")]
    Unsupported {
        /// The word before the first colon.
        transport: &'static str,
    },
    /// `tcp:` without a usable host and port.
    #[error("'{0}' is not tcp:HOST:PORT")]
    HostPort(String),
    /// `unix:` without a path.
    #[error("'unix:' needs the path of a socket")]
    EmptyPath,
}

/// Transports that QEMU 11.1 knows and that are recognised, so that the error is not "unknown".
const OTHER_TRANSPORTS: [&str; 5] = ["exec", "fd", "file", "rdma", "vsock"];

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let (transport, rest) = text.split_once(':').ok_or_else(|| BadAddress::Unknown(text.into()))?;
        match transport {
            "tcp" => {
                let bad = || BadAddress::HostPort(text.into());
                let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner.strip_suffix(']').ok_or_else(bad)?,
                    None if host.contains(':') => return Err(bad()),
                    None => host,
                };
                Ok(Address::Tcp { host: host.into(), port: port.parse().map_err(|_| bad())? })
            }
            "unix" if rest.is_empty() => Err(BadAddress::EmptyPath),
            "unix" => Ok(Address::Unix(rest.into())),
            other => match OTHER_TRANSPORTS.into_iter().find(|known| *known == other) {
                Some(transport) => Err(BadAddress::Unsupported { transport }),
                None => Err(BadAddress::Unknown(text.into())),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_says_why() {
        let parse = |text: &str| text.parse::<Address>().unwrap_err();
        for bad in ["tcp:4444", "tcp:host:", "tcp:host:65536", "tcp:::1:44", "tcp:[::1:44"] {
            assert!(matches!(parse(bad), BadAddress::HostPort(_)), "{bad}");
        }
        assert_eq!(parse("unix:"), BadAddress::EmptyPath);
        assert_eq!(parse("file:/tmp/x"), BadAddress::Unsupported { transport: "file" });
        assert!(matches!(parse("defer"), BadAddress::Unknown(_)));
        assert!(matches!(parse("udp:a:1"), BadAddress::Unknown(_)));
    }

    #[test]
    fn an_empty_host_means_every_interface() {
        assert_eq!("tcp::0".parse(), Ok(Address::Tcp { host: String::new(), port: 0 }));
    }
}
