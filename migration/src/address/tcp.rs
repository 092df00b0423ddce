//! Options of `tcp:` addresses, by the names of QEMU's `InetSocketAddress` (QEMU 11.1).

use super::BadAddress;
use crate::grammar::Parsed;
use nom::Parser;
use nom::branch::alt;
use nom::bytes::complete::tag;
use nom::character::complete::{self as number, char};
use nom::combinator::{eof, opt, peek, value};
use nom::sequence::{delimited, terminated};
use rustix::net::sockopt;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

/// What follows host and port of a `tcp:` address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TcpOptions {
    /// `keep-alive*`.
    pub keep_alive: KeepAlive,
    /// `to`: the last port that a destination tries if the others, from that of the address on, are taken.
    pub to: Option<u16>,
    /// `ipv4`: whether addresses of IPv4 are used. If it is on and `ipv6` is not, no others are.
    pub ipv4: Option<bool>,
    /// `ipv6`, likewise.
    pub ipv6: Option<bool>,
    /// `numeric`: the host is an address, and no name is looked up.
    pub numeric: Option<bool>,
}

/// How the system finds out that the peer's host, or the way to it, is gone while nothing is sent: `keep-alive`,
/// `keep-alive-count`, `keep-alive-idle` and `keep-alive-interval`. At a destination it is for the connections that
/// come in.
///
/// ```
/// use qevm_migration::Address;
///
/// let address: Address = "tcp:there:4444,keep-alive=on,keep-alive-idle=20,keep-alive-interval=5,keep-alive-count=4".parse()?;
/// let Address::Tcp { options, .. } = address else { panic!("{address}") };
/// assert_eq!((options.keep_alive.on, options.keep_alive.idle), (Some(true), 20));
/// # Ok::<(), qevm_wire::Located<qevm_migration::BadAddress>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeepAlive {
    /// Whether the system probes at all. If that was not said it does, by values that suit a WAN: after [60
    /// s](Self::IDLE), every [15 s](Self::INTERVAL), [8 times](Self::COUNT). (A QEMU does not then.)
    pub on: Option<bool>,
    /// Probes without an answer after which the connection is broken; 0 is the system's default. The system takes 1
    /// to 127.
    pub count: u32,
    /// Seconds of silence before the first probe; 0 is the system's default. The system takes 1 to 32767.
    pub idle: u32,
    /// Seconds between two probes; 0 is the system's default. The system takes 1 to 32767.
    pub interval: u32,
}

/// An option's name, and its place.
type Row = (&'static str, fn(&mut KeepAlive) -> &mut u32);

const NUMBERS: [Row; 3] = [
    ("keep-alive-count", |keep_alive| &mut keep_alive.count),
    ("keep-alive-idle", |keep_alive| &mut keep_alive.idle),
    ("keep-alive-interval", |keep_alive| &mut keep_alive.interval),
];
const SWITCH: &str = "keep-alive";

impl KeepAlive {
    /// `idle` where nothing was said.
    pub const IDLE: u32 = 60;
    /// `interval` where nothing was said.
    pub const INTERVAL: u32 = 15;
    /// `count` where nothing was said.
    pub const COUNT: u32 = 8;

    /// Sets a socket up. Those that a listener accepts inherit it.
    ///
    /// # Errors
    /// The system's, in QEMU's words.
    pub(crate) fn apply(&self, socket: impl AsFd) -> io::Result<()> {
        let KeepAlive { count, idle, interval, .. } = match self.on {
            Some(false) => return Ok(()),
            Some(true) => *self,
            None => KeepAlive { on: None, count: Self::COUNT, idle: Self::IDLE, interval: Self::INTERVAL },
        };
        let failed = |what: &str, error: rustix::io::Errno| {
            let reason = crate::reason::reason(&error.into());
            io::Error::new(error.kind(), format!("Unable to set TCP keep-alive{what} option on socket: {reason}"))
        };
        let socket = socket.as_fd();
        let seconds = |count: u32| Duration::from_secs(count.into());
        sockopt::set_socket_keepalive(socket, true).map_err(|error| failed("", error))?;
        if count > 0 {
            sockopt::set_tcp_keepcnt(socket, count).map_err(|error| failed(" count", error))?;
        }
        if idle > 0 {
            sockopt::set_tcp_keepidle(socket, seconds(idle)).map_err(|error| failed(" idle", error))?;
        }
        if interval > 0 {
            sockopt::set_tcp_keepintvl(socket, seconds(interval)).map_err(|error| failed(" interval", error))?;
        }
        Ok(())
    }
}

/// A switch's name, and its place.
type Switch = (&'static str, fn(&mut TcpOptions) -> &mut Option<bool>);

const SWITCHES: [Switch; 4] = [
    (SWITCH, |options| &mut options.keep_alive.on),
    ("ipv4", |options| &mut options.ipv4),
    ("ipv6", |options| &mut options.ipv6),
    ("numeric", |options| &mut options.numeric),
];
const TO: &str = "to";

impl TcpOptions {
    /// Takes in the option of a URI that a text begins with: `NAME=VALUE`, or the name alone for one that is on. The
    /// rest is what follows; at an error, what is at fault.
    pub(super) fn read<'t>(&mut self, text: &'t str) -> Result<&'t str, (BadAddress, &'t str)> {
        let (name, rest) = text.split_at(text.find([',', '=']).unwrap_or(text.len()));
        let bad = |name, expected| (BadAddress::Option { name, expected }, rest.strip_prefix('=').unwrap_or(rest));
        let ends = || peek(alt((eof, tag(","))));
        if let Some((name, slot)) = SWITCHES.iter().find(|(known, _)| *known == name) {
            let on = alt((value(false, tag("=off")), value(true, opt(tag("=on")))));
            let read: Parsed<'_, _> = terminated(on, ends()).parse(rest);
            let (rest, on) = read.map_err(|_| bad(name, "'on' or 'off'"))?;
            *slot(self) = Some(on);
            return Ok(rest);
        }
        let number = |name| {
            let read: Parsed<'_, _> = delimited(char('='), number::u32, ends()).parse(rest);
            read.map_err(|_| bad(name, "a number"))
        };
        if name == TO {
            let (rest, port) = number(TO)?;
            // A QEMU takes what is left of a larger one.
            self.to = Some(port.try_into().map_err(|_| bad(TO, "uint16_t"))?);
            return Ok(rest);
        }
        let row = NUMBERS.iter().find(|(known, _)| *known == name);
        let (name, slot) = row.ok_or_else(|| (BadAddress::UnknownOption(name.into()), text))?;
        let (rest, number) = number(name)?;
        *slot(&mut self.keep_alive) = number;
        Ok(rest)
    }

    /// Those of the addresses of `host` that may be used.
    ///
    /// # Errors
    /// There is none, in QEMU's words.
    pub(crate) fn choose(&self, host: &str, found: Vec<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
        let failed = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
        if self.numeric == Some(true) && host.parse::<IpAddr>().is_err() {
            return Err(failed("Name or service not known"));
        }
        let families = self.families()?;
        let chosen: Vec<_> = found.into_iter().filter(|place| families[usize::from(place.is_ipv6())]).collect();
        if chosen.is_empty() { Err(failed("Address family for hostname not supported")) } else { Ok(chosen) }
    }

    /// Whether IPv4 and IPv6 may be used.
    fn families(&self) -> io::Result<[bool; 2]> {
        match (self.ipv4, self.ipv6) {
            (Some(false), Some(false)) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "Cannot disable IPv4 and IPv6 at same time"))
            }
            (Some(false), _) | (None, Some(true)) => Ok([false, true]),
            (_, Some(false)) | (Some(true), None) => Ok([true, false]),
            (None, None) | (Some(true), Some(true)) => Ok([true, true]),
        }
    }

    /// Whether a destination that listens at an IPv6 address takes IPv4 there, too.
    pub(crate) fn takes_both(&self) -> bool {
        matches!(self.families(), Ok([true, _]))
    }
}

impl fmt::Display for TcpOptions {
    /// As in a URI, each with its comma.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut options = *self;
        if let Some(to) = self.to {
            write!(f, ",{TO}={to}")?;
        }
        for (name, slot) in SWITCHES {
            if let Some(on) = *slot(&mut options) {
                write!(f, ",{name}={}", if on { "on" } else { "off" })?;
            }
        }
        for (name, slot) in NUMBERS {
            let value = *slot(&mut options.keep_alive);
            if value > 0 {
                write!(f, ",{name}={value}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::channel::write_all;
    use crate::{Address, BadAddress, Listener, Socket, WriteSlice};
    use rustix::net::sockopt;
    use std::net::TcpListener;
    use std::time::Duration;

    /// What a QEMU 11.1 says to the same URIs.
    #[test]
    fn options_are_those_of_a_qemu() {
        let parse = |options: &str| format!("tcp:127.0.0.1:0,{options}").parse::<Address>();
        for (options, shown) in [
            ("keep-alive", ",keep-alive=on"),
            ("keep-alive=off,keep-alive-idle=5", ",keep-alive=off,keep-alive-idle=5"),
            ("keep-alive-idle=5", ",keep-alive-idle=5"),
            ("keep-alive=on,keep-alive=off", ",keep-alive=off"),
            ("keep-alive=on,", ",keep-alive=on"),
            ("keep-alive=on,keep-alive-idle=0", ",keep-alive=on"),
            ("to=7,ipv4,numeric=off", ",to=7,ipv4=on,numeric=off"),
        ] {
            assert_eq!(parse(options).unwrap().to_string(), format!("tcp:127.0.0.1:0{shown}"), "{options}");
        }
        for (options, text) in [
            ("keep-alive=maybe", "Parameter 'keep-alive' expects 'on' or 'off'"),
            ("keep-alive=on,keep-alive-idle=x", "Parameter 'keep-alive-idle' expects a number"),
            ("keep-alive-idle", "Parameter 'keep-alive-idle' expects a number"),
            ("to=x", "Parameter 'to' expects a number"),
            ("to", "Parameter 'to' expects a number"),
            // A QEMU says so in `channels` alone.
            ("to=70000", "Parameter 'to' expects uint16_t"),
            ("ipv4=maybe", "Parameter 'ipv4' expects 'on' or 'off'"),
            ("numeric=maybe", "Parameter 'numeric' expects 'on' or 'off'"),
            ("bogus=1", "Invalid parameter 'bogus'"),
            ("bogus", "Invalid parameter 'bogus'"),
        ] {
            assert_eq!(parse(options).map_err(|error| error.kind.to_string()), Err(text.into()));
        }
        assert!(matches!(parse(",keep-alive").unwrap_err().kind, BadAddress::UnknownOption(_)));
    }

    /// Where a QEMU 11.1 listens for the same URIs, and what it says.
    #[test]
    fn families_are_chosen_as_by_a_qemu() {
        let bind =
            |uri: &str| Listener::bind(&uri.parse().unwrap()).map(|listener| listener.as_fd().try_clone_to_owned());
        let family = |uri: &str| {
            let socket = bind(uri).unwrap().unwrap();
            TcpListener::from(socket).local_addr().unwrap()
        };
        for uri in ["tcp:127.0.0.1:0,ipv4=on", "tcp::0,ipv4=on", "tcp:localhost:0,ipv4=on,ipv6=off"] {
            assert!(family(uri).is_ipv4(), "{uri}");
        }
        for uri in ["tcp:[::1]:0,ipv6=on", "tcp::0,ipv6=on", "tcp::0,ipv4=off", "tcp::0"] {
            assert!(family(uri).is_ipv6(), "{uri}");
        }
        let unsupported = "Address family for hostname not supported";
        for (uri, why) in [
            ("tcp:127.0.0.1:0,ipv4=off", unsupported),
            ("tcp:127.0.0.1:0,ipv6=on", unsupported),
            ("tcp:[::1]:0,ipv6=off", unsupported),
            ("tcp:localhost:0,ipv4=off,ipv6=off", "Cannot disable IPv4 and IPv6 at same time"),
            ("tcp:localhost:0,numeric=on", "Name or service not known"),
        ] {
            let error = bind(uri).unwrap_err().to_string();
            assert!(error.ends_with(why), "{uri}: {error}");
            let error = Socket::connect(&uri.parse().unwrap()).unwrap_err().to_string();
            assert!(error.ends_with(why), "{uri}: {error}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_followed_by_the_next() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let bind = |to| Listener::bind(&format!("tcp:127.0.0.1:{port}{to}").parse().unwrap());
        let error = bind(format!(",to={port}")).unwrap_err().to_string();
        assert!(error.ends_with("Failed to find an available port: Address already in use"), "{error}");
        let listener = bind(format!(",to={}", port.saturating_add(50))).unwrap();
        let Address::Tcp { port: next, .. } = *listener.address() else { panic!() };
        assert!(next > port && next <= port.saturating_add(50), "{port}, {next}");
        assert!(bind(format!(",to={}", port - 1)).is_err());
    }

    #[test]
    fn what_the_system_does_not_take_is_refused_in_the_words_of_a_qemu() {
        for (option, what) in [("idle=40000", "idle"), ("count=200", "count"), ("interval=40000", "interval")] {
            let address: Address = format!("tcp:127.0.0.1:0,keep-alive=on,keep-alive-{option}").parse().unwrap();
            let error = Listener::bind(&address).unwrap_err().to_string();
            let expected = format!("Unable to set TCP keep-alive {what} option on socket: Invalid argument");
            assert!(error.ends_with(&expected), "{error}");
        }
    }

    #[test]
    fn connections_of_both_sides_have_them() {
        let seconds = Duration::from_secs;
        let set = |options: &str| {
            let listener = Listener::bind(&format!("tcp:127.0.0.1:0{options}").parse().unwrap()).unwrap();
            let Address::Tcp { port, .. } = *listener.address() else { panic!() };
            let to = format!("tcp:127.0.0.1:{port}{options}");
            let _connected = Socket::connect(&to.parse().unwrap()).unwrap();
            let (Socket::Tcp(accepted), _) = listener.try_accept().unwrap().unwrap() else { panic!() };
            let on = sockopt::socket_keepalive(&accepted).unwrap();
            (on, sockopt::tcp_keepidle(&accepted).unwrap(), sockopt::tcp_keepcnt(&accepted).unwrap())
        };
        assert_eq!(set(""), (true, seconds(60), 8));
        assert_eq!(set(",keep-alive=on,keep-alive-idle=7,keep-alive-count=3"), (true, seconds(7), 3));
        assert!(!set(",keep-alive=off,keep-alive-idle=7").0);

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{},keep-alive=on,keep-alive-count=200", taken.local_addr().unwrap());
        let error = Socket::connect(&address.parse().unwrap()).unwrap_err().to_string();
        assert!(error.ends_with("Unable to set TCP keep-alive count option on socket: Invalid argument"), "{error}");
        let working = Socket::connect(&format!("tcp:{}", taken.local_addr().unwrap()).parse().unwrap()).unwrap();
        write_all(&*working, &mut [WriteSlice::bytes(b"x")]).unwrap();
    }
}
