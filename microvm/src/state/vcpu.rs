//! The state of a vCPU.

/// Everything about one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// General-purpose registers.
    pub regs: Registers,
    /// Segments, tables and control registers.
    pub sregs: SpecialRegisters,
    /// x87, SSE and extended state: the XSAVE area in the standard (not compacted) format, 4096 bytes or more.
    pub xsave: Vec<u8>,
    /// Extended control register 0.
    pub xcr0: u64,
    /// Model-specific registers, the TSC among them.
    pub msrs: Vec<Msr>,
    /// The local APIC's register page: 1024 bytes.
    pub lapic: Vec<u8>,
    /// KVM's multiprocessor state: 0 runnable, 1 uninitialised, 2 INIT received, 3 halted, 4 SIPI received.
    pub mp_state: u32,
    /// Pending exceptions and interrupts.
    pub events: Events,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// TSC frequency, kHz.
    pub tsc_khz: u32,
}

/// General-purpose registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 … R15: the order of the instruction encoding, as in QEMU's section `cpu`.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible part.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Type field of the descriptor.
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Default operation size.
    pub db: bool,
    /// Code or data, not system.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// Granularity.
    pub g: bool,
    /// Available to software.
    pub avl: bool,
    /// Loaded with a null selector.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segments, tables and control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's own names
pub struct SpecialRegisters {
    /// ES CS SS DS FS GS: the order of the instruction encoding, as in QEMU's section `cpu`.
    pub segs: [Segment; 6],
    pub ldt: Segment,
    pub tr: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// One bit for each vector: an interrupt of the 8259 that was accepted and not yet delivered.
    pub interrupt_bitmap: [u64; 4],
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msr {
    /// Number.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// Exceptions and interrupts on their way (KVM_GET_VCPU_EVENTS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the names of the KVM API document
pub struct Events {
    pub exception_injected: bool,
    pub exception_pending: bool,
    pub exception_nr: u8,
    pub exception_error_code: Option<u32>,
    pub exception_payload: Option<u64>,
    pub interrupt_injected: bool,
    pub interrupt_nr: u8,
    pub interrupt_soft: bool,
    pub interrupt_shadow: u8,
    pub nmi_injected: bool,
    pub nmi_pending: bool,
    pub nmi_masked: bool,
    pub sipi_vector: u32,
    pub smi_smm: bool,
    pub smi_pending: bool,
    pub smi_inside_nmi: bool,
    pub smi_latched_init: bool,
    pub triple_fault_pending: bool,
}

/// Debug registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's own names
pub struct DebugRegisters {
    pub db: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}
