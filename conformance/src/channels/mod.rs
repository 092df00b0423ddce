//! The matrix of page channels and return path: real QEMUs at one end, `qevm receive` and `qevm send` at the other.
//!
//! [`table`] lists the rows as data. A row is one [`setup`] (capabilities, parameters, transport) of one
//! [`source::Flavor`] (release and machine) and what has to come of it:
//!
//! | module | row |
//! |---|---|
//! | [`qemu_to_qevm`] | a stopped guest migrates into `qevm receive` or a file; RAM of what arrived is QEMU's own |
//! | [`qevm_to_qemu`] | `qevm send` or `qevm convert` gives a saved guest to QEMU; RAM of what was loaded is the saved one |
//! | [`refused`] | QEMU refuses the set-up with a reason before data moves, and `qevm` says the same |
//! | [`mismatch`] | both ends are set up legally but differently: a named error in time, and the guest runs on |
//! | [`secured`] | one end must refuse the other's TLS before anything of the guest moves |
//! | [`live`] | a guest that dirties memory goes QEMU → `qevm receive` → `qevm send` → QEMU and finds no stale page |
//!
//! [`run`] plays them, reusing one source QEMU for all rows of a flavor.

mod credentials;
pub mod live;
pub mod mismatch;
pub mod qemu_to_qevm;
pub mod qevm_to_qemu;
pub mod refused;
pub mod run;
pub mod secured;
pub mod setup;
pub mod source;
pub mod table;

pub(crate) mod receiver;
mod shape;
