//! Where a journey is played, by which monitors, and its report.

use super::monitor::Monitor;
use super::virtio_load::VirtioLoad;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use reference_vmm::payload::{Progress, Transcript};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// A monitor on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Real QEMU of this suite.
    Qemu(Suite, Accel),
    /// reference-vmm, on KVM.
    Reference,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Qemu(suite, Accel::Kvm) => f.write_str(suite.series()),
            Stop::Qemu(suite, Accel::Tcg) => write!(f, "{} tcg", suite.series()),
            Stop::Reference => f.write_str("ref"),
        }
    }
}

/// What the guest migrates over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A UNIX socket.
    Unix,
    /// A TCP connection over the loopback.
    Tcp,
    /// A command at each end, with a named pipe between them.
    Exec,
    /// A pair of sockets that the monitors are given.
    Descriptor,
    /// A UNIX socket, and beside it one on which the source passes the guest's memory (mode `cpr-transfer`).
    Memory,
    /// A file: the guest goes on from it when all of it is there. 7.2 has it written and read by commands.
    File,
}

/// What the guest does, and how fast it may migrate.
#[derive(Debug, Clone)]
pub struct Load {
    /// Guest RAM, MiB.
    pub memory: u32,
    /// Destinations have all their memory from the host before they start.
    pub mem_prealloc: bool,
    /// The machines' RAM is a memory backend of this type, with these properties beside `id` and `size`.
    pub memory_backend: Option<&'static str>,
    /// Memory can be passed to a successor, and comes so to a destination.
    pub passes_memory: bool,
    /// vCPUs.
    pub cpus: u32,
    /// All monitors leave only the local APICs to the kernel.
    pub split_irqchip: bool,
    /// All machines have a PCI bus, whose host bridge the guest checks.
    pub pcie: bool,
    /// Configuration of the payload, see [`reference_vmm::payload`].
    pub payload: String,
    /// Virtio devices that it keeps busy.
    pub virtio: Vec<VirtioLoad>,
    /// `max-bandwidth`, bytes per second.
    pub max_bandwidth: u64,
    /// `downtime-limit`, ms.
    pub downtime_limit: u64,
}

impl Load {
    /// How many of the vCPUs the payload uses; the others sleep.
    pub(super) fn busy(&self) -> u64 {
        self.cpus.min(4).into()
    }
}

impl Default for Load {
    /// One vCPU rewrites 16 MiB of 64 three times a second, checks the rest in the background and reports fifty times a
    /// second; the link is slow enough that most of the 16 MiB are dirty again after the first round.
    fn default() -> Load {
        Load {
            memory: 64,
            mem_prealloc: false,
            memory_backend: None,
            passes_memory: false,
            cpus: 1,
            split_irqchip: false,
            pcie: false,
            payload: "dirty=16M rate=48M hold=4M zero=2M verify=16384 report=20".into(),
            virtio: Vec::new(),
            max_bandwidth: 64 << 20,
            downtime_limit: 100,
        }
    }
}

/// What a hop took.
#[derive(Debug, Clone, Serialize)]
pub struct Hop {
    /// From where.
    pub from: String,
    /// To where.
    pub to: String,
    /// Between the events STOP at the source and RESUME at the destination, ms.
    pub downtime_ms: f64,
    /// The source's figure of the whole migration, ms.
    pub total_ms: u64,
    /// Bytes, by the source's count.
    pub bytes: u64,
    /// How often the source read the log of dirty pages.
    pub rounds: u64,
}

/// Something that happens on the way.
#[derive(Debug, Clone)]
pub enum Moment {
    /// The guest has booted and written to all of its memory.
    Booted(Progress),
    /// A hop begins.
    Leaving {
        /// From where.
        from: Stop,
        /// To where.
        to: Stop,
        /// What `migrate` was told.
        uri: String,
    },
    /// The source has read its log of dirty pages; `query-migrate`.
    Round(Value),
    /// The guest runs at the next monitor.
    Arrived(Hop),
    /// It has rewritten and checked all of its memory there.
    Settled(Progress),
}

/// How a journey went.
#[derive(Debug, Clone, Serialize)]
pub struct Account {
    /// Hop by hop.
    pub hops: Vec<Hop>,
    /// Pages that the guest wrote or checked and found as it had left them.
    pub pages: u64,
    /// Passes over all its memory.
    pub passes: u64,
    /// Lines of its output that a migration cut in two.
    pub cut_lines: usize,
    /// Tries that failed because the connection was cut.
    pub cuts: usize,
}

/// Where a journey is played.
#[derive(Debug, Clone, Copy)]
pub struct Env<'s> {
    /// The real QEMUs.
    pub roots: &'s BTreeMap<Suite, Root>,
    /// The reference-vmm under judgement.
    pub program: &'s Monitor,
    /// A folder for sockets, consoles and logs.
    pub scratch: &'s Path,
    /// Further arguments of a monitor.
    pub more: &'s [&'static str],
}

/// What a transcript and the hops amount to.
pub(super) fn account(hops: Vec<Hop>, transcript: &Transcript) -> Account {
    let last = transcript.last;
    Account { hops, pages: last.written + last.checked, passes: last.pass, cut_lines: transcript.cut, cuts: 0 }
}
