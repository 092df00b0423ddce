//! The judge of guests that use their devices, by what they say of them.

use super::case::Case;
use anyhow::{Context, Result, ensure};
use qevm_lab::Report;
use reference_vmm::payload::PciDevice;
use serde_json::{Value, json};

/// Interrupts that a guest has to take of each device, where it starts and where it has arrived: one more than can be
/// under way. The next is raised when the last has come, so that one that gets lost ends them.
const INTERRUPTS: u64 = 2;

impl Case {
    /// What the guest says of its devices: counters without a gap, interrupts all taken.
    pub(super) fn judge_use(&self, report: &Report) -> Result<Value> {
        let said = |serial: &str, slot: u64| -> Vec<PciDevice> {
            serial.lines().filter_map(PciDevice::parse).filter(|device| device.slot == slot).collect()
        };
        let mut judged = Vec::new();
        for slot in (0..self.devices).map(|number| self.slot(number)) {
            let (before, after) = (said(&report.source_serial, slot), said(&report.destination_serial, slot));
            let last = before.last().with_context(|| format!("the guest did not use device {slot} at the source"))?;
            ensure!(last.taken >= INTERRUPTS, "interrupts did not work at the source: {last:?}");
            let arrived = after.last().with_context(|| format!("the guest says nothing of device {slot}"))?;
            let lines = [last].into_iter().chain(&after);
            let back = lines.clone().zip(&after).find(|(before, after)| !after.follows(before));
            ensure!(back.is_none(), "the device went back: {back:?}");
            ensure!(arrived.counter > last.counter, "its registers are not used: {arrived:?} after {last:?}");
            ensure!(arrived.taken >= last.taken + INTERRUPTS, "no interrupts: {arrived:?} after {last:?}");
            ensure!(
                lines.clone().all(|device| device.raised - device.taken <= 1),
                "an interrupt is missing: {after:?}"
            );
            ensure!(arrived.dma > last.dma, "its pages are not looked at: {arrived:?} after {last:?}");
            judged.push(json!({ "counter": arrived.counter, "taken": arrived.taken, "spurious": arrived.spurious, "pages": arrived.dma }));
        }
        Ok(judged.into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::Use;
    use super::*;

    /// What the driver saw of two QEMUs 11.1 in the lab, with MSI-X.
    const GOOD: &str = include_str!("../../../tests/data/lab/11.1-msix.json");

    #[test]
    fn a_device_that_is_used_on_the_way_must_not_lose_anything() {
        let case = Case::new("x", "11.1", "11.1").used(Use::MsiX);
        let good: Report = serde_json::from_str(GOOD).unwrap();
        assert!(case.judge_use(&good).is_ok(), "{:?}", case.judge_use(&good));
        let refused = |what: &str, change: &dyn Fn(&mut Report)| {
            let mut report: Report = serde_json::from_str(GOOD).unwrap();
            change(&mut report);
            let error = case.judge_use(&report).expect_err(what);
            assert!(format!("{error:#}").contains(what), "{what}: {error:#}");
        };
        refused("did not use", &|r| r.source_serial.clear());
        refused("says nothing", &|r| r.destination_serial.clear());
        refused("did not work at the source", &|r| r.source_serial = without_interrupts(&r.source_serial));
        refused("went back", &|r| r.destination_serial = r.source_serial.clone());
        refused("no interrupts", &|r| {
            let last = r.source_serial.lines().filter_map(PciDevice::parse).next_back().unwrap();
            let stuck = |line: &str| match PciDevice::parse(line) {
                Some(d) => line_of(PciDevice { raised: last.raised, taken: last.taken, ..d }),
                None => format!("{line}\n"),
            };
            r.destination_serial = r.destination_serial.lines().map(stuck).collect();
        });
        refused("an interrupt is missing", &|r| {
            let late = |line: &str| match PciDevice::parse(line) {
                Some(d) => line_of(PciDevice { raised: d.taken + 2, ..d }),
                None => format!("{line}\n"),
            };
            r.destination_serial = r.destination_serial.lines().map(late).collect();
        });
        assert!(Case { devices: 2, ..case.clone() }.judge_use(&good).is_err());
    }

    fn line_of(device: PciDevice) -> String {
        let PciDevice { slot, counter, raised, taken, spurious, dma } = device;
        format!(
            "qevm-payload pci-device slot={slot} counter={counter} raised={raised} taken={taken} spurious={spurious} dma={dma}\n"
        )
    }

    fn without_interrupts(serial: &str) -> String {
        let devices = serial.lines().filter_map(PciDevice::parse);
        devices.map(|device| line_of(PciDevice { raised: 1, taken: 1, ..device })).collect()
    }
}
