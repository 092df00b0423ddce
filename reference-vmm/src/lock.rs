//! Locks whose poison tells nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a device. A vCPU thread that panicked has taken the machine down already, so its poison tells nothing new.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
