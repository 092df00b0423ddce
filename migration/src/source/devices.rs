//! Devices whose state goes in parts, in the sections of QEMU's VFIO devices: what they have to send, and sending it.

use super::{Engine, RAM_SECTION, idstr};
use crate::{
    IterativeDevice, MigrationError, Pending,
    ram_sender::RamSender,
    switchover::{Decision, Remaining, Round, Switchover, expected_downtime},
};
use qevm_savevm::{event::Event, framing::SectionHeader, vfio::VfioRecord};
use std::time::Duration;

/// Bytes of a device's state in one record (QEMU 8.1 to 11.1).
const RECORD: usize = 1 << 20;
/// `version_id` of the sections.
const SECTION_VERSION: u32 = 1;
/// With less than this much to do until the dirty log is read again, the engine waits: where only a device is in the way of the
/// switchover, it would else do nothing but read the log.
const PACE: Duration = Duration::from_millis(20);

impl<'e> Engine<'e> {
    /// Opens the sections.
    pub(super) fn begin_devices(&mut self) -> Result<(), MigrationError> {
        for (section_id, device) in self.numbered() {
            device.begin().map_err(MigrationError::guest("prepare a device for migration"))?;
            self.stream.section_start(&SectionHeader {
                section_id,
                idstr: idstr(device.idstr())?,
                instance_id: 0,
                version_id: SECTION_VERSION,
            })?;
            self.stream.event(&Event::Vfio(VfioRecord::Setup))?;
            self.end_section()?;
        }
        Ok(())
    }

    /// Sends what the devices have while the guest runs, but no more than they had at the beginning: one that goes on
    /// making state does not make the round endless.
    pub(super) fn send_device_parts(&mut self) -> Result<(), MigrationError> {
        for (section_id, device) in self.numbered() {
            let mut left = device.estimate().precopy;
            while left > 0 {
                self.check()?;
                self.limiter.set_limit(self.job.parameters().max_bandwidth);
                let now = self.start.elapsed();
                if self.limiter.allowance(now) == 0 {
                    self.job.sleep(self.limiter.wait(now))?;
                    continue;
                }
                self.stream.section_part(section_id)?;
                let sent = self.send_record(device, RECORD.min(usize::try_from(left).unwrap_or(RECORD)))?;
                self.end_section()?;
                self.flush("the state of a device")?;
                if sent == 0 {
                    break;
                }
                left = left.saturating_sub(sent);
            }
        }
        Ok(())
    }

    /// Sends all that is left of the devices of a stopped guest.
    pub(super) fn send_device_rest(&mut self) -> Result<(), MigrationError> {
        for (section_id, device) in self.numbered() {
            self.stream.section_end(section_id)?;
            while self.send_record(device, RECORD)? > 0 {
                self.flush("the rest of the state of a device")?;
                self.check()?;
            }
            self.end_section()?;
        }
        Ok(())
    }

    /// Decides by estimates, and asks exactly where that matters. Gives what remains in all, too.
    pub(super) fn decide(
        &mut self,
        switchover: &mut Switchover,
        ram: &RamSender<'_>,
        round: &Round<'_>,
    ) -> Result<(Decision, u64), MigrationError> {
        let ram_bytes: u64 = ram.remaining().map(|(_, bytes)| bytes).sum();
        let fits = |devices: u64| {
            expected_downtime(ram_bytes.saturating_add(devices), round).is_some_and(|time| time <= round.downtime_limit)
        };
        let now = self.start.elapsed();
        let mut asked = self.devices.is_due(now, fits);
        let mut pending = if asked { self.ask()? } else { self.devices.estimate() };
        let parts = self.parts(ram, &pending);
        let mut decision = switchover.decide(&Round { remaining: &parts, ..*round });
        if let Decision::SwitchOver(reason) = decision
            && !asked
            && !self.devices.devices().is_empty()
        {
            (pending, asked) = (self.ask()?, true);
            let parts = self.parts(ram, &pending);
            decision = switchover.confirm(reason, &Round { remaining: &parts, ..*round });
        }
        tracing::trace!(asked, ?decision, ?pending, ram_bytes, "round");
        let devices = pending.iter().fold(0, |sum: u64, pending| sum.saturating_add(pending.total()));
        self.job.update(|statistics| statistics.devices_remaining = devices);
        Ok((decision, ram_bytes.saturating_add(devices)))
    }

    /// Waits a little if there is hardly anything to send before the dirty log is read again, though the guest cannot be stopped.
    pub(super) fn pace(&mut self, ram: &RamSender<'_>) -> Result<(), MigrationError> {
        let devices = self.devices.estimate();
        if devices.iter().all(|pending| pending.stopcopy == 0) {
            return Ok(());
        }
        let sendable = devices.iter().map(|pending| pending.precopy).chain(ram.remaining().map(|(_, bytes)| bytes));
        let sendable = sendable.fold(0, u64::saturating_add);
        let enough = self.bandwidth.estimate().unwrap_or(0) / u64::from(1000 / PACE.subsec_millis());
        if sendable < enough {
            self.job.sleep(PACE)?;
            // It says nothing about the link.
            self.accounted.1 = self.start.elapsed();
        }
        Ok(())
    }

    fn ask(&mut self) -> Result<Vec<Pending>, MigrationError> {
        let start = self.start;
        self.devices.ask(|| start.elapsed()).map_err(MigrationError::guest("ask a device for the size of its state"))
    }

    fn parts<'a>(&self, ram: &'a RamSender<'_>, pending: &[Pending]) -> Vec<Remaining<'a>>
    where
        'e: 'a,
    {
        let devices = self.devices.devices().iter().zip(pending).map(|(device, pending)| Remaining {
            name: device.idstr(),
            bytes: pending.precopy,
            stopcopy: pending.stopcopy,
        });
        ram.remaining().map(|(name, bytes)| Remaining::ram(name, bytes)).chain(devices).collect()
    }

    fn send_record(&mut self, device: &dyn IterativeDevice, limit: usize) -> Result<u64, MigrationError> {
        let mut state = Vec::new();
        device.read(&mut state, limit).map_err(MigrationError::guest("read the state of a device"))?;
        let len = state.len() as u64;
        if len > 0 {
            self.stream.event(&Event::Vfio(VfioRecord::Data { len }))?;
            self.stream.payload(&state)?;
            self.job.update(|statistics| statistics.device_bytes += len);
        }
        Ok(len)
    }

    fn end_section(&mut self) -> Result<(), MigrationError> {
        self.stream.event(&Event::Vfio(VfioRecord::EndOfState))?;
        Ok(self.stream.footer()?)
    }

    /// The devices with the numbers of their sections.
    fn numbered(&self) -> Vec<(u32, &'e dyn IterativeDevice)> {
        (RAM_SECTION + 1..).zip(self.devices.devices().iter().copied()).collect()
    }
}
