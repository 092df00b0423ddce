//! The options that describe a machine.

use super::device::DeviceOptions;
use super::object::{chosen, iommufds, memory_backends};
use super::options::pairs;
use super::{qmp_object, vfio};
use anyhow::{Context, bail};
use qevm_microvm::MACHINE_TYPE;
use qevm_migration::{BadSize, parse_size};
use qevm_multifd::Uuid;
use qevm_wire::{Located, Profile, QemuVersion};
use reference_vmm::boot::Kernel;
use reference_vmm::descriptors::Descriptors;
use reference_vmm::machine::MachineConfig;
use reference_vmm::memory::Files;
use reference_vmm::payload;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;

/// The machine.
#[derive(clap::Args)]
pub(crate) struct MachineArguments {
    /// Machine type, and whom it migrates to:
    /// microvm[,qemu=RELEASE][,peer-accel=tcg][,rtc=on][,pcie=on][,kernel-irqchip=split][,memory-backend=ID][,aux-ram-share=on].
    /// microvm has no version, so the release of QEMU's binary decides the bytes of a stream: name the oldest that is
    /// to load one (7.2, 10.0, 11.1, …). Streams of all releases are taken. peer-accel=tcg makes streams that a QEMU
    /// under TCG takes. rtc=on adds a real-time clock, which QEMU has by default under TCG and not under KVM. pcie=on
    /// adds a PCI Express bus with its host bridge. kernel-irqchip=split leaves only the local APICs to the kernel, as
    /// under QEMU. aux-ram-share=on makes RAM that no memory backend is such that mode cpr-transfer can pass it on
    #[arg(long = "machine", short = 'M', value_name = "TYPE", default_value = "microvm")]
    machine: MachineOptions,
    /// Accelerator: kvm[,dirty-ring-size=N]. N is the number of entries of each vCPU's dirty ring, a power of two, 1024
    /// or more; 0 is no ring: KVM's dirty log tells which pages were written
    #[arg(long, value_name = "ACCEL", default_value = "kvm")]
    accel: Accelerator,
    /// RAM, with K, M, G or T; plain numbers are MiB as in QEMU [default: that of the memory backend, or else 128M]
    #[arg(long, short, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,
    /// Memory for the machine's RAM, which -M memory-backend=ID takes: memory-backend-ram,id=ID,size=BYTES; -memfd with
    /// [,hugetlb=on[,hugetlbsize=SIZE]][,seal=off]; -file with mem-path=PATH[,offset=BYTES]; all with
    /// [,share=on|off][,prealloc=on] [,reserve=off][,merge=on]. The RAM block is then called ID in a stream, as by
    /// QEMU, and both sides of a migration have to say the same; id=microvm.ram is the name of a machine without a
    /// backend. And iommufd,id=ID[,fd=NUMBER], for --device vfio-pci: fd is an open /dev/iommu that this program
    /// inherits. Also TLS credentials, which migration parameter tls-creds names:
    /// tls-creds-x509,id=ID,dir=PATH,endpoint=client|server[,verify-peer=off][,priority=NORMAL:-VERS-TLS1.2]; and who
    /// may send a guest, which tls-authz names: authz-simple,id=ID,identity=NAME or
    /// authz-list,id=ID,policy=deny,rules.0.match=NAME, rules.0.policy=allow[,rules.0.format=glob]; or one of these as
    /// a JSON object
    #[arg(long, value_name = "OPTIONS")]
    object: Vec<String>,
    /// Let the host back all RAM at once, rather than page by page when the guest first writes to it. A destination
    /// that waits with --incoming then takes pages faster
    #[arg(long)]
    mem_prealloc: bool,
    /// Number of vCPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    smp: usize,
    /// UUID of the machine, as migrations with capability validate-uuid compare it:
    /// 12345678-1234-1234-1234-123456789abc
    #[arg(long, value_name = "UUID")]
    uuid: Option<Uuid>,
    /// Firmware image, a multiple of 64 KiB [default: the built-in payload guest; with --kernel none]
    #[arg(long, value_name = "FILE")]
    bios: Option<PathBuf>,
    /// Linux kernel to boot, an ELF file with a PVH entry point or a bzImage: at once, or with --bios by that firmware.
    /// With --incoming it is what the guest that comes starts anew with when it is reset
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line for the kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
    /// Where the serial port writes: stdio, file:PATH or null
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialOutput,
    /// Disk for a virtio-blk-device: id=ID,file=PATH[,format=raw][,if=none][,readonly=on]
    #[arg(long, value_name = "OPTIONS")]
    drive: Vec<String>,
    /// Character device for a port: null,id=ID; stdio,id=ID; file,id=ID,path=PATH[,append=on];
    /// socket,id=ID,path=PATH[,server=on][,wait=off]
    #[arg(long, value_name = "OPTIONS")]
    chardev: Vec<String>,
    /// Network for a card: tap,id=ID,ifname=NAME,script=no,downscript=no;
    /// dgram,id=ID,local.type=unix,local.path=PATH,remote.type=unix, remote.path=PATH;
    /// stream,id=ID,addr.type=unix,addr.path=PATH[,server=on]
    #[arg(long, value_name = "OPTIONS")]
    netdev: Vec<String>,
    /// Device on virtio-mmio, in the order of QEMU's command line: virtio-blk-device,drive=ID[,serial=TEXT],
    /// virtio-rng-device, virtio-net-device,netdev=ID[,mac=ADDRESS], virtio-serial-device with
    /// virtconsole,chardev=ID[,name=TEXT] and virtserialport,chardev=ID[,name=TEXT] on it. Without what it needs a
    /// device has no model: a guest is kept as it came and goes back, but does not run (use -S). On the PCI bus of -M
    /// microvm,pcie=on:
    /// vfio-pci,sysfsdev=PATH[,id=ID][,iommufd=ID][,addr=NUMBER][,enable-migration=on|off|auto][,migration-events=on]
    /// [,x-migration-multifd-transfer=on|off|auto], a device of the host that is bound to a VFIO driver
    #[arg(long, value_name = "OPTIONS")]
    device: Vec<String>,
    /// Item of the firmware configuration device: name=NAME,string=TEXT or name=NAME,file=PATH; commas in TEXT are
    /// doubled
    #[arg(long = "fw-cfg", alias = "fw_cfg", value_name = "ITEM")]
    fw_cfg: Vec<String>,
}

impl MachineArguments {
    /// The switches of the QEMU release that is to load this machine's streams.
    pub(crate) fn profile(&self) -> Profile {
        let profile = Profile::new(self.machine.qemu, MACHINE_TYPE);
        if self.machine.kvm { profile } else { profile.tcg() }
    }

    fn devices(&self) -> DeviceOptions<'_> {
        let (drives, chardevs, netdevs) = (&self.drive, &self.chardev, &self.netdev);
        let devices = self.device.iter().filter(|text| !vfio::is_vfio(text)).collect();
        DeviceOptions { drives, chardevs, netdevs, devices }
    }

    /// The sockets that its devices listen at.
    pub(crate) fn sockets(&self) -> anyhow::Result<Vec<PathBuf>> {
        self.devices().sockets()
    }

    /// The properties of the objects that are no memory, each with its argument.
    pub(crate) fn objects(&self) -> anyhow::Result<Vec<(&String, serde_json::Map<String, serde_json::Value>)>> {
        qmp_object::listed(&self.object)
    }

    /// The machine they describe. `incoming` says that it waits for a guest, whose memory a predecessor may have
    /// `passed`. The descriptors that they name are taken.
    pub(crate) fn config(
        &self,
        incoming: bool,
        passed: Option<BTreeMap<String, File>>,
        descriptors: &mut Descriptors,
    ) -> anyhow::Result<MachineConfig> {
        let read = |path: &Option<PathBuf>, what| match path {
            Some(path) => std::fs::read(path).with_context(|| format!("cannot read the {what} {}", path.display())),
            None => Ok(Vec::new()),
        };
        let kernel = match &self.kernel {
            Some(_) => Some(Kernel {
                image: read(&self.kernel, "kernel")?,
                initrd: read(&self.initrd, "initial RAM disk")?,
                command_line: self.append.clone().unwrap_or_default(),
                by_firmware: self.bios.is_some(),
            }),
            None => None,
        };
        let bios = match &self.bios {
            Some(path) => {
                std::fs::read(path).with_context(|| format!("cannot read the firmware {}", path.display()))?
            }
            None if self.kernel.is_some() => vec![0; NO_FIRMWARE],
            None => payload::IMAGE.to_vec(),
        };
        let fw_cfg = self.fw_cfg.iter().map(|item| parse_fw_cfg(item)).collect::<anyhow::Result<BTreeMap<_, _>>>()?;
        let (memory_backend, memory) = match &self.machine.memory_backend {
            Some(id) => chosen(&self.object, id, self.memory).map(|(backend, memory)| (Some(backend), memory))?,
            None => {
                memory_backends(&self.object)?;
                (None, self.memory.unwrap_or(MEMORY))
            }
        };
        let iommufds = iommufds(&self.object, descriptors)?;
        let names: BTreeSet<&str> = iommufds.iter().map(|iommufd| iommufd.id.as_str()).collect();
        let vfio = self.device.iter().filter(|text| vfio::is_vfio(text)).collect::<Vec<_>>();
        let vfio = vfio::slots(&vfio, &names)?;
        Ok(MachineConfig {
            memory,
            memory_backend,
            files: Files { share_aux: self.machine.aux_ram_share, passed },
            mem_prealloc: self.mem_prealloc,
            cpus: self.smp,
            uuid: self.uuid,
            bios,
            fw_cfg,
            kernel,
            incoming,
            split_irqchip: self.machine.split_irqchip,
            rtc: self.machine.rtc,
            pcie: self.machine.pcie,
            vfio,
            iommufds,
            virtio: self.devices().slots()?,
            dirty_ring_size: self.accel.dirty_ring_size,
            serial: self.serial.open()?,
        })
    }
}

/// Bytes of RAM by default.
const MEMORY: u64 = 128 << 20;

/// Length of the firmware of a machine that has none: that of QEMU's qboot, so that such a guest can go to a QEMU.
const NO_FIRMWARE: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
struct MachineOptions {
    qemu: QemuVersion,
    rtc: bool,
    /// Whether there is a PCI Express bus.
    pcie: bool,
    split_irqchip: bool,
    /// The peer runs under KVM.
    kvm: bool,
    /// The id of what the RAM is made of.
    memory_backend: Option<String>,
    /// RAM that no memory backend is can be passed to a successor.
    aux_ram_share: bool,
}

impl FromStr for MachineOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<MachineOptions, String> {
        let mut parts = pairs(text, Some("type")).map_err(|error| error.to_string())?.into_iter();
        match parts.next() {
            Some((name, value)) if name == "type" && value == MACHINE_TYPE => {}
            _ => return Err(format!("machine type '{text}': only {MACHINE_TYPE} is there")),
        }
        let mut options = MachineOptions {
            qemu: QemuVersion::NEWEST,
            rtc: false,
            pcie: false,
            split_irqchip: false,
            kvm: true,
            memory_backend: None,
            aux_ram_share: false,
        };
        for (name, value) in parts {
            match (name.as_str(), value.as_str()) {
                ("qemu", release) => options.qemu = release.parse().map_err(|bad| format!("qemu={release}: {bad}"))?,
                ("peer-accel", "kvm") => options.kvm = true,
                ("peer-accel", "tcg") => options.kvm = false,
                ("rtc", "on") => options.rtc = true,
                ("kernel-irqchip", "on") => options.split_irqchip = false,
                ("kernel-irqchip", "split") => options.split_irqchip = true,
                ("aux-ram-share", "on") => options.aux_ram_share = true,
                ("aux-ram-share", "off") => options.aux_ram_share = false,
                ("memory-backend", id) => options.memory_backend = Some(id.to_owned()),
                ("pcie", "on") => options.pcie = true,
                // QEMU's auto is off.
                ("pcie", "off" | "auto") => options.pcie = false,
                // As a QEMU under KVM has it.
                ("rtc", "off" | "auto") => options.rtc = false,
                _ => {
                    return Err(format!(
                        "'{name}={value}' is not one of qemu=RELEASE, peer-accel=kvm|tcg, rtc=on|off|auto, pcie=on|off|auto, kernel-irqchip=on|split, memory-backend=ID, aux-ram-share=on|off"
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// The accelerator, as QEMU's `-accel` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Accelerator {
    dirty_ring_size: u32,
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> Result<Accelerator, String> {
        let mut parts = pairs(text, Some("accel")).map_err(|error| error.to_string())?.into_iter();
        match parts.next() {
            Some((name, value)) if name == "accel" && value == "kvm" => {}
            _ => return Err(format!("accelerator '{text}': only kvm is there")),
        }
        let mut accelerator = Accelerator { dirty_ring_size: 0 };
        for (name, size) in parts {
            if name != "dirty-ring-size" {
                return Err(format!("'{name}={size}' is not dirty-ring-size=N"));
            }
            let size: u64 = size.parse().map_err(|_| "Parameter 'dirty-ring-size' expects uint64".to_owned())?;
            accelerator.dirty_ring_size =
                size.try_into().map_err(|_| "Parameter 'dirty-ring-size' expects uint32_t".to_owned())?;
            if accelerator.dirty_ring_size != 0 && !accelerator.dirty_ring_size.is_power_of_two() {
                return Err("dirty-ring-size must be a power of two.".to_owned());
            }
        }
        Ok(accelerator)
    }
}

#[derive(Clone)]
enum SerialOutput {
    Stdio,
    File(PathBuf),
    Null,
}

impl FromStr for SerialOutput {
    type Err = String;

    fn from_str(text: &str) -> Result<SerialOutput, String> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(SerialOutput::Stdio),
            ("null", _) => Ok(SerialOutput::Null),
            (_, Some(path)) if !path.is_empty() => Ok(SerialOutput::File(path.into())),
            _ => Err("expected stdio, file:PATH or null".to_owned()),
        }
    }
}

impl SerialOutput {
    fn open(&self) -> anyhow::Result<Box<dyn Write + Send>> {
        Ok(match self {
            SerialOutput::Stdio => Box::new(io::stdout()),
            SerialOutput::Null => Box::new(io::sink()),
            SerialOutput::File(path) => {
                let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
                Box::new(file)
            }
        })
    }
}

/// A size; plain numbers are MiB.
pub(crate) fn parse_memory(text: &str) -> Result<u64, Located<BadSize>> {
    parse_size(text, 1 << 20)
}

/// QEMU's syntax: options separated by commas, a doubled comma stands for one.
fn parse_fw_cfg(item: &str) -> anyhow::Result<(String, Vec<u8>)> {
    let (mut name, mut data) = (None, None);
    for (option, value) in pairs(item, None).with_context(|| format!("--fw-cfg {item}"))? {
        match option.as_str() {
            "name" => name = Some(value),
            "string" => data = Some(value.into_bytes()),
            "file" => data = Some(std::fs::read(&value).with_context(|| format!("cannot read {value}"))?),
            _ => bail!("--fw-cfg {item}: '{option}={value}' is not one of name=, string=, file="),
        }
    }
    match (name, data) {
        (Some(name), Some(data)) => Ok((name, data)),
        _ => bail!("--fw-cfg {item}: wanted name=NAME and one of string=TEXT, file=PATH"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        assert_eq!(parse_memory("128"), Ok(128 << 20));
        assert_eq!(parse_memory("4G"), Ok(4 << 30));
        assert_eq!(parse_memory("64k"), Ok(64 << 10));
        assert_eq!(parse_memory("1.5G"), Ok(3 << 29));
        for bad in ["", "M", "1Q", "-1", "99999999999999999999", "18446744073709551615G"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn machine_options() {
        let newest = || MachineOptions {
            qemu: QemuVersion::NEWEST,
            rtc: false,
            pcie: false,
            split_irqchip: false,
            kvm: true,
            memory_backend: None,
            aux_ram_share: false,
        };
        assert_eq!("microvm".parse(), Ok(newest()));
        assert_eq!("type=microvm,qemu=7.2.22".parse(), Ok(MachineOptions { qemu: QemuVersion::new(7, 2), ..newest() }));
        let split = MachineOptions { split_irqchip: true, ..newest() };
        assert_eq!("microvm,kernel-irqchip=split".parse(), Ok(split));
        assert_eq!("microvm,rtc=on".parse(), Ok(MachineOptions { rtc: true, ..newest() }));
        let backed = MachineOptions { memory_backend: Some("mem".into()), ..newest() };
        assert_eq!("microvm,memory-backend=mem".parse(), Ok(backed));
        for bad in [
            "",
            "q35",
            "microvm,",
            "microvm,rtc=yes",
            "microvm,qemu=7",
            "microvm,accel=kvm",
            "microvm,kernel-irqchip=off",
        ] {
            assert!(bad.parse::<MachineOptions>().is_err(), "{bad}");
        }
    }

    /// The texts are QEMU 11.1's.
    #[test]
    fn accelerators() {
        assert_eq!("kvm".parse(), Ok(Accelerator { dirty_ring_size: 0 }));
        assert_eq!("kvm,dirty-ring-size=4096".parse(), Ok(Accelerator { dirty_ring_size: 4096 }));
        let refused = |text: &str| text.parse::<Accelerator>().unwrap_err();
        assert_eq!(refused("kvm,dirty-ring-size=3"), "dirty-ring-size must be a power of two.");
        assert_eq!(refused("kvm,dirty-ring-size=4294967296"), "Parameter 'dirty-ring-size' expects uint32_t");
        assert_eq!(refused("kvm,dirty-ring-size=x"), "Parameter 'dirty-ring-size' expects uint64");
        assert!(refused("tcg").contains("only kvm") && refused("kvm,thread=multi").contains("thread"));
    }

    #[test]
    fn fw_cfg_items() {
        let (name, data) = parse_fw_cfg("name=opt/a,string=x,,y=1").unwrap();
        assert_eq!((name.as_str(), data.as_slice()), ("opt/a", b"x,y=1".as_slice()));
        for bad in ["", "name=a", "string=b", "name=a,text=b", "name=a,file=/nonexistent"] {
            assert!(parse_fw_cfg(bad).is_err(), "{bad}");
        }
    }
}
