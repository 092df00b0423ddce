//! Migrations in a simulator: both ends in one thread under virtual time, over connections that cut, delay, flip and stall.
//!
//! [`migrate`] runs one migration that a seed decides in every detail, and says how it ended or which [`Violation`] it has found. The destination
//! is the one of [`core`](crate::core); its driver and the source are models here, over a [`Memory`] whose dirty log is that of KVM. A
//! [`Plant`] puts a known fault in, to show that the simulator finds it.
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
mod link;
mod memory;
mod pages;
mod random;
mod simulation;
mod source;
#[cfg(test)]
mod tests;

pub use link::{Fault, Link};
pub use memory::Memory;
pub use random::Random;
pub use simulation::{Ending, Plan, Plant, Violation, migrate};
