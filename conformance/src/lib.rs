//! Real QEMUs of several releases as the judge of qevm.

pub mod process;
pub mod roots;
