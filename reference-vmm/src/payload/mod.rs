//! The payload guest: firmware of ours that notices when a migration loses a page.
//!
//! Give [`IMAGE`] to QEMU (`-M microvm -bios FILE`) or to a [`Machine`](crate::machine::Machine). It starts at the
//! reset vector, enters long mode, drops to ring 3 and then, on each of up to four vCPUs, rewrites a range of pages
//! pass after pass and checks before each rewrite that the page holds exactly what the last pass left there. In the
//! background it re-reads a range of pseudo-random pages and a range of pages that must stay zero. It prints on COM1:
//!
//! ```text
//! qevm-payload start cpus=1 ram=134217728 base=4194304 dirty=62914560 hold=15728640 zero=8388608 rate=0 timer=20 tsc_khz=2600092
//! qevm-payload pass=307 pages=15360 stale=0 tsc_back=0 written=4715523 checked=943 rounds=0 ticks=5 ms=271
//! qevm-payload stale-page kind=hot cpu=0 page=17 word=7 expected=… found=…
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `pass` | passes over the hot range completed by the slowest vCPU |
//! | `pages` | pages in the hot range |
//! | `stale` | pages found with other contents than the guest left there, since the start |
//! | `tsc_back` | times the TSC of a vCPU was seen to run backwards |
//! | `written` | hot pages written |
//! | `checked` | background pages checked |
//! | `rounds` | complete rounds over the background ranges, of all vCPUs together |
//! | `ticks` | timer interrupts taken |
//! | `ms` | time since the start by the TSC |
//!
//! It is configured by the fw_cfg item `opt/qevm/payload`, a text of `KEY=NUMBER[K|M|G]` entries separated by blanks or
//! `;`:
//!
//! | key | meaning | default |
//! |---|---|---|
//! | `base` | first address of the hot range | 4M |
//! | `dirty` | bytes in the hot range, shared out to the vCPUs | at most 64M and half of the RAM beyond 8M |
//! | `hold` | bytes of pseudo-random pages after it | at most 16M and an eighth |
//! | `zero` | bytes of untouched pages after that | at most 8M and an eighth |
//! | `rate` | bytes per second all vCPUs together dirty, 0 = as fast as possible | 0 |
//! | `verify` | background pages each vCPU checks per second | 4096 |
//! | `report` | milliseconds between progress lines | 250 |
//! | `timer` | timer interrupts per second and vCPU, 0 = none | 20 |
//! | `cpus` | vCPUs to use at most | all, up to 4 |
//! | `virtio` | virtio-mmio devices to keep busy: 1 disk, 2 random numbers, 4 console, 8 network | 0 |
//! | `events` | not 0: with `VIRTIO_RING_F_EVENT_IDX` | 0 |
//! | `reset` | milliseconds from each start to a reset, 0 = never | 0 |
//! | `resets` | resets at most | no limit |
//! | `way` | how: 1 ACPI reset register, 2 triple fault | 1 |
//! | `button` | power button: 1 report it, 2 report it and switch off | 0 |
//! | `pci` | PCI bus: 1 program its host bridge, and check its registers in each pass; 2 use test devices as well, 3 with INTx, 4 with MSI, 5 with MSI-X | 0 |
//! | `dma` | first of the pages that test devices write to, which must not be in use, 0 = none | 0 |
//! | `dmapages` | such pages for each of them | 64 |
//! | `reader` | not 0: the first vCPU reads the `hold` pages in a random order whenever it has nothing to rewrite, and measures each read | 0 |
//! | `worst` | not 0: do nothing of this, and to the monitor the worst that a guest can do, on every queue and port | 0 |
//!
//! Before a reset it prints `qevm-payload reset boots=N`, where `N` counts the starts so far in RAM, which a reset
//! keeps; and `qevm-payload power button` with the first progress line after the button was pressed.
//!
//! With virtio devices each progress line is followed by `qevm-payload virtio disk=… rng=… console=… net=… interrupts=…
//! errors=…`: the number of the next request of each device (0: it is not used), interrupts taken, and devices that
//! gave back something else than was asked for. With `pci` it is followed by `qevm-payload pci checks=N`, the number of
//! passes that checked the bridge; a register with another value than it should have counts as stale, `kind=pci` with
//! its offset as page.
//!
//! Test devices are those that `conformance/lab/testdev` documents, up to four. The guest places their BARs, turns
//! memory and bus mastering on, and tells each its pages of RAM. The first vCPU counts a register and a word of the
//! device's memory up in each pass and checks both, the configuration space, and some of the pages; it raises
//! interrupts one at a time by the next of four vectors, and the next one when the last has come. Each has a line after
//! that of the bus:
//!
//! ```text
//! qevm-payload pci-device slot=1 counter=12 raised=345 taken=345 spurious=0 dma=384
//! ```
//!
//! What is wrong counts as stale, with the slot as word: `kind=pci` for the configuration space, `pci-register` and
//! `pci-memory` for BARs, `pci-dma` for a page that lacks the number it was given last, and `pci-interrupt` for one
//! that has not come within five seconds, came twice (page 0), or by another vector (page 1).
//!
//! With `reader` a line that [`Reads`] reads follows: how long reads of pages took.

mod reads;
mod transcript;

pub use reads::Reads;
pub use transcript::{BadTranscript, Transcript};

/// The firmware image: 64 KiB, to be mapped so that it ends at 4 GiB and once more so that it ends at 1 MiB.
pub static IMAGE: &[u8; 64 << 10] = include_bytes!(concat!(env!("OUT_DIR"), "/payload.bin"));

/// Name of the fw_cfg item that configures the payload.
pub const FW_CFG_NAME: &str = "opt/qevm/payload";

/// One `qevm-payload pass=…` line.
///
/// ```
/// use reference_vmm::payload::Progress;
/// let line = "qevm-payload pass=3 pages=16 stale=0 tsc_back=0 written=48 checked=9 rounds=0 ticks=5 ms=271";
/// let progress = Progress::parse(line).unwrap();
/// assert_eq!((progress.pass, progress.stale, progress.ms), (3, 0, 271));
/// assert!(Progress::parse("qevm-payload start cpus=1").is_none());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Passes completed by the slowest vCPU.
    pub pass: u64,
    /// Pages in the hot range.
    pub pages: u64,
    /// Pages found stale since the start.
    pub stale: u64,
    /// Times the TSC ran backwards.
    pub tsc_back: u64,
    /// Hot pages written.
    pub written: u64,
    /// Background pages checked.
    pub checked: u64,
    /// Complete rounds over the background ranges.
    pub rounds: u64,
    /// Timer interrupts.
    pub ticks: u64,
    /// Milliseconds since the start.
    pub ms: u64,
}

/// One `qevm-payload pci-device slot=…` line.
///
/// ```
/// use reference_vmm::payload::PciDevice;
/// let line = "qevm-payload pci-device slot=1 counter=12 raised=345 taken=344 spurious=0 dma=384";
/// let device = PciDevice::parse(line).unwrap();
/// assert_eq!((device.slot, device.counter, device.raised - device.taken), (1, 12, 1));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciDevice {
    /// Its device number on the bus.
    pub slot: u64,
    /// Passes in which its registers and its memory were as they had been left.
    pub counter: u64,
    /// Interrupts raised; before this start of the guest as well, if the device has not been reset.
    pub raised: u64,
    /// Those of them that have come: at most one fewer.
    pub taken: u64,
    /// Times that its pin interrupted without a cause.
    pub spurious: u64,
    /// Pages looked at that the device writes to.
    pub dma: u64,
}

impl PciDevice {
    /// Reads such a line; `None` for any other line and for one that was cut off.
    pub fn parse(line: &str) -> Option<PciDevice> {
        let mut field = fields(line, "qevm-payload pci-device ")?;
        Some(PciDevice {
            slot: field("slot")?,
            counter: field("counter")?,
            raised: field("raised")?,
            taken: field("taken")?,
            spurious: field("spurious")?,
            dma: field("dma")?,
        })
    }
}

impl PciDevice {
    /// Whether a guest that said `before` can say this later, unless it was reset.
    pub fn follows(&self, before: &PciDevice) -> bool {
        self.counter >= before.counter
            && self.raised >= before.raised
            && self.taken >= before.taken
            && self.spurious >= before.spurious
            && self.dma >= before.dma
    }
}

/// Gives the numbers of a line that begins so, one after the other, by their names.
fn fields<'l>(line: &'l str, begin: &str) -> Option<impl FnMut(&str) -> Option<u64> + use<'l>> {
    let mut words = line.trim_end().strip_prefix(begin)?.split(' ');
    Some(move |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

impl Progress {
    /// Reads a progress line; `None` for any other line and for one that was cut off.
    pub fn parse(line: &str) -> Option<Progress> {
        let mut field = fields(line, "qevm-payload ")?;
        Some(Progress {
            pass: field("pass")?,
            pages: field("pages")?,
            stale: field("stale")?,
            tsc_back: field("tsc_back")?,
            written: field("written")?,
            checked: field("checked")?,
            rounds: field("rounds")?,
            ticks: field("ticks")?,
            ms: field("ms")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_vector_is_a_jump() {
        // 16-bit near jump, the only thing between the reset vector and the end of the image.
        assert_eq!(IMAGE[0xfff0], 0xe9);
    }

    #[test]
    fn a_cut_line_is_no_progress() {
        let line = "qevm-payload pass=3 pages=16 stale=0 tsc_back=0 written=48 checked=9 rounds=0 ticks=5 ms=271";
        assert!(Progress::parse(line).is_some());
        for end in 0..line.len() - 2 {
            assert_eq!(Progress::parse(&line[..end]), None, "{}", &line[..end]);
        }
    }
}
