//! What a peer may make a decoder allocate or nest.

/// Upper bounds on what a stream can claim before its content is read, and on what it may cost in all.
///
/// The defaults accept everything QEMU 5.2 to 11.1 produces for guests of practical size. With them, decoding a stream
/// of n bytes takes at most 64 MiB + 8 n bytes of memory, and steps in proportion to n, whatever a hostile peer sends.
/// Guest memory itself is never allocated by a format crate and so has no limit here.
///
/// What is counted over a whole stream, is counted over all its connections and packages:
///
/// | limit | counts |
/// |---|---|
/// | [`ram_blocks`](Self::ram_blocks) | the blocks of the one list |
/// | [`sections`](Self::sections) | every START and FULL, again or for the first time |
/// | [`device_state`](Self::device_state) | the bytes of all device sections |
/// | [`packages`](Self::packages) | the bytes of all packages |
/// | [`vmdesc`](Self::vmdesc) | the bytes of the one description |
/// | the others | one item |
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
    /// Sections that a stream opens in all (START and FULL), in packages and after a recovery, too.
    pub sections: u64,
    /// Bytes of all device sections (FULL) together.
    pub device_state: u64,
    /// Bytes of one device section (FULL) that have to be held to find its end.
    pub device_section: u64,
    /// Bytes of the JSON description after the end of the stream.
    pub vmdesc: u64,
    /// Bytes of a schema (`-dump-vmstate`), which no stream carries.
    pub schema: u64,
    /// Bytes of one `MIG_CMD_PACKAGED` blob.
    pub package: u64,
    /// Bytes of all `MIG_CMD_PACKAGED` blobs together; those inside others count again.
    pub packages: u64,
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
    /// Bytes of memory that the fields of one device section may take, beyond twice the section's own length. A
    /// program that keeps the fields of many sections lowers it by what is kept.
    pub fields: u64,
}

impl Limits {
    /// Bytes that can follow the guest's memory in a stream: all device sections with what is around them, and the
    /// description.
    ///
    /// ```
    /// use qevm_wire::Limits;
    ///
    /// let limits = Limits { sections: 0, device_state: 100, vmdesc: 50, ..Limits::default() };
    /// assert_eq!(limits.behind_memory(), 156);
    /// ```
    pub fn behind_memory(&self) -> u64 {
        // Header with the longest name, and footer; end of stream, type and length of the description.
        const AROUND_SECTION: u64 = 1 + 4 + 256 + 8 + 5;
        const AROUND_DESCRIPTION: u64 = 6;
        let sections = self.sections.saturating_mul(AROUND_SECTION);
        [self.device_state, self.vmdesc, AROUND_DESCRIPTION].into_iter().fold(sections, u64::saturating_add)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            ram_blocks: 4096,
            ram_block_len: 1 << 52,
            sections: 65_536,
            device_state: 256 << 20,
            device_section: 256 << 20,
            vmdesc: 64 << 20,
            schema: 16 << 20,
            package: 512 << 20,
            packages: 1 << 30,
            depth: 32,
            machine_name: 4096,
            capabilities: 256,
            // QEMU refuses packets above 1 MiB: twice the 512 KiB of pages a packet can hold (7.2 to 10.0).
            compressed: 1 << 20,
            device_state_packet: 64 << 20,
            // One bit per 4 KiB page of a 16 TiB block.
            received_bitmap: 512 << 20,
            elements: 1 << 20,
            fields: 16 << 20,
        }
    }
}
