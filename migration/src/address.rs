//! Where a migration goes to or comes from: QEMU's URIs.

mod tcp;

pub use tcp::{KeepAlive, TcpOptions};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode, utf8_percent_encode};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

/// The address of a migration peer, in the notation of QEMU's `-incoming` and `migrate`.
///
/// ```
/// use qevm_migration::Address;
///
/// let address: Address = "tcp:127.0.0.1:4444".parse()?;
/// assert_eq!(address, Address::tcp("127.0.0.1", 4444));
/// assert_eq!("unix:/run/vm.sock".parse::<Address>()?.to_string(), "unix:/run/vm.sock");
/// assert_eq!("tcp:[::1]:4444".parse::<Address>()?.to_string(), "tcp:[::1]:4444");
/// # Ok::<(), qevm_migration::BadAddress>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// `tcp:HOST:PORT[,OPTION…]`. An empty host listens on every interface; an IPv6 address stands in brackets.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 listens on a free one.
        port: u16,
        /// What follows them.
        options: TcpOptions,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// A UNIX socket without a file, which every process of the network namespace can connect to: `abstract` and
    /// `tight` of QEMU's `UnixSocketAddress`. No URI has it; it is shown as `unix:@NAME`.
    Abstract {
        /// Its name.
        name: String,
        /// It is as long as its name, and not as long as a name can be.
        tight: bool,
    },
    /// `exec:COMMAND`: the stream goes to the standard input of a command, or comes from its standard output.
    ///
    /// Program and arguments; a `COMMAND` of a URI is for `/bin/sh -c`.
    Exec(Vec<String>),
    /// `fd:NAME`: a descriptor that QMP's `getfd` was given, or the number of an inherited one.
    Fd(String),
    /// `file:PATH[,offset=N]`: a file, from byte N on (QEMU 8.2).
    File {
        /// The file.
        path: PathBuf,
        /// Where the stream begins in it, in bytes.
        offset: u64,
    },
    /// `nbd://HOST[:PORT]/[EXPORT]` or `nbd+unix:///[EXPORT]?socket=PATH`: a file that a page server gives, such as
    /// `qevm serve` or `qemu-nbd`. Guests only come from there. No transport of QEMU's.
    Nbd {
        /// Where it listens: [`Tcp`](Address::Tcp) or [`Unix`](Address::Unix).
        server: Box<Address>,
        /// Which of its files; the empty name is its default.
        export: String,
    },
}

/// A text that is no address of a migration peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddress {
    /// No transport of QEMU starts like this.
    #[error("unknown migration protocol: {0}")]
    Unknown(String),
    /// A transport of QEMU's that this monitor does not have.
    #[error("migration protocol '{transport}' is not supported here; use tcp:, unix:, exec:, fd:, file: or nbd:")]
    Unsupported {
        /// The word before the first colon.
        transport: &'static str,
    },
    /// `tcp:` without a usable host and port.
    #[error("'{0}' is not tcp:HOST:PORT")]
    HostPort(String),
    /// An option of `tcp:` has no such value. QEMU's words.
    #[error("Parameter '{name}' expects {expected}")]
    Option {
        /// The option.
        name: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// `tcp:` has no such option. QEMU's words.
    #[error("Invalid parameter '{0}'")]
    UnknownOption(String),
    /// `unix:` without a path.
    #[error("'unix:' needs the path of a socket")]
    EmptyPath,
    /// `exec:` without a command.
    #[error("'exec:' needs a command")]
    EmptyCommand,
    /// `fd:` without a name.
    #[error("invalid file descriptor address")]
    EmptyDescriptor,
    /// `file:` without a path.
    #[error("'file:' needs the path of a file")]
    EmptyFile,
    /// `nbd:` or `nbd+unix:` without what belongs there.
    #[error("'{0}' is not nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH")]
    Nbd(String),
    /// `,offset=` of `file:` is no size.
    #[error("file URI has bad offset {0}: Invalid argument")]
    Offset(String),
}

/// Transports that QEMU 11.1 knows and that are recognised, so that the error is not "unknown".
const OTHER_TRANSPORTS: [&str; 2] = ["rdma", "vsock"];

/// What runs the command of an `exec:` URI (QEMU 7.2 to 11.1).
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// What separates path and offset in a `file:` URI (QEMU 8.2).
const OFFSET: &str = ",offset=";

impl Address {
    /// Whether it is a socket, which one side connects to.
    pub fn is_socket(&self) -> bool {
        matches!(self, Address::Tcp { .. } | Address::Unix(_) | Address::Abstract { .. })
    }

    /// `tcp:` without options.
    pub fn tcp(host: &str, port: u16) -> Self {
        Address::Tcp { host: host.into(), port, options: TcpOptions::default() }
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let (transport, rest) = text.split_once(':').ok_or_else(|| BadAddress::Unknown(text.into()))?;
        match transport {
            "tcp" => {
                let bad = || BadAddress::HostPort(text.into());
                // As in a QEMU, a comma may follow the last option.
                let mut words = rest.strip_suffix(',').unwrap_or(rest).split(',');
                let (host, port) = words.next().and_then(|place| place.rsplit_once(':')).ok_or_else(bad)?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner.strip_suffix(']').ok_or_else(bad)?,
                    None if host.contains(':') => return Err(bad()),
                    None => host,
                };
                let port = port.parse().map_err(|_| bad())?;
                let mut options = TcpOptions::default();
                words.try_for_each(|option| options.set(option))?;
                Ok(Address::Tcp { host: host.into(), port, options })
            }
            "unix" if rest.is_empty() => Err(BadAddress::EmptyPath),
            "unix" => Ok(Address::Unix(rest.into())),
            "exec" if rest.is_empty() => Err(BadAddress::EmptyCommand),
            "exec" => Ok(Address::Exec(SHELL.into_iter().chain([rest]).map(String::from).collect())),
            "fd" if rest.is_empty() => Err(BadAddress::EmptyDescriptor),
            "fd" => Ok(Address::Fd(rest.into())),
            "file" => {
                let (path, offset) = match rest.rsplit_once(OFFSET) {
                    Some((path, offset)) => (path, size(offset).ok_or_else(|| BadAddress::Offset(offset.into()))?),
                    None => (rest, 0),
                };
                if path.is_empty() {
                    return Err(BadAddress::EmptyFile);
                }
                Ok(Address::File { path: path.into(), offset })
            }
            "nbd" | "nbd+unix" => nbd(transport, rest).ok_or_else(|| BadAddress::Nbd(text.into())),
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
            Address::Tcp { host, port, options } if host.contains(':') => write!(f, "tcp:[{host}]:{port}{options}"),
            Address::Tcp { host, port, options } => write!(f, "tcp:{host}:{port}{options}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Abstract { name, .. } => write!(f, "unix:@{name}"),
            Address::Exec(words) => match words.as_slice() {
                [shell, option, command] if [shell, option] == SHELL => write!(f, "exec:{command}"),
                words => write!(f, "exec:{}", words.join(" ")),
            },
            Address::Fd(name) => write!(f, "fd:{name}"),
            Address::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Address::File { path, offset } => write!(f, "file:{}{OFFSET}{offset:#x}", path.display()),
            Address::Nbd { server, export } => {
                let export = utf8_percent_encode(export, URI);
                match &**server {
                    Address::Unix(path) => {
                        let path = percent_encode(path.as_os_str().as_bytes(), URI);
                        write!(f, "nbd+unix:///{export}?socket={path}")
                    }
                    Address::Tcp { host, port, .. } if host.contains(':') => {
                        write!(f, "nbd://[{host}]:{port}/{export}")
                    }
                    Address::Tcp { host, port, .. } => write!(f, "nbd://{host}:{port}/{export}"),
                    other => other.fmt(f),
                }
            }
        }
    }
}

/// What stands in a URI as it is.
const URI: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What follows `nbd:` or `nbd+unix:` in a URI.
fn nbd(transport: &str, rest: &str) -> Option<Address> {
    let (authority, place) = rest.strip_prefix("//").map(|rest| rest.split_once('/').unwrap_or((rest, "")))?;
    let (export, query) = place.split_once('?').unwrap_or((place, ""));
    let export = percent_decode_str(export).decode_utf8().ok()?.into_owned();
    if transport == "nbd+unix" {
        let path: Vec<u8> = percent_decode_str(query.strip_prefix("socket=")?).collect();
        let server = Box::new(Address::Unix(OsString::from_vec(path).into()));
        return (authority.is_empty() && query.len() > "socket=".len()).then_some(Address::Nbd { server, export });
    }
    let (host, port) = match authority.rsplit_once(':') {
        // The colons of an address in brackets are not those before a port.
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (authority, qevm_nbd::number::PORT),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let server = Box::new(Address::tcp(host, port));
    (!host.is_empty() && query.is_empty()).then_some(Address::Nbd { server, export })
}

/// A size as QEMU reads one: decimal or, with `0x`, hexadecimal bytes, or a decimal number with a suffix from `B` and
/// `K` to `E`.
fn size(text: &str) -> Option<u64> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
    }
    let last = text.chars().next_back()?.to_ascii_uppercase();
    let (digits, shift) = match "BKMGTPE".chars().position(|suffix| suffix == last) {
        Some(place) => (&text[..text.len() - 1], 10 * place as u32),
        None => (text, 0),
    };
    let number: u64 = digits.parse().ok().filter(|_| !digits.starts_with('+'))?;
    number.checked_mul(1 << shift)
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
        assert_eq!(parse("vsock:3:44"), BadAddress::Unsupported { transport: "vsock" });
        assert_eq!(parse("exec:"), BadAddress::EmptyCommand);
        assert_eq!(parse("fd:"), BadAddress::EmptyDescriptor);
        assert_eq!(parse("file:"), BadAddress::EmptyFile);
        for bad in ["", "zz", "-1", "+1", "0x", "1Q", "\u{e9}", "18446744073709551616", "17E"] {
            assert_eq!(parse(&format!("file:a,offset={bad}")), BadAddress::Offset(bad.into()));
        }
        assert!(matches!(parse("defer"), BadAddress::Unknown(_)));
        assert!(matches!(parse("udp:a:1"), BadAddress::Unknown(_)));
    }

    #[test]
    fn a_file_may_begin_behind_something_else() {
        for (text, expected) in [("", 0), (",offset=4096", 4096), (",offset=0x1000", 4096), (",offset=3M", 3 << 20)] {
            let address: Address = format!("file:/a,b{text}").parse().unwrap();
            assert_eq!(address, Address::File { path: "/a,b".into(), offset: expected });
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }

    #[test]
    fn a_command_is_for_the_shell() {
        let address: Address = "exec:gzip > a:b".parse().unwrap();
        assert_eq!(address, Address::Exec(["/bin/sh", "-c", "gzip > a:b"].map(String::from).into()));
        assert_eq!(address.to_string(), "exec:gzip > a:b");
        assert_eq!(Address::Exec(vec!["cat".into(), "-u".into()]).to_string(), "exec:cat -u");
    }

    #[test]
    fn an_empty_host_means_every_interface() {
        assert_eq!("tcp::0".parse(), Ok(Address::tcp("", 0)));
    }

    #[test]
    fn page_servers_are_named_by_their_uri() {
        let unix = |path: &str| Box::new(Address::Unix(path.into()));
        let tcp = |host: &str, port| Box::new(Address::tcp(host, port));
        for (text, server, export, shown) in [
            ("nbd+unix:///?socket=/run/a.sock", unix("/run/a.sock"), "", "nbd+unix:///?socket=/run/a.sock"),
            ("nbd+unix:///x%20y?socket=/run/a%26b", unix("/run/a&b"), "x y", "nbd+unix:///x%20y?socket=/run/a%26b"),
            ("nbd+unix:///?socket=rel", unix("rel"), "", "nbd+unix:///?socket=rel"),
            ("nbd://host", tcp("host", 10809), "", "nbd://host:10809/"),
            ("nbd://host:7/name", tcp("host", 7), "name", "nbd://host:7/name"),
            ("nbd://[::1]", tcp("::1", 10809), "", "nbd://[::1]:10809/"),
            ("nbd://[::1]:80/", tcp("::1", 80), "", "nbd://[::1]:80/"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address, Address::Nbd { server, export: export.into() }, "{text}");
            assert_eq!(address.to_string(), shown);
            assert_eq!(shown.parse(), Ok(address));
        }
        for bad in [
            "nbd:host:10809",
            "nbd://",
            "nbd:///x",
            "nbd://host:x/",
            "nbd://host/?socket=/x",
            "nbd+unix:///",
            "nbd+unix:///?socket=",
            "nbd+unix://host/?socket=/x",
            "nbd+unix:/run/x",
            "nbd+unix:///%ff?socket=/x",
        ] {
            assert_eq!(bad.parse::<Address>(), Err(BadAddress::Nbd(bad.into())));
        }
    }
}
