//! Sees everything that is read, as it is read.

use crate::ram::{Copying, GuestRam};
use qevm_savevm::Event;
use qevm_savevm::command::Command;
use qevm_savevm::framing::{SectionHeader, SectionKind};
use qevm_savevm::ram::RamBlock;
use qevm_savevm::vmdesc::Node;

/// Sees everything that is read, as it is read.
pub trait Observer {
    /// The main channel was read up to `offset`.
    fn position(&mut self, _offset: u64) {}
    /// Everything is read a second time.
    fn restarted(&mut self) {}
    /// Anything comes on the main channel.
    fn event(&mut self, _event: &Event<'_>) {}
    /// A piece of the payload of the last event came, if that is a record of an iterable section beside `ram`.
    fn payload(&mut self, _bytes: &[u8]) {}
    /// The configuration section is over; target pages have `page_size` bytes.
    fn configuration(&mut self, _page_size: u64) {}
    /// A section record starts.
    fn section(&mut self, _kind: SectionKind, _header: &SectionHeader, _offset: u64) {}
    /// A command came.
    fn command(&mut self, _command: &Command, _offset: u64) {}
    /// The stream is over; only a description may follow.
    fn end_of_stream(&mut self) {}
    /// The list of RAM blocks has `block`.
    fn ram_block(&mut self, _block: &RamBlock) {}
    /// The first page of memory is next, and all RAM blocks are in `ram`: says where pages are to be copied as they
    /// come, if anywhere. `cpus`: how many CPUs the description tells of, if there is one already.
    fn copy(&mut self, _ram: &GuestRam, _cpus: Option<usize>) -> Option<Copying> {
        None
    }
    /// The content of a device section, `body`, starts at `offset` of its file.
    fn body(&mut self, _header: &SectionHeader, _offset: u64, _body: &[u8]) {}
    /// The fields of a device section, once they are known: at the latest when the description comes.
    fn fields(&mut self, _header: &SectionHeader, _fields: &Node) {}
    /// The configuration of a VFIO device, which came on a page channel and not in its section.
    fn configuration_of(&mut self, _header: &SectionHeader, _fields: &Node) {}
}

/// An observer that is not interested.
#[derive(Debug, Default)]
pub struct Ignore;
impl Observer for Ignore {}
