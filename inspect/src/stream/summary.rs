//! The report about a migration that was read.

use super::analysis::{Analysis, Section};
use super::release_guess;
use crate::failure::Failure;
use crate::ram::{GuestRam, Keep, RamDigest};
use crate::report::{RamReport, Report, SectionReport};

impl Analysis {
    /// Names of the RAM blocks that capability `x-ignore-shared` has left out of the stream: no page of them came.
    pub(super) fn ignored<'r>(&self, ram: &'r GuestRam) -> impl Iterator<Item = String> + use<'r> {
        let ignores = self.configuration.as_ref().is_some_and(|told| told.has_capability("x-ignore-shared"));
        let empty = ram.blocks().iter().filter(move |block| ignores && block.pages == 0 && block.used_length > 0);
        empty.map(|block| block.name.clone())
    }

    /// The report, with the given digest of each RAM block; none if page contents were jumped over or are missing.
    pub fn report(&mut self, digest: RamDigest) -> Report {
        let mut failure = self.failure.clone();
        let mut ram = Vec::new();
        let absent: Vec<String> = self.ram.iter().flat_map(|guest| self.ignored(guest)).collect();
        if let Some(guest) = &mut self.ram {
            for index in 0..guest.blocks().len() {
                let value = match guest.keep() {
                    _ if self.incomplete_ram || absent.contains(&guest.blocks()[index].name) => None,
                    Keep::Nothing | Keep::Contents | Keep::Places => None,
                    _ => match guest.digest(index, digest) {
                        Ok(value) => Some((digest.key(), value)),
                        Err(error) => {
                            failure.get_or_insert_with(|| Failure::io("temporary file", 0, &error));
                            None
                        }
                    },
                };
                let block = &guest.blocks()[index];
                ram.push(RamReport {
                    name: block.name.clone(),
                    used_length: block.used_length,
                    pages: block.pages,
                    zero_pages: block.zero_pages,
                    digest: value,
                });
            }
        }
        Report {
            bytes: self.bytes,
            opaque_bytes: self.opaque_bytes,
            device_bytes: self.device_bytes,
            reencoded_identical: self.reencoded_identical,
            qemu_profile: release_guess::describe(self),
            sections: self.sections.iter().map(Section::report).collect(),
            ram,
            error: failure,
        }
    }
}

impl Section {
    fn report(&self) -> SectionReport {
        SectionReport {
            idstr: self.header.idstr.to_string(),
            instance_id: self.header.instance_id,
            version_id: self.header.version_id,
            offset: self.offset,
            size: self.size,
        }
    }
}
