//! What the events of a stream mean for a destination.

use super::postcopy::Postcopy;
use super::{Action, Iterative, Phase, SectionUse};
use crate::core::{DeviceStateError, Mark, device_states};
use crate::{DeviceSection, LoadError, handover};
use qevm_multifd::Uuid;
use qevm_returnpath::Message;
use qevm_returnpath::switchover::{Ack, DestinationGate};
use qevm_savevm::Event;
use qevm_savevm::command::Command;
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::framing::{Content, SectionHeader, SectionKind};
use qevm_savevm::ram::RamRecord;
use qevm_savevm::vfio::VfioRecord;
use qevm_wire::{CountedString, PageGeometry};
use std::collections::HashSet;

/// The capabilities that both sides must agree on.
const MAPPED_RAM: &str = "mapped-ram";
const IGNORE_SHARED: &str = "x-ignore-shared";

/// The capability with which devices agree to the switchover.
const SWITCHOVER_ACK: &str = "switchover-ack";

/// What has come so far.
#[derive(Debug)]
pub(super) struct Loader {
    pub(super) machine_type: String,
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) mapped_ram: bool,
    pub(super) ignore_shared: bool,
    /// What is written to the main channel goes somewhere.
    pub(super) answers: bool,
    /// There are page channels.
    pub(super) page_channels: bool,
    /// The source says when they synchronise.
    pub(super) flushes: bool,
    /// Says when to agree to the switchover,
    pub(super) gate: DestinationGate,
    /// where the capability is on.
    pub(super) switchover_ack: bool,
    pub(super) iterative: Iterative,
    pub(super) devices: Vec<DeviceSection>,
    /// The RAM blocks that were listed.
    pub(super) listed: Vec<CountedString>,
    /// The guest may run before its memory is here.
    pub(super) postcopy: Postcopy,
    /// The sections that were opened, with START or FULL.
    pub(super) came: HashSet<(CountedString, u32, SectionKind)>,
    pub(super) ram: RamSection,
    /// A page with content has come.
    pub(super) has_pages: bool,
    /// Records of pages that came since the list of blocks.
    pub(super) records: u64,
    /// The stream may be a background snapshot, whose memory has no END.
    pub(super) snapshot: bool,
    /// The FULL section that is open, before its content.
    pub(super) section: Option<SectionHeader>,
    /// The source has opened a return path.
    pub(super) opened: bool,
    /// It has, and what is sent reaches it.
    pub(super) return_path: bool,
    /// The source confirms the handover.
    pub(super) confirmation: bool,
}

/// Where the section of guest memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RamSection {
    /// Before its START.
    Awaited,
    /// Of this id, before its END.
    Open(u32),
    /// After its END.
    Ended,
}

/// What follows an event.
pub(super) enum FollowUp<'a> {
    Do(Action<'a>),
    /// The guest is asked; the phase says what.
    Ask(Phase),
    /// The guest is to be started, and the stream goes on.
    Start,
}

impl Loader {
    /// Takes an event in, and says what follows.
    pub(super) fn take<'a>(&mut self, event: Event<'a>) -> Result<FollowUp<'a>, LoadError> {
        match event {
            Event::Ram(record) => return self.ram(record),
            Event::Configuration(configuration) => self.compare(&configuration)?,
            Event::Section { kind, header } => return self.open(kind, header),
            Event::Body(body) => {
                if let Some(SectionHeader { idstr, instance_id, version_id, .. }) = self.section.take() {
                    self.devices.push(DeviceSection { idstr, instance_id, version_id, body: body.to_vec() });
                }
            }
            Event::Vfio(record) => {
                if let Some(message) = self.device(record)?.filter(|_| self.return_path) {
                    return Ok(FollowUp::Do(Action::Send(message)));
                }
            }
            Event::Command(Command::SwitchoverStart) => {
                if self.iterative.has_transfers() {
                    return Ok(FollowUp::Do(Action::SwitchOver));
                }
            }
            Event::Command(
                command @ (Command::PostcopyAdvise(Some(_))
                | Command::RamDiscard(_)
                | Command::Packaged { .. }
                | Command::PostcopyListen
                | Command::PostcopyRun
                | Command::RecvBitmap(_)
                | Command::PostcopyResume),
            ) if self.postcopy.allowed => return self.postcopy.command(command, &self.listed),
            Event::Command(Command::Ping(value)) if self.return_path && self.postcopy.holds(value) => {}
            Event::Command(command) => {
                if let Some(message) = self.command(&command)?.filter(|_| self.return_path) {
                    return Ok(FollowUp::Do(Action::Send(message)));
                }
            }
            Event::SectionPart { kind, section_id } => {
                if kind == SectionKind::End && self.ram == RamSection::Open(section_id) {
                    self.ram = RamSection::Ended;
                }
                self.iterative.part(kind, section_id);
            }
            Event::SectionFooter { .. } => self.close_full()?,
            Event::Header | Event::Eof | Event::VmDescription { .. } => {}
            other => return Err(LoadError::Unsupported(format!("{other:?}"))),
        }
        Ok(FollowUp::Do(Action::Continue))
    }

    fn ram<'a>(&mut self, record: RamRecord<'a>) -> Result<FollowUp<'a>, LoadError> {
        match record {
            RamRecord::MemSize { .. } => {
                self.listed.clear();
                self.postcopy.lengths.clear();
                self.has_pages = false;
                self.records = 0;
                Ok(FollowUp::Do(Action::ForgetBlocks))
            }
            RamRecord::Block(block) => {
                self.listed.push(block.name.clone());
                self.postcopy.lengths.push(block.used_length);
                Ok(FollowUp::Ask(Phase::Block(block)))
            }
            RamRecord::EndOfBlocks => Ok(FollowUp::Do(Action::Continue)),
            RamRecord::Zero(page) if self.postcopy.listens => Ok(FollowUp::Ask(Phase::Place { page, zero: true })),
            RamRecord::Page(page) if self.postcopy.listens => Ok(FollowUp::Ask(Phase::Place { page, zero: false })),
            RamRecord::Zero(page) => Ok(FollowUp::Do(Action::Zero(page))),
            RamRecord::Xbzrle { page, data } => {
                self.has_pages = true;
                Ok(FollowUp::Do(Action::Difference { page, data }))
            }
            // The page channels have had nothing to carry since the guest stopped.
            RamRecord::EndOfSection if self.postcopy.listens => Ok(FollowUp::Do(Action::Continue)),
            RamRecord::MultifdFlush if self.postcopy.listens => {
                Err(LoadError::Unsupported("a flush of page channels after POSTCOPY_LISTEN".into()))
            }
            RamRecord::MultifdFlush => match self.page_channels {
                true => {
                    self.flushes = true;
                    Ok(FollowUp::Ask(Phase::Synchronising(Mark::Flush)))
                }
                false => Err(LoadError::MultifdOff),
            },
            // It goes on writing to its page channels when it sends nothing there any more, and waits for that to be
            // taken.
            RamRecord::EndOfSection if self.page_channels && !self.flushes && self.postcopy.advised => {
                let why = "capabilities 'postcopy-ram' and 'multifd' from a QEMU before 10.1 (turn one of them off at the source)";
                Err(LoadError::Unsupported(why.into()))
            }
            RamRecord::EndOfSection => match self.page_channels {
                true => Ok(FollowUp::Ask(Phase::Synchronising(Mark::Eos))),
                false => Ok(FollowUp::Do(Action::Continue)),
            },
            RamRecord::Compressed { .. } => {
                Err(LoadError::Unsupported("capability 'compress' (turn it off at the source)".into()))
            }
            RamRecord::Page(page) => {
                self.has_pages = true;
                self.records += 1;
                Ok(FollowUp::Do(Action::Page { page, remaining: 0 }))
            }
            // What else there may be one day is not understood.
            other => Err(LoadError::Unsupported(format!("{other:?}"))),
        }
    }

    /// What the record of an iterative device is answered with.
    fn device(&mut self, record: VfioRecord) -> Result<Option<Message>, LoadError> {
        match record {
            VfioRecord::Setup | VfioRecord::Data { .. } | VfioRecord::EndOfState => Ok(None),
            VfioRecord::InitDataSent if !self.switchover_ack => {
                Err(LoadError::CapabilityDiffers { name: SWITCHOVER_ACK, here: false })
            }
            VfioRecord::InitDataSent => {
                let device = self.iterative.current();
                if !self.opened {
                    return Err(LoadError::AckUnheard { device });
                }
                let ack = self.gate.agree(&device)?;
                Ok((ack == Ack::Send).then_some(Message::SwitchoverAck))
            }
            VfioRecord::Config => match self.section.as_ref().filter(|header| self.iterative.transfers(header)) {
                Some(header) => Err(DeviceStateError::OnMain { idstr: header.idstr.clone() }.into()),
                None => Ok(None),
            },
            VfioRecord::ConfigLoadReady if self.section.as_ref().is_some_and(|it| self.iterative.transfers(it)) => {
                Ok(None)
            }
            other => Err(LoadError::Unsupported(format!("{other:?} of a device"))),
        }
    }

    /// A FULL section ends, whose content was taken unless it is on its way over a page channel.
    fn close_full(&mut self) -> Result<(), LoadError> {
        let Some(header) = self.section.take() else { return Ok(()) };
        if !self.iterative.transfers(&header) {
            return Err(DeviceStateError::NotOnMain { idstr: header.idstr }.into());
        }
        let SectionHeader { idstr, instance_id, version_id, .. } = header;
        self.devices.push(DeviceSection { idstr, instance_id, version_id, body: Vec::new() });
        Ok(())
    }

    /// These configurations came over page channels: their sections have only places in the stream.
    pub(super) fn configurations(&mut self, configurations: &[(CountedString, Vec<u8>)]) -> Result<(), LoadError> {
        for (idstr, piece) in configurations {
            let vmstate = device_states::configuration(idstr, piece)?;
            match self.devices.iter_mut().find(|section| section.idstr == *idstr && section.instance_id == 0) {
                Some(section) => section.body = vmstate.to_vec(),
                None => return Err(LoadError::DeviceIncomplete { idstr: idstr.clone(), missing: "FULL" }),
            }
        }
        Ok(())
    }

    /// The answer to a command.
    fn command(&mut self, command: &Command) -> Result<Option<Message>, LoadError> {
        match command {
            Command::OpenReturnPath => {
                (self.opened, self.return_path) = (true, self.answers);
                let ack = self.gate.return_path_opened()?;
                Ok((ack == Ack::Send).then_some(Message::SwitchoverAck))
            }
            Command::Ping(handover::ANNOUNCE) => {
                self.confirmation = self.return_path;
                Ok(Some(Message::Pong { value: handover::AGREED }))
            }
            Command::Ping(value) => Ok(Some(Message::Pong { value: *value })),
            command => {
                let capability = match command {
                    Command::EnableColo => "x-colo",
                    _ => "postcopy-ram",
                };
                let name = command.name();
                Err(LoadError::Unsupported(format!(
                    "command {name} of capability '{capability}' (turn it off at the source)"
                )))
            }
        }
    }

    fn open(&mut self, kind: SectionKind, header: SectionHeader) -> Result<FollowUp<'static>, LoadError> {
        let usage = match header.content() {
            Content::Ram if header.instance_id == 0 => {
                self.ram = RamSection::Open(header.section_id);
                self.first(SectionKind::Start, &header)?;
                return Ok(FollowUp::Do(Action::Continue));
            }
            Content::Vfio if kind == SectionKind::Start && header.instance_id == 0 => Some(SectionUse::Iterative),
            Content::Vfio if kind == SectionKind::Full && header.instance_id == 0 => Some(SectionUse::Device),
            Content::Opaque if kind == SectionKind::Full => Some(SectionUse::Device),
            _ => None,
        };
        Ok(FollowUp::Ask(Phase::Section { header, usage }))
    }

    /// The guest has said whether it has a use for a section; if not, with the advice for the operator.
    pub(super) fn section(
        &mut self,
        header: SectionHeader,
        usage: Option<SectionUse>,
        known: Result<(), String>,
    ) -> Result<(), LoadError> {
        if let Err(advice) = known {
            let SectionHeader { idstr, instance_id, .. } = header;
            return Err(LoadError::UnknownSection { idstr, instance_id, advice });
        }
        match usage {
            Some(SectionUse::Device) => {
                self.first(SectionKind::Full, &header)?;
                self.iterative.leave();
                self.section = Some(header);
            }
            _ => {
                self.first(SectionKind::Start, &header)?;
                self.iterative.start(header);
            }
        }
        Ok(())
    }

    fn first(&mut self, kind: SectionKind, header: &SectionHeader) -> Result<(), LoadError> {
        let SectionHeader { idstr, instance_id, .. } = header;
        if self.came.insert((idstr.clone(), *instance_id, kind)) {
            return Ok(());
        }
        Err(LoadError::SectionAgain { idstr: idstr.clone(), instance_id: *instance_id })
    }

    /// Refuses a stream that has not brought all of guest memory, whose blocks are called `names`. Which devices are
    /// missing, the guest says.
    pub(super) fn check_complete(&self, names: &[String]) -> Result<(), LoadError> {
        match self.ram {
            RamSection::Awaited => return Err(LoadError::RamIncomplete { missing: "START" }),
            RamSection::Open(_) if self.snapshot && self.each_page_came_once() => {}
            RamSection::Open(_) => return Err(LoadError::RamIncomplete { missing: "END" }),
            RamSection::Ended => {}
        }
        let missing = names.iter().find(|name| !self.listed.iter().any(|listed| *listed == ***name));
        missing.map_or(Ok(()), |name| Err(LoadError::MissingRamBlock { name: name.clone() }))?;
        self.iterative.check_complete()
    }

    /// As in a background snapshot of QEMU's. The bitmap of a file has every page at most once.
    fn each_page_came_once(&self) -> bool {
        self.mapped_ram || self.postcopy.lengths.iter().sum::<u64>() == self.records * PageGeometry::X86.size()
    }

    fn compare(&self, configuration: &Configuration) -> Result<(), LoadError> {
        // QEMU compares as many bytes as were sent.
        if !self.machine_type.as_bytes().starts_with(&configuration.machine) {
            let found = configuration.machine.escape_ascii().to_string();
            return Err(LoadError::MachineType { found, expected: self.machine_type.clone() });
        }
        for (name, here) in [(IGNORE_SHARED, self.ignore_shared), (MAPPED_RAM, self.mapped_ram)] {
            if here != configuration.has_capability(name) {
                return Err(LoadError::CapabilityDiffers { name, here });
            }
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
                    if let Some(found) =
                        names.iter().find(|name| *name != MAPPED_RAM && *name != IGNORE_SHARED).cloned()
                    {
                        return Err(LoadError::Capability { found });
                    }
                }
                // Whether the capability is on here does not matter, as with a QEMU.
                ConfigurationSubsection::Uuid(found) => match self.uuid {
                    Some(here) if here != *found => return Err(LoadError::Uuid { found: *found, here }),
                    Some(_) => {}
                    None => tracing::warn!("UUID is received {}, but local uuid isn't set", Uuid(*found)),
                },
                _ => {}
            }
        }
        Ok(())
    }
}
