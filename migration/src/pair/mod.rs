//! Source and destination in one process, over a guest that is only memory, with faults put in on purpose.
//!
//! The guest writes to its memory from within the engine's own calls (whenever the source sends something or resets its
//! log), so what it does to which page at which place of the stream is the same in every run.

mod cpr;
mod device;
mod devices;
mod differences;
mod faults;
mod files;
mod guest;
mod multifd;
mod postcopy;
mod recovery;
mod sealed;
mod shared;
mod tests;
mod vfio;

use super::{
    Arrival, Capabilities, Channel, Guest, Incoming, Job, MigrationError, Outgoing, Parameters, ReadSlice, Socket,
    Statistics, Status, WriteSlice, migrate, receive,
};
pub(super) use faults::{Faults, Faulty};
pub(super) use guest::FakeGuest;
use parking_lot::Mutex;
use qevm_wire::{Profile, QemuVersion};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

/// Two machines and the settings of a migration between them.
pub(super) struct Pair {
    pub(super) source: Arc<FakeGuest>,
    pub(super) destination: Arc<FakeGuest>,
    pub(super) job: Arc<Job>,
    pub(super) profile: Profile,
    /// Of the destination, where they are not those of the source.
    pub(super) incoming: Option<Capabilities>,
    pub(super) incoming_parameters: Option<Parameters>,
}

/// How a migration ended, on both sides.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) source: Result<(), MigrationError>,
    pub(super) destination: Result<Arrival, MigrationError>,
    pub(super) statistics: Statistics,
    /// Bytes that the source wrote.
    pub(super) written: u64,
}

impl Pair {
    /// Two machines of `pages` pages of RAM, the first of them running and full of numbers.
    pub(super) fn new(pages: usize) -> Self {
        let source = FakeGuest::new(&[("microvm.ram", pages), ("pc.bios", 4)]);
        source.fill();
        source.resume().unwrap();
        let job = Job::default();
        let parameters = Parameters { max_bandwidth: 0, ..Parameters::default() };
        job.set_parameters(parameters);
        let pair = Pair {
            source: Arc::new(source),
            destination: Arc::new(FakeGuest::new(&[("microvm.ram", pages), ("pc.bios", 4)])),
            job: Arc::new(job),
            profile: Profile::new(QemuVersion::NEWEST, "microvm"),
            incoming: None,
            incoming_parameters: None,
        };
        pair.return_path(true)
    }

    pub(super) fn return_path(self, on: bool) -> Self {
        let capabilities = Capabilities::default().with([("return-path", on)]).unwrap();
        self.job.set_capabilities(capabilities).unwrap();
        self
    }

    /// Migrates once. The guest is started at the destination if it has arrived.
    pub(super) fn run(&self, faults: Faults) -> Outcome {
        let (a, b) = UnixStream::pair().unwrap();
        let writer = self.source.clone();
        let faulty = Arc::new(Faulty::new(Socket::Unix(a), faults, move || writer.work()));
        let sending: Arc<dyn Channel> = faulty.clone();
        let receiving: Arc<dyn Channel> = Arc::new(Socket::Unix(b));
        let (source, destination) = self.play(sending.into(), |_| Ok(receiving.into()));
        Outcome { source, destination, statistics: self.job.statistics(), written: faulty.written() }
    }

    /// Migrates once over these connections; those of the destination are asked for when the source runs.
    fn play(
        &self,
        sending: Outgoing,
        receiving: impl FnOnce(&Job) -> Result<Incoming, MigrationError> + Send,
    ) -> (Result<(), MigrationError>, Result<Arrival, MigrationError>) {
        let arrived = Mutex::new(None);
        self.job.begin().unwrap();
        let source = thread::scope(|scope| {
            let incoming = Job::default();
            incoming.set_capabilities(self.incoming.unwrap_or(self.job.capabilities())).unwrap();
            incoming.set_parameters(self.incoming_parameters.clone().unwrap_or(self.job.parameters()));
            incoming.begin().unwrap();
            scope.spawn(|| {
                let incoming = incoming;
                let result = receiving(&incoming).and_then(|connections| {
                    let all: Vec<_> = connections.all().cloned().collect();
                    let result = receive(&*self.destination, connections, &incoming, &self.profile);
                    if result.as_ref().is_ok_and(|arrival| arrival.running) {
                        self.destination.resume().unwrap();
                    }
                    all.iter().for_each(|channel| channel.close());
                    result
                });
                *arrived.lock() = Some(result);
            });
            migrate(&*self.source, &sending, &self.job, &self.profile)
        });
        (source, arrived.into_inner().unwrap())
    }

    /// Asserts that the guest has moved: it runs there with the same memory, and not here.
    pub(super) fn assert_moved(&self, outcome: &Outcome) {
        assert!(outcome.source.is_ok() && outcome.destination.is_ok(), "{outcome:?}");
        assert_eq!(outcome.statistics.status, Status::Completed);
        assert!(!self.source.is_running() && self.destination.is_running());
        self.source.assert_same_memory(&self.destination);
        assert!(!self.source.is_logging());
    }

    /// Asserts that the guest has stayed, and can be migrated again.
    pub(super) fn assert_stayed(&self, outcome: &Outcome) {
        assert!(outcome.source.is_err() && outcome.destination.is_err(), "{outcome:?}");
        assert!(self.source.is_running(), "{outcome:?}");
        assert!(!self.destination.is_running(), "{outcome:?}");
        assert!(!self.source.is_logging(), "{outcome:?}");
    }

    /// A fresh destination for another try.
    pub(super) fn renew_destination(&mut self) {
        self.destination = Arc::new(FakeGuest::new(&self.source.shape()));
    }
}
