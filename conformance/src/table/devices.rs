//! Device models.

use super::since;
use crate::roots::Suite::{self, Bookworm, Bullseye, Sid, Trixie};
use crate::scenario::Scenario;

/// A row for every suite from `since` on.
struct Devices {
    what: &'static str,
    machine: &'static str,
    since: Suite,
    arguments: &'static str,
}

const fn on(machine: &'static str, since: Suite, what: &'static str, arguments: &'static str) -> Devices {
    Devices { what, machine, since, arguments }
}

const DISK: &str = "-drive file={dir}/disk.raw,if=none,id=d0,format=raw";

/// `@` stands for a raw disk with the id `d0`.
const TABLE: &[Devices] = &[
    // virtio-mmio
    on(
        "microvm",
        Bullseye,
        "virtio-mmio",
        "@ -device virtio-blk-device,drive=d0 -netdev user,id=n0 \
        -device virtio-net-device,netdev=n0 -device virtio-rng-device -device virtio-serial-device -chardev null,id=c0 \
        -device virtconsole,chardev=c0",
    ),
    on(
        "microvm",
        Bullseye,
        "virtio-mmio-modern",
        "-global virtio-mmio.force-legacy=false @ \
        -device virtio-blk-device,drive=d0 -netdev hubport,id=n0,hubid=0 -device virtio-net-device,netdev=n0 \
        -device virtio-balloon-device -device virtio-scsi-device -device virtio-keyboard-device",
    ),
    on(
        "microvm",
        Bullseye,
        "virtio-mmio-9p-gpu",
        "-fsdev local,id=f0,path={dir},security_model=none \
        -device virtio-9p-device,fsdev=f0,mount_tag=t -device virtio-gpu-device -device virtio-tablet-device",
    ),
    // virtio-pci
    on("q35", Bullseye, "virtio-blk", "@ -device virtio-blk-pci,drive=d0,num-queues=2 -boot menu=off"),
    on("q35", Bullseye, "virtio-net-slirp", "-netdev user,id=n0 -device virtio-net-pci,netdev=n0"),
    on(
        "pc",
        Bullseye,
        "virtio-net-mq",
        "-netdev hubport,id=n0,hubid=0 -device virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56 \
        -netdev hubport,id=n1,hubid=0 -device virtio-net-pci-non-transitional,netdev=n1",
    ),
    on(
        "q35",
        Bullseye,
        "virtio-serial",
        "-device virtio-serial-pci -chardev null,id=c0 -device virtconsole,chardev=c0 \
        -chardev null,id=c1 -device virtserialport,chardev=c1,name=qevm.0",
    ),
    on("q35", Bullseye, "virtio-rng-balloon", "-device virtio-rng-pci -device virtio-balloon-pci,deflate-on-oom=on"),
    on(
        "pc",
        Bullseye,
        "virtio-input",
        "-device virtio-keyboard-pci -device virtio-mouse-pci -device virtio-tablet-pci",
    ),
    on(
        "q35",
        Bullseye,
        "virtio-scsi",
        "@ -device virtio-scsi-pci,id=s0 -device scsi-hd,drive=d0,bus=s0.0 \
        -device scsi-cd,bus=s0.0",
    ),
    on("pc", Bullseye, "virtio-gpu", "-device virtio-gpu-pci"),
    on(
        "q35",
        Bullseye,
        "virtio-9p",
        "-fsdev local,id=f0,path={dir},security_model=none \
        -device virtio-9p-pci,fsdev=f0,mount_tag=t",
    ),
    on(
        "q35",
        Bullseye,
        "virtio-mem",
        "-m size=32M,maxmem=256M -object memory-backend-ram,id=vm0,size=32M \
        -device virtio-mem-pci,memdev=vm0,requested-size=8M",
    ),
    on(
        "q35",
        Bullseye,
        "virtio-pmem",
        "-m size=32M,maxmem=256M -object memory-backend-ram,id=vm0,size=16M \
        -device virtio-pmem-pci,memdev=vm0",
    ),
    on("q35", Bookworm, "virtio-iommu", "-device virtio-iommu-pci -device virtio-rng-pci"),
    on(
        "q35",
        Bookworm,
        "virtio-packed",
        "@ -device virtio-blk-pci,drive=d0,packed=on,disable-legacy=on -netdev hubport,id=n0,hubid=0 \
        -device virtio-net-pci,netdev=n0,packed=on,host_mtu=1500,rss=on,hash=on",
    ),
    // Network cards
    on("q35", Bullseye, "e1000", "-netdev user,id=n0 -device e1000,netdev=n0"),
    on("q35", Bullseye, "e1000e", "-netdev hubport,id=n0,hubid=0 -device e1000e,netdev=n0"),
    on(
        "pc",
        Bullseye,
        "rtl8139-pcnet",
        "-netdev hubport,id=n0,hubid=0 -device rtl8139,netdev=n0 \
        -netdev hubport,id=n1,hubid=0 -device pcnet,netdev=n1",
    ),
    on(
        "pc",
        Bullseye,
        "eepro100-ne2k",
        "-netdev hubport,id=n0,hubid=0 -device i82559c,netdev=n0 \
        -netdev hubport,id=n1,hubid=0 -device ne2k_pci,netdev=n1",
    ),
    on(
        "q35",
        Bullseye,
        "vmxnet3-tulip",
        "-netdev hubport,id=n0,hubid=0 -device vmxnet3,netdev=n0 \
        -netdev hubport,id=n1,hubid=0 -device tulip,netdev=n1",
    ),
    on("q35", Trixie, "igb", "-netdev hubport,id=n0,hubid=0 -device igb,netdev=n0"),
    // Disks
    on("q35", Bullseye, "ahci", "@ -device ide-hd,drive=d0,bus=ide.0 -device ide-cd,bus=ide.1"),
    on("pc", Bullseye, "ide-floppy", "@ -device ide-hd,drive=d0,bus=ide.0 -device ide-cd,bus=ide.1 -device floppy"),
    on("q35", Sid, "nvme", "@ -device nvme,drive=d0,serial=qevm"),
    on(
        "pc",
        Bullseye,
        "lsi-megasas",
        "@ -device lsi53c895a,id=s0 -device scsi-hd,drive=d0,bus=s0.0 -device megasas,id=s1 \
        -device scsi-cd,bus=s1.0",
    ),
    on(
        "q35",
        Bullseye,
        "mptsas-pvscsi",
        "@ -device mptsas1068,id=s0 -device scsi-hd,drive=d0,bus=s0.0 -device pvscsi,id=s1 \
        -device scsi-cd,bus=s1.0",
    ),
    on("pc", Bullseye, "esp", "@ -device am53c974,id=s0 -device scsi-hd,drive=d0,bus=s0.0 -device dc390,id=s1"),
    on("q35", Bullseye, "sdhci", "@ -device sdhci-pci -device sd-card,drive=d0"),
    // USB
    on(
        "q35",
        Bullseye,
        "xhci",
        "@ -device qemu-xhci,id=x -device usb-tablet,bus=x.0 -device usb-kbd,bus=x.0 -device usb-mouse,bus=x.0 \
        -device usb-storage,drive=d0,bus=x.0",
    ),
    on(
        "pc",
        Bullseye,
        "nec-xhci-hub",
        "-device nec-usb-xhci,id=x -device usb-hub,bus=x.0,port=1 -device usb-tablet,bus=x.0,port=1.1 \
        -device usb-bot,bus=x.0 -audiodev none,id=a0 -device usb-audio,audiodev=a0,bus=x.0",
    ),
    on(
        "q35",
        Bullseye,
        "ehci-uhci",
        "-device ich9-usb-ehci1,id=e -device ich9-usb-uhci1,masterbus=e.0,firstport=0,multifunction=on \
        -device usb-tablet,bus=e.0 -device usb-hub,bus=e.0",
    ),
    on(
        "pc",
        Bullseye,
        "uhci-ohci",
        "-device piix3-usb-uhci,id=u -device usb-mouse,bus=u.0 -device pci-ohci,id=o -device usb-kbd,bus=o.0",
    ),
    // Sound
    on("q35", Bullseye, "hda", "-audiodev none,id=a0 -device ich9-intel-hda -device hda-duplex,audiodev=a0"),
    on("pc", Bullseye, "ac97-es1370", "-audiodev none,id=a0 -device AC97,audiodev=a0 -device ES1370,audiodev=a0"),
    on(
        "pc",
        Bullseye,
        "isa-sound",
        "-audiodev none,id=a0 -device sb16,audiodev=a0 -device adlib,audiodev=a0 \
        -device gus,audiodev=a0 -device cs4231a,audiodev=a0,iobase=0x604",
    ),
    // Displays
    on("q35", Bullseye, "vga", "-device VGA,vgamem_mb=8"),
    on("pc", Bullseye, "cirrus", "-device cirrus-vga,vgamem_mb=4"),
    on("q35", Bullseye, "qxl", "-device qxl-vga"),
    on("q35", Bullseye, "virtio-vga", "-device virtio-vga"),
    on("q35", Bullseye, "bochs-ramfb", "-device bochs-display -device ramfb"),
    on("pc", Bullseye, "vmware-svga", "-device vmware-svga"),
    on("pc", Bullseye, "ati-vga", "-device ati-vga"),
    on(
        "isapc",
        Bullseye,
        "isa-devices",
        "-device isa-vga -netdev hubport,id=n0,hubid=0 -device ne2k_isa,netdev=n0 -device isa-parallel,chardev=c0 \
        -chardev null,id=c0 -serial null",
    ),
    // Buses
    on(
        "q35",
        Bullseye,
        "pcie-ports",
        "-device pcie-root-port,id=rp0,chassis=1 -device pcie-root-port,id=rp1,chassis=2 \
        -device x3130-upstream,bus=rp0,id=up -device xio3130-downstream,bus=up,id=down,chassis=3 -device virtio-rng-pci,bus=down \
        -device pcie-pci-bridge,bus=rp1,id=pp -device e1000,bus=pp,addr=1,romfile=",
    ),
    on(
        "pc",
        Bullseye,
        "pci-bridge",
        "-device pci-bridge,id=b0,chassis_nr=1 -device virtio-rng-pci,bus=b0,addr=1 -device pxb,id=p0,bus_nr=64",
    ),
    on("q35", Bullseye, "intel-iommu", "-device intel-iommu -device i82801b11-bridge -device ioh3420,id=io0,chassis=9"),
    on(
        "q35",
        Bookworm,
        "cxl",
        "-M cxl=on -device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1 -device cxl-rp,id=rp0,bus=cxl.1,chassis=0,slot=2",
    ),
    // Memory
    on(
        "q35",
        Bullseye,
        "pc-dimm",
        "-m size=32M,slots=4,maxmem=256M -object memory-backend-ram,id=m1,size=16M -device pc-dimm,memdev=m1",
    ),
    on(
        "pc",
        Bullseye,
        "nvdimm",
        "-M nvdimm=on -m size=32M,slots=4,maxmem=256M -object memory-backend-ram,id=m1,size=16M \
        -device nvdimm,memdev=m1",
    ),
    // Watchdogs, management, odds and ends
    on("q35", Bullseye, "watchdogs", "-device i6300esb -device ib700"),
    on(
        "q35",
        Bullseye,
        "ipmi",
        "-device ipmi-bmc-sim,id=b0 -device isa-ipmi-kcs,bmc=b0 -device ipmi-bmc-sim,id=b1 -device isa-ipmi-bt,bmc=b1,ioport=0x1e4",
    ),
    on(
        "q35",
        Bullseye,
        "vmgenid",
        "-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87 -device vmcoreinfo -device pvpanic -device edu",
    ),
    on(
        "pc",
        Bullseye,
        "pci-serial",
        "-chardev null,id=c0 -device pci-serial,chardev=c0 -serial null -parallel null \
        -device isa-debugcon,chardev=c1 -chardev null,id=c1",
    ),
    on(
        "q35",
        Bullseye,
        "can",
        "-object can-bus,id=can0 -device kvaser_pci,canbus=can0 -device ctucan_pci,canbus0=can0,canbus1=can0",
    ),
    on(
        "q35",
        Bullseye,
        "ivshmem",
        "-object memory-backend-file,id=shm,size=1M,share=on,mem-path={dir}/shm -device ivshmem-plain,memdev=shm,master=on",
    ),
    on(
        "q35",
        Bookworm,
        "erst-pvpanic",
        "-object memory-backend-file,id=er,size=64K,share=on,mem-path={dir}/erst \
        -device acpi-erst,memdev=er -device pvpanic-pci",
    ),
    on("q35", Bullseye, "vmbus", "-device vmbus-bridge -cpu qemu64,hv-relaxed"),
    on("q35", Trixie, "virtio-sound", "-audiodev none,id=a0 -device virtio-sound-pci,audiodev=a0"),
];

/// The rows that the quick subset takes, by suite.
const QUICK: &[(Suite, &str)] = &[
    (Bullseye, "virtio-mmio"),
    (Bullseye, "e1000"),
    (Bullseye, "xhci"),
    (Bookworm, "virtio-mmio"),
    (Bookworm, "ide-floppy"),
    (Bookworm, "qxl"),
    (Trixie, "virtio-mmio"),
    (Trixie, "virtio-net-slirp"),
    (Trixie, "hda"),
    (Sid, "virtio-mmio"),
    (Sid, "virtio-mem"),
    (Sid, "pcie-ports"),
    (Sid, "nvme"),
];

pub(super) fn rows() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for devices in TABLE {
        for suite in since(devices.since) {
            let row = Scenario::new(suite, devices.machine, devices.what).with(&devices.arguments.replace('@', DISK));
            let quick = QUICK.iter().any(|(s, what)| *s == suite && *what == devices.what);
            rows.push(if quick { row.quick() } else { row });
        }
    }
    rows
}
