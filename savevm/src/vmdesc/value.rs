//! Typed values as they are on the wire: nothing is lost, so that they encode to the same bytes.

use std::fmt;

/// How a number of fixed width is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScalarKind {
    /// One byte; anything but 0 is true.
    Bool,
    /// Unsigned big-endian, one byte.
    U8,
    /// Unsigned big-endian, two bytes.
    U16,
    /// Unsigned big-endian, four bytes.
    U32,
    /// Unsigned big-endian, eight bytes.
    U64,
    /// Signed big-endian, one byte.
    I8,
    /// Signed big-endian, two bytes.
    I16,
    /// Signed big-endian, four bytes.
    I32,
    /// Signed big-endian, eight bytes.
    I64,
    /// Unsigned **little-endian**, two bytes: registers of PCI configuration space.
    U16Le,
    /// Unsigned **little-endian**, four bytes: structures that QEMU dumps as the x86 host has them.
    U32Le,
    /// Unsigned **little-endian**, eight bytes.
    U64Le,
    /// An IEEE 754 double: two big-endian words, high word first (`CPU_Double_U`).
    Double,
    /// Expire time of a timer in ns, −1 if it is not armed.
    Timer,
    /// One byte that tells whether an element of an array of pointers follows: `0x30` no, `0x31` yes (QEMU 11.x).
    PointerMarker,
    /// One byte before each element of a list, 1, and after the last, 0.
    ElementMarker,
}

impl ScalarKind {
    /// Bytes on the wire.
    pub const fn width(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::PointerMarker | Self::ElementMarker => 1,
            Self::U16 | Self::I16 | Self::U16Le => 2,
            Self::U32 | Self::I32 | Self::U32Le => 4,
            Self::U64 | Self::I64 | Self::U64Le | Self::Double | Self::Timer => 8,
        }
    }

    const fn is_signed(self) -> bool {
        matches!(self, Self::I8 | Self::I16 | Self::I32 | Self::I64 | Self::Timer)
    }

    const fn is_little_endian(self) -> bool {
        matches!(self, Self::U16Le | Self::U32Le | Self::U64Le)
    }

    /// What QEMU's type names mean. The `equal` types are read like their base; `int64 equal` is what QEMU calls its
    /// *unsigned* 64-bit one, and `int32 le` is big-endian (it means "less or equal"). QEMU 5.2 to 11.1.
    pub(super) fn of_type(type_name: &str) -> Option<Self> {
        Some(match type_name {
            "bool" => Self::Bool,
            "uint8" | "uint8 equal" | "fd" => Self::U8,
            "uint16" | "uint16 equal" => Self::U16,
            "uint32" | "uint32 equal" => Self::U32,
            "uint64" | "int64 equal" | "uint64 equal" => Self::U64,
            "int8" => Self::I8,
            "int16" => Self::I16,
            "int32" | "int32 equal" | "int32 le" => Self::I32,
            "int64" => Self::I64,
            "CPU_Double_U" => Self::Double,
            "timer" => Self::Timer,
            "nullptr" | "ptr-marker" | "ptr_marker" => Self::PointerMarker,
            _ => return None,
        })
    }
}

/// A number of fixed width.
///
/// ```
/// use qevm_savevm::vmdesc::{Scalar, ScalarKind};
///
/// let timer = Scalar::new(ScalarKind::Timer, u64::MAX);
/// assert_eq!((timer.as_i128(), timer.to_string()), (-1, "not armed".to_owned()));
/// assert_eq!(Scalar::new(ScalarKind::U8, 7).as_u64(), 7);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scalar {
    kind: ScalarKind,
    bits: u64,
}

impl Scalar {
    /// A number of which the low bits, as many as `kind` is wide, are `bits`.
    pub const fn new(kind: ScalarKind, bits: u64) -> Self {
        let unused = 64 - 8 * kind.width() as u32;
        Scalar { kind, bits: bits << unused >> unused }
    }

    /// How it is on the wire.
    pub const fn kind(self) -> ScalarKind {
        self.kind
    }

    /// The bits, without a sign.
    pub const fn as_u64(self) -> u64 {
        self.bits
    }

    /// The number, with its sign if its kind has one.
    pub const fn as_i128(self) -> i128 {
        if !self.kind.is_signed() {
            return self.bits as i128;
        }
        let unused = 64 - 8 * self.kind.width() as u32;
        ((self.bits << unused) as i64 >> unused) as i128
    }

    /// The number as a double, if its kind is [`ScalarKind::Double`].
    pub fn as_f64(self) -> Option<f64> {
        (self.kind == ScalarKind::Double).then(|| f64::from_bits(self.bits))
    }

    pub(super) fn read(kind: ScalarKind, bytes: &[u8]) -> Self {
        let shift_in = |bits: u64, byte: &u8| bits << 8 | u64::from(*byte);
        let bits = match kind.is_little_endian() {
            true => bytes.iter().rev().fold(0, shift_in),
            false => bytes.iter().fold(0, shift_in),
        };
        Scalar::new(kind, bits)
    }

    pub(super) fn write(self, out: &mut Vec<u8>) {
        let width = self.kind.width();
        match self.kind.is_little_endian() {
            true => out.extend_from_slice(&self.bits.to_le_bytes()[..width]),
            false => out.extend_from_slice(&self.bits.to_be_bytes()[8 - width..]),
        }
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            ScalarKind::Bool if self.bits < 2 => write!(f, "{}", self.bits == 1),
            ScalarKind::Bool => write!(f, "true ({:#x})", self.bits),
            ScalarKind::Timer if self.as_i128() == -1 => f.write_str("not armed"),
            ScalarKind::Timer => write!(f, "{} ns", self.as_i128()),
            ScalarKind::Double => write!(f, "{}", f64::from_bits(self.bits)),
            ScalarKind::PointerMarker if self.bits == u64::from(NULL_POINTER) => f.write_str("null"),
            ScalarKind::PointerMarker if self.bits == u64::from(VALID_POINTER) => f.write_str("present"),
            kind if kind.is_signed() => write!(f, "{}", self.as_i128()),
            _ => write!(f, "{:#x}", self.bits),
        }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.kind)
    }
}

/// The byte instead of an element that is a NULL pointer (QEMU 2.9 and later).
pub(super) const NULL_POINTER: u8 = 0x30;
/// The byte before an element that is there (QEMU 11.x).
pub(super) const VALID_POINTER: u8 = 0x31;

/// Numbers of one kind, one after the other.
///
/// They are kept as their bytes: an array takes no more memory than it takes in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scalars {
    kind: ScalarKind,
    bytes: Vec<u8>,
}

impl Scalars {
    /// An array of these numbers, of which only the bits that `kind` has room for are kept.
    pub fn new(kind: ScalarKind, numbers: impl IntoIterator<Item = u64>) -> Self {
        let mut bytes = Vec::new();
        numbers.into_iter().for_each(|bits| Scalar::new(kind, bits).write(&mut bytes));
        Scalars { kind, bytes }
    }

    pub(super) fn from_bytes(kind: ScalarKind, bytes: &[u8]) -> Self {
        Scalars { kind, bytes: bytes.into() }
    }

    /// How the elements are on the wire.
    pub fn kind(&self) -> ScalarKind {
        self.kind
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.width()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The element at `index`.
    pub fn at(&self, index: usize) -> Option<Scalar> {
        let start = index.checked_mul(self.kind.width())?;
        self.bytes.get(start..start + self.kind.width()).map(|bytes| Scalar::read(self.kind, bytes))
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Scalar> + '_ {
        self.bytes.chunks_exact(self.kind.width()).map(|bytes| Scalar::read(self.kind, bytes))
    }

    /// The bytes as on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}
