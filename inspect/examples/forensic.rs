//! What is in a saved guest, and its memory for gdb and crash: `cargo run -p qevm-inspect --example forensic -- FILE
//! CORE`.

use qevm_inspect::Migration;
use qevm_inspect::failure::Error;
use std::env;
use std::path::Path;
use std::process;

fn main() {
    let [_, file, core] = &env::args().collect::<Vec<_>>()[..] else { panic!("expected: FILE CORE") };
    if let Err(error) = report(file.as_ref(), core.as_ref()).map(|text| print!("{text}")) {
        eprintln!("{error}");
        process::exit(1);
    }
}

/// Lists RAM blocks and devices of the guest in `file`, and writes its memory and registers to `core`.
pub(crate) fn report(file: &Path, core: &Path) -> Result<String, Error> {
    let mut guest = Migration::open(file)?;
    let mut text = format!("machine {}\n", guest.machine());
    for block in guest.blocks() {
        text += &format!("block {} of {} bytes, {} pages\n", block.name, block.used_length, block.pages);
    }
    for device in guest.devices() {
        text += &format!("device {} number {}\n", device.header.idstr, device.header.instance_id);
    }
    Ok(text + &format!("core of {} bytes\n", guest.write_elf(core)?))
}
