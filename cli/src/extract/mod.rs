//! Getting guest memory and device state out of a stream.

pub mod elf_core;
