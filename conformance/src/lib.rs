//! Real QEMUs of several releases as the judge of qevm.
//!
//! [`roots`] installs them, [`launch`] starts one and [`qmp`] talks to it. A [`scenario`] is a row of the [`table`];
//! [`record`] plays it, with [`tape`] as the listener that keeps every channel, and asks the [`oracle`] what the stopped
//! guest's RAM really is.

pub mod corpus;
pub mod launch;
pub mod oracle;
pub mod payload;
pub mod process;
pub mod qmp;
pub mod record;
pub mod roots;
pub mod scenario;
pub mod table;
pub mod tape;
