//! What a driver reports of the actions that it has carried out.

use super::{Destination, Phase, Start};
use crate::{DeviceSection, Doubt, GuestError, LoadError, MigrationError};
use qevm_multifd::SyncError;
use qevm_wire::{CountedString, Decode, Located};

impl Destination {
    /// The next `count` bytes of the main channel are in their place: of a page or of a [mapped
    /// block](super::Action::MappedBlock), or they are of no use.
    ///
    /// # Errors
    /// They are more than belong there.
    pub fn placed(&mut self, count: u64) -> Result<(), MigrationError> {
        if matches!(self.phase, Phase::MappedBlock(_)) {
            self.phase = Phase::Stream;
        }
        self.skip(count)
    }

    /// The guest has a use for the [section](super::Action::Section), or what the operator may do.
    ///
    /// # Errors
    /// It has none, or the section has come before.
    pub fn section(&mut self, known: Result<(), String>) -> Result<(), MigrationError> {
        match std::mem::replace(&mut self.phase, Phase::Stream) {
            Phase::Section { header, usage } => {
                let taken = self.loader.section(header, usage, known);
                taken.map_err(|error| self.refuse(error))
            }
            phase => self.out_of_turn(phase),
        }
    }

    /// The guest has the [block](super::Action::Block) that was listed.
    pub fn block_fits(&mut self) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Stream) {
            Phase::Block(block) if block.mapped_ram.is_some_and(|header| !header.is_absent()) => {
                Phase::MappedBlock(block)
            }
            Phase::Block(_) => Phase::Stream,
            phase => phase,
        };
    }

    /// The main channel and the page channels have [synchronised](super::Action::Synchronise), or memory is
    /// [complete](super::Action::EndOfMemory) on all of them.
    ///
    /// # Errors
    /// They have not; or not all of guest memory has come.
    pub fn synchronised(&mut self, result: Result<(), SyncError>) -> Result<(), MigrationError> {
        result.map_err(|error| self.refuse(error.into()))?;
        match std::mem::replace(&mut self.phase, Phase::Stream) {
            Phase::Synchronising(_) => Ok(()),
            Phase::EndOfMemory => self.memory_is_complete(),
            phase => self.out_of_turn(phase),
        }
    }

    /// The state of devices that comes over page channels has been [loaded](super::Action::DeviceStates), and these are
    /// their configurations: the section's name, and the last piece without its header.
    ///
    /// # Errors
    /// It has not; or a configuration is not framed as one.
    pub fn device_states(
        &mut self,
        result: Result<Vec<(CountedString, Vec<u8>)>, LoadError>,
    ) -> Result<(), MigrationError> {
        let configurations = result.map_err(|error| self.refuse(error))?;
        match std::mem::replace(&mut self.phase, Phase::LoadingDevices) {
            Phase::DeviceStates => {
                let taken = self.loader.configurations(&configurations);
                taken.map_err(|error| self.refuse(error))
            }
            phase => self.out_of_turn(phase),
        }
    }

    /// The state of the devices.
    pub fn devices(&self) -> &[DeviceSection] {
        &self.loader.devices
    }

    /// The guest has taken over the state of the [devices](super::Action::LoadDevices), and ran at the source or not;
    /// or has [its disks](super::Action::Activate).
    ///
    /// # Errors
    /// It has not.
    pub fn loaded(&mut self, result: Result<bool, GuestError>) -> Result<(), MigrationError> {
        let running = result.map_err(|error| Located::new(LoadError::Devices(error), self.decoder.offset()))?;
        self.loader.devices.clear();
        let late = self.options.late_block_activate;
        match self.start {
            // It has failed meanwhile, for a reason that was told.
            None if self.loader.postcopy.listens => {}
            Some(_) if late => self.start = Some(Start::Answering { running }),
            Some(_) => self.start = Some(Start::Activating { running }),
            None if late => self.phase = self.verdict(running),
            None => self.phase = Phase::Activating { running },
        }
        Ok(())
    }

    /// The guest has [its disks](super::Action::Activate).
    ///
    /// # Errors
    /// It has not: another process uses one.
    pub fn activated(&mut self, result: Result<(), GuestError>) -> Result<(), MigrationError> {
        result.map_err(|error| Located::new(LoadError::Devices(error), self.decoder.offset()))?;
        match (self.start, &self.phase) {
            (Some(Start::Activating { running }), _) => self.start = Some(Start::Answering { running }),
            (_, Phase::Activating { running }) => self.phase = self.verdict(*running),
            _ => {}
        }
        Ok(())
    }

    /// The source has been [told](super::Action::Tell) that the guest has arrived.
    ///
    /// # Errors
    /// It is not certain.
    pub fn told(&mut self, result: Result<(), Doubt>) -> Result<(), MigrationError> {
        result?;
        if let Phase::Telling { running } = self.phase {
            self.phase = match self.loader.confirmation {
                true if !self.runs_early() => Phase::Confirming { running, until: self.now + self.handover_time() },
                _ => Phase::Arrived { running },
            };
        }
        Ok(())
    }

    /// The driver has answered a question that was not asked.
    fn out_of_turn(&mut self, phase: Phase) -> Result<(), MigrationError> {
        self.phase = phase;
        let source = "the destination was told the answer to a question that it had not asked".into();
        Err(MigrationError::Guest { doing: "drive the destination", source })
    }
}
