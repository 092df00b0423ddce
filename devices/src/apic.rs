//! Section `apic`: the local APIC of one vCPU, emulated or in the kernel.

use qevm_savevm::vmstate::VmState;

/// The local APIC, section `apic` version 3; the instance is the vCPU's initial APIC id.
///
/// QEMU's `apic` and `kvm-apic` devices share it. The 32-bit id of x2APIC mode is not stored.
/// (`docs/format/microvm-devices.md`, apic)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "apic", version = 3)]
pub struct Apic {
    /// `IA32_APIC_BASE`, low 32 bits.
    pub apicbase: u32,
    /// APIC id, 8 bits.
    pub id: u8,
    /// Arbitration id.
    pub arb_id: u8,
    /// Task priority.
    pub tpr: u8,
    /// Spurious interrupt vector register.
    pub spurious_vec: u32,
    /// Logical destination, the 8 bits of LDR.
    pub log_dest: u8,
    /// Destination format, the 4 bits of DFR.
    pub dest_mode: u8,
    /// In-service bits, 32 vectors a word.
    pub isr: [u32; 8],
    /// Trigger mode bits.
    pub tmr: [u32; 8],
    /// Request bits.
    pub irr: [u32; 8],
    /// Local vector table: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Error status.
    pub esr: u32,
    /// Interrupt command, low and high half.
    pub icr: [u32; 2],
    /// Timer divide configuration.
    pub divide_conf: u32,
    /// Timer divider as a shift.
    pub count_shift: i32,
    /// Timer initial count.
    pub initial_count: u32,
    /// When the initial count was loaded, ns of the virtual clock.
    pub initial_count_load_time: i64,
    /// When the timer fires next, ns of the virtual clock.
    pub next_time: i64,
    /// When the emulated timer fires, ns of the virtual clock; -1 if it is not armed.
    pub timer_expiry: i64,
    /// Subsection `apic_sipi`.
    #[vmstate(subsection)]
    pub sipi: Option<ApicSipi>,
}

/// Subsection `apic_sipi`: sent while the vCPU waits for a start-up IPI.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "apic_sipi", version = 1, needed = |sipi, _| sipi.wait_for_sipi != 0)]
pub struct ApicSipi {
    /// Vector of the start-up IPI.
    pub sipi_vector: i32,
    /// Not 0: waiting.
    pub wait_for_sipi: i32,
}
