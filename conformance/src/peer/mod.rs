//! Running guests that move between real QEMUs and reference-vmm.
//!
//! A [`Journey`] is a row of the [`table`]: the monitors that a payload guest visits, one after the other, and how it
//! gets from each to the next. [`travel`](Journey::travel) plays it: the first monitor boots the guest, every hop is a
//! live migration under way while the guest rewrites its memory, and at the end the guest itself says whether a page
//! was stale, its clock ran backwards or a byte of its serial output got lost. An [`Outage`] breaks the connection
//! again and again before it lets the guest go, a [`Recovery`] has it break when the guest has gone before its memory,
//! [`Cuts`] do so once in each of many migrations, a [`Pairing`] is of monitors that do not fit each other, and must be
//! told why, a [`Distrust`] of those that must not trust each other, a [`Doubt`] ends in a moment when the source
//! cannot know what the destination does, an [`Echo`] is a stopped guest that comes back as it was, a [`Snapshot`] is a
//! copy of a guest that runs on, and one that is [`Served`] starts from what a page server gives of its image. A
//! [`Lodger`] is one that never runs in reference-vmm: Linux under TCG. [`Gear`] is what a guest uses besides its
//! memory: virtio devices that it keeps busy. A [`Party`] is one of the monitors, controlled by QMP whoever wrote it.

pub mod bench;
pub mod bench_postcopy;
pub mod bench_restore;
pub mod bench_snapshot;
pub mod clock;
mod cuts;
pub mod demo;
mod departure;
pub mod dialogue;
mod doubt;
mod echo;
mod gear;
mod huge_pages;
mod journey;
mod lodger;
mod monitor;
mod oldest;
mod outage;
mod pairing;
mod party;
mod postcopy;
mod proxy;
pub mod python;
pub mod reboots;
mod recovery;
mod relay;
mod release;
mod report;
mod resident;
mod rows;
pub(crate) mod secured;
mod served;
mod shared;
mod snapshot;
mod stage;
pub mod table;
mod tap;
mod tls;
mod xbzrle;
mod zero_copy;

pub use cuts::Cuts;
pub use departure::Departure;
pub use doubt::{Doubt, Doubtful};
pub use echo::Echo;
pub use gear::Gear;
pub use journey::Journey;
pub use lodger::Lodger;
pub use monitor::{BUILT_IN, Monitor};
pub use outage::Outage;
pub use pairing::Pairing;
pub use party::{Party, reference};
pub use proxy::Cut;
pub use recovery::Recovery;
pub use relay::Break;
pub use report::{Case, run, summary};
pub use secured::{Flaw, Secured, Version};
pub use served::Served;
pub use snapshot::Snapshot;
pub use stage::{Account, Hop, Link, Load, Moment, Stage, Stop};
pub use tls::Distrust;
