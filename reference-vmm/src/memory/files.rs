//! The files that RAM is made of, where another process may have it, too: mode `cpr-transfer`.

use super::backend::{MemoryBackend, memfd};
use super::block::RamBlock;
use super::error::BackendError;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs::File;

/// The files of a machine's RAM.
#[derive(Debug, Default)]
pub struct Files {
    /// RAM that no memory backend is, such as that of the firmware, is made of files, too: QEMU's `aux-ram-share=on`.
    pub share_aux: bool,
    /// What a predecessor has passed, by the name of the RAM block. Its guest runs on in it until it is stopped to come
    /// here, so that nothing is written.
    pub passed: Option<BTreeMap<String, File>>,
}

impl Files {
    /// Whether the memory is another process's as well.
    pub(super) fn are_used(&self) -> bool {
        self.passed.is_some()
    }

    /// The block that a memory backend is.
    pub(super) fn backend(&mut self, backend: &MemoryBackend) -> Result<RamBlock> {
        if !self.are_used() || (backend.is_named() && backend.share) {
            // A file that has a name is opened by it, as at a QEMU.
            return RamBlock::of(backend);
        }
        if !backend.share {
            return Err(BackendError::Private.into());
        }
        let file = self.take(&backend.block_name(), backend.len())?;
        RamBlock::taken(backend, Some(file))
    }

    /// A block that no memory backend is.
    pub(super) fn block(&mut self, name: &str, used: u64, max: u64) -> Result<RamBlock> {
        match (self.are_used(), self.share_aux) {
            (true, true) => RamBlock::of_file(name, used, self.take(name, max)?, false),
            (true, false) => Err(BackendError::Private.into()),
            (false, true) => RamBlock::of_file(name, used, memfd(name, max)?, true),
            (false, false) => RamBlock::new(name, used, max),
        }
    }

    fn take(&mut self, name: &str, expected: u64) -> Result<File> {
        let passed = self.passed.as_mut().and_then(|passed| passed.remove(name));
        let file = passed.ok_or_else(|| BackendError::NotPassed(name.to_owned()))?;
        let found = file.metadata().map_err(|cause| Error::Host { what: "measure guest RAM", cause })?.len();
        match found == expected {
            true => Ok(file),
            false => Err(BackendError::PassedLength { name: name.to_owned(), found, expected }.into()),
        }
    }
}
