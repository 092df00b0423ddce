//! How a stream begins: the configuration, and the list of RAM blocks.

use super::{Engine, RAM_SECTION, idstr};
use crate::{MigrationError, handover, page_file::Saving, ram_sender::RamSender};
use qevm_multifd::SourceSync;
use qevm_savevm::{
    command::Command,
    configuration::{Configuration, ConfigurationSubsection},
    event::Event,
    framing::SectionHeader,
    mapped_ram::MappedBlock,
    ram,
    ram::{RamBlock, RamRecord},
};
use qevm_wire::PageGeometry;
use std::io;

/// Value of the PING that QEMU sends when it has opened the return path.
const FIRST_PING: u32 = 1;
/// What the length of a block takes in front of its header in the file.
const LENGTH_WORD: u64 = 8;

impl Engine<'_> {
    /// The first bytes. They are sent before anything that may take time: a destination gives up a connection that says nothing.
    pub(super) fn greet(&mut self) -> Result<(), MigrationError> {
        let configuration = self.profile.send_configuration.then(|| self.configuration()).transpose()?;
        self.stream.header(configuration.as_ref())?;
        if let Some(return_path) = self.return_path {
            self.stream.command(Command::OpenReturnPath)?;
            self.stream.command(return_path.ping(FIRST_PING)?)?;
            self.stream.command(return_path.ping(handover::ANNOUNCE)?)?;
        }
        self.flush("the header of the stream")
    }

    /// Everything up to the list of RAM blocks.
    pub(super) fn set_up(&mut self, ram: &RamSender<'_>) -> Result<(), MigrationError> {
        self.stream.section_start(&SectionHeader {
            section_id: RAM_SECTION,
            idstr: idstr("ram")?,
            instance_id: 0,
            version_id: ram::SECTION_VERSION,
        })?;
        let blocks = ram.remaining().map(|(name, len)| Ok(ram::RamBlock::new(idstr(name)?, len)));
        let blocks = blocks.collect::<Result<Vec<_>, MigrationError>>()?;
        match self.saving {
            None => self.stream.ram_setup(blocks)?,
            Some(saving) => self.place(saving, blocks)?,
        }
        self.synchronise(SourceSync::setup)?;
        self.stream.footer()?;
        self.begin_devices()?;
        self.flush("the list of RAM blocks")?;
        let total = ram.remaining().map(|(_, bytes)| bytes).sum();
        let limit = self.job.parameters().downtime_limit();
        self.job.update(|statistics| {
            statistics.setup_time = self.start.elapsed();
            statistics.ram.total = total;
            statistics.ram.page_size = PageGeometry::X86.size();
            statistics.expected_downtime = limit;
        });
        Ok(())
    }

    fn configuration(&self) -> Result<Configuration, MigrationError> {
        let mut configuration = Configuration::new(self.guest.machine_type());
        if self.saving.is_some() {
            configuration.subsections.push(ConfigurationSubsection::Capabilities(vec![idstr("mapped-ram")?]));
        }
        Ok(configuration)
    }

    /// Lists the blocks with the places of their pages. The stream goes on behind each block's pages.
    fn place(&mut self, saving: &Saving, blocks: Vec<RamBlock>) -> Result<(), MigrationError> {
        let failed = |source: io::Error| MigrationError::Send { doing: "the list of RAM blocks", source };
        let total = blocks.iter().map(|block| block.used_length).sum();
        self.stream.event(&Event::Ram(RamRecord::MemSize { total }))?;
        let mut layouts = Vec::with_capacity(blocks.len());
        for mut block in blocks {
            let here = saving.file.position().map_err(failed)? + self.stream.bytes().len() as u64;
            let header_at = here + block.name.wire_len() as u64 + LENGTH_WORD;
            let layout = MappedBlock::place(header_at, block.used_length, PageGeometry::X86)
                .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::EFBIG)))?;
            block.mapped_ram = Some(layout.header);
            self.stream.event(&Event::Ram(RamRecord::Block(block)))?;
            self.flush("the list of RAM blocks")?;
            saving.file.seek(layout.end()).map_err(failed)?;
            layouts.push(layout);
        }
        saving.lay_out(layouts);
        Ok(())
    }
}
