//! Reading fields one after the other into the members of a structure.

use super::tree::{Name, Node, Struct, Value};
use super::{Scalar, ScalarKind, Scalars, VmdescError};
use crate::{Error, Reader};
use qevm_wire::{Limits, WireError, Within};

/// Where the bytes of one section come from, and how many nodes may still be made of them.
#[derive(Clone)]
pub(super) struct Input<'a> {
    pub(super) reader: Reader<'a>,
    body: &'a [u8],
    base: u64,
    nodes: u64,
    node_limit: u64,
    /// Bytes of memory that the nodes take, and may take.
    memory: u64,
    memory_limit: u64,
    /// Fields that have no bytes, and how many there may be.
    empty: u64,
    empty_limit: u64,
}

/// Fields without bytes that a section may have, beyond four for each of its bytes. Their number would otherwise be
/// bounded by nothing on the wire.
const EMPTY_FIELDS: u64 = 4096;

/// The members of one structure while they are being read.
///
/// Names and types that are part of the format are given as `&'static str`; those of a description as `String`.
pub(super) struct Fields<'i, 'a> {
    pub(super) input: &'i mut Input<'a>,
    pub(super) members: Vec<Node>,
}

impl<'a> Input<'a> {
    pub(super) fn new(body: &'a [u8], offset: u64, limits: &Limits) -> Self {
        let len = body.len() as u64;
        Input {
            reader: Reader::at(body, offset),
            body,
            base: offset,
            nodes: 0,
            node_limit: limits.elements,
            memory: 0,
            memory_limit: limits.fields.saturating_add(2 * len),
            empty: 0,
            empty_limit: EMPTY_FIELDS.saturating_add(4 * len),
        }
    }

    /// The whole section.
    pub(super) fn body(&self) -> &'a [u8] {
        self.body
    }

    /// The bytes of the section that were read.
    pub(super) fn before(&self) -> &'a [u8] {
        &self.body[..(self.reader.offset() - self.base) as usize]
    }

    /// The bytes of the section that are next.
    pub(super) fn ahead(&self) -> &'a [u8] {
        &self.body[(self.reader.offset() - self.base) as usize..]
    }

    /// A node is about to be made, with these names and a value of `len` bytes.
    fn count_node(&mut self, names: [&Name; 2], len: u64) -> Result<(), Error> {
        /// What an allocation takes besides its bytes.
        const ALLOCATION: u64 = 16;
        self.nodes += 1;
        self.reader.within_limit("fields of a section", self.nodes, self.node_limit)?;
        let owned = |name: &Name| if let Name::Owned(name) = name { name.len() as u64 + ALLOCATION } else { 0 };
        let names: u64 = names.into_iter().map(owned).sum();
        self.memory += size_of::<Node>() as u64 + names + if len > 0 { len + ALLOCATION } else { 0 };
        self.reader.within_limit("memory for the fields of a section", self.memory, self.memory_limit)
    }

    /// `count` fields are looked at that have no bytes.
    pub(super) fn count_empty(&mut self, count: u64) -> Result<(), Error> {
        self.empty = self.empty.saturating_add(count);
        self.reader.within_limit("fields without bytes of a section", self.empty, self.empty_limit)
    }
}

impl<'i, 'a> Fields<'i, 'a> {
    pub(super) fn new(input: &'i mut Input<'a>) -> Self {
        Fields { input, members: Vec::new() }
    }

    pub(super) fn offset(&self) -> u64 {
        self.input.reader.offset()
    }

    /// Reads a field of `len` bytes, of which `value` makes the value.
    pub(super) fn leaf(
        &mut self,
        name: impl Into<Name>,
        type_name: impl Into<Name>,
        len: u64,
        value: impl FnOnce(&'a [u8]) -> Value,
    ) -> Result<&'a [u8], Error> {
        let (name, type_name) = (name.into(), type_name.into());
        let offset = self.offset();
        let bytes = self.input.reader.take(len).within(|| name.escape_debug().to_string())?;
        self.input.count_node([&name, &type_name], len)?;
        self.members.push(Node { name, type_name, offset, len, value: value(bytes) });
        Ok(bytes)
    }

    /// Reads one number.
    pub(super) fn scalar(
        &mut self,
        name: impl Into<Name>,
        type_name: impl Into<Name>,
        kind: ScalarKind,
    ) -> Result<Scalar, Error> {
        let bytes = self.leaf(name, type_name, kind.width() as u64, |b| Value::Scalar(Scalar::read(kind, b)))?;
        Ok(Scalar::read(kind, bytes))
    }

    /// Reads `count` numbers.
    pub(super) fn scalars(
        &mut self,
        name: impl Into<Name>,
        type_name: impl Into<Name>,
        kind: ScalarKind,
        count: u64,
    ) -> Result<(), Error> {
        let len = count.saturating_mul(kind.width() as u64);
        self.leaf(name, type_name, len, |b| Value::Scalars(Scalars::from_bytes(kind, b))).map(drop)
    }

    pub(super) fn bool(&mut self, name: impl Into<Name>) -> Result<bool, Error> {
        self.scalar(name, "bool", ScalarKind::Bool).map(|s| s.as_u64() != 0)
    }

    pub(super) fn u8(&mut self, name: impl Into<Name>) -> Result<u8, Error> {
        self.scalar(name, "uint8", ScalarKind::U8).map(|s| s.as_u64() as u8)
    }

    pub(super) fn u16(&mut self, name: impl Into<Name>) -> Result<u16, Error> {
        self.scalar(name, "uint16", ScalarKind::U16).map(|s| s.as_u64() as u16)
    }

    pub(super) fn u32(&mut self, name: impl Into<Name>) -> Result<u32, Error> {
        self.scalar(name, "uint32", ScalarKind::U32).map(|s| s.as_u64() as u32)
    }

    pub(super) fn i32(&mut self, name: impl Into<Name>) -> Result<i32, Error> {
        self.scalar(name, "int32", ScalarKind::I32).map(|s| s.as_u64() as u32 as i32)
    }

    pub(super) fn u64(&mut self, name: impl Into<Name>) -> Result<u64, Error> {
        self.scalar(name, "uint64", ScalarKind::U64).map(Scalar::as_u64)
    }

    pub(super) fn buffer(&mut self, name: impl Into<Name>, len: u64) -> Result<&'a [u8], Error> {
        self.leaf(name, "buffer", len, |b| Value::Buffer(b.into()))
    }

    pub(super) fn opaque(&mut self, name: impl Into<Name>, type_name: impl Into<Name>, len: u64) -> Result<(), Error> {
        self.leaf(name, type_name, len, |b| Value::Opaque(b.into())).map(drop)
    }

    /// Reads a structure; errors inside it name it.
    pub(super) fn structure(
        &mut self,
        name: impl Into<Name>,
        type_name: impl Into<Name>,
        vmsd_name: impl Into<Name>,
        version: u32,
        content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let vmsd_name = vmsd_name.into();
        let vmsd_len = if let Name::Owned(name) = &vmsd_name { name.len() as u64 } else { 0 };
        self.node(name.into(), type_name.into(), vmsd_len, content, |members| {
            Value::Struct(Struct { vmsd_name, version, members })
        })
    }

    /// Reads a list: element markers and elements.
    pub(super) fn list(
        &mut self,
        name: impl Into<Name>,
        type_name: impl Into<Name>,
        content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.node(name.into(), type_name.into(), 0, content, Value::List)
    }

    /// Reads the marker before an element of a list (true) or after its last (false).
    pub(super) fn element_marker(&mut self, index: u64) -> Result<bool, Error> {
        let offset = self.offset();
        let found = self.scalar(format!("[{index}].present"), "element marker", ScalarKind::ElementMarker)?.as_u64();
        match found {
            0 => Ok(false),
            1 => Ok(true),
            found => {
                let kind = VmdescError::List { what: "element marker", found, expected: 1 };
                Err(qevm_wire::Located::new(kind.into(), offset))
            }
        }
    }

    /// Reads a subsection whose header the wire must have next.
    pub(super) fn subsection(
        &mut self,
        vmsd_name: &str,
        version: u32,
        content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let name: Name = vmsd_name.to_owned().into();
        let header = |fields: &mut Fields<'_, 'a>| {
            fields.input.reader.subsection_header(vmsd_name, version)?;
            content(fields)
        };
        self.node(name.clone(), "subsection".into(), name.len() as u64, header, |members| {
            Value::Subsection(Struct { vmsd_name: name, version, members })
        })
    }

    /// Reads exactly `len` bytes with `content`.
    pub(super) fn bounded(
        &mut self,
        len: u64,
        what: &'static str,
        content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut outer = self.input.reader.clone();
        self.input.reader = outer.sub(len)?;
        content(self)?;
        self.input.reader.expect_end(what)?;
        self.input.reader = outer;
        Ok(())
    }

    /// Reads with `content`, or, if that fails, reads nothing and returns false. Nodes made in vain still count.
    pub(super) fn attempt(&mut self, content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>) -> bool {
        let (reader, members) = (self.input.reader.clone(), self.members.len());
        if content(self).is_ok() {
            return true;
        }
        self.input.reader = reader;
        self.members.truncate(members);
        false
    }

    /// The error of a value that this layout does not allow.
    pub(super) fn unexpected(&self, what: &'static str, found: u64, expected: u64) -> Error {
        self.input.reader.fail(WireError::Unexpected { what, found, expected })
    }

    fn node(
        &mut self,
        name: Name,
        type_name: Name,
        extra: u64,
        content: impl FnOnce(&mut Fields<'_, 'a>) -> Result<(), Error>,
        value: impl FnOnce(Vec<Node>) -> Value,
    ) -> Result<(), Error> {
        self.input.count_node([&name, &type_name], extra)?;
        let offset = self.offset();
        let mut inner = Fields::new(self.input);
        content(&mut inner).within(|| name.escape_debug().to_string())?;
        let mut members = inner.members;
        members.shrink_to_fit();
        let len = self.offset() - offset;
        self.members.push(Node { name, type_name, offset, len, value: value(members) });
        Ok(())
    }
}

/// Reading the header of a subsection.
trait SubsectionHeader {
    fn subsection_header(&mut self, vmsd_name: &str, version: u32) -> Result<(), Error>;
}

impl SubsectionHeader for Reader<'_> {
    fn subsection_header(&mut self, expected: &str, version: u32) -> Result<(), Error> {
        let at = self.clone();
        let found = self.u8()?;
        if found != super::tree::SUBSECTION {
            let (name, expected) = (expected.to_owned(), super::tree::SUBSECTION);
            return Err(at.fail(VmdescError::SubsectionMarker { name, found, expected }));
        }
        let at = self.clone();
        let found = self.counted_bytes()?;
        if found != expected.as_bytes() {
            let (found, expected) = (found.escape_ascii().to_string(), expected.to_owned());
            return Err(at.fail(VmdescError::SubsectionName { found, expected }));
        }
        let at = self.clone();
        let found = self.be32()?;
        if found != version {
            let name = expected.to_owned();
            return Err(at.fail(VmdescError::SubsectionVersion { name, found, expected: version }));
        }
        Ok(())
    }
}
