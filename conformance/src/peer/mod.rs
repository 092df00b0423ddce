//! Running guests that move between real QEMUs and reference-vmm.
//!
//! A [`Journey`] is a row of the [`table`]: the monitors that a payload guest visits, one after the other, and how it
//! gets from each to the next. [`play`](Journey::play) plays it: the first monitor boots the guest, every hop is a live
//! migration under way while the guest rewrites its memory, and at the end the guest itself says whether a page was
//! stale, its clock ran backwards or a byte of its serial output got lost. [`LinkCuts`] breaks the connection again and
//! again before it lets the guest go, a [`Recovery`] has it break when the guest has gone before its memory, [`Cuts`]
//! do so once in each of many migrations, a [`MismatchCase`] is of monitors that do not fit each other, and must be
//! told why, a [`Distrust`] of those that must not trust each other, a [`Doubt`] ends in a moment when the source
//! cannot know what the destination does, a [`RoundTrip`] is a stopped guest that comes back as it was, a [`Snapshot`]
//! is a copy of a guest that runs on, and one that is [`Served`] starts from what a page server gives of its image. A
//! [`StoppedLinuxGuest`] is one that never runs in reference-vmm: Linux under TCG. [`VirtioLoad`] is what a guest uses
//! besides its memory: virtio devices that it keeps busy. An [`Endpoint`] is one of the monitors, controlled by QMP
//! whichever it is.

pub mod bench;
pub mod bench_postcopy;
pub mod bench_restore;
pub mod bench_snapshot;
pub mod clock;
mod cpr;
mod cuts;
pub mod demo;
mod departure;
pub mod dialogue;
mod differences;
mod doubt;
mod endpoint;
mod env;
mod huge_pages;
mod journey;
mod link_cuts;
mod mismatch;
mod monitor;
mod oldest;
mod postcopy;
mod proxy;
pub mod python;
pub mod reboots;
mod recovery;
mod relay;
mod release;
mod report;
mod resident;
mod round_trip;
mod rows;
pub(crate) mod secured;
mod served;
mod shared;
mod snapshot;
mod stopped_linux;
pub mod table;
mod tap;
mod tls;
mod virtio_load;
mod xbzrle;
mod zero_copy;

pub use cuts::Cuts;
pub use departure::Departure;
pub use doubt::{Doubt, Doubtful};
pub use endpoint::{Endpoint, reference};
pub use env::{Account, Env, Hop, Link, Load, Moment, Stop};
pub use journey::Journey;
pub use link_cuts::LinkCuts;
pub use mismatch::MismatchCase;
pub use monitor::{BUILT_IN, Monitor};
pub use proxy::Cut;
pub use recovery::Recovery;
pub use relay::Break;
pub use report::{Case, run, summary};
pub use round_trip::RoundTrip;
pub use secured::{Flaw, Secured, Version};
pub use served::Served;
pub use snapshot::Snapshot;
pub use stopped_linux::StoppedLinuxGuest;
pub use tls::Distrust;
pub use virtio_load::VirtioLoad;
