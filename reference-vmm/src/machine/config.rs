//! What machine to build.

use crate::boot::Kernel;
use crate::devices::VirtioSlot;
use crate::memory::{Files, MemoryBackend};
use crate::payload;
use crate::vfio::{Iommufd, VfioSlot};
use qevm_multifd::Uuid;
use std::collections::BTreeMap;
use std::io::{self, Write};

/// What machine to build.
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory: u64,
    /// What the RAM is made of; private, anonymous memory without it.
    pub memory_backend: Option<MemoryBackend>,
    /// Which files RAM is made of that another process may have as well.
    pub files: Files,
    /// Whether the host is to back all RAM before the machine is there.
    pub mem_prealloc: bool,
    /// Number of vCPUs, 1 to [`MAX_CPUS`](super::MAX_CPUS).
    pub cpus: usize,
    /// Firmware: a multiple of 64 KiB.
    pub bios: Vec<u8>,
    /// The machine's UUID, which the firmware configuration device tells.
    pub uuid: Option<Uuid>,
    /// Files of the firmware configuration device by name.
    pub fw_cfg: BTreeMap<String, Vec<u8>>,
    /// A kernel to boot.
    pub kernel: Option<Kernel>,
    /// The machine waits for a guest that has its own kernel: this one is loaded when that guest is reset, and not
    /// before.
    pub incoming: bool,
    /// Interrupt controllers and PIT are in the monitor, and only the local APICs in the kernel: QEMU's
    /// `kernel-irqchip=split`.
    pub split_irqchip: bool,
    /// Whether there is a real-time clock. QEMU's `rtc=auto` has one under TCG only.
    pub rtc: bool,
    /// Whether there is a PCI Express bus: QEMU's `pcie=on`.
    pub pcie: bool,
    /// Devices on the PCI bus, from 00:01.0 on.
    pub vfio: Vec<VfioSlot>,
    /// What devices of the host's may be attached to by name.
    pub iommufds: Vec<Iommufd>,
    /// Devices on virtio-mmio. A machine that has one without a model can take a guest and give it back, but not run
    /// it.
    pub virtio: Vec<VirtioSlot>,
    /// Entries of each vCPU's dirty ring, a power of two; 0 is none, and the dirty log is KVM's bitmap (QEMU's
    /// `-accel kvm,dirty-ring-size=N`).
    pub dirty_ring_size: u32,
    /// Where the serial port writes.
    pub serial: Box<dyn Write + Send>,
}

impl Default for MachineConfig {
    /// 128 MiB, one vCPU, the payload guest, serial output thrown away.
    fn default() -> MachineConfig {
        MachineConfig {
            memory: 128 << 20,
            memory_backend: None,
            files: Files::default(),
            mem_prealloc: false,
            cpus: 1,
            bios: payload::IMAGE.to_vec(),
            uuid: None,
            fw_cfg: BTreeMap::new(),
            kernel: None,
            incoming: false,
            split_irqchip: false,
            rtc: false,
            pcie: false,
            vfio: Vec::new(),
            iommufds: Vec::new(),
            virtio: Vec::new(),
            dirty_ring_size: 0,
            serial: Box::new(io::sink()),
        }
    }
}
