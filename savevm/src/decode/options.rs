//! What a decoder has to be told because the stream does not say it.

use qevm_wire::{Limits, PageGeometry, Profile};

/// Whether sections end in a footer (`migration.send-section-footer`; off for machine types up to 2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Footers {
    /// Decided where the first section of known layout ends (usually the START of `ram`).
    #[default]
    Detect,
    /// Every section has one.
    Present,
    /// No section has one.
    Absent,
}

/// What a decoder has to be told because the stream does not say it.
///
/// The defaults read any whole stream from its first byte.
///
/// ```
/// use qevm_savevm::{DecoderOptions, Footers};
///
/// // A file that QEMU wrote with `migrate file:/path,offset=4096`.
/// let options = DecoderOptions { offset: 4096, ..DecoderOptions::default() };
/// assert_eq!(options.footers, Footers::Detect);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecoderOptions {
    /// What the peer may make the decoder hold.
    pub limits: Limits,
    /// Offset in the file (or connection) of the first byte that is shown. Offsets in errors count from there, and
    /// those in mapped-ram headers must fit to it.
    pub offset: u64,
    /// Target page size where the configuration section tells none.
    pub pages: PageGeometry,
    /// Whether sections have footers.
    pub footers: Footers,
    /// The source has capability `x-ignore-shared` on. Streams with a configuration section say so themselves.
    pub x_ignore_shared: bool,
    /// The source has capability `mapped-ram` on. Streams with a configuration section say so themselves.
    pub mapped_ram: bool,
    /// A description may follow the end of the stream. Without it, the end is final: a reader that waits for bytes of
    /// a live source whose machine type has `suppress-vmdesc=on` would wait for ever.
    pub vmdesc: bool,
    /// Bytes after the end of the stream are no error, but left alone (containers pad). Otherwise they are one if
    /// they are shown; a decoder does not ask for any, because a live source sends none and does not close either.
    pub allow_trailing: bool,
    /// The stream is read from its source while that is connected, and not from a recording: [`Step::End`](crate::Step)
    /// comes with the last byte that the source has to say, and bytes after it belong to what the two say to each
    /// other afterwards. Whether a description is the last that comes is what [`vmdesc`](Self::vmdesc) says, which
    /// then must be known ([`Profile::vmdesc`](qevm_wire::Profile)); of postcopy it never is.
    pub live: bool,
}

impl DecoderOptions {
    /// For the connection to a source that is alive, where `profile` is that of this machine: what comes, up to where,
    /// is as the machine type says. Everything else is as by default.
    ///
    /// ```
    /// use qevm_savevm::{DecoderOptions, Footers};
    /// use qevm_wire::{Profile, QemuVersion};
    ///
    /// let options = DecoderOptions::live(&Profile::new(QemuVersion::new(7, 2), "pc-i440fx-2.2"));
    /// assert!(options.live && !options.vmdesc && options.footers == Footers::Absent);
    /// ```
    pub fn live(profile: &Profile) -> Self {
        let footers = if profile.send_section_footer { Footers::Present } else { Footers::Absent };
        DecoderOptions { live: true, vmdesc: profile.vmdesc, footers, ..DecoderOptions::default() }
    }
}

impl Default for DecoderOptions {
    fn default() -> Self {
        DecoderOptions {
            limits: Limits::default(),
            offset: 0,
            pages: PageGeometry::X86,
            footers: Footers::default(),
            x_ignore_shared: false,
            mapped_ram: false,
            vmdesc: true,
            allow_trailing: false,
            live: false,
        }
    }
}
