//! The registers of the header and of each capability, by name.

/// Registers, one after the other: names, and bytes. Those of 1, 2 and 4 bytes are numbers.
pub(super) type Registers = &'static [(&'static str, u64)];

pub(super) const COMMON: Registers = &[
    ("vendor_id", 2),
    ("device_id", 2),
    ("command", 2),
    ("status", 2),
    ("revision", 1),
    ("programming_interface", 1),
    ("subclass", 1),
    ("class", 1),
    ("cache_line_size", 1),
    ("latency_timer", 1),
    ("header_type", 1),
    ("bist", 1),
];
pub(super) const DEVICE: Registers = &[
    ("bar0", 4),
    ("bar1", 4),
    ("bar2", 4),
    ("bar3", 4),
    ("bar4", 4),
    ("bar5", 4),
    ("cardbus_cis", 4),
    ("subsystem_vendor_id", 2),
    ("subsystem_id", 2),
    ("expansion_rom", 4),
    ("capabilities", 1),
    ("reserved", 7),
    ("interrupt_line", 1),
    ("interrupt_pin", 1),
    ("min_grant", 1),
    ("max_latency", 1),
];
pub(super) const BRIDGE: Registers = &[
    ("bar0", 4),
    ("bar1", 4),
    ("primary_bus", 1),
    ("secondary_bus", 1),
    ("subordinate_bus", 1),
    ("secondary_latency_timer", 1),
    ("io_base", 1),
    ("io_limit", 1),
    ("secondary_status", 2),
    ("memory_base", 2),
    ("memory_limit", 2),
    ("prefetchable_base", 2),
    ("prefetchable_limit", 2),
    ("prefetchable_base_upper", 4),
    ("prefetchable_limit_upper", 4),
    ("io_base_upper", 2),
    ("io_limit_upper", 2),
    ("capabilities", 1),
    ("reserved", 3),
    ("expansion_rom", 4),
    ("interrupt_line", 1),
    ("interrupt_pin", 1),
    ("bridge_control", 2),
];

pub(super) const CAPABILITY: Registers = &[("id", 1), ("next", 1)];
/// The upper twelve bits of the second are the place of the next one.
pub(super) const EXTENDED_CAPABILITY: Registers = &[("id", 2), ("version_and_next", 2)];

const PM: Registers = &[("capabilities", 2), ("control", 2), ("bridge_extensions", 1), ("data", 1)];
const VPD: Registers = &[("address", 2), ("data", 4)];
const SLOT_ID: Registers = &[("expansion_slot", 1), ("chassis", 1)];
const MSI: [Registers; 4] = [
    &[("control", 2), ("address", 4), ("data", 2)],
    &[("control", 2), ("address", 4), ("address_upper", 4), ("data", 2)],
    &[("control", 2), ("address", 4), ("data", 2), ("reserved", 2), ("mask", 4), ("pending", 4)],
    &[("control", 2), ("address", 4), ("address_upper", 4), ("data", 2), ("reserved", 2), ("mask", 4), ("pending", 4)],
];
const MSI_WIDE: u8 = 1 << 7;
const MSI_MASKS: u8 = 1 << 0;
const PCIX: Registers = &[("command", 2), ("status", 4)];
const VENDOR: Registers = &[("length", 1)];
const SUBSYSTEM: Registers = &[("reserved", 2), ("subsystem_vendor_id", 2), ("subsystem_id", 2)];
const PCIE: Registers = &[
    ("capabilities", 2),
    ("device_capabilities", 4),
    ("device_control", 2),
    ("device_status", 2),
    ("link_capabilities", 4),
    ("link_control", 2),
    ("link_status", 2),
    ("slot_capabilities", 4),
    ("slot_control", 2),
    ("slot_status", 2),
    ("root_control", 2),
    ("root_capabilities", 2),
    ("root_status", 4),
    ("device_capabilities_2", 4),
    ("device_control_2", 2),
    ("device_status_2", 2),
    ("link_capabilities_2", 4),
    ("link_control_2", 2),
    ("link_status_2", 2),
    ("slot_capabilities_2", 4),
    ("slot_control_2", 2),
    ("slot_status_2", 2),
];
/// How many of them version 1 has.
const PCIE_1: usize = 13;
const MSIX: Registers = &[("control", 2), ("table", 4), ("pending_bits", 4)];
const AF: Registers = &[("length", 1), ("capabilities", 1), ("control", 1), ("status", 1)];

/// Name, empty if it is unknown, and registers of a capability that begins so.
pub(super) fn capability(id: u8, rest: &[u8]) -> (&'static str, Registers) {
    let byte = |at: usize| rest.get(at).copied().unwrap_or_default();
    match id {
        0x01 => ("pm", PM),
        0x02 => ("agp", &[]),
        0x03 => ("vpd", VPD),
        0x04 => ("slot_id", SLOT_ID),
        0x05 => {
            let [wide, masks] = [byte(2) & MSI_WIDE != 0, byte(3) & MSI_MASKS != 0];
            ("msi", MSI[usize::from(wide) + 2 * usize::from(masks)])
        }
        0x06 => ("hot_swap", &[]),
        0x07 => ("pcix", PCIX),
        0x08 => ("hypertransport", &[]),
        0x09 => ("vendor_specific", VENDOR),
        0x0a => ("debug_port", &[]),
        0x0c => ("hot_plug", &[]),
        0x0d => ("subsystem", SUBSYSTEM),
        0x10 => ("pcie", if byte(2) & 0xf == 1 { &PCIE[..PCIE_1] } else { PCIE }),
        0x11 => ("msix", MSIX),
        0x12 => ("sata", &[]),
        0x13 => ("af", AF),
        0x14 => ("ea", &[]),
        _ => ("", &[]),
    }
}

const AER: Registers = &[
    ("uncorrectable_status", 4),
    ("uncorrectable_mask", 4),
    ("uncorrectable_severity", 4),
    ("correctable_status", 4),
    ("correctable_mask", 4),
    ("control", 4),
    ("header_log", 16),
];
const SERIAL_NUMBER: Registers = &[("lower", 4), ("upper", 4)];
const CAPABILITY_AND_CONTROL: Registers = &[("capabilities", 2), ("control", 2)];
const WIDE_CAPABILITY_AND_CONTROL: Registers = &[("capabilities", 4), ("control", 4)];
const SRIOV: Registers = &[
    ("capabilities", 4),
    ("control", 2),
    ("status", 2),
    ("initial_vfs", 2),
    ("total_vfs", 2),
    ("num_vfs", 2),
    ("function_dependency", 1),
    ("reserved", 1),
    ("first_vf_offset", 2),
    ("vf_stride", 2),
    ("reserved", 2),
    ("vf_device_id", 2),
    ("supported_page_sizes", 4),
    ("system_page_size", 4),
    ("vf_bar0", 4),
    ("vf_bar1", 4),
    ("vf_bar2", 4),
    ("vf_bar3", 4),
    ("vf_bar4", 4),
    ("vf_bar5", 4),
    ("vf_migration_state", 4),
];
const LTR: Registers = &[("max_snoop_latency", 2), ("max_no_snoop_latency", 2)];

/// Name, empty if it is unknown, and registers of an extended capability.
pub(super) fn extended_capability(id: u16) -> (&'static str, Registers) {
    match id {
        0x0001 => ("aer", AER),
        0x0002 => ("vc", &[]),
        0x0003 => ("serial_number", SERIAL_NUMBER),
        0x0004 => ("power_budgeting", &[]),
        0x000b => ("vendor_specific_extended", &[("vendor_header", 4)]),
        0x000d => ("acs", CAPABILITY_AND_CONTROL),
        0x000e => ("ari", CAPABILITY_AND_CONTROL),
        0x000f => ("ats", CAPABILITY_AND_CONTROL),
        0x0010 => ("sriov", SRIOV),
        0x0012 => ("multicast", &[]),
        0x0013 => ("pri", &[("control", 2), ("status", 2), ("capacity", 4), ("allocation", 4)]),
        0x0015 => ("resizable_bar", WIDE_CAPABILITY_AND_CONTROL),
        0x0016 => ("dpa", &[]),
        0x0017 => ("tph", WIDE_CAPABILITY_AND_CONTROL),
        0x0018 => ("ltr", LTR),
        0x0019 => ("secondary_pcie", &[("link_control_3", 4), ("lane_error_status", 4)]),
        0x001b => ("pasid", CAPABILITY_AND_CONTROL),
        0x001d => ("dpc", CAPABILITY_AND_CONTROL),
        0x001e => ("l1_pm", &[("capabilities", 4), ("control_1", 4), ("control_2", 4)]),
        0x001f => ("ptm", WIDE_CAPABILITY_AND_CONTROL),
        0x0023 => ("dvsec", &[("header_1", 4), ("header_2", 2)]),
        0x0025 => ("data_link_feature", WIDE_CAPABILITY_AND_CONTROL),
        0x0026 => ("physical_layer_16gt", &[]),
        0x0027 => ("lane_margining", &[]),
        _ => ("", &[]),
    }
}
