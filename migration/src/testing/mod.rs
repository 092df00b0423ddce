//! Migrations in a simulator: both ends in one thread under virtual time, over connections that cut, delay, flip and
//! stall.
//!
//! [`migrate`] runs one migration that a [`Plan`] decides in every detail, and says how it ended or which [`Violation`]
//! it has found. Source and destination are those of [`core`](crate::core), with drivers of their own over a [`Memory`]
//! whose dirty log is that of KVM: pages on the main channel or on page channels, with a return path or without,
//! between two of this crate's monitors or as between QEMUs, with an operator who cancels or lets the guest wait before
//! the switchover. A [`Plant`] puts a known mistake in, to show that the simulator finds it.
//!
//! ```
//! use qevm_migration::testing::{Plan, migrate};
//!
//! let plan = Plan::of(42);
//! let ending = migrate(&plan).map_err(|violation| format!("{violation} with {plan:?}"))?;
//! assert_eq!(Ok(ending), migrate(&plan)); // again, and exactly so
//! # Ok::<(), String>(())
//! ```

mod destination;
mod device;
mod early;
mod link;
mod memory;
mod page_sender;
mod pages;
#[cfg(test)]
mod places;
mod plan;
mod random;
mod sealed;
mod simulation;
mod source;
#[cfg(test)]
mod tests;

pub use device::{VfioDevice, VfioShape};
pub use link::{Fault, Link};
pub use memory::Memory;
pub use plan::{Plan, Plant};
pub use random::Random;
pub use sealed::Sealed;
pub use simulation::{Ending, Violation, migrate};
