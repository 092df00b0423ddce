//! What a command reads.

use super::size::parse_size;
use crate::failure::Stop;
use clap::Args;
use qevm_inspect::stream::Inputs;
use qevm_wire::PageGeometry;
use std::path::PathBuf;

/// Where the stream is, and what belongs to it.
#[derive(Debug, Clone, Args)]
pub struct Input {
    /// The main channel: a stream file, or `-` for standard input.
    #[arg(value_name = "MAIN")]
    pub main: PathBuf,
    /// The stream starts at byte N of MAIN (`file:PATH,offset=N` in QEMU). Offsets are reported from the start of MAIN;
    /// both count in what a compressed MAIN or a snapshot holds.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub offset: u64,
    /// MAIN is a qcow2 image: read the internal snapshot with this name or ID (`savevm`).
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,
    /// Size of a target page in bytes. Needed for targets whose pages have not 4096 bytes (most Arm boards, Alpha,
    /// SPARC64, AVR) where neither the configuration nor a description at the end of MAIN tells it: pipes, and files
    /// that are cut or padded.
    #[arg(long = "target-page-size", value_name = "BYTES", value_parser = parse_size)]
    pub target_page_size: Option<u64>,
    /// A further channel of the same migration: multifd or postcopy-preempt, told apart by its first bytes. May be
    /// repeated, in any order.
    #[arg(long = "channel", value_name = "FILE")]
    pub channels: Vec<PathBuf>,
    /// The main channel of a resumed postcopy migration (it has no header). May be repeated, in order.
    #[arg(long = "recovery", value_name = "FILE")]
    pub recovery: Vec<PathBuf>,
    /// What the destination sent back on the return path. May be repeated: the next ones belong to the recoveries.
    #[arg(long = "return-path", value_name = "FILE")]
    pub return_path: Vec<PathBuf>,
}

impl Input {
    /// Opens all files.
    pub(crate) fn open(&self) -> Result<Inputs, Stop> {
        let page_geometry = |size| {
            PageGeometry::from_size(size).ok_or_else(|| {
                Stop::Usage(format!("--target-page-size {size}: expected a power of two from 256 to 1048576"))
            })
        };
        let input = qevm_inspect::stream::Input {
            main: self.main.clone(),
            offset: self.offset,
            snapshot: self.snapshot.clone(),
            pages: self.target_page_size.map(page_geometry).transpose()?,
            channels: self.channels.clone(),
            recovery: self.recovery.clone(),
            return_path: self.return_path.clone(),
        };
        Ok(Inputs::open(&input)?)
    }
}

/// How device sections are read that no description tells about.
#[derive(Debug, Clone, Default, Args)]
pub struct Layouts {
    /// Read device sections that the stream does not describe (postcopy, truncated files, suppress-vmdesc=on) with this
    /// schema: the output of `qemu-system-x86_64 -M TYPE -dump-vmstate FILE` of the QEMU that wrote the stream. Without
    /// it, and for parts of the machine that no schema lists, the layouts are used that qevm knows.
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Read device sections as if the stream did not describe them.
    #[arg(long)]
    pub no_description: bool,
}

impl Layouts {
    /// Reads the schema, if there is one.
    pub(crate) fn open(&self) -> Result<qevm_inspect::stream::Layouts, Stop> {
        Ok(qevm_inspect::stream::Layouts::open(self.schema.as_deref(), self.no_description)?)
    }
}
