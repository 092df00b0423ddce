//! `qevm serve`: what is served, and to whom.

use super::bounds::DEFAULT;
use super::size::parse_size;
use super::{Input, Output};
use clap::Args;

/// `qevm serve`.
#[derive(Debug, Args)]
#[command(after_help = SERVE_EXIT_CODES, after_long_help = SERVE_EXAMPLES)]
pub struct Serve {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub input: Input,
    /// Where to listen: `unix:PATH`, which only the user that runs qevm can connect to, or `tcp:HOST:PORT`, which gives
    /// the guest's memory, unencrypted, to every host that reaches it. May be repeated.
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub listen: Vec<String>,
    /// Serve at most this many connections at a time; further ones are dropped. A guest of reference-vmm has two.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_clients: usize,
    /// Drop a client that takes nothing of an answer for this many seconds. One that asks for nothing stays.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Put at most this much into temporary files (in TMPDIR): all pages of a compressed image or of one that comes
    /// through a pipe, and pages that are compressed or sent as differences. Bytes, or a number with K, M, G or T; more
    /// is an error of kind `limit`: decompress the image first.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = DEFAULT)]
    pub max_spool: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub output: Output,
}

const SERVE_EXIT_CODES: &str =
    "Exit codes: 0 ended by SIGINT or SIGTERM; 1 the stream is bad (truncated included); 2 wrong usage.";

const SERVE_EXAMPLES: &str = "\
Whatever MAIN is (a plain stream, a libvirt save image, a qcow2 snapshot, a mapped-ram file), clients see a mapped-ram file, as
`qevm convert --format mapped-ram` writes it, which QEMU 9.0 and newer load. The protocol is NBD, read-only; the export has the
empty name. Nothing is written, and pages are read when they are asked for, so that a terabyte is served at once.

Examples:
  Start ten guests from one image, each of which loads only what it touches:
    qevm serve guest.qevm --listen unix:/run/guest.pages
    reference-vmm --incoming defer …, with QMP migrate-set-capabilities mapped-ram and postcopy-ram, then
      migrate-incoming uri=nbd+unix:///?socket=/run/guest.pages

  Look at what is served, or copy it, with the tools of QEMU or libnbd:
    qemu-img info 'nbd+unix:///?socket=/run/guest.pages'
    nbdcopy 'nbd+unix:///?socket=/run/guest.pages' guest.mapped

  Give it to a QEMU as a file (QEMU's FUSE export), loaded with capability mapped-ram:
    qemu-storage-daemon --blockdev nbd,node-name=pages,server.type=unix,server.path=/run/guest.pages,read-only=on \\
      --export fuse,id=file,node-name=pages,mountpoint=/run/guest.mapped
    qemu-system-x86_64 … -incoming defer, then migrate-incoming uri=file:/run/guest.mapped

Exit codes: 0 ended by SIGINT or SIGTERM; 1 the stream is bad (truncated included); 2 wrong usage. A page that cannot be read
when it is asked for (the file was cut or changed meanwhile) is an error to its client, which says why, and no end.
With --json the last line of standard output, printed when the server listens, is an object with the URIs that clients use (`listening`),
the length of what is served (`len`) and the RAM blocks.";
