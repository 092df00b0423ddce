//! Saved QEMU guests, for forensic and management tools: opening them whatever container they are in, walking through
//! everything that is in them, extracting memory and device state, writing them again in another form, checking whether
//! a destination will load them.
//!
//! The codecs of [`qevm_savevm`], [`qevm_multifd`] and [`qevm_returnpath`] do no I/O; this crate reads files for them.
//! What grows with the guest goes to unlinked temporary files, so that a guest of any size is read in little memory.
//!
//! Most tools need [`Migration`] alone:
//!
//! ```no_run
//! use qevm_inspect::Migration;
//!
//! let mut guest = Migration::open("guest.qevm".as_ref())?;
//! for block in guest.blocks() {
//!     println!("{}: {} bytes", block.name, block.used_length);
//! }
//! guest.write_elf("core".as_ref())?;
//! # Ok::<(), qevm_inspect::failure::Error>(())
//! ```
//!
//! The example `forensic` is such a tool in 20 lines.
//!
//! | module | what |
//! |---|---|
//! | [`open`] | a file, whatever it is: a plain or compressed stream, a libvirt save image, a snapshot in a qcow2 image, mapped-ram |
//! | [`stream`] | [`analyze`](stream::analyze) reads all files of a migration and calls an [`Observer`](stream::Observer) |
//! | [`ram`] | the guest's memory as a destination would have it |
//! | [`pages`] | any page of an image, without reading the rest |
//! | [`extract`] | RAM blocks, guest-physical memory, ELF cores for gdb and crash, device state as JSON |
//! | [`rewrite`] | a saved guest as a new stream: plain, over page channels, mapped-ram |
//! | [`check`] | whether a destination will load a stream, and if not, why |
//! | [`diff`] | what differs between two guests |
//! | [`report`] | what was found, for machines |
//! | [`bounds`] | what all that may cost |
//! | [`failure`] | why something could not be done |
//! | [`source`], [`read_at`] | bytes to read, in order and in any order |
//! | [`output_file`], [`aside`], [`size`] | files that appear when they are whole, text that waits for its turn, sizes in words |
//!
//! # Promises
//!
//! - For n bytes of input after decompression, everything takes at most 64 MiB + 8 n bytes of memory and work in
//!   proportion to n; what cannot follow n has [`Bounds`](bounds::Bounds).
//! - No input makes it panic or hang. A bad one is a [`Failure`](failure::Failure) with file, byte, path, found and
//!   expected. Where an option of the program `qevm` helps, the message names it.
#![forbid(unsafe_code)]

pub mod aside;
pub mod bounds;
pub mod check;
pub mod diff;
pub mod extract;
pub mod failure;
pub mod open;
pub mod output_file;
pub mod pages;
pub mod ram;
pub mod read_at;
pub mod report;
pub mod rewrite;
pub mod size;
pub mod source;
pub mod stream;

mod migration;

pub use migration::Migration;
