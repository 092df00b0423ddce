//! A device on its way through a migration, at the source or at the destination.

mod destination;
mod source;

use super::{DataFile, DeviceState, Driver, Failure, PrecopyInfo, Support, VfioError};
use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;

/// Told of each state that the device comes to.
pub type Watcher = Box<dyn Fn(DeviceState) + Send + Sync>;

/// A device and its state.
pub struct Migration {
    name: String,
    driver: Box<dyn Driver>,
    support: Support,
    inner: Mutex<Inner>,
    watcher: Mutex<Option<Watcher>>,
}

struct Inner {
    state: DeviceState,
    data: Option<Box<dyn DataFile>>,
    /// A migration from here is under way.
    saving: bool,
    /// What PRE_COPY said last, less what was read since.
    precopy: PrecopyInfo,
    /// What has left it in ERROR.
    broken: Option<Failure>,
    /// A question failed where there was no one to tell.
    failed: Option<Failure>,
    /// Bytes read or written.
    done: u64,
    /// What it said last that it has to send when it has stopped.
    told: u64,
    /// It was said that it sends more.
    excess_told: bool,
    /// What it was told in RESUMING is of a guest that did not arrive.
    stale: bool,
    /// It holds a state that came from elsewhere: to be reset would be to lose that.
    arrived: bool,
}

impl Migration {
    /// A device that runs, or does nothing yet, under the name that messages give it.
    ///
    /// # Errors
    /// [`Failure::Unsupported`] when it cannot migrate; [`Failure::Query`] and [`Failure::Implausible`] when it does
    /// not tell its state.
    pub fn new(name: impl Into<String>, driver: Box<dyn Driver>) -> Result<Migration, VfioError> {
        let name = name.into();
        let fails = |failure| VfioError { device: name.clone(), failure };
        let flags = driver.migration_flags().map_err(|errno| fails(Failure::Unsupported(errno)))?;
        let support = Support::from_flags(flags).ok_or_else(|| {
            fails(Failure::Implausible {
                query: "VFIO_DEVICE_FEATURE_MIGRATION",
                found: flags,
                expected: "STOP_COPY (1) among the flags",
            })
        })?;
        let state = read_state(&*driver).map_err(fails)?;
        if support.precopy {
            // Where it is not known, initial data never begin anew.
            let _ = driver.tell_reinit();
        }
        let inner = Inner {
            state,
            data: None,
            saving: false,
            precopy: PrecopyInfo::default(),
            broken: None,
            failed: None,
            done: 0,
            told: 0,
            excess_told: false,
            stale: false,
            arrived: false,
        };
        Ok(Migration { name, driver, support, inner: Mutex::new(inner), watcher: Mutex::default() })
    }

    /// The name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device offers.
    pub fn support(&self) -> Support {
        self.support
    }

    /// The state.
    pub fn state(&self) -> DeviceState {
        self.lock().state
    }

    /// From now on `watcher` is told of each state that the device comes to. It must not call back.
    pub fn watch(&self, watcher: Watcher) {
        *self.watcher.lock() = Some(watcher);
    }

    /// A migration from here begins. A device that works goes to PRE_COPY, if it has that.
    ///
    /// # Errors
    /// [`Failure::Arc`], [`Failure::NoData`]: the device works on as before.
    pub fn begin(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        (inner.precopy, inner.failed) = (PrecopyInfo::default(), None);
        (inner.done, inner.told, inner.excess_told) = (0, 0, false);
        if inner.state.is_running() && self.support.precopy {
            self.step(&mut inner, DeviceState::PreCopy).or_else(|error| self.back_to_work(&mut inner, error))?;
        }
        inner.saving = true;
        self.look(&mut inner);
        inner.failed.take().map_or(Ok(()), |failure| Err(self.fails(failure)))
    }

    /// The vCPUs are about to stop: the device begins nothing more with other devices, where it can be told so.
    ///
    /// # Errors
    /// [`Failure::Arc`]: the device works on as before.
    pub fn quiesce(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        let to = match inner.state {
            DeviceState::PreCopy => DeviceState::PreCopyP2p,
            DeviceState::Running => DeviceState::RunningP2p,
            _ => return Ok(()),
        };
        if !self.support.p2p {
            return Ok(());
        }
        self.step(&mut inner, to).or_else(|error| self.back_to_work(&mut inner, error))
    }

    /// The vCPUs have stopped, and the device stops. In a migration one that was in PRE_COPY goes on to STOP_COPY at
    /// once.
    ///
    /// # Errors
    /// [`Failure::Arc`]: [`resume`](Migration::resume) makes it work again.
    pub fn stop(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        let to = match inner.state {
            state if inner.saving && state.is_precopy() => DeviceState::StopCopy,
            state if state.is_running() => DeviceState::Stop,
            _ => return Ok(()),
        };
        self.step(&mut inner, to)
    }

    /// The guest has stopped for a migration: all that is left of the state can be read from here on.
    ///
    /// # Errors
    /// [`Failure::Arc`], [`Failure::NoData`].
    pub fn save(&self) -> Result<(), VfioError> {
        self.step(&mut self.lock(), DeviceState::StopCopy)
    }

    /// The guest is about to go on, here or at the destination. A source's device that cannot is reset: its guest runs
    /// on, and its driver in the guest has to deal with that. A destination's is not, for its state would be lost.
    ///
    /// # Errors
    /// [`Failure::Arc`]; [`Failure::Lost`] when it is in ERROR and stays there. Its guest must not run then.
    pub fn resume(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        if self.support.p2p && !inner.state.is_running() {
            // So that devices that begin something with each other are all there.
            self.step(&mut inner, DeviceState::RunningP2p).or_else(|error| self.recover(&mut inner, error))?;
        }
        Ok(())
    }

    /// The vCPUs go on, and so does the device, entirely.
    ///
    /// # Errors
    /// As [`resume`](Migration::resume).
    pub fn run(&self) -> Result<(), VfioError> {
        let mut inner = self.lock();
        let to = match inner.state {
            DeviceState::PreCopyP2p | DeviceState::PreCopy if inner.saving => DeviceState::PreCopy,
            _ => DeviceState::Running,
        };
        self.step(&mut inner, to).or_else(|error| self.recover(&mut inner, error))?;
        inner.arrived = false;
        Ok(())
    }

    /// The machine is reset while its guest is paused: the device is reset, if it can be, and does nothing.
    pub fn power_cycle(&self) {
        let mut inner = self.lock();
        if inner.state == DeviceState::Resuming {
            return;
        }
        if inner.saving && inner.done > 0 {
            inner.failed = Some(Failure::BrokenOff { done: inner.done });
        }
        if let Err(errno) = self.reset(&mut inner) {
            tracing::debug!(device = self.name, %errno, "the device cannot be reset");
        }
        if inner.state.is_running()
            && let Err(error) = self.step(&mut inner, DeviceState::Stop)
        {
            tracing::error!("{error}");
        }
    }

    /// The migration from here is over. The device stays with the guest: it works if that runs.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.saving = false;
        (inner.precopy, inner.failed) = (PrecopyInfo::default(), None);
        let ended = match inner.state {
            DeviceState::PreCopy | DeviceState::PreCopyP2p => {
                self.step(&mut inner, DeviceState::Running).or_else(|error| self.recover(&mut inner, error))
            }
            DeviceState::StopCopy => {
                self.step(&mut inner, DeviceState::Stop).or_else(|error| self.halt(&mut inner, error))
            }
            _ => return,
        };
        if let Err(error) = ended {
            tracing::error!("{error}");
        }
    }

    /// Goes to a state. When that fails the device is where the kernel says it is.
    fn step(&self, inner: &mut Inner, to: DeviceState) -> Result<(), VfioError> {
        let from = inner.state;
        if from == to {
            return Ok(());
        }
        let (file, refused) = match self.driver.set_state(to.raw()) {
            Ok(file) => (file, None),
            Err(errno) => (None, Some(errno)),
        };
        let now = match refused {
            None => to,
            Some(_) => read_state(&*self.driver).unwrap_or(DeviceState::Error),
        };
        if file.is_some() {
            inner.data = file;
        } else if !now.has_data() || !from.has_data() {
            inner.data = None;
        }
        self.now(inner, now);
        if inner.saving && from == DeviceState::StopCopy && now.is_running() && inner.done > 0 {
            // What the destination has is the beginning of a state that there is no more.
            inner.failed = Some(Failure::BrokenOff { done: inner.done });
        }
        match refused {
            Some(errno) => {
                let failure = Failure::Arc { from, to, left: now, errno };
                if now == DeviceState::Error && from != DeviceState::Error {
                    inner.broken = Some(failure.clone());
                }
                Err(self.fails(failure))
            }
            None if to.has_data() && inner.data.is_none() => Err(self.fails(Failure::NoData { from, to })),
            None => Ok(()),
        }
    }

    fn now(&self, inner: &mut Inner, state: DeviceState) {
        if inner.state == state {
            return;
        }
        let before = std::mem::replace(&mut inner.state, state);
        if (before, state) == (DeviceState::Resuming, DeviceState::Stop) {
            // A QEMU's device goes on from RESUMING when its guest does, and STOP is not told of.
            return;
        }
        if let Some(watcher) = &*self.watcher.lock() {
            watcher(state);
        }
    }

    /// Something failed while the guest runs, which goes on: so does the device, from where the kernel left it or after
    /// a reset.
    fn back_to_work(&self, inner: &mut Inner, error: VfioError) -> Result<(), VfioError> {
        if inner.state == DeviceState::Running || inner.state == DeviceState::PreCopy && inner.data.is_some() {
            return Err(error);
        }
        self.recover(inner, error.clone())?;
        Err(error)
    }

    /// Makes a device work that did not go where it was to go. One that was told a guest's state elsewhere is left
    /// alone.
    fn recover(&self, inner: &mut Inner, error: VfioError) -> Result<(), VfioError> {
        if inner.arrived {
            return Err(error);
        }
        if inner.state != DeviceState::Error && self.step(inner, DeviceState::Running).is_ok() {
            tracing::warn!("{error}: it works again");
            return Ok(());
        }
        let cause = inner.broken.take().unwrap_or_else(|| error.failure.clone());
        self.reset(inner).map_err(|errno| {
            self.now(inner, DeviceState::Error);
            inner.broken = Some(cause.clone());
            self.fails(Failure::Lost { cause: Box::new(cause), errno })
        })?;
        tracing::error!("{error}: it was reset, and has forgotten what its driver in the guest had told it");
        Ok(())
    }

    /// Makes a device stop whose guest has gone, or is paused: one that works on would write to memory that no
    /// guest has any more.
    fn halt(&self, inner: &mut Inner, error: VfioError) -> Result<(), VfioError> {
        if inner.state != DeviceState::Error && self.step(inner, DeviceState::Stop).is_ok() {
            tracing::warn!("{error}: it has stopped now");
            return Ok(());
        }
        let reset = self.reset(inner);
        self.step(inner, DeviceState::Stop).map_err(|_| match reset {
            Ok(()) => error.clone(),
            Err(errno) => self.fails(Failure::Lost { cause: Box::new(error.failure.clone()), errno }),
        })?;
        tracing::warn!("{error}: it was reset and has stopped now");
        Ok(())
    }

    /// Resets the device, after which it is in RUNNING.
    fn reset(&self, inner: &mut Inner) -> Result<(), Errno> {
        inner.data = None;
        let reset = self.driver.reset();
        let state = read_state(&*self.driver).unwrap_or(DeviceState::Error);
        self.now(inner, state);
        (inner.done, inner.arrived) = (0, false);
        reset
    }

    fn fails(&self, failure: Failure) -> VfioError {
        VfioError { device: self.name.clone(), failure }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

fn read_state(driver: &dyn Driver) -> Result<DeviceState, Failure> {
    let query = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE";
    let raw = driver.state().map_err(|errno| Failure::Query { query, state: DeviceState::Error, errno })?;
    DeviceState::from_raw(raw).ok_or(Failure::Implausible { query, found: raw.into(), expected: "a state from 0 to 7" })
}
