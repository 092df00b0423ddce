//! What a device has to send, and how it is read.

use super::{Inner, Migration};
use crate::vfio::{DeviceState, Failure, PrecopyInfo, VfioError};
use qevm_migration::Pending;
use rustix::io::Errno;

/// What a device that does not tell how much state it has is taken to have. (`docs/format/vfio.md`)
const UNTOLD: u64 = 100 << 30;
/// More than any device has: 64 PiB.
const IMPLAUSIBLE: u64 = 1 << 56;
const DATA_SIZE: &str = "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE";
const PRECOPY_INFO: &str = "VFIO_MIG_GET_PRECOPY_INFO";
/// Bytes beyond which it is worth a word that a device sends more than it said.
const MUCH: u64 = 64 << 20;

impl Migration {
    /// What is left to read in PRE_COPY; nothing elsewhere.
    pub fn estimate(&self) -> Pending {
        let mut inner = self.lock();
        self.look(&mut inner);
        Pending { precopy: inner.precopy.initial.saturating_add(inner.precopy.dirty), stopcopy: 0 }
    }

    /// What is left to read, at whatever cost.
    ///
    /// # Errors
    /// [`Failure::Query`], [`Failure::Implausible`].
    pub fn exact(&self) -> Result<Pending, VfioError> {
        let mut inner = self.lock();
        self.look(&mut inner);
        if let Some(failure) = inner.failed.take() {
            return Err(self.fails(failure));
        }
        let size = match self.driver.data_size() {
            Ok(size) if size >= IMPLAUSIBLE => {
                let expected = "fewer than 64 PiB";
                return Err(self.fails(Failure::Implausible { query: DATA_SIZE, found: size, expected }));
            }
            Ok(size) => size,
            Err(Errno::NOTTY) => UNTOLD,
            Err(errno) => return Err(self.fails(Failure::Query { query: DATA_SIZE, state: inner.state, errno })),
        };
        inner.told = size;
        let precopy = inner.precopy.initial.saturating_add(inner.precopy.dirty);
        Ok(Pending { precopy, stopcopy: size.saturating_sub(precopy) })
    }

    /// Of what can be read in PRE_COPY, what comes first.
    pub fn initial(&self) -> u64 {
        self.lock().precopy.initial
    }

    /// Appends up to `limit` bytes of the state; none if there are none at the moment.
    ///
    /// # Errors
    /// [`Failure::Read`]; what a [question](Migration::exact) before could not say.
    pub fn read(&self, into: &mut Vec<u8>, limit: usize) -> Result<(), VfioError> {
        let mut inner = self.lock();
        if let Some(failure) = inner.failed.take() {
            return Err(self.fails(failure));
        }
        let Inner { state, done, .. } = *inner;
        let Some(data) = inner.data.as_mut().filter(|_| state != DeviceState::Resuming) else { return Ok(()) };
        let before = into.len();
        into.resize(before + limit, 0);
        let read = loop {
            match data.read(&mut into[before..]) {
                Err(Errno::INTR) => {}
                Err(Errno::NOMSG) if state.is_precopy() => break Ok(0),
                read => break read,
            }
        };
        let count = match read {
            Ok(count) if count <= limit => count,
            Ok(count) => {
                into.truncate(before);
                let expected = "no more bytes than there is room for";
                return Err(self.fails(Failure::Implausible { query: "read", found: count as u64, expected }));
            }
            Err(errno) => {
                into.truncate(before);
                return Err(self.fails(Failure::Read { state, done, errno }));
            }
        };
        into.truncate(before + count);
        let count = count as u64;
        inner.done = done.saturating_add(count);
        // What comes first is initial.
        let initial = inner.precopy.initial.min(count);
        inner.precopy.initial -= initial;
        inner.precopy.dirty = inner.precopy.dirty.saturating_sub(count - initial);
        if state == DeviceState::StopCopy && !inner.excess_told && inner.done / 2 > inner.told.max(MUCH) {
            inner.excess_told = true;
            let (sent, said) = (inner.done, inner.told);
            tracing::warn!(device = self.name, sent, said, "the device sends far more state than it said it had");
        }
        Ok(())
    }

    /// Asks what is left in PRE_COPY. A failure is kept for who can be told.
    pub(super) fn look(&self, inner: &mut Inner) {
        if !inner.state.is_precopy() {
            inner.precopy = PrecopyInfo::default();
            return;
        }
        let Some(data) = &inner.data else { return };
        let failure = match data.precopy_info() {
            Ok(info) => match info.initial.checked_add(info.dirty).filter(|total| *total < IMPLAUSIBLE) {
                Some(_) => {
                    inner.precopy = info;
                    return;
                }
                None => Failure::Implausible {
                    query: PRECOPY_INFO,
                    found: info.initial.max(info.dirty),
                    expected: "fewer than 64 PiB",
                },
            },
            Err(errno) => Failure::Query { query: PRECOPY_INFO, state: inner.state, errno },
        };
        // What is left stays what it was, so that the next read or question reports it.
        inner.precopy.dirty = inner.precopy.dirty.max(1);
        inner.failed = Some(failure);
    }
}
