//! `qevm check`: what can be said of a destination.

use super::size::parse_size;
use super::{Bounds, Input, Output};
use clap::Args;
use qevm_wire::{Capability, CountedString, QemuVersion};
use std::path::PathBuf;

/// `qevm check`.
#[derive(Debug, Args)]
#[command(after_help = CHECK_EXIT_CODES, after_long_help = CHECK_EXAMPLES)]
#[group(id = "destination", required = true, multiple = true,
    args = ["against", "qemu", "machine", "page_size", "uuid", "ram_block", "capability"])]
pub struct Check {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
    /// What tells of the destination: a stream, save image or snapshot that a QEMU set up like it wrote, or the output
    /// of its `-dump-vmstate`. May be repeated: the files tell of one destination. Where MAIN is qmp:SOCKET, a QEMU
    /// that runs: qmp:SOCKET, the output of `-dump-vmstate`, or a domain XML of libvirt; once.
    #[arg(long, value_name = "FILE")]
    pub against: Vec<PathBuf>,
    /// Which internal snapshot of a qcow2 image that --against names is read, by name or ID. Without it, the one that
    /// --snapshot names.
    #[arg(long, value_name = "NAME", requires = "against")]
    pub against_snapshot: Option<String>,
    /// Release of the destination's QEMU.
    #[arg(long, value_name = "RELEASE")]
    pub qemu: Option<QemuVersion>,
    /// Machine type of the destination, by its full name: `pc-q35-10.0`, not `q35`.
    #[arg(long, value_name = "TYPE")]
    pub machine: Option<String>,
    /// Target page size of the destination in bytes.
    #[arg(long, value_name = "BYTES")]
    pub page_size: Option<u64>,
    /// UUID of the destination's guest, which counts with capability `validate-uuid`.
    #[arg(long, value_parser = parse_uuid)]
    pub uuid: Option<Uuid>,
    /// A RAM block of the destination and its used length, e.g. `pc.ram=4G`. May be repeated; blocks that are not named
    /// are not compared, unless `--against` tells of them.
    #[arg(long, value_name = "NAME=SIZE", value_parser = parse_ram_block)]
    pub ram_block: Vec<(CountedString, u64)>,
    /// A migration capability of the destination, e.g. `postcopy-ram=off`. May be repeated.
    #[arg(long, value_name = "NAME=on|off", value_parser = parse_capability)]
    pub capability: Vec<(Capability, bool)>,
}

const CHECK_EXIT_CODES: &str = "Exit codes: 0 it loads, as far as what was compared goes; 1 it is refused, or bad; 2 wrong usage; 3 not decidable.";

const CHECK_EXAMPLES: &str = "\
Examples:
  Will a save file load in the QEMU that is to take it over? Let that QEMU, started with the same options and -S,
  write a stream of its own (QMP: migrate uri=exec:cat>/tmp/destination.qevm), and compare:
    qevm check guest.qevm --against /tmp/destination.qevm

  Without starting a guest there: what its device models read, by the machine type of the stream:
    qemu-system-x86_64 -M pc-q35-10.0 -dump-vmstate schema.json
    qevm check guest.qevm --against schema.json

  By what is known of the destination:
    qevm check guest.qevm --machine pc-q35-10.0 --ram-block pc.ram=4G --capability postcopy-ram=off --qemu 7.2

  Before a migration: two QEMUs that run, by their QMP sockets, or one and the definition of the other:
    qevm check qmp:/run/source.qmp --against qmp:/run/destination.qmp
    qevm check qmp:/run/source.qmp --against domain.xml

Outcomes: `fails`: QEMU refuses the stream; `may fail`: what is known does not tell, e.g. because a description lists
only what its guest had a reason to write; `loads`: QEMU accepts the difference in silence.

Exit codes: 0 it loads, as far as what was compared goes; 1 it is refused, or bad; 2 wrong usage; 3 not decidable: at
least one `may fail` and nothing that `fails`.";

/// A guest's UUID, in the order of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

fn parse_uuid(text: &str) -> Result<Uuid, String> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let number = match digits.len() {
        32 => u128::from_str_radix(&digits, 16).ok(),
        _ => None,
    };
    number.map(|number| Uuid(number.to_be_bytes())).ok_or_else(|| "expected 32 hexadecimal digits".to_owned())
}

fn parse_ram_block(text: &str) -> Result<(CountedString, u64), String> {
    // The names of option ROMs have no '=' in them, but nothing forbids one.
    let (name, size) = text.rsplit_once('=').ok_or("expected NAME=SIZE, e.g. pc.ram=4G")?;
    let name = CountedString::new(name).ok_or("the name is longer than 255 bytes")?;
    Ok((name, parse_size(size).map_err(|error| error.to_string())?))
}

fn parse_capability(text: &str) -> Result<(Capability, bool), String> {
    let (name, state) = text.split_once('=').ok_or("expected NAME=on or NAME=off")?;
    let capability = name.parse().map_err(|_| format!("QEMU has no migration capability '{name}'"))?;
    match state {
        "on" => Ok((capability, true)),
        "off" => Ok((capability, false)),
        _ => Err(format!("'{state}' is neither on nor off")),
    }
}
