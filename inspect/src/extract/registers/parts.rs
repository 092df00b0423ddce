//! What the registers of every target are read from, and what their notes have in common.

use crate::extract::elf_core::{Format, Note};
use qevm_savevm::vmdesc::{Node, ScalarKind, Value};

const NT_PRSTATUS: u32 = 1;
pub(super) const NT_FPREGSET: u32 = 2;

/// What an ELF core tells of one CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuNotes {
    /// The kind of file that the notes are for.
    pub format: Format,
    /// The notes, in the order of the file.
    pub notes: Vec<Note>,
    /// What the CPU has beyond them.
    pub left_out: Option<&'static str>,
}

/// The fields of a section `cpu`.
#[derive(Clone, Copy)]
pub(super) struct Fields<'n>(pub(super) &'n Node);

impl<'n> Fields<'n> {
    pub(super) fn find(self, path: &str) -> Result<&'n Node, String> {
        self.0.find(path).ok_or_else(|| format!("no field '{path}'"))
    }

    pub(super) fn has(self, path: &str) -> bool {
        self.0.find(path).is_some()
    }

    pub(super) fn word(self, path: &str) -> Result<u64, String> {
        let scalar = self.find(path)?.scalar();
        scalar.map(|scalar| scalar.as_u64()).ok_or_else(|| format!("field '{path}' is no number"))
    }

    /// True for an array of numbers of 32 bits.
    pub(super) fn is_narrow(self, path: &str) -> bool {
        matches!(self.0.find(path).map(|node| &node.value), Some(Value::Scalars(numbers)) if numbers.kind() == ScalarKind::U32)
    }

    /// An array of at least `N` numbers.
    pub(super) fn words<const N: usize>(self, path: &str) -> Result<[u64; N], String> {
        let numbers = match &self.find(path)?.value {
            Value::Scalars(numbers) if numbers.len() >= N => numbers,
            _ => return Err(format!("field '{path}' is no array of {N} numbers")),
        };
        Ok(std::array::from_fn(|index| numbers.at(index).map_or(0, |number| number.as_u64())))
    }
}

/// An `elf_prstatus`: `len` bytes, all zero but the number of the CPU as the process, and registers.
pub(super) struct Status {
    pub(super) format: Format,
    /// Where the number of the process and the registers are.
    pub(super) places: (usize, usize),
    pub(super) len: usize,
    pub(super) number: u32,
}

/// The places of [`Status`] in every Linux of 64 and of 32 bits.
pub(super) const WIDE: (usize, usize) = (32, 112);
pub(super) const NARROW: (usize, usize) = (24, 72);

impl Status {
    pub(super) fn note(self, registers: &[u8]) -> Note {
        let (pid_at, registers_at) = self.places;
        let mut content = vec![0; pid_at];
        self.format.word(&mut content, self.number);
        content.resize(registers_at, 0);
        content.extend_from_slice(registers);
        content.resize(self.len, 0);
        Note { owner: "CORE", kind: NT_PRSTATUS, content }
    }
}
