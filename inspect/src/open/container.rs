//! What a stream is wrapped in, and what that says beside the stream.

use crate::failure::printable;
use crate::size::size;
use qevm_savevm::container::libvirt::{SaveFormat, SaveImage};
use qevm_savevm::container::qcow2::Snapshot;
use serde_json::{Value, json};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

/// One wrapping of a stream.
#[derive(Debug, Clone)]
pub enum Container {
    /// Compressed.
    Compressed {
        /// The program that decompresses it.
        program: &'static str,
        /// Bytes follow the compressed data, as a read up to its end has shown.
        trailing: Rc<Cell<bool>>,
    },
    /// A libvirt save image.
    SaveImage {
        /// Its header.
        header: SaveImage,
        /// The domain XML, without its NUL; shorter than the header says if the image ends in it.
        xml: Vec<u8>,
    },
    /// The VM state of a snapshot in a qcow2 image.
    Snapshot {
        /// Index of the snapshot that is read.
        chosen: usize,
        /// All snapshots of the image, in the order of its table.
        all: Vec<Snapshot>,
    },
}

impl Container {
    /// In words, without what it is of.
    pub fn describe(&self) -> String {
        match self {
            Container::Compressed { program, .. } => format!("compressed with {program}"),
            Container::SaveImage { header, xml } => {
                let complete = if header.complete { "" } else { ", incomplete: virsh restore refuses it" };
                let guest = if header.was_running { "running" } else { "paused" };
                let (version, format, xml) = (header.version, format_name(header.format), size(xml.len() as u64));
                format!(
                    "libvirt save image, version {version}, {guest} guest, format {format}, {xml} of domain XML{complete}"
                )
            }
            Container::Snapshot { chosen, all } => {
                let of = format!("qcow2 image, snapshot {}", all.get(*chosen).map_or(String::new(), describe));
                match all.len() {
                    1 => of,
                    number => format!("{of}; one of {number}"),
                }
            }
        }
    }

    /// A remark on what was found in reading the stream.
    pub fn remark(&self) -> Option<String> {
        match self {
            Container::Compressed { program, trailing } if trailing.get() => {
                Some(format!("bytes follow the compressed data ({program}): they are not part of it"))
            }
            _ => None,
        }
    }

    /// For machines.
    pub fn json(&self) -> Value {
        match self {
            Container::Compressed { program, trailing } => {
                json!({"kind": "compressed", "format": program, "trailing": trailing.get()})
            }
            Container::SaveImage { header, xml } => json!({
                "kind": "libvirt",
                "complete": header.complete,
                "version": header.version,
                "was_running": header.was_running,
                "format": format_name(header.format),
                "xml_len": xml.len(),
                "stream_offset": header.stream_offset,
            }),
            Container::Snapshot { chosen, all } => json!({
                "kind": "qcow2",
                "snapshot": all.get(*chosen).map(snapshot_json),
                "snapshots": all.iter().map(snapshot_json).collect::<Vec<_>>(),
            }),
        }
    }
}

/// The name that `save_image_format` in libvirt's `qemu.conf` has for it.
fn format_name(format: SaveFormat) -> &'static str {
    match format {
        SaveFormat::Raw => "raw",
        SaveFormat::Compressed(compression) => compression.as_str(),
        SaveFormat::Sparse => "sparse",
        _ => "unknown",
    }
}

/// A snapshot as lists show it: name, ID, date, size and guest clock.
pub(super) fn describe(snapshot: &Snapshot) -> String {
    let Snapshot { vm_state_size, vm_clock_nsec, .. } = snapshot;
    let state = match vm_state_size {
        0 => "of the disk alone".to_owned(),
        bytes => format!("{} of VM state, guest clock {}", size(*bytes), clock(*vm_clock_nsec)),
    };
    format!("'{}' (ID {}, {}, {state})", text(&snapshot.name), text(&snapshot.id), date(snapshot))
}

/// A snapshot for machines.
pub(super) fn snapshot_json(snapshot: &Snapshot) -> Value {
    json!({
        "id": text(&snapshot.id),
        "name": text(&snapshot.name),
        "date": date(snapshot),
        "vm_clock_ns": snapshot.vm_clock_nsec,
        "vm_state_size": snapshot.vm_state_size,
        "disk_size": snapshot.disk_size,
    })
}

pub(super) fn text(bytes: &[u8]) -> String {
    printable(&String::from_utf8_lossy(bytes))
}

/// In UTC.
fn date(snapshot: &Snapshot) -> String {
    let date = UNIX_EPOCH + Duration::from_secs(snapshot.date_sec.into());
    humantime::format_rfc3339_seconds(date).to_string()
}

/// As `qemu-img snapshot -l` shows it: hours, minutes, seconds and milliseconds.
fn clock(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let (seconds, milliseconds) = (milliseconds / 1000, milliseconds % 1000);
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    format!("{:04}:{:02}:{seconds:02}.{milliseconds:03}", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values that `qemu-img snapshot -l` of QEMU 11.1 prints for such an entry.
    #[test]
    fn a_snapshot_is_shown_as_qemu_img_lists_it() {
        let mut snapshot = Snapshot {
            id: b"1".to_vec(),
            name: b"before\nupgrade".to_vec(),
            date_sec: 1_790_000_000,
            vm_clock_nsec: 90_061_234_567_890,
            vm_state_size: 241 << 10,
            disk_size: Some(8 << 20),
            l1_offset: 0,
            l1_len: 0,
        };
        let shown =
            "'before\\nupgrade' (ID 1, 2026-09-21T14:13:20Z, 241.0 KiB of VM state, guest clock 0025:01:01.234)";
        assert_eq!(describe(&snapshot), shown.replace("241.0", "241"));
        snapshot.vm_state_size = 0;
        assert!(describe(&snapshot).ends_with("of the disk alone)"));
    }
}
