//! What the kernel's driver of a device does for its migration, call by call.

use rustix::io::Errno;

/// The calls of version 2 of the migration protocol (`linux/vfio.h`), with the kernel's semantics.
pub trait Driver: Send + Sync {
    /// Feature MIGRATION: which states the device has.
    ///
    /// # Errors
    /// ENOTTY when it cannot be migrated.
    fn migration_flags(&self) -> Result<u64, Errno>;

    /// Feature MIG_DEVICE_STATE: brings the device to a state, by way of others where that is needed, and gives a new
    /// descriptor for its data where there is one. From PRE_COPY to STOP_COPY there is none: that of PRE_COPY goes on.
    ///
    /// # Errors
    /// The driver's own. The device is then in the state that [`state`](Driver::state) tells, which may be none of the
    /// two.
    fn set_state(&self, state: u32) -> Result<Option<Box<dyn DataFile>>, Errno>;

    /// Feature MIG_DEVICE_STATE: the state.
    ///
    /// # Errors
    /// The driver's own.
    fn state(&self) -> Result<u32, Errno>;

    /// Feature MIG_DATA_SIZE: bytes to read if the device were in STOP_COPY now. It may take long.
    ///
    /// # Errors
    /// The driver's own; ENOTTY when it does not tell.
    fn data_size(&self) -> Result<u64, Errno>;

    /// Feature MIG_PRECOPY_INFOv2: from now on [`PrecopyInfo::reinit`] is told.
    ///
    /// # Errors
    /// ENOTTY for a kernel or device that does not know it.
    fn tell_reinit(&self) -> Result<(), Errno>;

    /// VFIO_DEVICE_RESET: the device forgets everything, and is in RUNNING.
    ///
    /// # Errors
    /// The driver's own; ENOTTY when it cannot be reset.
    fn reset(&self) -> Result<(), Errno>;
}

/// The descriptor through which a device's state is read or written. Dropping it closes it.
pub trait DataFile: Send {
    /// Reads some bytes, perhaps fewer than there is room for. In STOP_COPY, 0 means that there are no more.
    ///
    /// # Errors
    /// The driver's own; ENOMSG in PRE_COPY when there is nothing at the moment.
    fn read(&mut self, into: &mut [u8]) -> Result<usize, Errno>;

    /// Writes some of the bytes.
    ///
    /// # Errors
    /// The driver's own.
    fn write(&mut self, from: &[u8]) -> Result<usize, Errno>;

    /// VFIO_MIG_GET_PRECOPY_INFO, which is legal in PRE_COPY and PRE_COPY_P2P.
    ///
    /// # Errors
    /// The driver's own.
    fn precopy_info(&self) -> Result<PrecopyInfo, Errno>;
}

/// What a device says in PRE_COPY of the data that it can send before it stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// The initial data begin anew.
    pub reinit: bool,
    /// Bytes that come first, and that the destination needs to prepare for the rest.
    pub initial: u64,
    /// Bytes after those.
    pub dirty: u64,
}
