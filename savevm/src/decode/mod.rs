//! The decoder of the main channel: bytes in, events out.
//!
//! ```text
//!  Header ──▶ AfterHeader ──▶ Item ──(a section)──▶ Ram, Vfio, DirtyBitmap, … or Body ──(its end)──▶ Footer
//!              configuration   ▲ │                                                                     │
//!                              │ └─(EOF)──▶ AfterEof ──(description)──▶ End                            │
//!                              └────────────────────────(and after each command)───────────────────────┘
//! ```
//!
//! Where a stream has no footers, Footer takes no bytes.

mod body_ends;
mod checkpoint;
mod error;
mod item;
mod options;
mod page_run;
mod scan;
mod sections;
mod totals;
mod written;

pub use body_ends::BodyEnds;
pub use error::StreamError;
pub use options::{DecoderOptions, Footers};
pub use sections::Sections;

use crate::event::{Event, PayloadKind, Step};
use crate::framing::SectionHeader;
use crate::ram::{RamBlocks, RamReader};
use crate::{Error, ErrorKind, Reader, dirty_bitmap, hash_table, vfio};
use qevm_wire::{Cursor, Decode, Located, PageGeometry, WireError};
use scan::{Around, Scan};
use std::sync::Arc;
use totals::Totals;

/// Reads a main channel: [`next`](Decode::next) is shown bytes and gives the event at their front.
///
/// The decoder holds no bytes of the stream. The caller keeps a buffer, drops from its front what an event consumed,
/// and adds to its end when [`Step::NeedMore`] asks for it. After an event with payload (a page, VFIO data, the
/// description, a package) the next bytes of the stream are the caller's: it moves them where they belong, from its
/// buffer or straight from the socket, and reports them with [`skip_payload`](Decode::skip_payload).
///
/// After an error the decoder stays where it was and gives the same error again.
///
/// What the limits bound for a whole stream is counted by all decoders of it together: those of packages, of
/// recoveries, and clones.
///
/// # The content of device sections
///
/// The vmstate of a device has no length on the wire. After [`Event::Section`] with such content (and after
/// [`VfioRecord::Config`](crate::vfio::VfioRecord::Config)), [`expects_body`](Decoder::expects_body) is true and the
/// caller has the choice:
///
/// * it knows the device, reads its state from the buffer, and says how long it was with
///   [`body`](Decoder::body); the decoder then checks the footer;
/// * it does not, and calls [`next`](Decode::next): the decoder looks for the footer, and gives the content as
///   [`Event::Body`], which needs all of it in the buffer (at most [`Limits::device_section`](qevm_wire::Limits));
/// * it has a description to choose among the places where the content may end: [`body_ends`](Decoder::body_ends) gives
///   them one after the other.
///
/// # Packages
///
/// The content of a [`Command::Packaged`](crate::command::Command::Packaged) is payload of the stream around it, and is
/// read with a decoder of its own, from [`nested`](Decoder::nested). A destination must have all of it before it acts
/// on the first section, because pages of the main channel can be needed to load it.
#[derive(Debug, Clone)]
pub struct Decoder {
    options: DecoderOptions,
    state: State,
    cursor: Cursor<PayloadKind>,
    pages: PageGeometry,
    footers: Footers,
    sections: Sections,
    section: Option<CurrentSection>,
    ram: RamReader,
    /// Page sizes that POSTCOPY_ADVISE told of, or 0.
    advised_page_sizes: u64,
    /// `postcopy-ram` was advised and a package was sent: the guest runs at the destination.
    postcopy: bool,
    /// A package was sent, whether for RAM or for bitmaps of disks: no description follows the end of postcopy.
    packaged: bool,
    bitmap_names: dirty_bitmap::Names,
    /// Entries of the guest's hash page table, where the stream has told how many there are.
    hash_table_entries: Option<u64>,
    package: Option<Package>,
    /// What the stream has cost so far.
    totals: Totals,
}

/// What the next bytes that are not payload mean.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Header,
    /// A configuration section may be next.
    AfterHeader,
    /// A type byte is next.
    Item,
    Ram,
    Vfio(vfio::Place),
    DirtyBitmap,
    BlockMigration,
    HashTable(hash_table::Place),
    StorageAttributes,
    /// Content of unknown length is next; what follows it is given.
    Body {
        scan: Scan,
        then: AfterBody,
    },
    /// The footer of the current section is next.
    Footer,
    /// A description may be next.
    AfterEof,
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AfterBody {
    Footer,
    /// The END_OF_STATE of a VFIO section.
    EndOfState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CurrentSection {
    id: u32,
    start: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Package {
    start: u64,
    end: u64,
    depth: u32,
}

impl Decoder {
    /// A decoder for a stream from its first byte, the `Q` of `QEVM`.
    pub fn new(options: DecoderOptions) -> Self {
        Self::with_state(options, State::Header)
    }

    fn with_state(options: DecoderOptions, state: State) -> Self {
        Decoder {
            state,
            cursor: Cursor::at(options.offset),
            pages: options.pages,
            footers: options.footers,
            sections: Sections::default(),
            section: None,
            ram: RamReader::new(Arc::default()),
            advised_page_sizes: 0,
            postcopy: false,
            packaged: false,
            bitmap_names: dirty_bitmap::Names::default(),
            hash_table_entries: None,
            package: None,
            totals: Totals::default(),
            options,
        }
    }

    /// A decoder for the connection on which a broken postcopy goes on: it has no header, and sections and RAM blocks
    /// are those of `self`, the decoder of the connection that broke. Offsets start at 0 again.
    #[must_use]
    pub fn recovery(&self) -> Decoder {
        let options = DecoderOptions { offset: 0, ..self.options.clone() };
        Decoder {
            pages: self.pages,
            footers: self.footers,
            sections: self.sections.clone(),
            ram: RamReader::new(self.ram.blocks.clone()),
            advised_page_sizes: self.advised_page_sizes,
            hash_table_entries: self.hash_table_entries,
            postcopy: true,
            packaged: true,
            totals: self.totals.clone(),
            ..Self::with_state(options, State::Item)
        }
    }

    /// A decoder that goes on where this one is and leaves it as it is: what it reads is to be read again, and counts
    /// towards the [`Limits`](qevm_wire::Limits) of neither.
    #[must_use]
    pub fn ahead(&self) -> Decoder {
        Decoder { totals: self.totals.detached(), ..self.clone() }
    }

    /// From now on, as with [`DecoderOptions::allow_trailing`].
    pub fn allow_trailing(&mut self) {
        self.options.allow_trailing = true;
    }

    /// A decoder for the package that is next in the stream, to be called after the event of its command.
    ///
    /// It ends where the package does, with [`Step::End`], and its offsets are those of the stream around it. The
    /// bytes that it consumes must be skipped in `self` as well.
    ///
    /// # Errors
    /// [`WireError::LimitExceeded`] if packages are nested deeper than [`Limits::depth`](qevm_wire::Limits::depth).
    pub fn nested(&self) -> Result<Decoder, Error> {
        let depth = self.package.map_or(0, |package| package.depth) + 1;
        let limit = self.options.limits.depth;
        if depth > limit {
            let (found, limit) = (depth.into(), limit.into());
            let kind = WireError::LimitExceeded { what: "depth of packages", found, limit };
            return Err(self.locate(Located::new(kind.into(), self.cursor.offset())));
        }
        let end = self.cursor.offset().saturating_add(self.cursor.payload());
        Ok(Decoder {
            cursor: Cursor::at(self.cursor.offset()),
            pages: self.pages,
            footers: self.footers,
            sections: self.sections.nested(),
            ram: RamReader::new(self.ram.blocks.clone()),
            advised_page_sizes: self.advised_page_sizes,
            hash_table_entries: self.hash_table_entries,
            package: Some(Package { start: self.cursor.offset(), end, depth }),
            totals: self.totals.clone(),
            ..Self::with_state(self.options.clone(), State::Item)
        })
    }

    /// True if the content of a device section is next, whose length the wire does not tell.
    ///
    /// ```
    /// use qevm_savevm::{Decoder, DecoderOptions, Event};
    /// use qevm_wire::Driver;
    ///
    /// # use qevm_savevm::{StreamWriter, framing::SectionHeader};
    /// # let name = |name: &str| qevm_wire::CountedString::new(name).unwrap();
    /// # let section = |section_id, idstr| SectionHeader { section_id, idstr: name(idstr), instance_id: 0, version_id: 2 };
    /// # let mut stream = StreamWriter::default();
    /// # stream.header(None)?;
    /// # stream.section_full(&section(7, "timer"), &[1; 24])?;
    /// # stream.section_full(&section(8, "strange"), b"who knows")?;
    /// # stream.eof()?;
    /// # let stream = stream.take();
    /// let mut driver = Driver::new(&stream[..], Decoder::new(DecoderOptions::default()));
    /// let mut found = Vec::new();
    /// while let Some(event) = driver.next()? {
    ///     match event {
    ///         // A device of known layout: its bytes are read, and the decoder is told how many.
    ///         Event::Section { header, .. } if header.idstr == "timer" => {
    ///             assert!(driver.decoder().expects_body());
    ///             driver.fill(24)?;
    ///             found.push(driver.buffered().get(..24).ok_or("the stream is cut")?.to_vec());
    ///             driver.decoder_mut().body(24)?;
    ///             driver.consume(24);
    ///         }
    ///         // Any other: the decoder looks for its end, and gives all of it, within the limits.
    ///         Event::Body(content) => found.push(content.to_vec()),
    ///         _ => {}
    ///     }
    /// }
    /// assert_eq!(found, [&[1; 24][..], b"who knows"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn expects_body(&self) -> bool {
        matches!(self.state, State::Body { .. }) && self.cursor.payload() == 0
    }

    /// Says that the content of the device section was `len` bytes long and is done with.
    ///
    /// # Errors
    /// [`StreamError::NoBody`] if none is expected, [`StreamError::PackageTooShort`] if it goes on past its package,
    /// [`WireError::LimitExceeded`] if all device sections together have more than
    /// [`Limits::device_state`](qevm_wire::Limits::device_state) bytes.
    pub fn body(&mut self, len: u64) -> Result<(), Error> {
        let State::Body { then, .. } = self.state else {
            return Err(self.locate(Located::new(StreamError::NoBody.into(), self.cursor.offset())));
        };
        let end = self.cursor.offset().checked_add(len);
        let last = self.package.map_or(u64::MAX, |package| package.end);
        let Some(end) = end.filter(|end| *end <= last) else {
            let missing = end.unwrap_or(u64::MAX) - last;
            return Err(
                self.locate(Located::new(StreamError::PackageTooShort { missing }.into(), self.cursor.offset()))
            );
        };
        self.totals
            .device_state(len, &self.options.limits)
            .map_err(|kind| self.locate(Located::new(kind.into(), self.cursor.offset())))?;
        self.cursor.move_to(end);
        self.after_body(then);
        Ok(())
    }

    /// The places at which the content of the device section that is next may end. `self` stays as it is: the choice is
    /// to be told with [`body`](Decoder::body).
    pub fn body_ends(&self) -> BodyEnds {
        BodyEnds::new(self)
    }

    /// True if the stream may end here: after its end, whether a description follows or not.
    pub fn is_complete(&self) -> bool {
        match self.state {
            State::AfterEof | State::End => self.cursor.payload() == 0,
            State::Item => {
                self.cursor.payload() == 0 && self.package.is_some_and(|package| self.cursor.offset() == package.end)
            }
            _ => false,
        }
    }

    /// The size of target pages, from the configuration section or the options.
    pub fn page_geometry(&self) -> PageGeometry {
        self.pages
    }

    /// Sets the size of target pages, which only some configuration sections tell. To be called before the first page;
    /// see [`expects_page`](Decoder::expects_page).
    pub fn set_page_geometry(&mut self, pages: PageGeometry) {
        self.pages = pages;
    }

    /// True if the record of a page may be next, or another record of the section `ram`.
    pub fn expects_page(&self) -> bool {
        self.state == State::Ram && self.cursor.payload() == 0
    }

    /// The RAM blocks listed so far.
    pub fn ram_blocks(&self) -> &Arc<RamBlocks> {
        &self.ram.blocks
    }

    /// The sections opened so far.
    pub fn sections(&self) -> &Sections {
        &self.sections
    }

    /// The section that the last event belongs to.
    pub fn current_section(&self) -> Option<&SectionHeader> {
        self.section.and_then(|section| self.sections.get(section.id))
    }

    /// Whether sections have footers, as far as that is known.
    pub fn footers(&self) -> Footers {
        self.footers
    }

    /// As much of `input` as belongs to this stream, and whether nothing can come after it.
    fn bounded<'a>(&self, input: &'a [u8]) -> (&'a [u8], bool) {
        match self.package {
            Some(package) => {
                let left = usize::try_from(package.end.saturating_sub(self.cursor.offset())).unwrap_or(usize::MAX);
                match input.get(..left) {
                    Some(input) => (input, true),
                    None => (input, self.cursor.has_ended()),
                }
            }
            None => (input, self.cursor.has_ended()),
        }
    }

    fn expect_payload(&mut self, len: u64, of: PayloadKind) {
        self.cursor.expect(len, of);
    }

    fn find_body_end(&mut self, content: &[u8], at_end: bool) -> Result<usize, Error> {
        let State::Body { scan, .. } = &mut self.state else {
            return Err(Located::new(StreamError::NoBody.into(), self.cursor.offset()));
        };
        if self.footers == Footers::Absent {
            return Err(Located::new(StreamError::LengthUnknown.into(), self.cursor.offset()));
        }
        let around =
            Around { sections: &self.sections, options: &self.options, at_end, in_package: self.package.is_some() };
        scan.next_end(content, self.cursor.offset(), &around)
    }

    fn doubtful_body_end(&self) -> Option<usize> {
        match &self.state {
            State::Body { scan, .. } => scan.doubtful_end(),
            _ => None,
        }
    }

    fn after_body(&mut self, then: AfterBody) {
        self.state = match then {
            AfterBody::Footer => State::Footer,
            AfterBody::EndOfState => State::Vfio(vfio::Place::Ending),
        };
    }

    /// Puts the path to the current item around an error.
    fn locate(&self, error: Error) -> Error {
        let mut error = match (self.package, error) {
            // A package is all there, so what it lacks is its writer's error and not the connection's.
            (Some(package), Located { kind: ErrorKind::Wire(WireError::Truncated { needed, .. }), offset, path })
                if !self.cursor.has_ended() || offset.saturating_add(needed) > package.end =>
            {
                let missing = offset.saturating_add(needed).saturating_sub(package.end);
                Located { kind: StreamError::PackageTooShort { missing }.into(), offset, path }
            }
            (_, error) => error,
        };
        // What is wrong with a payload is wrong with the page that it is.
        if let Some(block) = self.ram.current.filter(|_| self.cursor.payload() > 0 && self.state == State::Ram) {
            error = error.within(self.ram.blocks.path(block));
        }
        if let Some(header) = self.current_section() {
            error = error.within(format!("section {} '{}'", header.section_id, header.idstr));
        }
        match self.package {
            Some(package) => error.within(format!("package at {}", package.start)),
            None => error,
        }
    }
}

impl Decode for Decoder {
    type Event<'a> = Event<'a>;
    type Payload = PayloadKind;
    type Kind = ErrorKind;

    fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<Event<'a>, PayloadKind>, Error> {
        let (input, at_end) = self.bounded(input);
        if let Some(step) = self.cursor.pending(input.len() as u64, at_end) {
            return step.map_err(|error| self.locate(error));
        }
        let mut reader = Reader::at(input, self.cursor.offset());
        match self.item(&mut reader, at_end) {
            Ok(Some(event)) => {
                self.cursor.move_to(reader.offset());
                Ok(Step::Event { consumed: reader.position(), event })
            }
            Ok(None) => Ok(Step::End),
            Err(error) => match self.cursor.need_more(&error, at_end) {
                Some(at_least) => Ok(Step::NeedMore { at_least }),
                None => Err(self.locate(error)),
            },
        }
    }

    fn payload_remaining(&self) -> u64 {
        self.cursor.payload()
    }

    fn payload_of(&self) -> Option<&PayloadKind> {
        self.cursor.payload_of()
    }

    /// As everywhere; [`StreamError::PackageTooShort`] if the payload goes on after the end of its package.
    fn skip_payload(&mut self, count: u64) -> Result<(), Error> {
        let left = self.package.map_or(u64::MAX, |package| package.end.saturating_sub(self.cursor.offset()));
        // More than the payload has is no fault of the package.
        if count > left && count <= self.cursor.payload() {
            let kind = StreamError::PackageTooShort { missing: count - left };
            return Err(self.locate(Located::new(kind.into(), self.cursor.offset())));
        }
        self.cursor.skip(count)
    }

    fn end_of_input(&mut self) {
        self.cursor.end();
    }

    fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}
