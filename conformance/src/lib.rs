//! Real QEMUs of several releases as the judge of qevm.
//!
//! [`roots`] installs them (through [`apt`]), [`launch`] starts one and [`qmp`] talks to it; [`host_cpu`] is the
//! processor that it starts with under KVM; [`linux`] and [`payload`] are guests for it. A [`scenario`] is a row of the
//! [`table`]; [`record`] plays it, with [`recorder`] as the listener that keeps every channel, and asks the [`oracle`]
//! what the stopped guest's RAM really is. [`judge`] then holds what qevm (the [`subject`]) says about the recording
//! against that truth and against QEMU's own [`description`], and [`reload`] gives what qevm writes back to QEMU;
//! [`matrix`] does it for many scenarios and [`report`] tells the result.
//!
//! [`channels`] is a matrix of its own: page channels and return path, with `qevm receive` and `qevm send` as the other
//! end. [`targets`] captures machines of other targets, [`cores`] compares their ELF cores, and [`mod@crash`] has those
//! of Linux guests opened by the program of that name. [`lab`] is a machine with a KVM as on hardware, for what a
//! paravirtual host cannot show. [`peer`] takes running guests to and fro between these QEMUs and reference-vmm, and
//! [`mod@bench`] measures both; [`toy`] does so with the example of `qevm-migration`, and [`lifecycle`] is about what
//! becomes of a guest when something goes wrong with that.

pub mod analyze;
pub mod apt;
pub mod bench;
pub mod catalogue;
pub mod channels;
pub mod cores;
pub mod corpus;
mod cpio;
pub mod crash;
pub mod description;
mod exec;
pub mod fields;
pub mod host_cpu;
pub mod interface;
pub mod judge;
pub mod lab;
pub mod launch;
pub mod lifecycle;
pub mod linux;
pub mod matrix;
mod network;
pub mod oracle;
pub mod outcome;
pub mod patience;
pub mod payload;
pub mod peer;
pub mod process;
mod processor_time;
pub mod qmp;
pub mod record;
pub mod recorder;
pub mod reload;
pub mod report;
pub mod roots;
mod route;
pub mod scenario;
pub mod subject;
mod suite;
pub mod table;
pub mod targets;
pub mod toy;
pub mod trial;
