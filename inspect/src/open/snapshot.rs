//! The VM state of a qcow2 internal snapshot as something to read and seek in.

use super::container::{Container, describe};
use crate::failure::{Error, Failure};
use crate::read_at::{ReadAt, Stamp};
use crate::source::Source;
use parking_lot::Mutex;
use qevm_savevm::Reader;
use qevm_savevm::container::qcow2::{self, Cluster, Header, Snapshot, VmState};
use qevm_wire::{Fault, Limits};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

/// The table is read in pieces of this size until an entry is whole.
const TABLE_PIECE: usize = 64 << 10;
/// No table is read further than this: far more than any image's snapshots take.
const TABLE_LIMIT: usize = 16 << 20;

/// Opens the VM state of the snapshot that `chosen` names, or of the only one that has any.
pub(super) fn open(name: &str, file: File, chosen: Option<&str>) -> Result<(Source, Container), Error> {
    let bad = |error: qevm_savevm::Error| Error::from(Failure::located(name, error));
    let io = |error: io::Error| Error::from(Failure::io(name, 0, &error));
    let mut first = vec![0; qcow2::HEADER_LEN];
    let read = read_up_to(&file, &mut first, 0).map_err(io)?;
    let header = Header::parse(&first[..read]).map_err(bad)?;
    header.check_snapshots(&Limits::default()).map_err(bad)?;

    let snapshots = table(name, &file, &header)?;
    let chosen = choose(name, &snapshots, chosen)?;
    let snapshot = &snapshots[chosen];
    let held = (&file).seek(SeekFrom::End(0)).map_err(io)?;
    if snapshot.vm_state_size > held {
        return Err(more_than_held(name, &header, snapshot, held).into());
    }
    let mut l1 = vec![0; snapshot.l1_len as usize];
    read_exact(&file, &mut l1, snapshot.l1_offset).map_err(|error| Failure::io(name, snapshot.l1_offset, &error))?;
    let state = VmState::new(&header, snapshot, &l1).map_err(bad)?;
    let len = state.len();
    let table = Table { offset: None, bytes: vec![0; header.cluster_size() as usize] };
    let reader = StateReader { file, cluster_size: header.cluster_size(), table: Mutex::new(table), state };
    Ok((Source::seekable(Arc::new(reader), len), Container::Snapshot { chosen, all: snapshots }))
}

/// `savevm` writes every byte of the state. What claims more than the file holds would be made of clusters that are not
/// there, or of one many times, and cost more than was sent.
fn more_than_held(name: &str, header: &Header, snapshot: &Snapshot, held: u64) -> Failure {
    Failure {
        file: name.to_owned(),
        kind: Fault::Malformed.as_str(),
        offset: header.snapshots_offset,
        path: "snapshot table".to_owned(),
        message: format!("VM state of {} bytes, expected at most the file's {held}", snapshot.vm_state_size),
    }
}

fn table(name: &str, file: &File, header: &Header) -> Result<Vec<Snapshot>, Error> {
    let (mut bytes, mut parsed) = (Vec::new(), 0);
    let mut snapshots = Vec::new();
    while snapshots.len() < header.snapshots as usize {
        let offset = header.snapshots_offset.saturating_add(parsed as u64);
        let mut reader = Reader::at(&bytes[parsed..], offset);
        match Snapshot::parse(&mut reader) {
            Ok(snapshot) => {
                parsed += reader.position();
                snapshots.push(snapshot);
            }
            Err(error) if error.is_truncated() && bytes.len() < TABLE_LIMIT => {
                let held = bytes.len();
                bytes.resize(held + TABLE_PIECE, 0);
                let at = header.snapshots_offset.saturating_add(held as u64);
                let read = read_up_to(file, &mut bytes[held..], at).map_err(|error| Failure::io(name, at, &error))?;
                bytes.truncate(held + read);
                if read == 0 {
                    return Err(Failure::located(name, error.within("snapshot table")).into());
                }
            }
            Err(error) => return Err(Failure::located(name, error.within("snapshot table")).into()),
        }
    }
    Ok(snapshots)
}

/// Index of the snapshot that is meant: by name or ID, or the only one with VM state. A name comes before an ID.
fn choose(name: &str, snapshots: &[Snapshot], chosen: Option<&str>) -> Result<usize, Error> {
    let with_state = || snapshots.iter().enumerate().filter(|(_, snapshot)| snapshot.vm_state_size > 0);
    // As much as helps, and a line all the same.
    const LISTED: usize = 50;
    let list = || {
        let mut list: Vec<String> = snapshots.iter().take(LISTED).map(describe).collect();
        list.extend(snapshots.len().checked_sub(LISTED + 1).map(|more| format!("and {} more", more + 1)));
        list.join(", ")
    };
    let Some(wanted) = chosen else {
        return match with_state().map(|(index, _)| index).collect::<Vec<_>>()[..] {
            [only] => Ok(only),
            [] if snapshots.is_empty() => Err(Error::Usage(format!(
                "{name}: a qcow2 image without snapshots, so that no stream is in it (savevm)"
            ))),
            [] => Err(Error::Usage(format!(
                "{name}: a qcow2 image without a snapshot that has VM state (savevm); there are: {}",
                list()
            ))),
            _ => Err(Error::Usage(format!("{name}: several snapshots; choose one with --snapshot: {}", list()))),
        };
    };
    let wanted = wanted.as_bytes();
    let found = with_state().find(|(_, s)| s.name == wanted).or_else(|| with_state().find(|(_, s)| s.id == wanted));
    let without = || snapshots.iter().find(|s| s.name == wanted || s.id == wanted);
    match (found, without()) {
        (Some((index, _)), _) => Ok(index),
        (None, Some(snapshot)) => Err(Error::Usage(format!(
            "{name}: snapshot {} has no VM state, so that no stream is in it; there are: {}",
            describe(snapshot),
            list()
        ))),
        (None, None) => Err(Error::Usage(format!(
            "{name}: no snapshot '{}'; there are: {}",
            String::from_utf8_lossy(wanted),
            list()
        ))),
    }
}

/// Reads until `buffer` is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        let at = offset.saturating_add(filled as u64);
        match file.read_at(&mut buffer[filled..], at) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Fills `buffer`.
fn read_exact(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    match read_up_to(file, buffer, offset)? {
        read if read == buffer.len() => Ok(()),
        read => {
            let message = format!("{} bytes expected at byte {offset}, {read} are there", buffer.len());
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, message))
        }
    }
}

struct StateReader {
    file: File,
    cluster_size: u64,
    state: VmState,
    /// The L2 table read last.
    table: Mutex<Table>,
}

/// An L2 table, and where it is.
struct Table {
    offset: Option<u64>,
    bytes: Vec<u8>,
}

impl ReadAt for StateReader {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let len = self.state.contiguous(position).min(buffer.len() as u64) as usize;
        if len == 0 {
            return Ok(0);
        }
        let buffer = &mut buffer[..len];
        match self.cluster(position)? {
            // The state starts at a cluster boundary, so its clusters are those of the file.
            Cluster::At(offset) => {
                read_exact(&self.file, buffer, offset.saturating_add(position % self.cluster_size))?;
            }
            Cluster::Zero => buffer.fill(0),
        }
        Ok(len)
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        self.file.stamp()
    }
}

impl StateReader {
    fn cluster(&self, position: u64) -> io::Result<Cluster> {
        let damaged = |error: qevm_savevm::Error| io::Error::new(io::ErrorKind::InvalidData, error);
        let Some(offset) = self.state.l2_table(position).map_err(damaged)? else {
            return Ok(Cluster::Zero);
        };
        let mut table = self.table.lock();
        if table.offset != Some(offset) {
            table.offset = None;
            read_exact(&self.file, &mut table.bytes, offset)?;
            table.offset = Some(offset);
        }
        self.state.cluster(position, &table.bytes, offset).map_err(damaged)
    }
}
