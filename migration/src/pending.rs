//! What remains to be sent of everything: RAM, and devices whose state is sent in parts while the guest runs.
//!
//! Such a device is asked in two ways (as QEMU's handlers are since 8.1): for an *estimate* in every round, which must
//! be cheap, and for the *exact* size, which may need the device's firmware or stop what it is doing. An estimate
//! leaves out what the device cannot tell cheaply, above all what it can send only when the guest has stopped. Asking
//! exactly in every round makes the source spin; never asking again makes it miss a device that shrinks. [`Account`]
//! remembers the last exact answer, so that both agree, and asks again when the estimates say that it may be worth it,
//! less and less often.

use super::GuestError;
use std::time::Duration;

/// Bytes that remain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pending {
    /// What can be sent while the guest runs.
    pub precopy: u64,
    /// What can be sent only when it has stopped.
    pub stopcopy: u64,
}

impl Pending {
    /// All of it.
    pub fn total(self) -> u64 {
        self.precopy.saturating_add(self.stopcopy)
    }
}

/// A device with more state than fits the downtime, sent in parts while the guest runs, in the sections of QEMU's VFIO
/// devices.
///
/// Its configuration, which comes in a FULL section of the same name, is one of the sections that
/// [`Devices::save`](crate::Devices::save) gives and [`Devices::load`](crate::Devices::load) gets, at its place among
/// those of the other devices.
pub trait IterativeDevice: Send + Sync {
    /// The section's name; it ends in `/vfio`.
    fn idstr(&self) -> &str;

    /// Its name in messages and statistics.
    fn name(&self) -> &str {
        self.idstr()
    }

    /// It takes part in capability `switchover-ack`, as VFIO devices with PRE_COPY do: the source pauses the guest only
    /// when the destination has loaded its [initial data](IterativeDevice::initial). The same on both sides.
    fn switchover_ack(&self) -> bool {
        false
    }

    /// Where there are page channels, what is left of its state when the guest is paused goes over them, and so does
    /// its configuration (`x-migration-multifd-transfer` of QEMU's VFIO devices; 10.0). It must have a configuration
    /// then: [`Devices::save`] gives a section of its name. The same on both sides.
    ///
    /// [`Devices::save`]: crate::Devices::save
    fn multifd_transfer(&self) -> bool {
        false
    }

    /// Of what can be sent while the guest runs, the bytes that the destination needs before it can agree to the
    /// switchover. They are those that are sent first.
    fn initial(&self) -> u64 {
        0
    }

    /// The migration begins.
    ///
    /// # Errors
    /// The device's own.
    fn begin(&self) -> Result<(), GuestError>;

    /// What remains, as far as it can be told at once.
    fn estimate(&self) -> Pending;

    /// What remains, at whatever cost.
    ///
    /// # Errors
    /// The device's own.
    fn exact(&self) -> Result<Pending, GuestError>;

    /// Moves up to `limit` bytes of state to the end of `into`; none if there are none to send at the moment. When the
    /// guest has stopped, it is called until none is left.
    ///
    /// # Errors
    /// The device's own.
    fn read(&self, into: &mut Vec<u8>, limit: usize) -> Result<(), GuestError>;

    /// Takes over a piece of the state, as [`read`](IterativeDevice::read) gave it at the source, in that order; called
    /// at the destination, for pieces that came over page channels from a thread of the device's own.
    ///
    /// # Errors
    /// The device's own; it does not like its state.
    fn load(&self, state: &[u8]) -> Result<(), GuestError>;

    /// The migration is over: the device is at the destination, or stays.
    fn end(&self);
}

/// The first wait before a device is asked exactly again…
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// …and the longest, which is how late a device that shrinks may be noticed…
const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// …unless asking takes long: it is not to take more than this part of the time. A device that takes 100 ms is noticed
/// within a second.
const ASKING_PART: u32 = 6;

/// What a device said of its size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceSize {
    /// What remains, as far as it can be told at once.
    pub estimate: Pending,
    /// What is left of its initial data.
    pub initial: u64,
    /// What remains, if the device was asked exactly; the estimate is of just after that.
    pub exact: Option<Pending>,
}

/// What the devices said so far.
#[derive(Debug)]
pub(crate) struct Account {
    /// What the last exact answers had more to be sent at the stop than the estimates of that moment.
    hidden: Vec<u64>,
    /// The sum of the last exact answers.
    last: Option<u64>,
    wait: Duration,
    ask_at: Duration,
}

impl Account {
    /// Of this many devices.
    pub(crate) fn new(devices: usize) -> Self {
        Account { hidden: vec![0; devices], last: None, wait: FIRST_WAIT, ask_at: Duration::ZERO }
    }

    /// What remains of each device, with what is known only exactly as it was when it was last asked.
    pub(crate) fn estimate(&self, sizes: &[DeviceSize]) -> Vec<Pending> {
        let known = |(size, hidden): (&DeviceSize, &u64)| {
            let told = size.estimate;
            Pending { stopcopy: told.stopcopy.saturating_add(*hidden), ..told }
        };
        sizes.iter().zip(&self.hidden).map(known).collect()
    }

    /// Whether to ask exactly now although what is known does not fit: it would fit by what the devices tell cheaply
    /// (`fits`), and the last answer is old enough.
    pub(crate) fn is_due(&self, sizes: &[DeviceSize], now: Duration, fits: impl FnOnce(u64) -> bool) -> bool {
        let hides = self.hidden.iter().any(|hidden| *hidden > 0);
        let estimates = sizes.iter().map(|size| size.estimate.total());
        hides && now >= self.ask_at && fits(estimates.fold(0, u64::saturating_add))
    }

    /// Every device was asked exactly from `begin` to `end`, from which the next time to ask follows. Gives what
    /// remains of each.
    pub(crate) fn answered(&mut self, sizes: &[DeviceSize], begin: Duration, end: Duration) -> Vec<Pending> {
        let exact = |size: &DeviceSize| size.exact.unwrap_or(size.estimate);
        let answers: Vec<Pending> = sizes.iter().map(exact).collect();
        for ((size, answer), hidden) in sizes.iter().zip(&answers).zip(&mut self.hidden) {
            *hidden = answer.stopcopy.saturating_sub(size.estimate.stopcopy);
        }
        let total = answers.iter().map(|pending| pending.total()).fold(0, u64::saturating_add);
        let shrank = self.last.is_none_or(|last| u128::from(total) * 10 < u128::from(last) * 9);
        self.last = Some(total);
        self.wait = if shrank { FIRST_WAIT } else { (self.wait * 2).min(LONGEST_WAIT) };
        self.ask_at = end + self.wait.max(end.saturating_sub(begin) * ASKING_PART);
        answers
    }
}

#[cfg(test)]
mod tests;
