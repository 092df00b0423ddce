//! What the rows of the table are made of.

use super::{Journey, Link, Load};
use crate::roots::Suite;
use serde_json::{Map, Value};

/// The releases whose microvm trades guests with reference-vmm in every way.
pub(super) const PEERS: [Suite; 3] = [Suite::Bookworm, Suite::Trixie, Suite::Sid];

/// Parameters of page channels.
pub(super) fn channels_of(channels: u32, compression: &str) -> Map<String, Value> {
    let mut parameters = Map::new();
    parameters.insert("multifd-channels".into(), channels.into());
    parameters.insert("multifd-compression".into(), compression.into());
    parameters
}

/// A journey of no stop, over a UNIX socket and with no capability.
pub(super) fn plain() -> Journey {
    Journey {
        name: String::new(),
        stops: Vec::new(),
        link: Link::Unix,
        capabilities: Vec::new(),
        parameters: Map::new(),
        postcopy: None,
        tls: None,
        load: Load::default(),
        quick: false,
    }
}
