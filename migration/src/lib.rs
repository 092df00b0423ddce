//! Live migration: precopy of a running guest to another monitor, with QEMU's stream.
//!
//! A monitor implements [`Guest`], registers its devices ([`Registry`]), and calls [`migrate`] at the source and
//! [`receive`] at the destination. `docs/first-migration.md` goes through a first migration from a QEMU;
//! `examples/toy_vmm.rs` is the monitor in it. One that has an event loop of its own drives [`core::source`] and
//! [`core::destination`], as `examples/async_vmm.rs` does with tokio.
//!
//! ```
//! use qevm_migration::{Channel, Devices, DirtyLog, Guest, GuestError, Job, RamView, Registry, Socket, migrate, receive};
//! use qevm_wire::{Profile, QemuVersion};
//! use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
//! use std::{ops::Range, os::unix::net::UnixStream, thread};
//! use vm_memory::{Bytes, MmapRegion, VolatileMemory};
//!
//! /// A guest that is memory, which is not written to.
//! struct Toy {
//!     memory: MmapRegion,
//!     running: AtomicBool,
//!     devices: Registry<'static>,
//! }
//!
//! impl Guest for Toy {
//!     fn machine_type(&self) -> &str { "toy" }
//!     fn ram(&self) -> Vec<RamView<'_>> {
//!         vec![RamView { name: "ram", memory: self.memory.as_volatile_slice(), pristine: false }]
//!     }
//!     fn start_dirty_log(&self) -> Result<Box<dyn DirtyLog + '_>, GuestError> { Ok(Box::new(Log { first: true })) }
//!     fn pause(&self) -> Result<bool, GuestError> { Ok(self.running.swap(false, Ordering::SeqCst)) }
//!     fn resume(&self) -> Result<(), GuestError> { self.running.store(true, Ordering::SeqCst); Ok(()) }
//!     fn devices(&self) -> &dyn Devices { &self.devices }
//! }
//!
//! /// At first all pages are in the log, and then none.
//! struct Log { first: bool }
//!
//! impl DirtyLog for Log {
//!     fn read(&mut self, found: &mut dyn FnMut(usize, usize, u64)) -> Result<(), GuestError> {
//!         found(0, 0, if self.first { u64::MAX } else { 0 });
//!         Ok(())
//!     }
//!     fn reset(&mut self, _: usize, _: Range<u64>) -> Result<(), GuestError> { self.first = false; Ok(()) }
//! }
//!
//! // 64 pages each: one word of the log.
//! let toy = || -> Result<Toy, GuestError> {
//!     Ok(Toy { memory: MmapRegion::new(64 * 4096)?, running: AtomicBool::new(false), devices: Registry::new("toy") })
//! };
//! let (here, there) = (toy()?, toy()?);
//! here.memory.as_volatile_slice().write_obj(42_u64, 0x5008)?;
//! here.resume()?;
//!
//! let (a, b) = UnixStream::pair()?;
//! let channel = |stream| -> Arc<dyn Channel> { Arc::new(Socket::Unix(stream)) };
//! let (sending, receiving) = (channel(a), channel(b));
//! let profile = Profile::new(QemuVersion::NEWEST, "toy");
//! let (source, destination) = (Job::default(), Job::default());
//! source.begin()?;
//! destination.begin()?;
//! let arrival = thread::scope(|scope| {
//!     let arriving = scope.spawn(|| receive(&there, receiving.into(), &destination, &profile));
//!     let left = migrate(&here, &sending.into(), &source, &profile);
//!     let arrived = arriving.join().map_err(|_| "the receiving thread has died")?;
//!     left?;
//!     Ok::<_, GuestError>(arrived?)
//! })?;
//! destination.end(None);
//!
//! assert!(arrival.running, "the guest ran at the source: it is to run here");
//! assert!(!here.pause()?, "and it does not run there any more");
//! assert_eq!(there.memory.as_volatile_slice().read_obj::<u64>(0x5008)?, 42);
//! # Ok::<(), GuestError>(())
//! ```
//!
//! # Contents, in reading order
//!
//! | module | what |
//! |---|---|
//! | `address`, `channel`, `socket`, `pipe`, `connections` | where a peer is, and the ways to it |
//! | `watch` | deadlines of what is waited for there |
//! | `unidentified`, `arrivals` | connections until it is known what they are; those of one source |
//! | `core` | what the engines decide, without I/O, threads and clocks |
//! | `capabilities`, `parameters`, [`rate`] | QEMU's settings by their names; the rate limit |
//! | `guest` | [`Guest`], [`Devices`], [`Hooks`]: what the engines need of a virtual machine |
//! | `registry`, `description` | [`Registry`]: devices that are declared, and their description |
//! | [`bitmap`], `zero`, `ram_sender` | dirty pages, and sending them straight from guest memory |
//! | `differences` | pages as differences to what was sent of them before |
//! | `multifd` | page channels: threads that send and receive pages beside the main channel |
//! | `page_file`, `lazy` | files in which every page has its place; guests that run before their memory is loaded from one |
//! | `page_server` | such files at a page server |
//! | [`cpr`] | memory that stays where it is, for another process of the host |
//! | `snapshot` | memory as of one instant, of a guest that runs on |
//! | `pending`, [`switchover`] | what remains of everything, and when to stop the guest |
//! | `source`, `return_path`, `urgent` | [`migrate`]: the source engine: threads, sockets and the guest around the core |
//! | `postcopy` | [`Postcopy`]: guests that run before their memory has come from the source |
//! | `stream_reader`, `atomic_page_set`, `ram_receiver`, `destination` | [`receive`]: the destination engine |
//! | `testing` | simulated migrations (feature `testing`) |
//! | `handover`, `verdict` | who runs the guest when the connection breaks in the last moment |
//! | `tls` | sessions around the connections |
//! | `announcement` | [`Announcement`]: how the network learns where the guest is now |
//! | `job`, `statistics` | control and what `query-migrate` reports |
//!
//! # Promises
//!
//! * Until the destination has everything and says so, every failure leaves the source's guest running (if it ran).
//! * A page that changes after it was sent is sent again: a page leaves the set of dirty pages, and its log is reset,
//!   before it is read.
//! * The guest never runs on both sides; see `handover` and `verdict` for what the network can still spoil.

mod address;
mod announcement;
mod arrivals;
mod atomic_page_set;
pub mod bitmap;
mod capabilities;
mod channel;
mod connections;
mod converge;
pub mod core;
pub mod cpr;
mod description;
mod descriptors;
mod destination;
mod differences;
pub mod dirty_rate;
mod error;
mod grammar;
mod guest;
mod handover;
mod job;
mod lazy;
mod listener;
mod multifd;
mod page_file;
mod page_server;
#[cfg(test)]
mod pair;
mod parameters;
mod patience;
mod pending;
mod pipe;
mod postcopy;
pub mod private;
mod ram_receiver;
mod ram_sender;
pub mod rate;
mod reason;
mod registry;
mod return_path;
mod size;
mod snapshot;
mod socket;
mod source;
mod statistics;
mod stream_reader;
pub mod switchover;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tls;
mod unidentified;
mod urgent;
mod verdict;
mod watch;
mod zero;

pub use address::{Address, BadAddress, KeepAlive, TcpOptions};
pub use announcement::Announcement;
pub use capabilities::{BadCapability, Capabilities, KNOWN as KNOWN_CAPABILITIES, RULES};
pub use channel::{Channel, ReadSlice, WriteSlice};
pub use connections::{Incoming, Outgoing, check_transport};
pub use description::{DeviceSection, SavedDevices};
pub use descriptors::{Descriptors, NoDescriptors};
pub use destination::{Arrival, Rest, receive};
pub use error::{GuestError, LoadError, MigrationError, Refused, ReturnPathError};
pub use guest::{ADVICE, Devices, DirtyLog, Guest, Hooks, MissingPages, NoHooks, ProtectedPages, RamView, Touch};
pub use job::{Job, Notice};
pub use lazy::{LazyRestore, RestoreProgress};
pub use listener::Listener;
pub use parameters::{BadParameter, Mode, Parameters, Timeouts};
pub use pending::{IterativeDevice, Pending};
pub use pipe::Pipe;
pub use postcopy::{BlockTimes, Postcopy, Recovery};
pub use registry::{Registry, RegistryError};
pub use size::{BadSize, parse_size};
pub use socket::Socket;
pub use source::{migrate, monotonic_now};
pub use statistics::{
    DowntimeParts, PartStatistics, RamStatistics, RoundStatistics, Statistics, Status, XbzrleStatistics,
};
pub use tls::{Credentials, CredentialsError, Endpoint, Tls, TlsChannel, TlsError, TlsSocket, Versions};
pub use verdict::Doubt;
pub use watch::{Awaited, ChannelName, Silence};

/// Bytes of a page of guest memory: that of x86, `PageGeometry::X86`.
const PAGE_SIZE: u64 = 4096;
