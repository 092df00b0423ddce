//! The judge of guests that use their devices, by what they say of them.

use anyhow::{Context, Result, ensure};
use qevm_lab::Report;
use reference_vmm::payload::PciDevice;
use serde_json::{Value, json};

use super::Case;

/// Interrupts that a guest has to take of each device where it has arrived: two by each vector.
const INTERRUPTS: u64 = 8;

impl Case {
    /// What the guest says of its devices: counters without a gap, interrupts all taken.
    pub(super) fn judge_use(&self, report: &Report) -> Result<Value> {
        let said = |serial: &str, slot: u64| -> Vec<PciDevice> {
            serial.lines().filter_map(PciDevice::parse).filter(|device| device.slot == slot).collect()
        };
        let mut judged = Vec::new();
        for slot in (1..).take(self.devices) {
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
