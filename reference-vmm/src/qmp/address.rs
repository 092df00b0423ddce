//! Where a guest goes to or comes from: arguments `uri` and `channels` of `migrate` and `migrate-incoming`.

use super::{arguments::Arguments, protocol::Failure};
use qevm_migration::Address;

/// An address as it was given. It is parsed when the arguments are complete.
pub(super) enum AddressArgument {
    Uri(String),
    Address(Address),
}

impl AddressArgument {
    pub(super) fn resolve(self) -> Result<Address, Failure> {
        match self {
            AddressArgument::Uri(uri) => {
                uri.parse().map_err(|error: qevm_migration::BadAddress| Failure::generic(error.to_string()))
            }
            AddressArgument::Address(address) => Ok(address),
        }
    }
}

/// `uri`, or the one main channel of `channels` (QEMU 8.2).
pub(super) fn parse_channel_address(arguments: &mut Arguments) -> Result<AddressArgument, Failure> {
    let (uri, channels) = (arguments.optional_text("uri")?, arguments.optional_list("channels")?.unwrap_or_default());
    match (uri, channels.len()) {
        (None, 0) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (Some(uri), 0) => Ok(AddressArgument::Uri(uri)),
        (Some(_), _) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (None, _) => {
            let mut addresses = Vec::new();
            for (i, channel) in channels.into_iter().enumerate() {
                addresses.push(main_channel(arguments.inner(channel, &format!("channels[{i}]"))?)?);
            }
            match <[AddressArgument; 1]>::try_from(addresses) {
                Ok([address]) => Ok(address),
                Err(_) => Err(Failure::generic("Channel list has more than one entries")),
            }
        }
    }
}

/// A `MigrationChannel`, which has to be the main one.
fn main_channel(mut channel: Arguments) -> Result<AddressArgument, Failure> {
    let kind = channel.choice("channel-type", &["main", "cpr"])?;
    let address = transport(channel.object("addr")?)?;
    channel.complete()?;
    match kind.as_str() {
        "main" => Ok(address),
        _ => Err(Failure::generic("channel type 'cpr' is not supported here")),
    }
}

/// The address in a main channel as a JSON object, as `-incoming` takes it (QEMU 11.1).
///
/// ```
/// use qevm_migration::Address;
/// use reference_vmm::qmp::channel;
///
/// let text = r#"{"channel-type":"main","addr":{"transport":"socket","type":"unix","path":"/run/vm"}}"#;
/// assert_eq!(channel(text).unwrap(), Address::Unix("/run/vm".into()));
/// assert_eq!(channel(r#"{"channel-type":"main"}"#).unwrap_err().to_string(), "Parameter 'addr' is missing");
/// ```
///
/// # Errors
/// In QEMU's words, but for what is wrong with the JSON.
pub fn channel(text: &str) -> Result<Address, Failure> {
    let members = serde_json::from_str(text);
    let members = members.map_err(|error| Failure::generic(format!("JSON parse error, {error}")))?;
    main_channel(Arguments::new(members))?.resolve()
}

/// A `MigrationAddress`.
fn transport(mut addr: Arguments) -> Result<AddressArgument, Failure> {
    let address = match addr.choice("transport", &["socket", "exec", "rdma", "file"])?.as_str() {
        "socket" => match addr.choice("type", &["inet", "unix", "vsock", "fd"])?.as_str() {
            "inet" => {
                let host = addr.text("host")?;
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                let port = addr.text("port")?;
                AddressArgument::Uri(format!("tcp:{host}:{port}{}", options(&mut addr)?))
            }
            "unix" => {
                let (path, in_file) = (addr.text("path")?, !addr.flag("abstract")?);
                // Of an abstract one, it is on unless it was said to be off; of others it means nothing.
                match addr.optional_flag("tight")?.unwrap_or(true) {
                    _ if in_file => AddressArgument::Uri(format!("unix:{path}")),
                    tight => AddressArgument::Address(Address::Abstract { name: path, tight }),
                }
            }
            "vsock" => AddressArgument::Uri(format!("vsock:{}:{}", addr.text("cid")?, addr.text("port")?)),
            _ => AddressArgument::Uri(format!("fd:{}", addr.text("str")?)),
        },
        "exec" => AddressArgument::Address(Address::Exec(words(&mut addr)?)),
        "file" => {
            let (filename, offset) = (addr.text("filename")?, addr.integer("offset")?);
            let negative = || Failure::generic("Invalid parameter type for 'offset', expected: uint64");
            let offset = u64::try_from(offset).map_err(|_| negative())?;
            AddressArgument::Address(Address::File { path: filename.into(), offset })
        }
        other => {
            return Err(Failure::generic(format!("transport '{other}' is not supported here")));
        }
    };
    addr.complete()?;
    Ok(address)
}

/// The other members of an `InetSocketAddress` as options of a URI.
fn options(addr: &mut Arguments) -> Result<String, Failure> {
    let mut options = String::new();
    if let Some(port) = addr.optional_unsigned("to")? {
        let port = u16::try_from(port).map_err(|_| Failure::generic("Parameter 'to' expects uint16_t"))?;
        options += &format!(",to={port}");
    }
    for name in ["numeric", "ipv4", "ipv6", "keep-alive"] {
        if let Some(on) = addr.optional_flag(name)? {
            options += &format!(",{name}={}", if on { "on" } else { "off" });
        }
    }
    for name in ["keep-alive-count", "keep-alive-idle", "keep-alive-interval"] {
        if let Some(number) = addr.optional_unsigned(name)? {
            // QEMU does not say where the member is here.
            let number = u32::try_from(number);
            let number = number.map_err(|_| Failure::generic(format!("Parameter '{name}' expects uint32_t")))?;
            options += &format!(",{name}={number}");
        }
    }
    Ok(options)
}

/// Program and arguments of `exec`.
fn words(addr: &mut Arguments) -> Result<Vec<String>, Failure> {
    let mut words = Vec::new();
    for (i, word) in addr.list("args")?.into_iter().enumerate() {
        match word {
            serde_json::Value::String(word) => words.push(word),
            _ => return Err(Failure::generic(format!("Invalid parameter type for 'args[{i}]', expected: string"))),
        }
    }
    // QEMU 11.1 crashes.
    if words.is_empty() {
        return Err(Failure::generic("Parameter 'args' is empty, expected a program and its arguments"));
    }
    Ok(words)
}
