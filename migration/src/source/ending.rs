//! How a migration ends at the source: the guest is stopped, the rest is sent and handed over, or everything goes back.

use super::{EXPLANATION_PATIENCE, Engine, PRE_SWITCHOVER_POLL, RAM_SECTION, Stopped, monotonic_now};
use crate::{
    DeviceSection, GuestError, MigrationError, SavedDevices, Status,
    channel::{Source, write_all},
    connections::Reader,
    handover,
    ram_sender::{RamSender, Sent},
    return_path::ReturnPath,
};
use qevm_multifd::SourceSync;
use qevm_savevm::{
    command::Command,
    framing::SectionHeader,
    vmdesc::{Description, DeviceBody, DeviceDescription, TextStyle},
};
use qevm_wire::PageGeometry;
use std::{
    io,
    time::{Duration, Instant},
};

/// How long the destination's host may take to acknowledge the confirmation.
const CONFIRMATION_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const CONFIRMATION_POLL: Duration = Duration::from_millis(1);

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
        let saved = self.guest.devices().save(self.profile, was_running);
        saved.map_err(MigrationError::guest("save the state of the devices"))
    }

    /// Sends what is left of the RAM, and the devices: all but the end of the stream. Gives the description that stands behind that.
    pub(super) fn send_rest(
        &mut self,
        ram: &mut RamSender<'_>,
        devices: SavedDevices,
    ) -> Result<Option<String>, MigrationError> {
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
        if let Some(return_path) = self.return_path.filter(|_| !self.agreed()) {
            self.stream.command(return_path.ping(handover::LOADED)?)?;
        }
        self.flush("the state of the devices")?;
        let described = devices.vmdesc.filter(|_| self.profile.vmdesc);
        let described = described.or_else(|| self.profile.vmdesc.then(|| describe(&devices.sections)));
        self.check()?;
        Ok(described)
    }

    /// Sends the end of the stream, which makes the destination complete, and waits for its verdict.
    ///
    /// Whatever fails before any of that was sent, the destination does not run the guest, which may go on here. Behind it, only one that
    /// waits for a confirmation or says that it has failed does not run it for certain.
    pub(super) fn hand_over(&mut self, description: Option<&str>) -> Result<(), MigrationError> {
        let agreed = self.agreed();
        if let Some(return_path) = self.return_path {
            return_path.answers()?;
            self.check()?;
            return_path.everything_is_sent()?;
        }
        self.stream.eof()?;
        if let Some(description) = description {
            self.stream.vmdesc(description)?;
        }
        let sent = self.send_end()?;
        match self.return_path.map(ReturnPath::verdict) {
            Some(Ok(())) if agreed => self.job.handed_over()?,
            // A QEMU runs the guest already: it is too late to cancel.
            Some(Ok(())) => {}
            Some(Err(error @ MigrationError::PeerFailed { .. })) => return Err(error),
            Some(Err(MigrationError::NoVerdict | MigrationError::ReturnPath(_))) if agreed => {
                sent?;
                return Err(MigrationError::NoVerdict);
            }
            Some(Err(error)) if agreed => return Err(error),
            Some(Err(error)) => return Err(self.unsettled(error)),
            None => self.settle(sent)?,
        }
        self.handed_over = Some(Instant::now());
        if agreed { self.confirm() } else { Ok(()) }
    }

    /// Whether the destination waits for a confirmation before it runs the guest. It has said so before the guest was stopped.
    fn agreed(&self) -> bool {
        self.return_path.is_some_and(ReturnPath::agreed)
    }

    /// Sends what the stream holds, its end. An error of its own says that nothing has got out; behind that, the inner one says that not
    /// all has.
    fn send_end(&mut self) -> Result<Result<(), MigrationError>, MigrationError> {
        const DOING: &str = "the end of the stream";
        let failed = |source| MigrationError::Send { doing: DOING, source };
        let first = loop {
            match self.channel.write(&[Source::bytes(self.stream.bytes())]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => break written.map_err(failed)?,
            }
        };
        let rest = write_all(self.channel, &mut [Source::bytes(&self.stream.bytes()[first..])]);
        let bytes = self.stream.bytes().len() as u64;
        self.stream.clear();
        self.sent(Sent { bytes, ..Sent::default() });
        Ok(rest.map_err(failed))
    }

    /// Waits, without a return path, until everything has been taken.
    fn settle(&self, sent: Result<(), MigrationError>) -> Result<(), MigrationError> {
        if self.connections.reader == Reader::Nobody {
            sent?;
            return self.job.handed_over();
        }
        sent.map_err(|error| self.unsettled(error))?;
        match self.channel.settle() {
            Ok(()) => self.job.handed_over().map_err(|error| self.unsettled(error)),
            // What it has not read it does not have.
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => {
                Err(MigrationError::Send { doing: "the end of the stream", source })
            }
            Err(source) => Err(self.unsettled(source)),
        }
    }

    /// Says that the guest will not run here again, and waits until the destination's host has that.
    fn confirm(&self) -> Result<(), MigrationError> {
        let confirmation = handover::confirmation()?;
        write_all(self.channel, &mut [Source::bytes(&confirmation)]).map_err(|error| self.unsettled(error))?;
        let deadline = Instant::now() + CONFIRMATION_PATIENCE;
        while self.channel.backlog().map_err(|error| self.unsettled(error))? > 0 {
            if let Some(Err(error)) = self.return_path.and_then(|heard| heard.closed(CONFIRMATION_POLL)) {
                return Err(self.unsettled(error));
            }
            if Instant::now() > deadline {
                return Err(self.unsettled("it does not acknowledge that it is to run the guest"));
            }
        }
        Ok(())
    }

    /// Whether the guest runs at the destination is not known.
    fn unsettled(&self, reason: impl Into<GuestError>) -> MigrationError {
        let reason = self.job.check().map_or_else(Into::into, |()| reason.into());
        MigrationError::Unsettled { reason }
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
            self.guest.hooks().handed_over();
            return error;
        }
        if was_running && let Err(resume) = self.guest.resume() {
            let source = format!("{resume} (the migration had failed: {error})").into();
            return MigrationError::Guest { doing: "resume the guest", source };
        }
        if !was_running {
            self.guest.hooks().stay_stopped();
            if self.inactive
                && let Err(claim) = self.guest.hooks().activate()
            {
                let source = format!("{claim} (the migration had failed: {error})").into();
                return MigrationError::Guest { doing: "take the guest's disks back", source };
            }
        }
        error
    }

    pub(super) fn finish(&mut self, result: Result<(), MigrationError>) -> Result<(), MigrationError> {
        self.job.update(|statistics| {
            if let Some((stopped, handed_over)) = self.stopped.as_ref().zip(self.handed_over) {
                statistics.downtime = Some(handed_over - stopped.at);
                statistics.ram.downtime_bytes = self.transferred.saturating_sub(statistics.ram.precopy_bytes);
            }
        });
        self.devices.devices().iter().for_each(|device| device.end());
        if result.is_ok() {
            self.let_run();
            self.guest.hooks().handed_over();
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
