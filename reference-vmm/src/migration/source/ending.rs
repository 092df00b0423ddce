//! How a migration ends at the source: the guest is stopped, the rest is sent and handed over, or everything goes back.

use super::{EXPLANATION_PATIENCE, Engine, PRE_SWITCHOVER_POLL, RAM_SECTION, Stopped, monotonic_now};
use crate::migration::{
    DeviceSection, MigrationError, SavedDevices, Status,
    channel::{Source, write_all},
    handover,
    ram_sender::{RamSender, Sent},
};
use qevm_multifd::SourceSync;
use qevm_savevm::{
    command::Command,
    framing::SectionHeader,
    vmdesc::{Description, DeviceBody, DeviceDescription, TextStyle},
};
use qevm_wire::PageGeometry;
use std::time::Instant;

impl Engine<'_> {
    /// Stops the guest.
    pub(super) fn stop(&mut self) -> Result<(), MigrationError> {
        self.check()?;
        self.pause()?;
        self.job.update(|statistics| statistics.ram.precopy_bytes = self.transferred);
        if self.job.capabilities().pause_before_switchover {
            self.job.advance(Status::PreSwitchover)?;
            while !self.job.may_go_on(PRE_SWITCHOVER_POLL)? {
                self.check()?;
            }
        }
        self.job.advance(Status::Device)
    }

    /// Stops the guest, unless the mode did it already.
    pub(super) fn pause(&mut self) -> Result<(), MigrationError> {
        if self.stopped.is_some() {
            return Ok(());
        }
        let at = Instant::now();
        let stopped_at = monotonic_now();
        let was_running = self.guest.pause().map_err(MigrationError::guest("stop the guest"))?;
        self.stopped = Some(Stopped { at, was_running });
        self.job.update(|statistics| statistics.stopped_at = Some(stopped_at));
        Ok(())
    }

    pub(super) fn save_devices(&self) -> Result<SavedDevices, MigrationError> {
        let was_running = self.stopped.as_ref().is_some_and(|stopped| stopped.was_running);
        let saved = self.guest.save_devices(self.profile, was_running);
        saved.map_err(MigrationError::guest("save the state of the devices"))
    }

    /// Sends what is left of the RAM, and the devices: all but the end of the stream.
    pub(super) fn send_rest(&mut self, ram: &mut RamSender<'_>, devices: SavedDevices) -> Result<(), MigrationError> {
        if self.profile.switchover_start {
            self.stream.command(Command::SwitchoverStart)?;
        }
        self.stream.section_end(RAM_SECTION)?;
        while self.send_pages(ram, None, u64::MAX)? {
            self.check()?;
        }
        self.synchronise(SourceSync::round_end)?;
        if let Some(saving) = self.saving {
            let bytes = saving.finish()?;
            self.sent(Sent { bytes, ..Sent::default() });
        }
        self.synchronise(SourceSync::completion)?;
        self.stream.footer()?;
        self.send_device_rest()?;
        let first = RAM_SECTION + 1 + self.devices.devices().len() as u32;
        for (section_id, device) in (first..).zip(&devices.sections) {
            let (idstr, instance_id, version_id) = (device.idstr.clone(), device.instance_id, device.version_id);
            self.stream.section_full(&SectionHeader { section_id, idstr, instance_id, version_id }, &device.body)?;
        }
        self.flush("the state of the devices")?;
        self.stream.eof()?;
        if self.profile.vmdesc {
            let described = devices.vmdesc.unwrap_or_else(|| describe(&devices.sections));
            self.stream.vmdesc(&described)?;
        }
        self.check()
    }

    /// Sends the end of the stream, which makes the destination complete, and waits for its verdict.
    pub(super) fn hand_over(&mut self) -> Result<(), MigrationError> {
        let Some(return_path) = self.return_path else {
            self.flush("the end of the stream")?;
            return match self.channel.settle() {
                Ok(()) => self.job.handed_over(),
                // The destination may have got everything, and run the guest.
                Err(source) => Err(MigrationError::Unsettled { source }),
            };
        };
        return_path.sent_everything();
        // Even if this breaks half-way, the destination may have all it needs: its verdict counts.
        let sent = self.flush("the end of the stream");
        match return_path.verdict() {
            Ok(()) if return_path.agreed() => self.job.handed_over()?,
            // A QEMU runs the guest already: it is too late to cancel.
            Ok(()) => return Ok(()),
            Err(MigrationError::NoVerdict | MigrationError::ReturnPath(_)) => {
                sent?;
                return Err(MigrationError::NoVerdict);
            }
            Err(error) => return Err(error),
        }
        let confirmation = handover::confirmation()?;
        if let Err(error) = write_all(self.channel, &mut [Source::bytes(&confirmation)]) {
            // The destination has everything, and may even have been told: running the guest here is not safe.
            tracing::error!(
                "cannot confirm the handover ({error}): if the guest does not run at the destination, say 'cont' there"
            );
        }
        Ok(())
    }

    /// Replaces a broken channel by what the destination said about it.
    pub(super) fn explain(&self, error: MigrationError) -> MigrationError {
        match (error, self.return_path) {
            (error @ MigrationError::Send { .. }, Some(return_path)) => {
                return_path.explanation(EXPLANATION_PATIENCE).unwrap_or(error)
            }
            (error, _) => error,
        }
    }

    /// Lets the guest go on after a failure.
    pub(super) fn back_out(&mut self, error: MigrationError) -> MigrationError {
        // First of all the destination must not get any further.
        self.connections.close();
        self.let_run();
        let was_running = self.stopped.take().is_some_and(|stopped| stopped.was_running);
        if matches!(error, MigrationError::Unsettled { .. }) {
            self.guest.handed_over();
            return error;
        }
        if was_running && let Err(resume) = self.guest.resume() {
            let source = format!("{resume} (the migration had failed: {error})").into();
            return MigrationError::Guest { doing: "resume the guest", source };
        }
        if !was_running {
            self.guest.stay_stopped();
            if self.inactive
                && let Err(claim) = self.guest.activate()
            {
                let source = format!("{claim} (the migration had failed: {error})").into();
                return MigrationError::Guest { doing: "take the guest's disks back", source };
            }
        }
        error
    }

    pub(super) fn finish(&mut self, result: Result<(), MigrationError>) -> Result<(), MigrationError> {
        self.job.update(|statistics| {
            statistics.total_time = self.start.elapsed();
            if let Some((stopped, handed_over)) = self.stopped.as_ref().zip(self.handed_over) {
                statistics.downtime = Some(handed_over - stopped.at);
                statistics.ram.downtime_bytes = self.transferred.saturating_sub(statistics.ram.precopy_bytes);
            }
        });
        self.devices.devices().iter().for_each(|device| device.end());
        if result.is_ok() {
            self.let_run();
            self.guest.handed_over();
        }
        self.job.end(result.as_ref().err());
        // The return path is read to its end: the destination closes when it has taken over.
        self.connections.all().for_each(|channel| channel.finish_writing());
        result
    }
}

/// A description of sections as buffers, which is how QEMU describes handlers without fields.
fn describe(sections: &[DeviceSection]) -> String {
    let device = |section: &DeviceSection| DeviceDescription {
        name: section.idstr.to_string(),
        instance_id: section.instance_id,
        body: DeviceBody::OldStyle { size: section.body.len() as u64 },
    };
    let mut description = Description::default();
    description.page_size = Some(PageGeometry::X86.size());
    description.devices = sections.iter().map(device).collect();
    description.to_json(TextStyle::Compact)
}
