//! Device state as a tree of named, typed fields.

use super::model::SUBSECTION_HEADER;
use super::{Scalar, Scalars};
use qevm_wire::WireError;
use std::borrow::Cow;

/// The byte that starts a subsection (all QEMU releases).
pub(super) const SUBSECTION: u8 = 0x05;

/// A name that is either part of the format or came with a stream.
pub type Name = Cow<'static, str>;

/// A field, a structure or a subsection: a node of the tree that a device section is.
///
/// The bytes of a node are those of its children one after the other; a subsection has a header before them. Nothing of
/// a section is outside a leaf or a subsection header, so a tree encodes to the bytes it was decoded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name as the description has it. Elements of arrays have `[index]` after it, whatever QEMU release wrote the
    /// description. For unnamed parts of QEMU's composite types, the name that this crate's format reference gives.
    pub name: Name,
    /// QEMU's name of the type; `subsection` for subsections.
    pub type_name: Name,
    /// Stream offset of the first byte.
    pub offset: u64,
    /// Bytes on the wire.
    pub len: u64,
    /// The value.
    pub value: Value,
}

/// What a [`Node`] holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// A number, flag, timer or marker.
    Scalar(Scalar),
    /// An array of numbers.
    Scalars(Scalars),
    /// Bytes that mean themselves: names, register files, memory.
    Buffer(Vec<u8>),
    /// Bytes that QEMU writes as zeroes and skips when it reads.
    Unused(Vec<u8>),
    /// Bits: big-endian 64-bit words, bit 0 of word 0 first.
    Bitmap(Vec<u8>),
    /// Bytes of a type whose layout is not known here. They are counted by [`Node::opaque_bytes`].
    Opaque(Vec<u8>),
    /// Fields and subsections, in wire order.
    Struct(Struct),
    /// A subsection: header, then its content.
    Subsection(Struct),
    /// A list or tree: element markers and elements, in wire order.
    List(Vec<Node>),
}

/// The content of a structure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Struct {
    /// Name of its VMSD. For a subsection this is the name on the wire.
    pub vmsd_name: Name,
    /// Its version. Only subsections have it on the wire.
    pub version: u32,
    /// Fields, then subsections.
    pub members: Vec<Node>,
}

impl Node {
    /// The nodes inside this one.
    pub fn children(&self) -> &[Node] {
        match &self.value {
            Value::Struct(inner) | Value::Subsection(inner) => &inner.members,
            Value::List(elements) => elements,
            _ => &[],
        }
    }

    /// The first child with this name.
    pub fn child(&self, name: &str) -> Option<&Node> {
        self.children().iter().find(|child| child.name == name)
    }

    /// The first node at this path: names joined by dots, e.g. `state.irr` or `cpu/pkru.env.pkru`.
    ///
    /// Names can have dots of their own, which is why every way to take the path apart is tried. An element of an array
    /// of numbers is no node; ask the array.
    pub fn find(&self, path: &str) -> Option<&Node> {
        self.children().iter().find_map(|child| match path.strip_prefix(child.name.as_ref())? {
            "" => Some(child),
            rest => child.find(rest.strip_prefix('.')?),
        })
    }

    /// The number that this node is, if it is one.
    pub fn scalar(&self) -> Option<Scalar> {
        match self.value {
            Value::Scalar(scalar) => Some(scalar),
            _ => None,
        }
    }

    /// Calls `visit` with the path and the node of every leaf, in wire order.
    ///
    /// ```
    /// use qevm_savevm::vmdesc::{Node, Scalar, ScalarKind, Value};
    ///
    /// let node = Node { name: "id".into(), type_name: "uint8".into(), offset: 0, len: 1,
    ///     value: Value::Scalar(Scalar::new(ScalarKind::U8, 3)) };
    /// let mut seen = Vec::new();
    /// node.leaves(&mut |path, leaf| seen.push((path.to_owned(), leaf.scalar().unwrap().as_u64())));
    /// assert_eq!(seen, [("id".to_owned(), 3)]);
    /// ```
    pub fn leaves<'a>(&'a self, visit: &mut impl FnMut(&str, &'a Node)) {
        self.walk(&mut self.name.to_string(), visit);
    }

    fn walk<'a>(&'a self, path: &mut String, visit: &mut impl FnMut(&str, &'a Node)) {
        let children = match &self.value {
            Value::Struct(inner) | Value::Subsection(inner) => &inner.members,
            Value::List(elements) => elements,
            _ => return visit(path, self),
        };
        for child in children {
            let length = path.len();
            path.push('.');
            path.push_str(&child.name);
            child.walk(path, visit);
            path.truncate(length);
        }
    }

    /// Bytes that are attributed to no named field: those of types whose layout is not known here.
    pub fn opaque_bytes(&self) -> u64 {
        match &self.value {
            Value::Opaque(bytes) => bytes.len() as u64,
            _ => self.children().iter().map(Node::opaque_bytes).sum(),
        }
    }

    /// Bytes of memory that the node takes, with all inside it.
    pub fn memory(&self) -> u64 {
        let owned = |name: &Name| if let Cow::Owned(name) = name { name.len() } else { 0 };
        let value = match &self.value {
            Value::Scalars(scalars) => scalars.as_bytes().len(),
            Value::Buffer(b) | Value::Unused(b) | Value::Bitmap(b) | Value::Opaque(b) => b.len(),
            Value::Struct(inner) | Value::Subsection(inner) => owned(&inner.vmsd_name),
            Value::Scalar(_) | Value::List(_) => 0,
        };
        let own = size_of::<Node>() + owned(&self.name) + owned(&self.type_name) + value;
        own as u64 + self.children().iter().map(Node::memory).sum::<u64>()
    }

    /// Bytes that the node encodes to. Unlike [`Node::len`] it follows changes of the values.
    pub fn encoded_len(&self) -> u64 {
        let own = match &self.value {
            Value::Scalar(scalar) => scalar.kind().width() as u64,
            Value::Scalars(scalars) => scalars.as_bytes().len() as u64,
            Value::Buffer(b) | Value::Unused(b) | Value::Bitmap(b) | Value::Opaque(b) => b.len() as u64,
            Value::Subsection(inner) => SUBSECTION_HEADER + inner.vmsd_name.len() as u64,
            Value::Struct(_) | Value::List(_) => 0,
        };
        own + self.children().iter().map(Node::encoded_len).sum::<u64>()
    }

    /// Appends the bytes as on the wire.
    ///
    /// # Errors
    /// [`WireError::TooLong`] if the name of a subsection that the caller made has more than 255 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match &self.value {
            Value::Scalar(scalar) => scalar.write(out),
            Value::Scalars(scalars) => out.extend_from_slice(scalars.as_bytes()),
            Value::Buffer(b) | Value::Unused(b) | Value::Bitmap(b) | Value::Opaque(b) => out.extend_from_slice(b),
            Value::Subsection(inner) => {
                let found = inner.vmsd_name.len();
                let Ok(length) = u8::try_from(found) else {
                    return Err(WireError::TooLong {
                        what: "subsection name",
                        found: found as u64,
                        max: u8::MAX.into(),
                    });
                };
                out.extend_from_slice(&[SUBSECTION, length]);
                out.extend_from_slice(inner.vmsd_name.as_bytes());
                out.extend_from_slice(&inner.version.to_be_bytes());
            }
            Value::Struct(_) | Value::List(_) => {}
        }
        self.children().iter().try_for_each(|child| child.encode(out))
    }
}
