//! Where a migration goes to or comes from: QEMU's URIs.

mod tcp;

pub use tcp::{KeepAlive, TcpOptions};

use crate::grammar::{Misfit, Parsed, whole};
use crate::size::{BadSize, parse_size};
use nom::branch::alt;
use nom::bytes::complete::{tag, take_till};
use nom::character::complete::{self as number, char};
use nom::combinator::{cut, eof, map_opt, opt, peek, rest, verify};
use nom::error::context;
use nom::sequence::{preceded, terminated};
use nom::{Finish, Parser};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode, utf8_percent_encode};
use qevm_wire::{Blame, Fault, Located};
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
/// // The byte at fault, and what should be there.
/// let error = "tcp:localhost:http".parse::<Address>().unwrap_err();
/// let what = "malformed at byte 14: 'tcp:localhost:http' is not tcp:HOST:PORT: expected a port, 0 to 65535";
/// assert_eq!(error.to_string(), what);
/// # Ok::<(), qevm_wire::Located<qevm_migration::BadAddress>>(())
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
    #[error("'{text}' is not tcp:HOST:PORT: expected {expected}")]
    HostPort {
        /// The text.
        text: String,
        /// What should be at the place at fault.
        expected: &'static str,
    },
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
    #[error("'{text}' is not nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH: expected {expected}")]
    Nbd {
        /// The text.
        text: String,
        /// What should be at the place at fault.
        expected: &'static str,
    },
    /// `,offset=` of `file:` is no size.
    #[error("file URI has bad offset {0}: Invalid argument")]
    Offset(String),
}

impl BadAddress {
    fn host_port(text: String, expected: &'static str) -> Self {
        BadAddress::HostPort { text, expected }
    }

    fn nbd(text: String, expected: &'static str) -> Self {
        BadAddress::Nbd { text, expected }
    }
}

impl Blame for BadAddress {
    fn fault(&self) -> Fault {
        match self {
            BadAddress::Unknown(_) | BadAddress::Unsupported { .. } => Fault::Unsupported,
            _ => Fault::Malformed,
        }
    }
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
    type Err = Located<BadAddress>;

    fn from_str(text: &str) -> Result<Self, Located<BadAddress>> {
        let at = |rest: &str, kind| Located::new(kind, (text.len() - rest.len()) as u64);
        let misfit = |misfit: Misfit<'_>, kind: fn(String, &'static str) -> BadAddress| {
            at(misfit.rest, kind(text.into(), misfit.expected))
        };
        let Some((transport, rest)) = text.split_once(':') else {
            return Err(at(text, BadAddress::Unknown(text.into())));
        };
        let given = |kind| if rest.is_empty() { Err(at(rest, kind)) } else { Ok(rest) };
        match transport {
            "tcp" => {
                let place = host_port(rest).finish();
                let (mut rest, (host, port)) = place.map_err(|error| misfit(error, BadAddress::host_port))?;
                let mut options = TcpOptions::default();
                // As in a QEMU, a comma may follow the last option.
                while let Some(option) = rest.strip_prefix(',').filter(|option| !option.is_empty()) {
                    rest = options.read(option).map_err(|(kind, rest)| at(rest, kind))?;
                }
                Ok(Address::Tcp { host: host.into(), port, options })
            }
            "unix" => Ok(Address::Unix(given(BadAddress::EmptyPath)?.into())),
            "exec" => {
                let command = given(BadAddress::EmptyCommand)?;
                Ok(Address::Exec(SHELL.into_iter().chain([command]).map(String::from).collect()))
            }
            "fd" => Ok(Address::Fd(given(BadAddress::EmptyDescriptor)?.into())),
            "file" => {
                let (path, offset) = rest.rsplit_once(OFFSET).unwrap_or((rest, "0"));
                let bad =
                    |error: Located<BadSize>| at(&offset[error.offset as usize..], BadAddress::Offset(offset.into()));
                let offset = parse_size(offset, 1).map_err(bad)?;
                if path.is_empty() {
                    return Err(at(rest, BadAddress::EmptyFile));
                }
                Ok(Address::File { path: path.into(), offset })
            }
            "nbd" => whole(rest, nbd).map_err(|error| misfit(error, BadAddress::nbd)),
            "nbd+unix" => whole(rest, nbd_unix).map_err(|error| misfit(error, BadAddress::nbd)),
            other => Err(at(
                text,
                match OTHER_TRANSPORTS.into_iter().find(|known| *known == other) {
                    Some(transport) => BadAddress::Unsupported { transport },
                    None => BadAddress::Unknown(text.into()),
                },
            )),
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
            Address::File { path, offset } => {
                let path = path.display().to_string();
                // An offset of 0 is said where the path would be taken for one.
                let has_offset = *offset > 0 || path.contains(OFFSET);
                if has_offset { write!(f, "file:{path}{OFFSET}{offset:#x}") } else { write!(f, "file:{path}") }
            }
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

/// `HOST:PORT` of `tcp:`, up to the options.
fn host_port(text: &str) -> Parsed<'_, (&str, u16)> {
    let port = preceded(context("a colon and a port", char(':')), port);
    terminated((host(":,"), port), context("a comma or the end", peek(alt((eof, tag(",")))))).parse(text)
}

/// An address of IPv6 in brackets, or what comes before the first of `ends`.
fn host<'t>(ends: &'static str) -> impl Parser<&'t str, Output = &'t str, Error = Misfit<'t>> {
    let address = terminated(take_till(|char| "[],".contains(char)), context("a closing bracket", char(']')));
    alt((preceded(char('['), cut(address)), take_till(|char| ends.contains(char))))
}

fn port(text: &str) -> Parsed<'_, u16> {
    context("a port, 0 to 65535", number::u16).parse(text)
}

/// What follows `nbd:`.
fn nbd(text: &str) -> Parsed<'_, Address> {
    let host = context("a host", verify(host(":/?"), |host: &str| !host.is_empty()));
    let port = opt(preceded(char(':'), cut(port)));
    let export = terminated(opt(preceded(char('/'), cut(export))), opt(char('?')));
    let nbd = |(host, port, export): (&str, Option<u16>, Option<String>)| Address::Nbd {
        server: Box::new(Address::tcp(host, port.unwrap_or(qevm_nbd::number::PORT))),
        export: export.unwrap_or_default(),
    };
    preceded(context("two slashes", tag("//")), (host, port, export)).map(nbd).parse(text)
}

/// What follows `nbd+unix:`.
fn nbd_unix(text: &str) -> Parsed<'_, Address> {
    let path = |path: &str| OsString::from_vec(percent_decode_str(path).collect()).into();
    let path = preceded(tag("?socket="), cut(context("a path", verify(rest, |path: &str| !path.is_empty())))).map(path);
    let export = preceded(context("three slashes", tag("///")), export);
    (export, context("'?socket=' and a path", path))
        .map(|(export, path)| Address::Nbd { server: Box::new(Address::Unix(path)), export })
        .parse(text)
}

/// The name of a page server's file.
fn export(text: &str) -> Parsed<'_, String> {
    let name = |name| Some(percent_decode_str(name).decode_utf8().ok()?.into_owned());
    context("a name in UTF-8", map_opt(take_till(|char| char == '?'), name)).parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_address_says_why() {
        let parse = |text: &str| text.parse::<Address>().unwrap_err().kind;
        assert_eq!(parse("unix:"), BadAddress::EmptyPath);
        assert_eq!(parse("vsock:3:44"), BadAddress::Unsupported { transport: "vsock" });
        assert_eq!(parse("exec:"), BadAddress::EmptyCommand);
        assert_eq!(parse("fd:"), BadAddress::EmptyDescriptor);
        assert_eq!(parse("file:"), BadAddress::EmptyFile);
        for bad in ["", "zz", "-1", "++1", "1.5", ".5", "0x", "1Q", "\u{e9}", "18446744073709551616", "17E"] {
            assert_eq!(parse(&format!("file:a,offset={bad}")), BadAddress::Offset(bad.into()));
        }
        assert!(matches!(parse("defer"), BadAddress::Unknown(_)));
        assert!(matches!(parse("udp:a:1"), BadAddress::Unknown(_)));
    }

    #[test]
    fn what_is_no_address_says_where() {
        let misfit = |text: &str| {
            let error = text.parse::<Address>().unwrap_err();
            match error.kind {
                BadAddress::HostPort { text: found, expected } | BadAddress::Nbd { text: found, expected } => {
                    assert_eq!(found, text);
                    (error.offset, expected)
                }
                kind => panic!("{text}: {kind}"),
            }
        };
        for (text, offset, expected) in [
            ("tcp:4444", 8, "a colon and a port"),
            ("tcp:host:", 9, "a port, 0 to 65535"),
            ("tcp:host:65536", 9, "a port, 0 to 65535"),
            ("tcp:host:+1", 9, "a port, 0 to 65535"),
            ("tcp:::1:44", 5, "a port, 0 to 65535"),
            ("tcp:host:44;to=50", 11, "a comma or the end"),
            ("tcp:[::1:44", 11, "a closing bracket"),
            ("tcp:[::1,to=5]:44", 8, "a closing bracket"),
            ("tcp:[::1]44", 9, "a colon and a port"),
            ("nbd:host:10809", 4, "two slashes"),
            ("nbd://", 6, "a host"),
            ("nbd:///x", 6, "a host"),
            ("nbd://[]/x", 6, "a host"),
            ("nbd://host:x/", 11, "a port, 0 to 65535"),
            ("nbd://::1:10809/", 6, "a host"),
            ("nbd://host/%ff", 11, "a name in UTF-8"),
            ("nbd://host/?socket=/x", 12, "the end"),
            ("nbd+unix:///", 12, "'?socket=' and a path"),
            ("nbd+unix:///?socket=", 20, "a path"),
            ("nbd+unix://host/?socket=/x", 9, "three slashes"),
            ("nbd+unix:/run/x", 9, "three slashes"),
            ("nbd+unix:///%ff?socket=/x", 12, "a name in UTF-8"),
        ] {
            assert_eq!(misfit(text), (offset, expected), "{text}");
        }
        for (text, offset) in [
            ("defer", 0),
            ("vsock:3:44", 0),
            ("unix:", 5),
            ("fd:", 3),
            ("file:,offset=1", 5),
            ("file:a,offset=1Q", 15),
            ("tcp:host:4444,bogus=1", 14),
            ("tcp:host:4444,ipv4,to=x", 22),
            ("tcp:host:4444,to", 16),
            ("tcp:host:4444,,to=5", 14),
        ] {
            assert_eq!(text.parse::<Address>().unwrap_err().offset, offset, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_an_address_or_has_a_place(
            transport in "tcp|unix|exec|fd|file|nbd|nbd\\+unix",
            rest in "(//|[a-z0-9:,=?%/\\[\\]]|to=|ipv4=on|socket=|,offset=|\\PC){0,12}",
        ) {
            let text = format!("{transport}:{rest}");
            match text.parse::<Address>() {
                Ok(address) => prop_assert_eq!(address.to_string().parse(), Ok(address)),
                Err(error) => prop_assert!(text.is_char_boundary(error.offset as usize), "{}", error),
            }
        }
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
    }
}
