//! What the events of a stream mean for the guest.

use super::super::{
    DeviceSection, Guest, GuestError, IterativeDevice, LoadError, handover, multifd::Mark, ram_receiver::RamReceiver,
};
use qevm_returnpath::{
    Message,
    switchover::{Ack, DestinationGate},
};
use qevm_savevm::{
    Event,
    command::Command,
    configuration::{Configuration, ConfigurationSubsection},
    framing::{Content, SectionHeader, SectionKind},
    ram::{RamBlock, RamRecord},
    vfio::VfioRecord,
};
use qevm_wire::{CountedString, PageGeometry};
use std::collections::HashSet;
use vm_memory::VolatileSlice;

/// The capability that both sides must agree on and that is supported here.
const MAPPED_RAM: &str = "mapped-ram";

/// What the events mean for the guest.
pub(super) struct Loader<'e> {
    pub(super) guest: &'e dyn Guest,
    pub(super) ram: RamReceiver<'e>,
    pub(super) devices: Vec<DeviceSection>,
    /// The sections that were opened.
    pub(super) came: HashSet<(CountedString, u32)>,
    pub(super) ram_section: RamSection,
    /// The device section that is open.
    pub(super) section: Option<SectionHeader>,
    /// What is written goes somewhere.
    pub(super) answers: bool,
    /// The source listens.
    pub(super) return_path: bool,
    /// The source confirms the handover.
    pub(super) confirmation: bool,
    /// Capability `mapped-ram` is on here.
    pub(super) mapped_ram: bool,
    /// Says when to agree to the switchover. No device of this machine wants to be asked.
    pub(super) gate: DestinationGate,
}

/// Where the section of guest memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RamSection {
    /// Before its START.
    Awaited,
    /// Of this id, before its END.
    Open(u32),
    /// Behind its END.
    Ended,
}

/// What is to be done behind an event.
pub(super) enum Then<'e> {
    GoOn,
    /// The next bytes belong there.
    Page(VolatileSlice<'e>),
    /// The pages of this block are in the file.
    Block(RamBlock),
    /// The source is to hear this.
    Answer(Message),
    /// The page channels may have to be waited for.
    Synchronise(Mark),
}

impl<'e> Loader<'e> {
    /// Takes an event in, and says what is to be done behind it.
    pub(super) fn take(&mut self, event: &Event<'_>) -> Result<Then<'e>, LoadError> {
        match event {
            Event::Ram(RamRecord::Page(page)) => return Ok(Then::Page(self.ram.page(page))),
            Event::Ram(RamRecord::MultifdFlush) => return Ok(Then::Synchronise(Mark::Flush)),
            Event::Ram(RamRecord::EndOfSection) => return Ok(Then::Synchronise(Mark::Eos)),
            Event::Ram(record) => {
                self.ram.record(self.guest, record)?;
                if let RamRecord::Block(block) = record
                    && block.mapped_ram.is_some()
                {
                    return Ok(Then::Block(block.clone()));
                }
            }
            Event::Configuration(configuration) => self.compare(configuration)?,
            Event::Section { kind, header } => self.open(*kind, header)?,
            Event::Body(body) => {
                if let Some(SectionHeader { idstr, instance_id, version_id, .. }) = self.section.take() {
                    self.devices.push(DeviceSection { idstr, instance_id, version_id, body: body.to_vec() });
                }
            }
            Event::Vfio(VfioRecord::Setup | VfioRecord::Data { .. } | VfioRecord::EndOfState) => {}
            Event::Command(Command::OpenReturnPath) => {
                self.return_path = self.answers;
                if self.gate.return_path_opened()? == Ack::Send {
                    return Ok(Then::Answer(Message::SwitchoverAck));
                }
            }
            Event::Command(Command::Ping(handover::ANNOUNCE)) => {
                self.confirmation = self.return_path;
                return Ok(Then::Answer(Message::Pong { value: handover::AGREED }));
            }
            Event::Command(Command::Ping(value)) => return Ok(Then::Answer(Message::Pong { value: *value })),
            Event::Command(Command::SwitchoverStart) => {}
            Event::Command(command) => {
                let capability = match command {
                    Command::EnableColo => "x-colo",
                    _ => "postcopy-ram",
                };
                let name = command.name();
                return Err(LoadError::Unsupported(format!(
                    "command {name} of capability '{capability}' (turn it off at the source)"
                )));
            }
            Event::SectionPart { kind, section_id } => {
                if *kind == SectionKind::End && self.ram_section == RamSection::Open(*section_id) {
                    self.ram_section = RamSection::Ended;
                }
            }
            Event::Header | Event::SectionFooter { .. } | Event::Eof | Event::VmDescription { .. } => {}
            other => return Err(LoadError::Unsupported(format!("{other:?}"))),
        }
        Ok(Then::GoOn)
    }

    fn open(&mut self, kind: SectionKind, header: &SectionHeader) -> Result<(), LoadError> {
        let SectionHeader { idstr, instance_id, section_id, .. } = header;
        match header.content() {
            Content::Ram if *instance_id == 0 => self.ram_section = RamSection::Open(*section_id),
            // Their configuration, which is a FULL section, comes with devices on PCI; this machine has none.
            Content::Vfio if kind == SectionKind::Start && *instance_id == 0 && self.iterative(idstr).is_some() => {}
            Content::Opaque if kind == SectionKind::Full && self.guest.devices().has(idstr, *instance_id) => {
                self.section = Some(header.clone());
            }
            _ => {
                let advice = self.guest.devices().advice(idstr);
                return Err(LoadError::UnknownSection { idstr: idstr.clone(), instance_id: *instance_id, advice });
            }
        }
        if !self.came.insert((idstr.clone(), *instance_id)) {
            return Err(LoadError::SectionAgain { idstr: idstr.clone(), instance_id: *instance_id });
        }
        Ok(())
    }

    /// The device whose state comes in sections of this name, piece by piece.
    fn iterative(&self, idstr: &CountedString) -> Option<&'e dyn IterativeDevice> {
        self.guest.devices().iterative().into_iter().find(|device| *idstr == *device.idstr())
    }

    /// Takes a piece of the state of the device of this name over.
    pub(super) fn load_iterative(&self, idstr: &CountedString, state: &[u8]) -> Result<(), GuestError> {
        self.iterative(idstr).ok_or_else(|| format!("there is no device '{idstr}'"))?.load(state)
    }

    /// Refuses a stream that has not brought all of guest memory. Which devices are missing, the guest says.
    pub(super) fn check_complete(&self) -> Result<(), LoadError> {
        match self.ram_section {
            RamSection::Awaited => return Err(LoadError::RamIncomplete { missing: "START" }),
            RamSection::Open(_) => return Err(LoadError::RamIncomplete { missing: "END" }),
            RamSection::Ended => {}
        }
        let listed = self.ram.listed();
        let missing = self.guest.ram().into_iter().find(|view| !listed.iter().any(|block| block.name == *view.name));
        missing.map_or(Ok(()), |view| Err(LoadError::MissingRamBlock { name: view.name.into() }))
    }

    fn compare(&self, configuration: &Configuration) -> Result<(), LoadError> {
        let expected = self.guest.machine_type();
        // QEMU compares as many bytes as were sent.
        if !expected.as_bytes().starts_with(&configuration.machine) {
            let found = configuration.machine.escape_ascii().to_string();
            return Err(LoadError::MachineType { found, expected: expected.into() });
        }
        let (here, there) = (self.mapped_ram, configuration.has_capability(MAPPED_RAM));
        if here != there {
            return Err(LoadError::CapabilityDiffers { name: MAPPED_RAM, here });
        }
        for subsection in &configuration.subsections {
            match subsection {
                ConfigurationSubsection::TargetPageBits(_) => {
                    let found = configuration.page_geometry().map_or(0, PageGeometry::size);
                    if found != PageGeometry::X86.size() {
                        return Err(LoadError::PageSize { found, expected: PageGeometry::X86.size() });
                    }
                }
                ConfigurationSubsection::Capabilities(names) => {
                    if let Some(found) = names.iter().find(|name| *name != MAPPED_RAM).cloned() {
                        return Err(LoadError::Capability { found });
                    }
                }
                // This machine has no UUID to compare with, and QEMU without one does not compare either.
                _ => {}
            }
        }
        Ok(())
    }
}
