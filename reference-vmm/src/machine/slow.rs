//! Slowing the guest down, so that a migration of it comes to its end.

use super::Machine;
use super::dirty_limit::VcpuDirtyLimit;
use crate::error::Result;
use std::time::Duration;

impl Machine {
    /// Pauses the vCPUs for this many per cent of their time (at most [`MAX_THROTTLE`](super::MAX_THROTTLE)); 0 lets
    /// them run.
    ///
    /// # Errors
    /// [`Error::Host`](crate::Error::Host) when the host has no thread for it.
    pub fn throttle(&self, per_cent: u8) -> Result<()> {
        self.throttle.set(per_cent, &self.vcpus)?;
        self.control.wake();
        Ok(())
    }

    /// For how many per cent of their time the vCPUs are paused.
    pub fn throttled(&self) -> u8 {
        self.throttle.per_cent()
    }

    /// Keeps a vCPU, or all of them, from writing to more than this many MiB in a second, or ends that with `None`. A
    /// vCPU that keeps to the limit in every [period](Machine::set_dirty_limit_period) is not slowed down; another one
    /// pauses for as long as it takes, and over any longer time writes at most what the limit allows in that time and
    /// one period.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a machine without dirty rings or such a vCPU;
    /// [`Error::Host`](crate::Error::Host) when the host has no thread for it.
    pub fn limit_dirty_rate(&self, vcpu: Option<usize>, mib_per_second: Option<u64>) -> Result<()> {
        self.dirty_limit.set(vcpu, mib_per_second, &self.vcpus)?;
        self.control.wake();
        Ok(())
    }

    /// Over what time a vCPU has to keep to its limit; a second at first.
    pub fn set_dirty_limit_period(&self, period: Duration) {
        self.dirty_limit.set_period(period);
    }

    /// The limits that there are, by vCPU; empty without any.
    pub fn dirty_limits(&self) -> Vec<VcpuDirtyLimit> {
        self.dirty_limit.list()
    }
}
