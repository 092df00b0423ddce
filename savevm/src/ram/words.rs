//! Numbers of the records.

/// Flags in the low bits of the word that opens a record.
pub mod flag {
    /// ZERO: the page is filled with the byte that follows, which is 0.
    pub const ZERO: u64 = 0x002;
    /// MEM_SIZE: the list of RAM blocks follows.
    pub const MEM_SIZE: u64 = 0x004;
    /// PAGE: the page follows.
    pub const PAGE: u64 = 0x008;
    /// EOS: the section ends.
    pub const EOS: u64 = 0x010;
    /// CONTINUE: the block is that of the record before; modifies the page records.
    pub const CONTINUE: u64 = 0x020;
    /// XBZRLE: the difference to the page sent before follows (capability `xbzrle`).
    pub const XBZRLE: u64 = 0x040;
    /// HOOK: a message of the RDMA transport.
    pub const HOOK: u64 = 0x080;
    /// COMPRESS_PAGE: the page follows as zlib data (capability `compress`, removed in 9.1).
    pub const COMPRESS_PAGE: u64 = 0x100;
    /// MULTIFD_FLUSH: wait for the SYNC packet of every page channel (8.1).
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// First byte of an XBZRLE record; no other encoding exists.
pub const XBZRLE_ENCODING: u8 = 0x01;
