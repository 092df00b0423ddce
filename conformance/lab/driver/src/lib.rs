//! The trip of a guest with VFIO devices from one monitor to another, and further on, in the lab's machine.
//!
//! A [`Plan`] says what is started, with which devices, and what is changed on the way; [`run`] does it and gives a
//! [`Report`] of what was seen of each migration. It judges nothing: that is done outside the machine, by
//! `qevm-conformance lab`.

mod device;
mod monitor;
mod patience {
    //! How long is waited for what must come, by the machine's clock, which is slow on a busy host.
    pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(120);
}
mod plan;
#[allow(dead_code, unreachable_pub)] // Shared with the program outside of the machine, which uses all of it.
mod qmp;
mod record;
mod trip;

pub use plan::{Change, Device, Happened, Kind, Monitor, Plan, Report, Sample, Side};
pub use trip::run;
