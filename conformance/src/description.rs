//! The JSON that QEMU writes about its own device state after the end of a stream, found without qevm's help.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// `QEMU_VM_VMDESCRIPTION`: followed by a 32-bit big-endian length and the JSON, which ends the stream.
const MARKER: u8 = 0x06;
/// Descriptions of the largest machines here are below 200 KiB.
const TAIL: u64 = 8 << 20;

/// A device section as the description has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The section's `idstr`.
    pub idstr: String,
    /// The section's instance.
    pub instance_id: u64,
    /// Its version; absent for handlers that carry no fields.
    pub version_id: Option<u64>,
}

/// The description at the end of `stream`; `None` where there is none.
///
/// # Errors
/// The file cannot be read.
pub fn at_end_of(stream: &Path) -> Result<Option<Value>> {
    Ok(text_at_end_of(stream)?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// The text of the description at the end of `stream`; `None` where there is none.
///
/// # Errors
/// The file cannot be read.
pub fn text_at_end_of(stream: &Path) -> Result<Option<Vec<u8>>> {
    let mut file = File::open(stream).with_context(|| format!("opening {}", stream.display()))?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL)))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok(find(&tail))
}

fn find(tail: &[u8]) -> Option<Vec<u8>> {
    for at in (0..tail.len().saturating_sub(5)).rev() {
        let length = u32::from_be_bytes([tail[at + 1], tail[at + 2], tail[at + 3], tail[at + 4]]) as usize;
        if tail[at] == MARKER && at + 5 + length == tail.len() {
            let text = &tail[at + 5..];
            return serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok().then(|| text.to_vec());
        }
    }
    None
}

/// The device sections in the description's order.
pub fn devices(description: &Value) -> Vec<Described> {
    let devices = description["devices"].as_array().map(Vec::as_slice).unwrap_or_default();
    devices
        .iter()
        .map(|d| Described {
            idstr: d["name"].as_str().unwrap_or_default().into(),
            instance_id: d["instance_id"].as_u64().unwrap_or(u64::MAX),
            version_id: d["version"].as_u64(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_is_what_reaches_the_end() {
        let json =
            br#"{"devices": [{"name": "timer", "instance_id": 0, "version": 2}, {"name": "slirp", "instance_id": 0}]}"#;
        let mut stream = vec![0x06, 0, 0, 0, 9, 1, 2, 3];
        stream.push(MARKER);
        stream.extend((json.len() as u32).to_be_bytes());
        stream.extend(json);
        let devices = devices(&serde_json::from_slice(&find(&stream).unwrap()).unwrap());
        assert_eq!(devices[0], Described { idstr: "timer".into(), instance_id: 0, version_id: Some(2) });
        assert_eq!(devices[1].version_id, None);
        stream.push(0);
        assert!(find(&stream).is_none());
    }
}
