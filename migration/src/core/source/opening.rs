//! How a stream begins: the configuration and the list of RAM blocks.

use super::phase::{Phase, Precopy, Setup, Step};
use super::{Action, Answers, PageRoute, RAM_SECTION, SourceCore, idstr};
use crate::{MigrationError, Mode, Status, handover};
use qevm_multifd::SourceSync;
use qevm_savevm::command::{Command, PostcopyAdvise};
use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram;
use qevm_wire::PageGeometry;
use std::time::Duration;

/// Value of the PING that QEMU sends when it has opened the return path.
const FIRST_PING: u32 = 1;

impl SourceCore {
    pub(super) fn open(
        &mut self,
        step: Setup,
        now: Duration,
        answers: Option<&mut Answers>,
    ) -> Result<(), MigrationError> {
        let next = match step {
            Setup::Begin => {
                if self.parameters.mode != Mode::Normal {
                    self.pause(now);
                }
                self.greet(answers)?;
                if self.options.profile.preempt_pre_7_2 {
                    // The destination tells connections apart by their order.
                    self.open_preempt();
                }
                let snapshot = self.options.capabilities.background_snapshot;
                self.do_next(if snapshot { Action::PrepareSnapshot } else { Action::StartLog });
                Setup::List
            }
            Setup::List => {
                self.list_blocks(answers.is_some())?;
                Setup::CloseList
            }
            Setup::CloseList => {
                self.synchronise(SourceSync::setup)?;
                self.stream.footer()?;
                self.begin_devices(answers)?;
                self.do_next(Action::Send { doing: "the list of RAM blocks" });
                Setup::Done
            }
            Setup::Done => {
                self.statistics.setup_time = now;
                self.statistics.ram.total = self.remaining_bytes();
                self.statistics.ram.page_size = PageGeometry::X86.size();
                if self.options.capabilities.background_snapshot {
                    self.begin_snapshot();
                    return Ok(());
                }
                self.statistics.expected_downtime = self.parameters.downtime_limit();
                self.do_next(Action::Status(Status::Active));
                self.do_next(Action::ReadLog);
                self.phase = Phase::Precopy(Precopy::default(), Step::FirstRead);
                return Ok(());
            }
        };
        self.phase = Phase::Setup(next);
        Ok(())
    }

    /// The first bytes. They are sent before anything that may take time: a destination gives up a connection that says
    /// nothing.
    fn greet(&mut self, answers: Option<&mut Answers>) -> Result<(), MigrationError> {
        let configuration = self.options.profile.send_configuration.then(|| self.configuration()).transpose()?;
        self.stream.header(configuration.as_ref())?;
        if let Some(answers) = answers {
            self.stream.command(Command::OpenReturnPath)?;
            self.stream.command(answers.ping(FIRST_PING)?)?;
            self.stream.command(answers.ping(handover::ANNOUNCE)?)?;
            if self.options.capabilities.postcopy_ram {
                let sizes = (0..self.options.blocks.len()).map(|block| self.options.host_page_size(block));
                let page_size_summary = sizes.fold(0, |summary, size| summary | size);
                let advise = PostcopyAdvise { page_size_summary, target_page_size: PageGeometry::X86.size() };
                self.stream.command(Command::PostcopyAdvise(Some(advise)))?;
            }
        }
        self.do_next(Action::Send { doing: "the header of the stream" });
        Ok(())
    }

    /// Everything up to the list of RAM blocks.
    fn list_blocks(&mut self, answers: bool) -> Result<(), MigrationError> {
        self.stream.section_start(&SectionHeader {
            section_id: RAM_SECTION,
            idstr: idstr("ram")?,
            instance_id: 0,
            version_id: ram::SECTION_VERSION,
        })?;
        let advised = self.options.capabilities.postcopy_ram && answers;
        let block = |(index, (name, len)): (usize, &(String, u64))| {
            let size = self.options.host_page_size(index);
            let page_size = Some(size).filter(|size| advised && *size != PageGeometry::X86.size());
            // QEMU's is where the memory is in a part of the machine, which is 0 for a memory backend.
            let address = self.options.capabilities.ignore_shared.then_some(0);
            Ok(ram::RamBlock { page_size, address, ..ram::RamBlock::new(idstr(name)?, *len) })
        };
        let blocks = self.options.blocks.iter().enumerate().map(block);
        let blocks = blocks.collect::<Result<Vec<_>, MigrationError>>()?;
        match self.options.route {
            PageRoute::Main | PageRoute::Channels => self.stream.ram_setup(blocks)?,
            PageRoute::File | PageRoute::FileByThreads => self.do_next(Action::PlaceBlocks(blocks)),
        }
        Ok(())
    }

    fn configuration(&self) -> Result<Configuration, MigrationError> {
        let mut configuration = Configuration::new(self.options.machine_type.clone());
        // In QEMU's order.
        let file = matches!(self.options.route, PageRoute::File | PageRoute::FileByThreads);
        let told = [("x-ignore-shared", self.options.capabilities.ignore_shared), ("mapped-ram", file)];
        let told =
            told.into_iter().filter(|(_, on)| *on).map(|(name, _)| idstr(name)).collect::<Result<Vec<_>, _>>()?;
        if !told.is_empty() {
            configuration.subsections.push(ConfigurationSubsection::Capabilities(told));
        }
        if let Some(uuid) = self.options.uuid.filter(|_| self.options.capabilities.validate_uuid) {
            configuration.subsections.push(ConfigurationSubsection::Uuid(uuid));
        }
        Ok(configuration)
    }
}
