//! `reference-vmm payload`.

use anyhow::Context;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write the payload guest's firmware image, for QEMU's -bios.
#[derive(clap::Args)]
#[command(after_long_help = "\
Example: boot the same guest in QEMU

  reference-vmm payload --out payload.bin
  qemu-system-x86_64 -M microvm,accel=kvm -m 128 -bios payload.bin -nographic -nodefaults -serial stdio \\
      -fw_cfg name=opt/qevm/payload,string='dirty=32M rate=100M'

Keys of opt/qevm/payload (sizes take K, M or G):
  base     first address of the pages rewritten in every pass [4M]
  dirty    bytes rewritten in every pass, shared out to the vCPUs [64M, less when RAM is small]
  hold     bytes of pseudo-random pages after them, checked in the background [16M]
  zero     bytes of pages after those that stay zero, checked as well [8M]
  rate     bytes dirtied per second, 0 = as fast as possible [0]
  verify   background pages each vCPU checks per second [4096]
  report   milliseconds between progress lines [250]
  timer    timer interrupts per second and vCPU, 0 = none [20]
  cpus     vCPUs to use at most [4]
  virtio   virtio-mmio devices to keep busy: 1 disk, 2 random numbers, 4 console, 8 network [0]
  events   not 0: with VIRTIO_RING_F_EVENT_IDX [0]
  reset    milliseconds from each start to a reset, 0 = never [0]
  resets   resets at most [no limit]
  way      how: 1 ACPI reset register, 2 triple fault [1]
  button   power button: 1 report it, 2 report it and switch off [0]
  pci      not 0: program the PCI bus's host bridge, and check its registers in each pass [0]
  reader   not 0: read the pseudo-random pages at random, and measure how long each read takes [0]
  worst    not 0: do nothing of this, and to the monitor the worst that a guest can do [0]")]
pub(crate) struct Payload {
    /// File to write; - is standard output
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Payload {
    pub(crate) fn execute(self) -> anyhow::Result<ExitCode> {
        let image = reference_vmm::payload::IMAGE;
        if self.out.as_os_str() == "-" {
            std::io::stdout().write_all(image).context("cannot write the image")?;
        } else {
            std::fs::write(&self.out, image).with_context(|| format!("cannot write {}", self.out.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
