//! The report about a migration that was read.

use super::analysis::{Analysis, Section};
use super::writer;
use crate::failure::Failure;
use crate::ram::{Keep, RamDigest};
use crate::report::{RamReport, Report, SectionReport};

impl Analysis {
    /// The report, with the given digest of each RAM block; none if page contents were jumped over or are missing.
    pub fn report(&mut self, digest: RamDigest) -> Report {
        let mut failure = self.failure.clone();
        let mut ram = Vec::new();
        if let Some(guest) = &mut self.ram {
            for index in 0..guest.blocks().len() {
                let value = match guest.keep() {
                    _ if self.incomplete_ram => None,
                    Keep::Nothing | Keep::Places => None,
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
            qemu_profile: writer::describe(self),
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
