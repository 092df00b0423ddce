//! Magics, flags and numbers (`docs/format/nbd.md`). All are big-endian on the wire.

/// First word of a server: `NBDMAGIC`.
pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second word of a newstyle server, and first of each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// First word of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First word of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Port of servers that say nothing else.
pub const PORT: u16 = 10809;
/// Longest name and longest text.
pub const MAX_STRING: usize = 4096;
/// Longest data of an option or of a reply to one, as far as this crate goes.
pub const MAX_OPTION: u32 = 64 << 10;
/// Most bytes that a client may ask for at once, if it was told nothing else.
pub const MAX_READ: u32 = 32 << 20;

/// Flags of the handshake, of server and client.
pub mod handshake {
    /// Unknown options are answered.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes after the reply to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Options.
pub mod option {
    /// Choose an export and begin, without a reply that could refuse.
    pub const EXPORT_NAME: u32 = 1;
    /// End the connection.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Go on under TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell of an export.
    pub const INFO: u32 = 6;
    /// Choose an export and begin.
    pub const GO: u32 = 7;
    /// Replies come in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// Replies from here on are errors; their data is a text for people.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The option is forbidden.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option's data is malformed.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// What a reply of type [`reply::INFO`] tells.
pub mod info {
    /// Size and flags of an export.
    pub const EXPORT: u16 = 0;
    /// Its name as the server has it.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, best and largest number of bytes of a request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export.
pub mod export {
    /// There are flags.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be written.
    pub const READ_ONLY: u16 = 2;
    /// Several connections at once see the same.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; as many bytes follow as are to be written.
    pub const WRITE: u16 = 1;
    /// End the connection; there is no reply.
    pub const DISCONNECT: u16 = 2;
    /// Make what was written last.
    pub const FLUSH: u16 = 3;
    /// Read ahead.
    pub const CACHE: u16 = 5;
}

/// Types of chunks.
pub mod chunk {
    /// Flag: the last chunk of its reply.
    pub const DONE: u16 = 1;
    /// Nothing but perhaps the end.
    pub const NONE: u16 = 0;
    /// Bytes of the export.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes of the export.
    pub const OFFSET_HOLE: u16 = 2;
    /// Types from here on are errors.
    pub const ERRORS: u16 = 1 << 15;
    /// The request has failed.
    pub const ERROR: u16 = ERRORS + 1;
    /// The request has failed at an offset.
    pub const ERROR_OFFSET: u16 = ERRORS + 2;
}

/// Why a request failed.
pub mod errno {
    /// It is not allowed, above all a write.
    pub const EPERM: u32 = 1;
    /// The bytes cannot be read.
    pub const EIO: u32 = 5;
    /// It asks for what is not there.
    pub const EINVAL: u32 = 22;
    /// It asks for too much at once.
    pub const EOVERFLOW: u32 = 75;
    /// It is not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server ends.
    pub const ESHUTDOWN: u32 = 108;
}
