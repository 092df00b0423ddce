//! Limits of the vCPUs' dirty rates, as QMP sets them.

use super::Vmm;
use crate::Error;
use crate::machine::VcpuDirtyLimit;

/// A limit that cannot be set or taken back. The texts are those of QEMU 11.1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LimitRefused {
    /// The machine has no dirty rings.
    #[error("dirty page limit feature requires KVM with accelerator property 'dirty-ring-size' set'")]
    NoRings,
    /// There is no such vCPU.
    #[error("incorrect cpu index specified")]
    NoVcpu,
    /// Capability `dirty-limit` is on, a migration goes on, and there are limits: they are the migration's now.
    #[error("can't {0} dirty page rate limit while migration is running")]
    Migrating(&'static str),
    /// The machine refuses it.
    #[error(transparent)]
    Machine(#[from] Error),
}

impl Vmm {
    /// Limits what a vCPU, or every vCPU, may dirty to this many MiB per second; 0 takes the limit back.
    ///
    /// # Errors
    /// [`LimitRefused`].
    pub fn set_vcpu_dirty_limit(&self, vcpu: Option<i64>, rate: u64) -> Result<(), LimitRefused> {
        if self.machine.dirty_log().ring_size() == 0 {
            return Err(LimitRefused::NoRings);
        }
        let vcpu = self.vcpu(vcpu)?;
        self.check_limits_are_free("set")?;
        Ok(self.machine.limit_dirty_rate(vcpu, Some(rate).filter(|rate| *rate > 0))?)
    }

    /// Takes the limit of a vCPU, or of every vCPU, back.
    ///
    /// # Errors
    /// [`LimitRefused`]; taking back a limit that there is not is no error.
    pub fn cancel_vcpu_dirty_limit(&self, vcpu: Option<i64>) -> Result<(), LimitRefused> {
        // QEMU does not look at the vCPU where there cannot be a limit.
        if self.machine.dirty_log().ring_size() == 0 {
            return Ok(());
        }
        let vcpu = self.vcpu(vcpu)?;
        self.check_limits_are_free("cancel")?;
        Ok(self.machine.limit_dirty_rate(vcpu, None)?)
    }

    /// The limits that there are; while the capability is on and there are any, migrations report on them.
    pub fn vcpu_dirty_limits(&self) -> Vec<VcpuDirtyLimit> {
        self.machine.dirty_limits()
    }

    fn vcpu(&self, index: Option<i64>) -> Result<Option<usize>, LimitRefused> {
        let known = |index: i64| usize::try_from(index).ok().filter(|index| *index < self.machine.cpus());
        index.map(|index| known(index).ok_or(LimitRefused::NoVcpu)).transpose()
    }

    fn check_limits_are_free(&self, doing: &'static str) -> Result<(), LimitRefused> {
        let job = &self.outgoing;
        let taken = job.capabilities().dirty_limit && job.status().is_running() && !self.vcpu_dirty_limits().is_empty();
        if taken { Err(LimitRefused::Migrating(doing)) } else { Ok(()) }
    }
}
