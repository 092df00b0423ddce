//! The commands about dirty rates and their limits.

use super::arguments::{Arguments, empty, finish};
use super::protocol::Failure;
use crate::machine::VcpuDirtyLimit;
use crate::vmm::Vmm;
use qevm_migration::dirty_rate::Mode;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

const UNITS: [&str; 2] = ["second", "millisecond"];

/// `calc-dirty-rate`.
pub(super) fn calc(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let time = arguments.integer("calc-time")?;
    let unit = arguments.optional_choice("calc-time-unit", &UNITS)?;
    let sample_pages = arguments.optional_integer("sample-pages")?;
    let mode = arguments.optional_choice("mode", &["page-sampling", "dirty-ring", "dirty-bitmap"])?;
    finish(arguments)?;
    let mode = match mode.as_deref() {
        None | Some("page-sampling") => Mode::PageSampling,
        Some("dirty-bitmap") => Mode::DirtyBitmap,
        Some(_) => Mode::DirtyRing,
    };
    let millis = if unit.as_deref() == Some("millisecond") { time } else { time.saturating_mul(1000) };
    // What is negative is too short, and too few.
    let time = Duration::from_millis(millis.try_into().unwrap_or(0));
    let sample_pages = sample_pages.map(|pages| pages.try_into().unwrap_or(0));
    vmm.measure_dirty_rate(time, mode, sample_pages).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

/// `query-dirty-rate`.
pub(super) fn query(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let unit = arguments.optional_choice("calc-time-unit", &UNITS)?.unwrap_or_else(|| UNITS[0].into());
    finish(arguments)?;
    let report = vmm.dirty_rate();
    let time = if unit == "second" { report.time.as_secs() } else { report.time.as_millis() as u64 };
    let mut object = json!({
        "status": report.state.as_str(),
        "start-time": report.start_time,
        "calc-time": time,
        "calc-time-unit": unit,
        "sample-pages": report.sample_pages,
        "mode": report.mode.as_str(),
    });
    if let Some(rate) = report.rate {
        object["dirty-rate"] = rate.into();
        if report.mode == Mode::DirtyRing {
            let vcpus = report.vcpus.iter().enumerate();
            object["vcpu-dirty-rate"] = vcpus.map(|(id, rate)| json!({ "id": id, "dirty-rate": rate })).collect();
        }
    }
    Ok(object)
}

/// `set-vcpu-dirty-limit`.
pub(super) fn set_limit(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let vcpu = arguments.optional_integer("cpu-index")?;
    let rate = arguments.unsigned("dirty-rate")?;
    finish(arguments)?;
    vmm.set_vcpu_dirty_limit(vcpu, rate).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

/// `cancel-vcpu-dirty-limit`.
pub(super) fn cancel_limit(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let vcpu = arguments.optional_integer("cpu-index")?;
    finish(arguments)?;
    vmm.cancel_vcpu_dirty_limit(vcpu).map_err(|error| Failure::generic(error.to_string()))?;
    Ok(empty())
}

/// `query-vcpu-dirty-limit`.
pub(super) fn query_limit(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    finish(arguments)?;
    let limits = vmm.vcpu_dirty_limits();
    let one = |limit: &VcpuDirtyLimit| json!({ "limit-rate": limit.limit, "current-rate": limit.rate, "cpu-index": limit.vcpu });
    Ok(limits.iter().map(one).collect())
}

/// Adds to what `query-migrate` returns how vCPUs are slowed down under capability `dirty-limit` (8.1).
pub(super) fn add_limit_times(vmm: &Vmm, migration: &mut Value) {
    let limits = vmm.vcpu_dirty_limits();
    if !vmm.outgoing().capabilities().dirty_limit || limits.is_empty() || migration.get("ram").is_none() {
        return;
    }
    let micros = |time: Duration| time.as_micros() as u64;
    let longest = limits.iter().map(|limit| micros(limit.pause)).max().unwrap_or(0);
    let ring_full = limits.iter().map(|limit| micros(limit.ring_full)).sum::<u64>() / limits.len() as u64;
    migration["dirty-limit-throttle-time-per-round"] = longest.into();
    migration["dirty-limit-ring-full-time"] = ring_full.into();
}
