//! Where a guest goes to or comes from: arguments `uri` and `channels` of `migrate` and `migrate-incoming`.

use super::arguments::Arguments;
use super::protocol::Failure;
use qevm_migration::{Address, BadAddress};
use qevm_wire::Located;

/// An address as it was given. It is parsed when the arguments are complete.
pub(super) enum AddressArgument {
    Uri(String),
    Address(Address),
}

impl AddressArgument {
    pub(super) fn resolve(self) -> Result<Address, Failure> {
        match self {
            AddressArgument::Uri(uri) => {
                uri.parse().map_err(|error: Located<BadAddress>| Failure::generic(error.kind.to_string()))
            }
            AddressArgument::Address(address) => Ok(address),
        }
    }
}

/// `uri`, or the main channel of `channels` (QEMU 8.2), and the one for descriptors (10.0) if there is one.
pub(super) fn parse_channel_addresses(
    arguments: &mut Arguments,
) -> Result<(AddressArgument, Option<AddressArgument>), Failure> {
    let (uri, channels) = (arguments.optional_text("uri")?, arguments.optional_list("channels")?.unwrap_or_default());
    match (uri, channels.len()) {
        (None, 0) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (Some(uri), 0) => Ok((AddressArgument::Uri(uri), None)),
        (Some(_), _) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (None, _) => {
            let (mut main, mut cpr) = (None, None);
            for (i, channel) in channels.into_iter().enumerate() {
                let (kind, address) = typed_channel(arguments.inner(channel, &format!("channels[{i}]"))?)?;
                let slot = if kind == "main" { &mut main } else { &mut cpr };
                if slot.replace(address).is_some() {
                    return Err(Failure::generic(format!("Channel list has more than one {kind} entry")));
                }
            }
            // QEMU 11.1 crashes.
            Ok((main.ok_or_else(|| Failure::generic("missing 'main' migration channel"))?, cpr))
        }
    }
}

/// The one address that a guest comes from.
pub(super) fn parse_channel_address(arguments: &mut Arguments) -> Result<AddressArgument, Failure> {
    match parse_channel_addresses(arguments)? {
        (address, None) => Ok(address),
        _ => Err(Failure::generic("Channel list must have only one entry, for type 'main'")),
    }
}

/// A `MigrationChannel` and its type.
fn typed_channel(mut channel: Arguments) -> Result<(String, AddressArgument), Failure> {
    let kind = channel.choice("channel-type", &["main", "cpr"])?;
    let address = transport(channel.object("addr")?)?;
    channel.complete()?;
    Ok((kind, address))
}

/// The address in a channel as a JSON object, as `-incoming` takes it (QEMU 11.1), and whether it is that for
/// descriptors.
///
/// ```
/// use qevm_migration::Address;
/// use reference_vmm::qmp::channel;
///
/// let text = r#"{"channel-type":"main","addr":{"transport":"socket","type":"unix","path":"/run/vm"}}"#;
/// assert_eq!(channel(text).unwrap(), (false, Address::Unix("/run/vm".into())));
/// assert_eq!(channel(r#"{"channel-type":"main"}"#).unwrap_err().to_string(), "Parameter 'addr' is missing");
/// ```
///
/// # Errors
/// In QEMU's words, but for what is wrong with the JSON.
pub fn channel(text: &str) -> Result<(bool, Address), Failure> {
    let members = serde_json::from_str(text);
    let members = members.map_err(|error| Failure::generic(format!("JSON parse error, {error}")))?;
    let (kind, address) = typed_channel(Arguments::new(members))?;
    let address = address.resolve()?;
    match (kind == "cpr", &address) {
        (true, Address::Unix(_) | Address::Abstract { .. }) | (false, _) => Ok((kind == "cpr", address)),
        _ => Err(Failure::generic("bad cpr channel socket type; must be unix")),
    }
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
