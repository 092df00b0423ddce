//! Where a guest goes to or comes from: arguments `uri` and `channels` of `migrate` and `migrate-incoming`.

use super::{arguments::Arguments, protocol::Failure};
use qevm_migration::Address;

/// An address as it was given. It is looked at when the arguments are complete.
pub(super) enum Place {
    Uri(String),
    Address(Address),
}

impl Place {
    pub(super) fn look_at(self) -> Result<Address, Failure> {
        match self {
            Place::Uri(uri) => {
                uri.parse().map_err(|error: qevm_migration::BadAddress| Failure::generic(error.to_string()))
            }
            Place::Address(address) => Ok(address),
        }
    }
}

/// `uri`, or the one main channel of `channels` (QEMU 8.2).
pub(super) fn place(arguments: &mut Arguments) -> Result<Place, Failure> {
    let (uri, channels) = (arguments.optional_text("uri")?, arguments.optional_list("channels")?.unwrap_or_default());
    match (uri, channels.len()) {
        (None, 0) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (Some(uri), 0) => Ok(Place::Uri(uri)),
        (Some(_), _) => Err(Failure::generic("need either 'uri' or 'channels' argument")),
        (None, _) => {
            let mut places = Vec::new();
            for (i, channel) in channels.into_iter().enumerate() {
                let mut channel = arguments.inner(channel, &format!("channels[{i}]"))?;
                let kind = channel.choice("channel-type", &["main", "cpr"])?;
                let place = transport(channel.object("addr")?)?;
                channel.complete()?;
                if kind != "main" {
                    return Err(Failure::generic("channel type 'cpr' is not supported here"));
                }
                places.push(place);
            }
            match <[Place; 1]>::try_from(places) {
                Ok([place]) => Ok(place),
                Err(_) => Err(Failure::generic("Channel list has more than one entries")),
            }
        }
    }
}

/// A `MigrationAddress`.
fn transport(mut addr: Arguments) -> Result<Place, Failure> {
    let place = match addr.choice("transport", &["socket", "exec", "rdma", "file"])?.as_str() {
        "socket" => match addr.choice("type", &["inet", "unix", "vsock", "fd"])?.as_str() {
            "inet" => {
                let host = addr.text("host")?;
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                let port = addr.text("port")?;
                Place::Uri(format!("tcp:{host}:{port}{}", keep_alive(&mut addr)?))
            }
            "unix" => Place::Uri(format!("unix:{}", addr.text("path")?)),
            "vsock" => Place::Uri(format!("vsock:{}:{}", addr.text("cid")?, addr.text("port")?)),
            _ => Place::Uri(format!("fd:{}", addr.text("str")?)),
        },
        "exec" => Place::Address(Address::Exec(words(&mut addr)?)),
        "file" => {
            let (filename, offset) = (addr.text("filename")?, addr.integer("offset")?);
            let negative = || Failure::generic("Invalid parameter type for 'offset', expected: uint64");
            let offset = u64::try_from(offset).map_err(|_| negative())?;
            Place::Address(Address::File { path: filename.into(), offset })
        }
        other => {
            return Err(Failure::generic(format!("transport '{other}' is not supported here")));
        }
    };
    addr.complete()?;
    Ok(place)
}

/// The members `keep-alive*` of an `InetSocketAddress` as options of a URI.
fn keep_alive(addr: &mut Arguments) -> Result<String, Failure> {
    let mut options = match addr.optional_flag("keep-alive")? {
        Some(on) => format!(",keep-alive={}", if on { "on" } else { "off" }),
        None => String::new(),
    };
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
