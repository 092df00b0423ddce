//! `qevm send`: where a guest goes, and how.

use super::output::EXIT_CODES;
use super::{Bounds, ClientTls, Input, Output};
use clap::Args;
use qevm_multifd::Compression;
use qevm_wire::QemuVersion;
use qevm_wire::profile::ZeroPageDetection;

/// `qevm send`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Send {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    /// Where the destination listens: `tcp:HOST:PORT` or `unix:PATH`.
    #[arg(value_name = "ADDRESS")]
    pub address: String,
    /// Release of the destination; decides what may be on the wire.
    #[arg(long, value_name = "VERSION", default_value_t = QemuVersion::NEWEST)]
    pub to: QemuVersion,
    /// Send pages on N page channels. The destination needs capability `multifd` and the same `multifd-channels`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub multifd_channels: Option<u8>,
    /// Compression of the page channels: none, zlib or zstd; the destination's must be the same.
    #[arg(long, value_name = "METHOD", default_value = "none", requires = "multifd_channels")]
    pub multifd_compression: Compression,
    /// Level of the compression: 0 to 9 for zlib, 0 to 20 for zstd.
    #[arg(long, value_name = "LEVEL", requires = "multifd_compression")]
    pub multifd_level: Option<i32>,
    /// How pages of zeroes travel: none (like all others), legacy (ZERO records of the main channel) or multifd (listed
    /// in the packets of page channels; QEMU 9.0). The default is that of the destination's release and the machine
    /// type.
    #[arg(long, value_name = "MODE", value_parser = zero_page_detection)]
    pub zero_page_detection: Option<ZeroPageDetection>,
    /// Whether the page channels synchronise after each section, as releases before 8.1 and machine types up to 8.0 do,
    /// or once a round. Must be as at the destination; the default is that of its release and the machine type.
    #[arg(long, value_name = "on|off", value_parser = on_or_off, requires = "multifd_channels")]
    pub multifd_flush_after_each_section: Option<bool>,
    /// Do not open a return path; the destination then cannot say whether it has loaded the guest.
    #[arg(long)]
    pub no_return_path: bool,
    /// Give up when the destination takes nothing for this many seconds, or has not said that it has loaded the guest
    /// this many seconds after all was sent, whatever else it says.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub tls: ClientTls,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
}

fn zero_page_detection(mode: &str) -> Result<ZeroPageDetection, &'static str> {
    match mode {
        "none" => Ok(ZeroPageDetection::None),
        "legacy" => Ok(ZeroPageDetection::Legacy),
        "multifd" => Ok(ZeroPageDetection::Multifd),
        _ => Err("expected none, legacy or multifd"),
    }
}

fn on_or_off(value: &str) -> Result<bool, &'static str> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off"),
    }
}
