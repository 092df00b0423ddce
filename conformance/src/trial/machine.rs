//! A `microvm` that no QEMU ever ran: its stream written field by field from the declarations of `qevm-devices`.
//!
//! The machine is as it leaves reset (Intel SDM volume 3, table "IA-32 and Intel 64 Processor States Following
//! Power-up, Reset, or INIT", and the data sheets of the chips), with firmware in the block `pc.bios` and all other
//! memory zero.

use anyhow::{Context as _, Result, ensure};
use qevm_devices::DeviceState;
use qevm_devices::acpi_ged::AcpiGed;
use qevm_devices::apic::Apic;
use qevm_devices::cpu::Cpu;
use qevm_devices::cpu::registers::Segment;
use qevm_devices::cpu_common::CpuCommon;
use qevm_devices::fw_cfg::{FwCfg, FwCfgDma};
use qevm_devices::globalstate::GlobalState;
use qevm_devices::i8254::{I8254, PitChannel};
use qevm_devices::i8259::I8259;
use qevm_devices::ioapic::IoApic;
use qevm_devices::kvm_tpr_opt::KvmTprOpt;
use qevm_devices::mc146818rtc::Mc146818Rtc;
use qevm_devices::serial::{IsaSerial, Uart};
use qevm_devices::timer::CpuTimers;
use qevm_savevm::StreamWriter;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_savevm::vmdesc::{Description, DeviceBody, DeviceDescription, TextStyle};
use qevm_savevm::vmstate::Context;
use qevm_wire::{CountedString, QemuVersion};
use std::io::Write;

const PAGE: usize = 4096;
/// QEMU gives `ram` this version in every release since 2.x.
const RAM_VERSION: u32 = 4;
const RAM_SECTION: u32 = 1;
/// 2026-01-01 00:00:00 UTC, what the clock of the machine shows.
const CLOCK: u64 = 1_767_225_600;

/// The stream that a QEMU of release `qemu` would send of the machine, with `memory` bytes of RAM and `firmware`.
///
/// # Errors
/// A field holds what the wire has no room for; memory or firmware are not whole pages.
pub fn stream(qemu: QemuVersion, memory: u64, firmware: &[u8]) -> Result<Vec<u8>> {
    let mut stream = Vec::new();
    write(qemu, memory, firmware, |_, _| false, &mut stream)?;
    Ok(stream)
}

/// Writes the same to `out`, with other contents of memory: `page` fills the page at an offset, or says that it is
/// zero.
///
/// # Errors
/// As [`stream`], and what `out` reports.
pub fn write(
    qemu: QemuVersion,
    memory: u64,
    firmware: &[u8],
    page: impl FnMut(u64, &mut [u8; PAGE]) -> bool,
    out: &mut impl Write,
) -> Result<()> {
    ensure!(firmware.len().is_multiple_of(PAGE), "{} bytes of firmware are no whole pages", firmware.len());
    let ctx = Context::new(qemu, "microvm");
    let mut stream = StreamWriter::default();
    stream.header(Some(&Configuration::new("microvm")))?;
    ram(&mut stream, memory, firmware, page, out)?;
    let mut description = Description::default();
    description.page_size = Some(PAGE as u64);
    for (number, (idstr, instance_id, mut state)) in sections(&ctx)?.into_iter().enumerate() {
        state.prepare(&ctx)?;
        let version_id = state.version(&ctx);
        let (body, described) = state.encode_described(version_id, &ctx).with_context(|| idstr.to_owned())?;
        let section_id = RAM_SECTION + 1 + number as u32;
        stream.section_full(&SectionHeader { section_id, idstr: name(idstr)?, instance_id, version_id }, &body)?;
        let body = DeviceBody::Struct(described);
        description.devices.push(DeviceDescription { name: idstr.to_owned(), instance_id, body });
    }
    stream.eof()?;
    let style = if qemu < QemuVersion::new(6, 0) { TextStyle::Spaced } else { TextStyle::Compact };
    stream.vmdesc(&description.to_json(style))?;
    out.write_all(stream.bytes())?;
    Ok(())
}

fn name(text: &str) -> Result<CountedString> {
    CountedString::new(text).with_context(|| format!("'{text}' is too long for a name"))
}

/// One pass over memory and firmware.
fn ram(
    stream: &mut StreamWriter,
    memory: u64,
    firmware: &[u8],
    mut page: impl FnMut(u64, &mut [u8; PAGE]) -> bool,
    out: &mut impl Write,
) -> Result<()> {
    let header =
        SectionHeader { section_id: RAM_SECTION, idstr: name("ram")?, instance_id: 0, version_id: RAM_VERSION };
    stream.section_start(&header)?;
    let bios = RamBlock::new(name("pc.bios")?, firmware.len() as u64);
    stream.ram_setup([RamBlock::new(name("microvm.ram")?, memory), bios])?;
    stream.eos()?;
    stream.footer()?;
    stream.section_end(RAM_SECTION)?;
    let mut content = [0; PAGE];
    for offset in (0..memory).step_by(PAGE) {
        if page(offset, &mut content) {
            stream.page_header(BlockId(0), offset)?;
            stream.payload(&content)?;
            // As much is held as a guest of any size needs.
            out.write_all(stream.bytes())?;
            stream.clear();
        } else {
            stream.zero_page(BlockId(0), offset)?;
        }
    }
    for (number, page) in firmware.chunks_exact(PAGE).enumerate() {
        stream.page_header(BlockId(1), (number * PAGE) as u64)?;
        stream.payload(page)?;
    }
    stream.eos()?;
    stream.footer()?;
    Ok(())
}

/// The device sections in the order in which the release sends them.
fn sections(ctx: &Context) -> Result<Vec<(&'static str, u32, DeviceState)>> {
    let qemu = ctx.profile.qemu;
    let run_state = GlobalState::new("running", ctx).context("a run state's name is too long")?;
    let mut all = vec![
        ("timer", 0, DeviceState::Timer(CpuTimers::default())),
        ("fw_cfg", 0, DeviceState::FwCfg(fw_cfg())),
        ("cpu_common", 0, DeviceState::CpuCommon(CpuCommon::default())),
        ("cpu", 0, DeviceState::Cpu(cpu(qemu))),
        ("kvm-tpr-opt", 0, DeviceState::KvmTprOpt(KvmTprOpt::default())),
        ("ioapic", 0, DeviceState::IoApic(ioapic())),
        ("acpi-ged", 0, DeviceState::AcpiGed(AcpiGed::default())),
        ("i8259", 0, DeviceState::I8259(I8259::default())),
        ("i8259", 1, DeviceState::I8259(I8259::default())),
        ("i8254", 0, DeviceState::I8254(i8254())),
        ("mc146818rtc", 0, DeviceState::Mc146818Rtc(rtc())),
        ("serial", 0, DeviceState::Serial(serial())),
        ("globalstate", 0, DeviceState::GlobalState(run_state)),
    ];
    // 5.2 has one I/O APIC; since 11.0 the local APICs come first.
    if qemu >= QemuVersion::new(6, 0) {
        all.insert(6, ("ioapic", 1, DeviceState::IoApic(ioapic())));
    }
    let apic = ("apic", 0, DeviceState::Apic(apic()));
    all.insert(if qemu >= QemuVersion::new(11, 0) { 0 } else { 5 }, apic);
    Ok(all)
}

/// The processor at the reset vector: real mode, execution at 0xfffffff0.
fn cpu(qemu: QemuVersion) -> Cpu {
    /// P, S and accessed, as [`Segment`] has them.
    const DATA: u32 = 0x9300;
    const CODE: u32 = 0x9b00;
    let data = Segment { limit: 0xffff, flags: DATA, ..Segment::default() };
    let code = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, flags: CODE };
    let system = |flags| Segment { limit: 0xffff, flags, ..Segment::default() };
    Cpu {
        eip: 0xfff0,
        eflags: 0x2,
        // As real streams of guests in real mode have them: ADDSEG; the global interrupt flag of SVM is set.
        hflags: 0x40,
        hflags2: if qemu < QemuVersion::new(6, 0) { 0x1 } else { 0x101 },
        fpuc: 0x37f,
        mxcsr: 0x1f80,
        segs: [data, code, data, data, data, data],
        ldt: system(0x8200),
        tr: system(0x8b00),
        gdt: system(0),
        idt: system(0),
        cr0: 0x6000_0010,
        dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
        a20_mask: -1,
        smbase: 0x3_0000,
        pat: 0x0007_0406_0007_0406,
        interrupt_injected: -1,
        exception_nr: -1,
        xcr0: 1,
        ..Cpu::default()
    }
}

/// Enabled, at its usual place, of the bootstrap processor; everything masked but LINT0, which takes the i8259's
/// interrupts as firmware would have set it up.
fn apic() -> Apic {
    const MASKED: u32 = 0x1_0000;
    const EXT_INT: u32 = 0x700;
    Apic {
        apicbase: 0xfee0_0900,
        spurious_vec: 0xff,
        dest_mode: 0xf,
        lvt: [MASKED, MASKED, MASKED, EXT_INT, MASKED, MASKED],
        next_time: 0,
        timer_expiry: -1,
        ..Apic::default()
    }
}

fn ioapic() -> IoApic {
    const MASKED: u64 = 0x1_0000;
    IoApic { ioredtbl: [MASKED; 24], ..IoApic::default() }
}

/// Counting from 65536 in mode 3, the speaker's gate off.
fn i8254() -> I8254 {
    /// Nanoseconds of 65536 periods of 1.193182 MHz.
    const WRAP: i64 = 54_925_401;
    let channel = |gate| PitChannel { count: 0x1_0000, mode: 3, gate, ..PitChannel::default() };
    let mut channels = [channel(1), channel(1), channel(0)];
    channels[0].next_transition_time = WRAP / 2;
    I8254 { irq_disabled: 0, channels, next_transition_time: WRAP / 2 }
}

fn rtc() -> Mc146818Rtc {
    let mut rtc = Mc146818Rtc { base_rtc: CLOCK, next_alarm_time: u64::MAX >> 1, ..Mc146818Rtc::default() };
    // Registers A (32768 Hz), B (24 hours, BCD), D (the battery is good); Thursday, 1 January 2026.
    for (register, value) in [(6, 0x05), (7, 0x01), (8, 0x01), (9, 0x26), (0x0a, 0x26), (0x0b, 0x02), (0x0d, 0x80)] {
        rtc.cmos_data[register] = value;
    }
    rtc
}

/// 9600 baud, nothing to send, nothing received, the line up.
fn serial() -> IsaSerial {
    let uart = Uart { divider: 12, iir: 0x01, mcr: 0x08, lsr: 0x60, msr: 0xb0, ..Uart::default() };
    IsaSerial { state: uart }
}

fn fw_cfg() -> FwCfg {
    FwCfg { dma: Some(FwCfgDma::default()), ..FwCfg::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_wire::Limits;

    #[test]
    fn its_description_describes_it() {
        for (major, minor) in [(5, 2), (7, 2), (10, 0), (11, 1)] {
            let qemu = QemuVersion::new(major, minor);
            let stream = stream(qemu, 1 << 20, &[0xf4; PAGE]).unwrap();
            let at = Description::find_at_end(&stream).expect("a description at the end");
            let description = Description::parse(&stream[at..], &Limits::default()).unwrap();
            assert_eq!(description.devices.len(), if qemu < QemuVersion::new(6, 0) { 14 } else { 15 });
            let ctx = Context::new(qemu, "microvm");
            for (idstr, instance_id, state) in sections(&ctx).unwrap() {
                let described = description.device(idstr.as_bytes(), instance_id).expect(idstr);
                let body = state.encode(state.version(&ctx), &ctx).unwrap();
                let node = described.decode(&body, 0, &Limits::default()).unwrap();
                assert_eq!((node.opaque_bytes(), node.encoded_len()), (0, body.len() as u64), "{idstr}");
            }
        }
    }

    #[test]
    fn firmware_must_be_whole_pages() {
        assert!(stream(QemuVersion::new(11, 1), 1 << 20, &[0; 100]).is_err());
    }
}
