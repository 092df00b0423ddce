//! The commands about dirty rates and their limits.

use super::{
    arguments::Arguments,
    commands::{empty, only},
    protocol::Failure,
};
use crate::{dirty_rate::Mode, vmm::Vmm};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};

const UNITS: [&str; 2] = ["second", "millisecond"];

/// `calc-dirty-rate`.
pub(super) fn calc(vmm: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    let time = arguments.integer("calc-time")?;
    let unit = arguments.optional_choice("calc-time-unit", &UNITS)?;
    let sample_pages = arguments.optional_integer("sample-pages")?;
    let mode = arguments.optional_choice("mode", &["page-sampling", "dirty-ring", "dirty-bitmap"])?;
    only(arguments)?;
    let mode = match mode.as_deref() {
        None | Some("page-sampling") => Mode::PageSampling,
        Some("dirty-bitmap") => Mode::DirtyBitmap,
        Some(_) => return Err(Failure::generic("mode dirty-ring is not enabled, use other method instead.")),
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
    only(arguments)?;
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
    }
    Ok(object)
}

/// `set-vcpu-dirty-limit`: needs to know what each vCPU dirties, which only a dirty ring tells.
pub(super) fn set_limit(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    arguments.optional_integer("cpu-index")?;
    arguments.integer("dirty-rate")?;
    only(arguments)?;
    Err(Failure::generic("dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'"))
}

/// `cancel-vcpu-dirty-limit`: there is none.
pub(super) fn cancel_limit(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    arguments.optional_integer("cpu-index")?;
    only(arguments)?;
    Ok(empty())
}

/// `query-vcpu-dirty-limit`: there is none.
pub(super) fn query_limit(_: &Arc<Vmm>, arguments: &mut Arguments) -> Result<Value, Failure> {
    only(arguments)?;
    Ok(json!([]))
}
