//! The command line: what can be asked, and the help that teaches it.

mod bounds;
mod check;
mod input;
mod output;
mod receive;
mod send;
mod serve;
mod size;
mod tls;

pub use self::bounds::Bounds;
pub use self::check::{Check, Uuid};
pub use self::input::{Input, Layouts};
pub use self::output::Output;
pub use self::receive::Receive;
pub use self::send::Send;
pub use self::serve::Serve;
pub use self::tls::{ClientTls, ServerTls};

use self::output::EXIT_CODES;
use self::size::parse_size;
use clap::{Args, Parser, Subcommand, ValueEnum};
use qevm_inspect::extract::MemoryBlock;
use std::path::PathBuf;

/// Read, check and move QEMU migration streams.
///
/// A stream is what QEMU's `migrate` command sends: into a file (`file:PATH`), through a command (`exec:cat > PATH`),
/// or over a socket to `qevm receive`. Every command takes `-` for standard input.
#[derive(Debug, Parser)]
#[command(name = "qevm", version, arg_required_else_help = true, after_help = EXIT_CODES, after_long_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Save a guest and look at it (QMP: migrate uri=file:/tmp/guest.qevm):
    qevm inspect /tmp/guest.qevm
    zstd -dc guest.qevm.zst | qevm inspect -

  Prove that a stream is whole, with one JSON object for scripts as the last line:
    qevm verify --json guest.qevm | tail -n 1 | jq .ok

  The CPU's registers, and what a network card was doing:
    qevm inspect --section cpu --field env.regs guest.qevm
    qevm inspect --section virtio-net --json guest.qevm | jq .fields

  Will the QEMU that is to take the guest over load it, and if not, why:
    qevm check guest.qevm --against stream-saved-there.qevm

  A migration that used multifd: the order of the channels does not matter:
    qevm verify --channel ch0 --channel ch1 main.qevm

  Start ten guests from one image, each of which loads only the pages that it touches:
    qevm serve guest.qevm --listen unix:/run/guest.pages

  Be the destination of a real QEMU's `migrate tcp:localhost:4444`:
    qevm receive tcp:0.0.0.0:4444 --out guest.qevm

Exit codes: 0 all holds; 1 the stream is bad (truncated included); 2 wrong usage.
Errors are one line on standard error: `qevm: FILE: FAULT at byte N, in PATH: message`. With --json the last line of
standard output is an object all the same, in which `ok` is false and `error` says why.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what is in a stream: header, RAM blocks with digests, sections, description.
    Inspect(Inspect),
    /// Decode everything, re-encode it, compare byte for byte, rebuild every RAM block.
    Verify(Verify),
    /// Compare two guests: configuration, RAM blocks and pages, sections and fields.
    Diff(Diff),
    /// Say whether a destination will load a stream, and if not, why.
    Check(Check),
    /// Be the source of a migration: play a saved guest into a QEMU that runs with `-incoming`.
    Send(Send),
    /// Be a page server: give a saved guest, page by page, to monitors that start it before its memory is loaded.
    Serve(Serve),
    /// Write a migration again as a plain stream or a mapped-ram file.
    Convert(Convert),
    /// Write a guest to files: RAM blocks, guest-physical memory, an ELF core or a compressed dump for gdb and
    /// crash, device state as JSON.
    Extract(Extract),
    /// Be the destination of a real QEMU's `migrate`, save the stream and say what arrived.
    Receive(Receive),
    /// Print a completion script for a shell.
    Completions(Completions),
    /// Write the manual pages to a directory.
    Man(Man),
    /// Install the manual pages and the completion scripts of bash, zsh and fish where programs look for them.
    InstallDocs(InstallDocs),
}

impl Command {
    /// `--json` was given.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Inspect(inspect) => inspect.output.json,
            Command::Verify(verify) => verify.output.json,
            Command::Diff(diff) => diff.output.json,
            Command::Check(check) => check.output.json,
            Command::Send(send) => send.output.json,
            Command::Serve(serve) => serve.output.json,
            Command::Convert(convert) => convert.output.json,
            Command::Extract(extract) => extract.output.json,
            Command::Receive(receive) => receive.output.json,
            Command::Completions(_) | Command::Man(_) | Command::InstallDocs(_) => false,
        }
    }
}

/// `qevm inspect`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Inspect {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layouts: Layouts,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
    /// Skip over page contents instead of reading them: no CRC-32 of RAM, but at the speed of seeking.
    #[arg(long)]
    pub no_digest: bool,
    /// Digest of each RAM block.
    #[arg(long, value_enum, default_value_t = RamDigest::Crc32)]
    pub ram_digest: RamDigest,
    /// List every record of each section (START, PART, END) instead of one line for each section.
    #[arg(long)]
    pub records: bool,
    /// Show every device section down to its fields.
    #[arg(long)]
    pub fields: bool,
    /// Show only the fields of sections whose name contains TEXT, e.g. `mc146818rtc`. May be repeated.
    #[arg(long, value_name = "TEXT")]
    pub section: Vec<String>,
    /// Show only fields whose path contains TEXT, e.g. `env.eip`.
    #[arg(long, value_name = "TEXT")]
    pub field: Option<String>,
}

/// `qevm verify`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Verify {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layouts: Layouts,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
    /// Digest of each RAM block, over its used length; pages that never came count as zero.
    #[arg(long, value_enum, default_value_t = RamDigest::Crc32)]
    pub ram_digest: RamDigest,
}

/// `qevm extract`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
#[group(id = "what", required = true, multiple = true, args = ["ram", "memory", "elf", "kdump", "devices", "xml"])]
pub struct Extract {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layouts: Layouts,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
    /// Write each RAM block to a file DIR/block-N.raw; the output says which is which. Only their owner can read these
    /// and the other files, which appear when they are whole.
    #[arg(long, value_name = "DIR")]
    pub ram: Option<PathBuf>,
    /// Write guest-physical memory to a sparse raw file, in which the offset is the address.
    #[arg(long, value_name = "FILE")]
    pub memory: Option<PathBuf>,
    /// Write guest-physical memory and CPU registers to an ELF core file.
    #[arg(long, value_name = "FILE")]
    pub elf: Option<PathBuf>,
    /// Write guest-physical memory and CPU registers to a kdump-compressed file, as makedumpfile does, for crash.
    #[arg(long, value_name = "FILE")]
    pub kdump: Option<PathBuf>,
    /// How the pages in --kdump are compressed.
    #[arg(long, value_enum, default_value_t = KdumpCompression::Zlib, requires = "kdump")]
    pub kdump_compression: KdumpCompression,
    /// Machine type of the guest, where the stream does not tell it (types before 2.4) or tells another than meant.
    #[arg(long, value_name = "TYPE")]
    pub machine: Option<String>,
    /// A RAM block of guest-physical memory. Without ADDRESS it belongs to the main memory, which needs to be said if
    /// memory backends have names that do not tell their order; with ADDRESS it lies there as a whole, as DIMMs do. May
    /// be repeated.
    #[arg(long, value_name = "NAME[@ADDRESS]", value_parser = parse_memory_block)]
    pub memory_block: Vec<MemoryBlock>,
    /// Fail if a RAM block that could be guest memory has no known place in --memory, --elf or --kdump.
    #[arg(long)]
    pub strict: bool,
    /// Write what comes before the fault of a stream that is cut or damaged: memory that did not come is zero, and
    /// devices that did not come are missing. The notes and `partial` in JSON say so.
    #[arg(long)]
    pub partial: bool,
    /// Write all device sections, down to each field, to a JSON file.
    #[arg(long, value_name = "FILE")]
    pub devices: Option<PathBuf>,
    /// Write the domain XML of a libvirt save image to a file.
    #[arg(long, value_name = "FILE")]
    pub xml: Option<PathBuf>,
    /// Replace files that exist. A symbolic link is replaced itself, and not what it points to.
    #[arg(long)]
    pub force: bool,
}

/// How the pages of a kdump-compressed file are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KdumpCompression {
    /// As dump-guest-memory of a QEMU does it: every crash reads it.
    Zlib,
    /// Shorter and faster, for crash 8.0 and makedumpfile 1.7.1 and later.
    Zstd,
}

impl From<KdumpCompression> for qevm_inspect::extract::PageCompression {
    fn from(compression: KdumpCompression) -> Self {
        match compression {
            KdumpCompression::Zlib => Self::Zlib,
            KdumpCompression::Zstd => Self::Zstd,
        }
    }
}

/// `qevm convert`.
#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct Convert {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    /// Write the new stream here. Only its owner can read the file, which appears when it is whole.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Its form.
    #[arg(long, value_enum, default_value_t = StreamForm::Plain)]
    pub format: StreamForm,
    /// Replace the output file if it exists. A symbolic link is replaced itself, and not what it points to.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
}

/// `qevm diff`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 no differences; 1 there are some, or a stream is bad; 2 wrong usage.")]
pub struct Diff {
    /// A stream, save image or snapshot.
    #[arg(value_name = "FIRST")]
    pub first: PathBuf,
    /// Another one.
    #[arg(value_name = "SECOND")]
    pub second: PathBuf,
    /// Which internal snapshot of a qcow2 image is read, by name or ID. Given once it holds for every image; given
    /// twice, for FIRST and then for SECOND, so that two snapshots of one image can be compared.
    #[arg(long, value_name = "NAME")]
    pub snapshot: Vec<String>,
    /// Do not compare the contents of memory.
    #[arg(long)]
    pub no_ram: bool,
    /// Only differences in blocks and sections whose name contains TEXT.
    #[arg(long, value_name = "TEXT")]
    pub section: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub layouts: Layouts,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub bounds: Bounds,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
}

/// The form of a stream in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StreamForm {
    /// Every page on the main channel, for `-incoming` and `migrate-incoming` without further capabilities.
    Plain,
    /// Every page at its own place (capability `mapped-ram`, QEMU 9.0 and newer).
    MappedRam,
}

impl StreamForm {
    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            StreamForm::Plain => "plain",
            StreamForm::MappedRam => "mapped-ram",
        }
    }
}

/// `qevm completions`.
#[derive(Debug, Args)]
#[command(after_help = "Example: qevm completions bash > qevm.bash; `qevm install-docs` installs those of all shells.")]
pub struct Completions {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `qevm man`.
#[derive(Debug, Args)]
#[command(after_help = "Example: qevm man ~/.local/share/man/man1")]
pub struct Man {
    /// A directory for qevm.1 and one page for each command; it is made if it is not there.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// `qevm install-docs`.
#[derive(Debug, Args)]
#[command(after_help = "Example: sudo qevm install-docs --prefix /usr/local")]
pub struct InstallDocs {
    /// Where to: `share/man/man1`, `share/bash-completion/completions`, `share/zsh/site-functions` and
    /// `share/fish/vendor_completions.d` in DIR, which are made if they are not there. Without it, ~/.local.
    #[arg(long, value_name = "DIR")]
    pub prefix: Option<PathBuf>,
}

/// Which digest is computed of each RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RamDigest {
    /// CRC-32 as in zlib and Ethernet; needs 4 bytes of memory for each page.
    Crc32,
    /// SHA-256; needs a temporary file as large as the guest's non-zero memory.
    Sha256,
}

impl From<RamDigest> for qevm_inspect::ram::RamDigest {
    fn from(digest: RamDigest) -> Self {
        match digest {
            RamDigest::Crc32 => Self::Crc32,
            RamDigest::Sha256 => Self::Sha256,
        }
    }
}

fn parse_memory_block(text: &str) -> Result<MemoryBlock, String> {
    // Names such as `/rom@etc/acpi/tables` have an '@' of their own.
    let placed = text.rsplit_once('@').and_then(|(name, address)| Some((name, parse_size(address).ok()?)));
    Ok(match placed {
        Some((name, address)) => MemoryBlock { name: name.to_owned(), address: Some(address) },
        None => MemoryBlock { name: text.to_owned(), address: None },
    })
}
