//! Whether a destination will load a stream, and if not, why.
//!
//! [`Summary`] collects what matters from a stream's events, [`Expectations`] says what is known of a destination (from
//! a stream that it wrote itself, from its `-dump-vmstate`, or from options), and [`check`] compares them.
//!
//! The rules are those that real QEMUs of 5.2 to 11.1 follow; where they accept a difference silently, so does the
//! comparison, with a [`Finding`] that [`Outcome::Loads`]. Nothing here panics; findings are at most one for each
//! section, field or block that was compared.
//!
//! ```
//! use qevm_savevm::check::{Expectations, Outcome, Summary, check};
//! use qevm_savevm::configuration::Configuration;
//!
//! let stream = Summary { configuration: Some(Configuration::new("pc-q35-10.0")), ..Summary::default() };
//! let destination = Expectations { machine: Some(b"pc-q35-11.1".to_vec()), ..Expectations::default() };
//! let findings = check(&stream, &destination);
//! assert_eq!((findings[0].outcome, findings[0].found.as_str()), (Outcome::Fails, "pc-q35-10.0"));
//! ```

mod cause;
mod configuration;
mod features;
mod fields;
mod finding;
mod models;
mod ram;
mod rules;
mod sections;
mod summary;
mod values;
mod versions;

pub use features::virtio_features;
pub use finding::{Finding, Outcome, Subject};
pub use summary::{Expectations, Summary};
pub use values::Values;

/// Compares a stream with what its destination expects: in the order in which a destination would meet the differences,
/// and then what is only at the destination. What is not known of the destination is not compared.
pub fn check(stream: &Summary, destination: &Expectations) -> Vec<Finding> {
    let mut findings = Vec::new();
    configuration::compare(stream, destination, &mut findings);
    ram::compare(stream, destination, &mut findings);
    sections::compare(stream, destination, &mut findings);
    fields::compare(stream, destination, &mut findings);
    values::compare(stream, destination, &mut findings);
    findings
}

#[cfg(test)]
mod tests;
