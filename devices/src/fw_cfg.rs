//! Section `fw_cfg`: the firmware configuration device.

use qevm_savevm::vmstate::VmState;

/// The device's selector, section `fw_cfg` version 2. (`docs/format/microvm-devices.md`, fw_cfg)
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "fw_cfg", version = 2, minimum_version = 1)]
pub struct FwCfg {
    /// The selected entry.
    pub cur_entry: u16,
    /// The offset in it, as version 1 has it.
    #[vmstate(name = "cur_offset", type = "int32_as_uint16", exists = version == 1)]
    pub cur_offset_v1: Option<u16>,
    /// The offset in it, bytes.
    #[vmstate(since = 2)]
    pub cur_offset: u32,
    /// Subsection `fw_cfg/dma`: the DMA interface is on, as always on microvm.
    #[vmstate(subsection)]
    pub dma: Option<FwCfgDma>,
    /// Subsection `fw_cfg/acpi_mr`: sent unless all three sizes are multiples of the host's page size.
    #[vmstate(subsection)]
    pub acpi_mr: Option<FwCfgAcpiMr>,
}

/// Subsection `fw_cfg/dma`, version 0.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "fw_cfg/dma", version = 0)]
pub struct FwCfgDma {
    /// The half-written address register.
    pub dma_addr: u64,
}

/// Subsection `fw_cfg/acpi_mr`: the sizes of the RAM blocks with ACPI's tables, bytes.
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "fw_cfg/acpi_mr", version = 1, needed = |sizes, _| !sizes.are_page_aligned())]
pub struct FwCfgAcpiMr {
    /// `/rom@etc/acpi/tables`
    pub table_mr_size: u64,
    /// `/rom@etc/table-loader`
    pub linker_mr_size: u64,
    /// `/rom@etc/acpi/rsdp`
    pub rsdp_mr_size: u64,
}

impl FwCfgAcpiMr {
    fn are_page_aligned(&self) -> bool {
        let page = qevm_wire::PageGeometry::X86.size();
        [self.table_mr_size, self.linker_mr_size, self.rsdp_mr_size].iter().all(|size| size % page == 0)
    }
}
