//! What a peer may make a decoder allocate or nest.

/// Upper bounds on what a stream can claim before its content is read.
///
/// The defaults accept everything QEMU 5.2 to 11.1 produces for guests of practical size, and keep a decoder's own
/// memory below some hundred MiB whatever a hostile peer sends. Guest memory itself is never allocated by a format
/// crate and so has no limit here.
///
/// ```
/// use qevm_wire::Limits;
///
/// let strict = Limits { ram_blocks: 16, ..Limits::default() };
/// assert!(strict.ram_blocks < Limits::default().ram_blocks);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// RAM blocks in the list at the start of the `ram` section.
    pub ram_blocks: u64,
    /// Length of one RAM block in bytes.
    pub ram_block_len: u64,
    /// Sections a stream may open (START and FULL).
    pub sections: u64,
    /// Bytes of one device section (FULL) that have to be held to find its end.
    pub device_section: u64,
    /// Bytes of the JSON description after the end of the stream.
    pub vmdesc: u64,
    /// Bytes of one `MIG_CMD_PACKAGED` blob.
    pub package: u64,
    /// Depth of nested structures: packages, subsections, JSON.
    pub depth: u32,
    /// Bytes of the machine name in the configuration section.
    pub machine_name: u64,
    /// Capability names in the configuration section.
    pub capabilities: u64,
    /// Compressed bytes of one page or of one multifd packet.
    pub compressed: u64,
    /// Bytes of one multifd device-state packet.
    pub device_state_packet: u64,
    /// Bytes of a received-page bitmap on the return path.
    pub received_bitmap: u64,
    /// Elements of a list or tree inside a device section.
    pub elements: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            ram_blocks: 4096,
            ram_block_len: 1 << 52,
            sections: 65_536,
            device_section: 256 << 20,
            vmdesc: 64 << 20,
            package: 512 << 20,
            depth: 32,
            machine_name: 4096,
            capabilities: 256,
            // QEMU refuses packets above 1 MiB: twice the 512 KiB of pages a packet can hold (7.2 to 10.0).
            compressed: 1 << 20,
            device_state_packet: 64 << 20,
            // One bit per 4 KiB page of a 16 TiB block.
            received_bitmap: 512 << 20,
            elements: 1 << 20,
        }
    }
}
