//! Cuts seeds out of recordings of real QEMUs: `cargo run --example seeds -- RECORDINGS`, where the folder was filled
//! by `qevm-conformance record`. What is cut, and how, is told in `seeds/README.md`. Seeds that are there already stay.

mod channels;
mod device_state;
mod stream;

use serde_json::Value;
use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// This many of the recordings that fit are used for a target.
const ENOUGH: usize = 32;

/// A recording: its name and its files.
pub(crate) struct Recording {
    name: String,
    folder: PathBuf,
    manifest: Value,
}

impl Recording {
    fn open(folder: PathBuf) -> io::Result<Option<Recording>> {
        let path = folder.join("recording.json");
        if !path.exists() {
            return Ok(None);
        }
        let manifest = serde_json::from_slice(&fs::read(path)?)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Recording { name, folder, manifest }))
    }

    fn file(&self, key: &str) -> io::Result<Option<Vec<u8>>> {
        self.manifest["files"][key].as_str().map(|name| fs::read(self.folder.join(name))).transpose()
    }

    /// The main channel, from its first byte.
    fn main(&self) -> io::Result<Vec<u8>> {
        let bytes = self.file("main")?.unwrap_or_default();
        let offset = self.manifest["files"]["offset"].as_u64().unwrap_or(0) as usize;
        Ok(bytes.get(offset..).unwrap_or_default().to_vec())
    }

    fn files(&self, key: &str) -> io::Result<Vec<Vec<u8>>> {
        let names = self.manifest["files"][key].as_array().into_iter().flatten().filter_map(Value::as_str);
        names.map(|name| fs::read(self.folder.join(name))).collect()
    }

    fn machine(&self) -> &str {
        self.manifest["machine"].as_str().unwrap_or_default()
    }

    /// What QEMU says about its devices.
    fn dump(&self) -> Option<String> {
        let (release, _) = self.name.split_once('-')?;
        let file = format!("dump-vmstate/{release}-{}.json", self.machine());
        fs::read_to_string(self.folder.parent()?.join(file)).ok()
    }

    fn has_capability(&self, name: &str) -> bool {
        self.manifest["capabilities"].as_array().into_iter().flatten().any(|capability| capability == name)
    }

    fn is_stream(&self) -> bool {
        !self.has_capability("mapped-ram") && !self.name.ends_with("savevm")
    }
}

/// Seeds of one target, each of them different.
struct Seeds {
    folder: PathBuf,
    known: BTreeSet<Vec<u8>>,
}

impl Seeds {
    fn of(target: &str) -> io::Result<Seeds> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
        fs::create_dir_all(&folder)?;
        let known = fs::read_dir(&folder)?.map(|entry| fs::read(entry?.path())).collect::<io::Result<_>>()?;
        Ok(Seeds { folder, known })
    }

    fn add(&mut self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        if self.known.len() < ENOUGH && !bytes.is_empty() && self.known.insert(bytes.clone()) {
            fs::write(self.folder.join(name.replace('/', "-")), bytes)?;
        }
        Ok(())
    }
}

/// An input of several files, as the library's `parts` reads it.
fn parts<'a>(files: impl IntoIterator<Item = (u8, &'a [u8])>) -> Vec<u8> {
    let part = |(kind, bytes): (u8, &[u8])| [&[kind], &(bytes.len() as u32).to_be_bytes()[..], bytes].concat();
    files.into_iter().flat_map(part).collect()
}

fn main() -> io::Result<()> {
    let corpus = env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: seeds RECORDINGS"))?;
    let mut folders = fs::read_dir(corpus)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    folders.sort();
    let recordings = folders.into_iter().filter_map(|folder| Recording::open(folder).transpose());
    let mut recordings = recordings.collect::<io::Result<Vec<_>>>()?;
    // One of each kind from every release, before the next kind.
    recordings.sort_by_key(|recording| {
        recording.name.split_once('-').map(|(release, kind)| (kind.to_owned(), release.to_owned()))
    });
    stream::seeds(&recordings)?;
    channels::seeds(&recordings)?;
    device_state::seeds(&recordings)
}
